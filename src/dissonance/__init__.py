"""Find the answers on which a reward model and a policy disagree, ask people about exactly those, and retrain both.

    prompts -> completions -> rewards -> conflicts -> queries -> labels -> pairs -> reward model -> policy -> evaluation
    prompts.py  sampling/     rewards/   conflict.py  selection/ feedback/          refine/                   evaluate/

`loop.py` is the method, round after round; `measuring.py`, `labelling.py`, `round_labels.py` and `round_training.py`
compose its stages, `artifacts.py` keeps what they leave, `report/` shows it, `cli/` is the command line.
The method and its metrics are from "Targeting Misalignment" (Liu, Khajavi, Jiang, Liu; arXiv 2512.09212).
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from dissonance.errors import DissonanceError

if TYPE_CHECKING:
    from dissonance.config import AuditConfig, RunConfig
    from dissonance.conflict import kendall_null, kendall_p_value, kendall_tau_distance, pacs
    from dissonance.loop import evaluate, refine, run
    from dissonance.measuring import audit, conflicts, select

__version__ = version("dissonance")
__all__ = [
    "AuditConfig",
    "DissonanceError",
    "RunConfig",
    "audit",
    "conflicts",
    "evaluate",
    "kendall_null",
    "kendall_p_value",
    "kendall_tau_distance",
    "pacs",
    "refine",
    "run",
    "select",
]
_LAZY = {
    "AuditConfig": "config",
    "RunConfig": "config",
    "audit": "measuring",
    "conflicts": "measuring",
    "evaluate": "loop",
    "kendall_null": "conflict",
    "kendall_p_value": "conflict",
    "kendall_tau_distance": "conflict",
    "pacs": "conflict",
    "refine": "loop",
    "run": "loop",
    "select": "measuring",
}


def __getattr__(name: str) -> Any:
    # SciPy, PyTorch and Transformers wait until something needs them.
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
