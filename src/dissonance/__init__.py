"""Find the answers on which a reward model and a policy disagree, and ask people about exactly those.

    prompts -> completions -> rewards -> conflicts -> queries -> labels -> pairs
    prompts.py  sampling/     rewards/   conflict.py  selection/ feedback/

`loop.py` and `labelling.py` compose the stages, `artifacts.py` keeps what they leave, `report/` shows it, `cli/` is the
command line.
The method and its metrics are from "Targeting Misalignment" (Liu, Khajavi, Jiang, Liu; arXiv 2512.09212).
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from dissonance.errors import DissonanceError

if TYPE_CHECKING:
    from dissonance.config import RunConfig
    from dissonance.conflict import kendall_null, kendall_p_value, kendall_tau_distance, pacs
    from dissonance.loop import audit, conflicts, select

__version__ = version("dissonance")
__all__ = [
    "DissonanceError",
    "RunConfig",
    "audit",
    "conflicts",
    "kendall_null",
    "kendall_p_value",
    "kendall_tau_distance",
    "pacs",
    "select",
]
_LAZY = {
    "RunConfig": "config",
    "audit": "loop",
    "conflicts": "loop",
    "kendall_null": "conflict",
    "kendall_p_value": "conflict",
    "kendall_tau_distance": "conflict",
    "pacs": "conflict",
    "select": "loop",
}


def __getattr__(name: str) -> Any:
    # SciPy, PyTorch and Transformers wait until something needs them.
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
