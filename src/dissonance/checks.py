"""What can be found wrong with a run before it begins, and what it would do: `run --dry-run`."""

import json
from pathlib import Path
from typing import Any

from sqlalchemy import make_url

from dissonance.artifacts import atomic_path
from dissonance.config import ModelConfig, PolicyConfig, RefiningConfig, RewardConfig, RunConfig
from dissonance.errors import SettingsError
from dissonance.launch import command_of
from dissonance.measuring import LOCAL, audit_inputs, audit_settings, measured_before
from dissonance.models import Engine
from dissonance.prompts import load_prompts
from dissonance.round_labels import annotator_settings
from dissonance.round_training import GivenPairs, check_evaluation, pairs_of_round, read_pairs
from dissonance.selection import STRATEGIES, parse_threshold


def check(config: RunConfig) -> None:
    """Check what no section can by itself, and reads no file.

    Raises:
        SettingsError: a strategy, a threshold, an annotator's setting, a tracker or a launcher that is not there;
            settings of two sections that contradict each other.
    """
    if (asked := config.selection) is not None:
        if asked.strategy not in STRATEGIES:
            raise SettingsError(f"selection.strategy is {asked.strategy!r}: use one of {', '.join(STRATEGIES)}")
        for name in ("tau", "delta"):
            if (value := getattr(asked, name)) is not None:
                parse_threshold(str(value), name)
    check_refining(config, trains_reward_model=config.selection is not None)


def check_refining(config: RefiningConfig, *, trains_reward_model: bool = True) -> None:
    """As `check`, of the second half of a round."""
    from dissonance.refine.session import check_trackers

    if trains_reward_model and ":" in config.reward_model.model and config.refine.reward.base is None:
        raise SettingsError(
            f"reward_model {config.reward_model.model} is a callable, which cannot be trained: set "
            "refine.reward.base to a model, or leave selection out"
        )
    annotator_settings(config.feedback)
    policy = config.refine.policy
    check_trackers(config.trackers)
    if policy is not None and policy.launcher is not None:
        command_of(policy.launcher)
        for name, device in (("policy", config.policy.device), ("reward_model", config.reward_model.device)):
            if ":" in device:
                raise SettingsError(f"{name}.device is {device}, and refine.policy.launcher gives each process its own")
    if policy is not None and policy.method == "rso" and policy.rso_keep > config.policy.n:
        raise SettingsError(f"refine.policy.rso_keep is {policy.rso_keep}, but policy.n is {config.policy.n}")
    if config.evaluation is not None and config.evaluation.likelihood == "relative" and not config.policy.reference:
        raise SettingsError("evaluation.likelihood is relative: set policy.reference, or take another")


def plan(config: RunConfig, audit: Path | None = None, engine: Engine = LOCAL) -> dict[str, Any]:
    """Read every file, look for every model, and say what the run would do.

    Args:
        config: the settings.
        audit: a run whose measurements would be taken over.
        engine: where the rounds would be measured.

    Returns:
        prompts, held_out_prompts, completions and judgements a round; rounds; pairs by file; reward_model and policy,
        what is trained how; models, each with where it was found: `folder`, `file`, `callable`, or `hub`, which is not
        looked up.

    Raises:
        InputError: as `check`, or a file or folder is not there or holds something else.
    """
    check(config)
    if audit is not None:
        everything = load_prompts(**{**config.prompts.model_dump(), "sample": None})
        measured_before(
            audit, config.audit, audit_settings(config.audit, engine), audit_inputs(config.audit, everything)
        )
    return plan_with(config, read_pairs(config.preferences))


def plan_with(config: RunConfig, given: GivenPairs) -> dict[str, Any]:
    """As `plan`, of checked settings whose preference files were read already."""
    prompts = load_prompts(**config.prompts.model_dump(), seed=config.seed).prompts
    everything = load_prompts(**{**config.prompts.model_dump(), "sample": None}).prompts
    training = config.refine.policy
    if training is not None and training.method in {"rloo", "grpo"} and training.prompts_per_step > len(prompts):
        raise SettingsError(
            f"refine.policy.prompts_per_step is {training.prompts_per_step}, but there are {len(prompts)} prompts"
        )
    check_evaluation(config, everything, pairs_of_round(given, (), config.preferences))
    asked = None if config.evaluation is None else config.evaluation.prompts
    return {
        "prompts": len(prompts),
        "held_out_prompts": 0 if asked is None else len(load_prompts(**asked.model_dump(), seed=config.seed).prompts),
        "completions": len(prompts) * config.policy.n,
        "judgements": 0 if config.selection is None else config.selection.budget,
        "annotator": None if config.selection is None else config.feedback.annotator,
        "rounds": config.rounds.most,
        "pairs": dict(given.counts),
        "reward_model": None if config.selection is None else config.refine.reward.model_dump(mode="json"),
        "policy": None if training is None else training.model_dump(mode="json"),
        "models": {name: {"model": of.model, "found": _place(of, name)} for name, of in _models(config).items()},
    }


def _models(config: RunConfig) -> dict[str, ModelConfig]:
    named: dict[str, ModelConfig | None] = {
        "policy": config.policy,
        "reward_model": config.reward_model,
        "feedback.reward_model": config.feedback.reward_model,
        "evaluation.gold": None if config.evaluation is None else config.evaluation.gold,
    }
    for name, model in {
        "policy.reference": config.policy.reference,
        "refine.reward.base": config.refine.reward.base,
    }.items():
        named[name] = None if model is None else ModelConfig(model=model)
    return {name: section for name, section in named.items() if section is not None}


def _place(section: ModelConfig, name: str) -> str:
    """Where a model is; raises a ModelError where it is not."""
    from dissonance.classifier import check_classifies
    from dissonance.huggingface import base_and_adapter, resolve_source
    from dissonance.language_model import check_generates
    from dissonance.rewards import load_reward_model

    if isinstance(section, RewardConfig) and ":" in section.model:
        load_reward_model(section)
        return "callable"
    base, adapter = base_and_adapter(section, name)
    for part in filter(None, (base, adapter)):
        source = resolve_source(part, name)
    if not Path(source.name).expanduser().is_dir():
        return "hub"
    if isinstance(section, RewardConfig):
        if section.server is None or section.server.protocol != "openrlhf":  # which needs its tokenizer alone
            check_classifies(section)
    elif isinstance(section, PolicyConfig):
        check_generates(section, name)
    return "file" if source.kwargs else "folder"


def write_config(path: Path, config: RunConfig) -> None:
    """Write the settings, a store's password left out, so that `run` can be given them again."""
    settings = config.model_dump(mode="json")
    store = config.feedback.store
    if store is not None and "://" in store:
        settings["feedback"]["store"] = make_url(store).set(password=None).render_as_string()
    with atomic_path(path) as temporary:  # JSON is YAML
        temporary.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
