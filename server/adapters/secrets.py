"""Passwords and tokens: what is random, and what is slow on purpose. The only importer of `argon2`."""

import hashlib
import secrets

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

_hasher = PasswordHasher()  # Argon2id with the parameters of RFC 9106 for low memory


def hash_password(password: str) -> str:
    """Hash a password for keeping; takes some 50 ms and 64 MiB."""
    return _hasher.hash(password)


def is_password(password: str, kept: str) -> bool:
    """Whether `kept` was made from `password`."""
    try:
        return _hasher.verify(kept, password)
    except (VerificationError, InvalidHashError):
        return False


def new_token() -> str:
    """A secret of 256 bits for a browser or a program."""
    return secrets.token_urlsafe(32)


def token_digest(token: str) -> str:
    """What is kept of a token: nothing that could be used in its place."""
    return hashlib.sha256(token.encode()).hexdigest()
