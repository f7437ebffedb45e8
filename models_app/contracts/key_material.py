"""API key text: how a key is made, recognised and stored. Pure, no Django, no I/O.

A key is `ast_<10 char public id>_<43 char secret><6 char checksum>`. The public id names the key in lists and logs;
the checksum (base-62 of CRC-32 over everything before it, as GitHub's tokens do) lets noise be refused without a
look-up. Only SHA-256 of the whole text is stored: a secret of 256 random bits needs no slow hash.
"""

from __future__ import annotations

import hashlib
import secrets
import string
import zlib
from dataclasses import dataclass

PREFIX = "ast_"
PUBLIC_ID_LENGTH = 10
SECRET_LENGTH = 43
CHECKSUM_LENGTH = 6
KEY_LENGTH = len(PREFIX) + PUBLIC_ID_LENGTH + 1 + SECRET_LENGTH + CHECKSUM_LENGTH
ALPHABET = string.digits + string.ascii_letters
_LETTERS = frozenset(ALPHABET)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made: the text is shown once, the digest is stored."""

    text: str
    public_id: str
    digest: str


def _random(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def checksum(body: str) -> str:
    """Six base-62 digits of CRC-32 over the body."""
    value = zlib.crc32(body.encode("ascii"))
    digits = []
    for _ in range(CHECKSUM_LENGTH):
        value, rest = divmod(value, 62)
        digits.append(ALPHABET[rest])
    return "".join(reversed(digits))


def generate() -> NewKey:
    """A new random key."""
    public_id = _random(PUBLIC_ID_LENGTH)
    body = f"{PREFIX}{public_id}_{_random(SECRET_LENGTH)}"
    text = body + checksum(body)
    return NewKey(text=text, public_id=public_id, digest=digest(text))


def digest(text: str) -> str:
    """SHA-256 of the key text, 64 hex digits: what the database and the gateway's table hold."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def well_formed(text: str) -> bool:
    """Whether this could be one of our keys: length, prefix, alphabet and checksum fit."""
    if len(text) != KEY_LENGTH or not text.startswith(PREFIX) or text[len(PREFIX) + PUBLIC_ID_LENGTH] != "_":
        return False
    letters = text[len(PREFIX) : len(PREFIX) + PUBLIC_ID_LENGTH] + text[len(PREFIX) + PUBLIC_ID_LENGTH + 1 :]
    return _LETTERS.issuperset(letters) and checksum(text[:-CHECKSUM_LENGTH]) == text[-CHECKSUM_LENGTH:]


def masked(text: str) -> str:
    """What an error or a log may show of a key somebody sent: its beginning and its last two characters."""
    if len(text) < 12:
        return "****"
    return f"{text[:8]}****{text[-2:]}"
