"""One round's pairs -> reward model -> policy -> what became better."""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dissonance.artifacts import Run, fingerprint, read_table, source_fingerprint
from dissonance.config import (
    AuditConfig,
    EvaluationConfig,
    PolicyConfig,
    PreferencesConfig,
    PromptsConfig,
    RefiningConfig,
    RewardConfig,
)
from dissonance.errors import DataError
from dissonance.evaluate import Asked, Grader, HeldOut, Models, evaluate, normalised, overlaps
from dissonance.launch import Request, launch, train
from dissonance.measuring import model_inputs
from dissonance.models import RewardModel
from dissonance.progress import ProgressFactory
from dissonance.prompts import load_prompts
from dissonance.records import Completion, Preference, Prompt
from dissonance.round_labels import PAIRS
from dissonance.sections import deciding

REWARD_MODEL, POLICY = "reward_model", "policy"
_ENOUGH_GOLD = 20
"""Held-out pairs that are no ties, below which they are no test of a reward model's direction."""


def models_of_round(run: Run, number: int, config: AuditConfig) -> tuple[PolicyConfig, RewardConfig]:
    """The policy and the reward model that a round begins with: those that the rounds before it left."""
    policy, reward = config.policy, config.reward_model
    for earlier in range(number):
        folder = run.round(earlier)
        if (folder / POLICY).is_dir():
            policy = policy.trained(folder / POLICY)
        if (folder / REWARD_MODEL).is_dir():
            reward = _reward_in(reward, folder)
    return policy, reward


def _reward_in(start: RewardConfig, folder: Path) -> RewardConfig:
    return start.trained(folder / REWARD_MODEL).model_copy(update={"index": None})


@dataclass(frozen=True)
class GivenPairs:
    """The preference files of a config, read once: what is trained on, and what is not."""

    original: list[Preference]
    held_out: list[Preference]
    gold: list[Preference] | None
    """None without a file of them."""
    counts: Mapping[str, int]
    """Pairs by file."""


def read_pairs(config: PreferencesConfig) -> GivenPairs:
    """Read and split the preference files; all pairs of a prompt are on one side for good.

    Raises:
        DataError: a file is no file of preferences, or what is to be held out is trained on.
    """
    from dissonance.refine.pairs import read_preferences

    files = {"original": config.original, "held_out": config.held_out, "gold": config.gold}
    given = {name: read_preferences(path) for name, path in files.items() if path is not None}
    original, held_out = given.get("original", []), given.get("held_out")
    for name in ("held_out", "gold"):
        if found := overlaps(given.get(name, ()), original):
            raise DataError(
                f"preferences.{name}: {len(found):,} of its pairs are on prompts of preferences.original, which is "
                f"trained on (the first is pair {found[0][0] + 1}): take others"
            )
    counts = {name: len(pairs) for name, pairs in given.items()}
    if held_out is None:
        held_out, original = _split(original, config.held_out_share, set())
    return GivenPairs(original, held_out, given.get("gold"), counts)


@dataclass(frozen=True)
class Pairs:
    """Everything that a round's reward model learns from, or is measured on."""

    original: list[Preference]
    new: list[Preference]
    """Of this round and all before."""
    held_out_original: list[Preference]
    held_out_new: list[Preference]
    gold: list[Preference] | None
    """None where there are too few to tell."""


def pairs_of_round(given: GivenPairs, answered: Sequence[Preference], config: PreferencesConfig) -> Pairs:
    """The pairs as a round has them, `answered` being those of people, of this round and all before."""
    aside = [*(given.held_out if config.held_out is not None else ()), *(given.gold or ())]
    held_out_new, new = _split(answered, config.held_out_share, {normalised(pair.messages) for pair in aside})
    gold: list[Preference] | None = given.held_out + held_out_new if given.gold is None else given.gold
    if given.gold is None and sum(not pair.tie for pair in gold or ()) < _ENOUGH_GOLD:
        gold = None
    return Pairs(given.original, new, given.held_out, held_out_new, gold)


def answered_pairs(run: Run, number: int) -> list[Preference]:
    """What people's answers came to, in a round and all before it."""
    from dissonance.refine.pairs import read_preferences

    files = [run.round(k) / PAIRS for k in range(number + 1)]
    return [pair for file in files if file.is_file() for pair in read_preferences(file)]


def _split(
    pairs: Sequence[Preference], share: float, apart: Collection[str]
) -> tuple[list[Preference], list[Preference]]:
    """Those that are held out, by what their prompts say, and the others."""
    sides: tuple[list[Preference], list[Preference]] = ([], [])
    for pair in pairs:
        said = normalised(pair.messages)
        drawn = int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest())
        sides[said not in apart and drawn >= share * 2**64].append(pair)
    return sides


