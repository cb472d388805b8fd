"""Where a server is, and the key that it wants."""

import os
from urllib.parse import urlsplit

from dissonance.errors import SettingsError


def checked_address(address: str, example: str = "http://127.0.0.1:8000/v1") -> str:
    """The address, if it is one.

    Raises:
        ValueError: it has no http(s) scheme or no host, or holds a password; the message goes on from a name.
    """
    parts = urlsplit(address)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"is {address!r}: write it as {example}")
    if parts.username or parts.password:
        raise ValueError("holds a password: name the variable that holds the key as api_key_env")
    return address


def key_of(variable: str | None) -> str | None:
    """What an environment variable holds; None where none is named.

    Raises:
        SettingsError: it is not set.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key:
        raise SettingsError(f"the environment variable {variable} is not set: put the API key in it")
    return key
