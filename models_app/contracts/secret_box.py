"""Secrets at rest: sealed with a key derived from the installation's secret file. Pure, no Django.

Fernet (AES-128-CBC with HMAC-SHA256) from `cryptography`; its key is HKDF-SHA256 of the installation secret.
"""

from __future__ import annotations

import base64
from functools import lru_cache

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from models_app.exceptions import SecretUnreadable


@lru_cache(maxsize=8)
def _fernet(installation_secret: str) -> Fernet:
    key = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"assistant secret box v1").derive(installation_secret.encode())
    return Fernet(base64.urlsafe_b64encode(key))


def seal(installation_secret: str, text: str) -> str:
    """The text encrypted, as ASCII; an empty text stays empty."""
    return _fernet(installation_secret).encrypt(text.encode()).decode("ascii") if text else ""


def unseal(installation_secret: str, sealed: str) -> str:
    """The text back. Raises SecretUnreadable where it was sealed under another secret."""
    if not sealed:
        return ""
    try:
        return _fernet(installation_secret).decrypt(sealed.encode("ascii")).decode()
    except (InvalidToken, UnicodeError):
        raise SecretUnreadable(
            "A stored secret was written under another secret_key; enter it again or restore secrets/secret_key."
        ) from None