def reward_training_inputs(config: RefiningConfig) -> dict[str, Any]:
    """What decides a refined reward model besides its pairs of the run: settings, and files by their content."""
    base = config.refine.reward.base
    return {
        **config.refine.reward.model_dump(mode="json"),
        **_preference_inputs(config),
        **({} if base is None else {"base_content": source_fingerprint(base)}),
    }


def policy_training_inputs(config: RefiningConfig) -> dict[str, Any]:
    """What decides a refined policy besides the reward model; how many processes train it is in its metrics."""
    training = config.refine.policy
    settings = {} if training is None else training.model_dump(mode="json", exclude={"launcher"})
    return {**settings, **_preference_inputs(config)}


def _preference_inputs(config: RefiningConfig) -> dict[str, Any]:
    files = config.preferences.model_dump(mode="json")
    return {name: source_fingerprint(value) if isinstance(value, str) else value for name, value in files.items()}


def evaluation_inputs(config: RefiningConfig) -> dict[str, Any]:
    """What decides an evaluation besides the models of the run."""
    settings = config.evaluation
    if settings is None:
        return {}
    prompts = {} if settings.prompts is None else {"prompts_content": source_fingerprint(settings.prompts.source)}
    gold = {} if settings.gold is None else model_inputs("gold", settings.gold)
    behind = config.feedback.reward_model
    annotator = {} if behind is None else model_inputs("annotator", behind)
    return {**deciding(settings.model_dump(mode="json")), **prompts, **gold, **annotator}


def refine_reward_of_round(
    run: Run, number: int, config: RefiningConfig, pairs: Pairs, seed: int, progress: ProgressFactory
) -> dict[str, Any]:
    """Leaves `reward_model/` in the round's folder; what `refine_reward_model` returns, less its seconds."""
    from dissonance.refine.reward import refine_reward_model

    _, start = models_of_round(run, number, config)
    found = refine_reward_model(
        config.refine.reward,
        start,
        pairs.original,
        pairs.new,
        pairs.held_out_original,
        pairs.held_out_new,
        run.round(number) / REWARD_MODEL,
        seed=seed,
        progress=progress,
        trackers=config.trackers,
    )
    return {name: value for name, value in found.items() if name != "seconds"}


def refine_policy_of_round(
    run: Run,
    number: int,
    config: RefiningConfig,
    prompts: Sequence[Prompt],
    pairs: Pairs,
    seed: int,
    progress: ProgressFactory,
) -> dict[str, Any]:
    """Leaves `policy/` in the round's folder, trained against the round's refined reward model, where there is one."""
    from dissonance.refine.policy_trainers import ONLINE

    training = config.refine.policy
    if training is None:
        return {}
    start, reward = _ends_with(run, number, config)
    folder = run.round(number)
    completions = None if training.method in ONLINE else _completions(folder)
    request = Request(
        training, start, reward, list(prompts), folder / POLICY, seed, pairs.gold, completions, config.trackers
    )
    return launch(training.launcher, request, progress) if training.launcher else train(request, progress)


def _ends_with(run: Run, number: int, config: AuditConfig) -> tuple[PolicyConfig, RewardConfig]:
    """The policy that a round begins with, and the reward model that it ends with."""
    policy, reward = models_of_round(run, number, config)
    folder = run.round(number)
    return policy, _reward_in(reward, folder) if (folder / REWARD_MODEL).is_dir() else reward


def _completions(folder: Path) -> list[Completion]:
    names = ("prompt_id", "completion_id", "text", "token_ids", "finish_reason", "logprob")
    rows = read_table(folder / "completions.parquet").select(names).to_pylist()
    return [Completion(**{**row, "token_ids": tuple(row["token_ids"])}) for row in rows]


def evaluate_round(
    run: Run,
    number: int,
    config: RefiningConfig,
    prompts: Sequence[Prompt],
    pairs: Pairs,
    seed: int,
    progress: ProgressFactory,
) -> dict[str, Any]:
    """Compare a round's policy and reward model with those it began with; what `evaluate` returns.

    `prompts` are all that any round may draw.
    """
    settings = config.evaluation
    if settings is None:
        return {}
    if "likelihood" not in settings.model_fields_set:
        settings = settings.model_copy(update={"likelihood": config.likelihood})
    folder = run.round(number)
    start, proxy = models_of_round(run, number, config)
    _, refined = _ends_with(run, number, config)
    new = start.trained(folder / POLICY) if (folder / POLICY).is_dir() else start
    asked = _asked(folder, _trained_clusters(config, settings))
    return evaluate(
        _held_out(config, settings, prompts, pairs),
        _models(config, settings, start, new, proxy, refined, seed),
        _grader(config, settings),
        settings,
        folder,
        asked=asked,
        progress=progress,
    )


