"""Text from models and servers, made fit to be stored."""

import re


def storable(text: str) -> str:
    """Put U+FFFD for what no database need hold: NUL, and half a surrogate pair (an emoji that was cut off)."""
    return re.sub("[\0\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
