"""Text that a user wrote."""


def decode(content: bytes) -> str:
    """UTF-8 as text, without the byte order mark that some editors put first. ValueError when it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"is not UTF-8 (byte {content[error.start]:#04x} at place {error.start}): save it as UTF-8"
        ) from error