def check_evaluation(config: RefiningConfig, prompts: Sequence[Prompt], pairs: Pairs) -> None:
    """Find out before anything is trained what `evaluate_round` would refuse after it.

    Raises:
        DataError: held-out prompts are trained on.
        SettingsError: the gold reward that grades also answers.
    """
    if config.evaluation is not None:
        _held_out(config, config.evaluation, prompts, pairs)
        _grader(config, config.evaluation)


def _held_out(config: RefiningConfig, settings: EvaluationConfig, prompts: Sequence[Prompt], pairs: Pairs) -> HeldOut:
    trained_on: list[Prompt | Preference] = [*prompts, *pairs.original, *pairs.new]
    trained_clusters = _trained_clusters(config, settings) or {}
    return HeldOut(
        tuple(load_prompts(**settings.prompts.model_dump(), seed=config.seed).prompts) if settings.prompts else (),
        trained_on,
        pairs=_without([*pairs.held_out_original, *pairs.held_out_new], trained_on),
        clusters=_clusters(settings.prompts, settings.cluster_column),
        trained_clusters=set(trained_clusters.values()),
    )


def _without(pairs: Sequence[Preference], trained_on: Sequence[Prompt | Preference]) -> tuple[Preference, ...]:
    """Pairs whose prompts nothing was trained on, the policy included."""
    gone = {place for place, _ in overlaps(pairs, trained_on)}
    return tuple(pair for place, pair in enumerate(pairs) if place not in gone)


def _trained_clusters(config: RefiningConfig, settings: EvaluationConfig) -> dict[str, str] | None:
    """Of the prompts that are trained on; None where their file has no such column."""
    try:
        return _clusters(config.prompts, settings.cluster_column)
    except DataError:
        return None


def _clusters(prompts: PromptsConfig | None, column: str | None) -> dict[str, str] | None:
    """prompt_id -> what a column of the prompts' file says; None without a column."""
    if prompts is None or column is None:
        return None
    whole = prompts.model_copy(update={"category_column": column, "sample": None})
    loaded = load_prompts(**whole.model_dump()).prompts
    return {prompt.prompt_id: prompt.category for prompt in loaded if prompt.category is not None}


def _asked(folder: Path, clusters: Mapping[str, str] | None) -> Asked | None:
    """What was asked in the round and what people said, as its pairs tell."""
    if not (folder / PAIRS).is_file():
        return None
    columns = ["prompt_id", "chosen_id", "rejected_id", "tie"]
    rows = read_table(folder / PAIRS).select(columns).to_pylist()
    prompts, completions = (read_table(folder / f"{name}.parquet") for name in ("prompts", "completions"))
    return Asked([_Judged(**row) for row in rows], prompts, completions.drop_columns(["token_ids"]), clusters)


@dataclass(frozen=True, slots=True)
class _Judged:
    prompt_id: str
    chosen_id: int
    rejected_id: int
    tie: bool


def _models(
    config: RefiningConfig,
    settings: EvaluationConfig,
    start: PolicyConfig,
    new: PolicyConfig,
    proxy: RewardConfig,
    refined: RewardConfig,
    seed: int,
) -> Models:
    """What makes each model; both policies at temperature 1 and top-p 1, so that the KL between them is one."""
    from dissonance.rewards import load_reward_model
    from dissonance.sampling import HFReference, load_policy

    plain = {"n": settings.n, "temperature": 1.0, "top_p": 1.0}
    first, second = (policy.model_copy(update=plain) for policy in (start, new))
    reference: Callable[[], HFReference] | None = None
    if config.policy.reference is not None:
        reference = partial(HFReference, first, config.policy.reference)
    return Models(
        start=partial(load_policy, first, seed),
        new=partial(load_policy, second, seed),
        start_likelihood=partial(HFReference, second, first),
        proxy=partial(load_reward_model, proxy),
        refined=None if refined == proxy else partial(load_reward_model, refined),
        reference=reference,
    )


def _grader(config: RefiningConfig, settings: EvaluationConfig) -> Grader | None:
    from dissonance.rewards import load_reward_model

    if settings.gold is None:
        return None
    behind = config.feedback.reward_model
    make: Callable[[], RewardModel] = partial(load_reward_model, settings.gold)
    annotators = [] if behind is None else [_identity(behind)]
    return Grader(make, _identity(settings.gold), annotators, settings.allow_annotator_as_grader)


def _identity(reward: RewardConfig) -> str:
    """What tells a reward model from another, wherever it lies."""
    function = reward.model.partition(":")[2]
    return fingerprint([function, *model_inputs("reward_model", reward).values()])
