"""The secret that a reward worker asks of its clients: a line of a file that others cannot read."""

import base64
import hmac
import stat
from pathlib import Path

SHORTEST = 16
VARIABLE = "SOAR_MEGA_REWARD_TOKEN_FILE"  # where clients find theirs


def read_token(path: str | Path) -> str:
    """The token in a file. ValueError where others can read it, or it is no word of 16 characters or more."""
    path = Path(path)
    if path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
        raise ValueError(f"{path} holds a secret and can be read by others: chmod o-rwx {path}")
    try:
        token = path.read_text(encoding="ascii").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: a token is plain ASCII") from error
    if len(token) < SHORTEST or not token.isprintable() or " " in token:
        raise ValueError(f"{path} must hold one word of {SHORTEST} characters or more: openssl rand -hex 32")
    return token


def matches(token: str, header: str | None) -> bool:
    """Whether an Authorization header shows the token: as Bearer, or as the password of http://any:TOKEN@host."""
    kind, _, shown = (header or "").strip().partition(" ")
    if kind.lower() == "basic":
        try:
            shown = base64.b64decode(shown, validate=True).decode("ascii").partition(":")[2]
        except ValueError:
            return False
    elif kind.lower() != "bearer":
        return False
    return hmac.compare_digest(shown.strip().encode(), token.encode())
