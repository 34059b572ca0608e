"""Text that a user wrote."""

# what is wrong with a string that JSON could spell and that `user_files.is_text` refuses
NO_TEXT = "is no text: it holds half of a UTF-16 pair (\\ud800 to \\udfff)"


def decode(content: bytes) -> str:
    """UTF-8 as text, without the byte order mark that some editors put first. ValueError when it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"is not UTF-8 (byte {content[error.start]:#04x} at place {error.start}): save it as UTF-8"
        ) from error
