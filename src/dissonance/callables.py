"""Callables that settings name as `module:callable`; the current folder is searched for the module."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from dissonance.errors import ModelError


def import_callable(name: str, role: str) -> Callable[..., Any]:
    """What `module:callable` names.

    Raises:
        ModelError: there is no such module or callable; `role` says what it was to be.
    """
    module_name, _, attribute = name.partition(":")
    _search_here()
    try:
        with redirect_stdout(sys.stderr):  # stdout is for what was asked of the command
            found: Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # whatever the user's module raises
        raise ModelError(f"{role}: {name} cannot be imported: {error!r}") from error
    if not callable(found):
        raise ModelError(f"{role}: {name} is a {type(found).__name__}, not a callable")
    return found


def function_source(name: str) -> Path | None:
    """The file that `module:callable` is in, to know it again after it was edited; None where there is no file."""
    _search_here()
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _search_here() -> None:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last, so that a file here shadows no installed package
