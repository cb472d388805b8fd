"""What can be found wrong with a run before it begins, and what it would do: `run --dry-run`."""

import importlib.util
from pathlib import Path
from typing import Any, get_args

from dissonance.artifacts import Run
from dissonance.config import RewardConfig, RunConfig, Tracker
from dissonance.errors import SettingsError
from dissonance.prompts import load_prompts
from dissonance.round_labels import annotator_settings
from dissonance.round_training import check_evaluation, pairs_of_round
from dissonance.selection import STRATEGIES, parse_threshold

_PACKAGES: dict[Tracker, str] = {name: name for name in get_args(Tracker)}


def check(config: RunConfig) -> None:
    """Check what no section can by itself, without loading a model.

    Raises:
        SettingsError: a strategy, a threshold, an annotator's setting or a tracker that is not there.
        DataError: a file of preferences or held-out prompts cannot be read, or prompts are in both halves.
        ModelError: a folder that is to hold a model is not there.
    """
    if (asked := config.selection) is not None:
        if asked.strategy not in STRATEGIES:
            raise SettingsError(f"selection.strategy is {asked.strategy!r}: use one of {', '.join(STRATEGIES)}")
        for name in ("tau", "delta"):
            if (value := getattr(asked, name)) is not None:
                parse_threshold(str(value), name)
    annotator_settings(config.feedback)
    for name in (*config.trackers, *config.refine.reward.report_to):
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise SettingsError(f"trackers: {name} is not installed: pip install {name}")


def plan(config: RunConfig) -> dict[str, Any]:
    """Read every file, look for every model, and say what the run would do.

    Returns:
        prompts, held_out_prompts, completions and judgements a round; rounds; pairs by file; reward_model and policy,
        what is trained how; models, each with where it was found: `folder`, `file`, `callable`, or `hub`, which is not
        looked up.

    Raises:
        InputError: as `check`, or a file or folder is not there or holds something else.
    """
    from dissonance.huggingface import base_and_adapter, resolve_source
    from dissonance.refine.pairs import read_preferences
    from dissonance.rewards import FunctionRewardModel

    check(config)
    prompts = load_prompts(**config.prompts.model_dump(), seed=config.seed).prompts
    files = {name: value for name, value in config.preferences.model_dump().items() if isinstance(value, str)}
    pairs = {name: len(read_preferences(value)) for name, value in files.items()}
    held_out = 0
    check_evaluation(config, prompts, pairs_of_round(Run(Path()), -1, config.preferences))
    if config.evaluation is not None and config.evaluation.prompts is not None:
        held_out = len(load_prompts(**config.evaluation.prompts.model_dump(), seed=config.seed).prompts)

    def place(section: Any, role: str) -> str:
        if isinstance(section, RewardConfig) and ":" in section.model:
            FunctionRewardModel(section)
            return "callable"
        base, _ = base_and_adapter(section, role)
        source = resolve_source(base, role)
        path = Path(source.name).expanduser()
        return "folder" if path.is_dir() else "file" if source.kwargs else "hub"

    models = {"policy": config.policy, "reward_model": config.reward_model}
    optional = {"feedback.reward_model": config.feedback.reward_model}
    if config.evaluation is not None:
        optional["evaluation.gold"] = config.evaluation.gold
    models |= {name: section for name, section in optional.items() if section is not None}
    training = config.refine.policy
    return {
        "prompts": len(prompts),
        "held_out_prompts": held_out,
        "completions": len(prompts) * config.policy.n,
        "judgements": 0 if config.selection is None else config.selection.budget,
        "annotator": None if config.selection is None else config.feedback.annotator,
        "rounds": config.rounds.most,
        "pairs": pairs,
        "reward_model": None if config.selection is None else config.refine.reward.model_dump(mode="json"),
        "policy": None if training is None else training.model_dump(mode="json"),
        "models": {name: {"model": of.model, "found": place(of, name)} for name, of in models.items()},
    }
