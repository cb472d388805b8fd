"""Where a server is, and the key that it wants."""

import os
from urllib.parse import SplitResult, urlsplit

from dissonance.errors import SettingsError


def checked_address(address: str, example: str = "http://127.0.0.1:8000/v1") -> str:
    """The address, if it is one.

    Raises:
        ValueError: it has no http(s) scheme or no host, or holds a password; the message goes on from a name.
    """
    parts = urlsplit(address)
    if parts.username or parts.password:
        raise ValueError("holds a password: name the variable that holds the key as api_key_env (--server-key-env)")
    if parts.scheme not in {"http", "https"} or not parts.hostname or not _port(parts):
        raise ValueError(f"is {address!r}: write it as {example}")
    return address


def _port(parts: SplitResult) -> bool:
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False


def key_of(variable: str | None) -> str | None:
    """What an environment variable holds; None where none is named.

    Raises:
        SettingsError: it is not set, or holds what no key does.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise SettingsError(f"the environment variable {variable} is not set: put the API key in it")
    if not (key.isascii() and key.isprintable()):  # nor said, since it is a secret
        raise SettingsError(f"the environment variable {variable} holds characters that no API key has")
    return key
