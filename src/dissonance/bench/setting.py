"""A world with its answers: what every cell of a task and a seed chooses from, and is graded on; made once."""

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

import dissonance
from dissonance.artifacts import atomic_folder, fingerprint, read_table, versions, write_table
from dissonance.bench.config import BenchConfig, PoolConfig
from dissonance.config import AuditConfig, Dtype, PolicyConfig, PromptsConfig, RewardConfig
from dissonance.conflict import conflicts
from dissonance.engine.local import LocalEngine
from dissonance.likelihood import Likelihood, loglikelihood
from dissonance.progress import quiet
from dissonance.prompts import load_prompts
from dissonance.records import Message, Preference
from dissonance.sandbox import Sandbox, Task, World, build_sandbox, gold_reward
from dissonance.sandbox.build import fingerprint as world_fingerprint
from dissonance.selection.pool import FloatArray, Pool, pool_from_tables

MAX_NEW_TOKENS = 32
"""No answer of a world needs more."""
DTYPE: Dtype = "float32"
"""What a world's models are trained in: `auto` would give other numbers on a GPU."""
_CACHED_TOKENS = 2048
"""Batches of this size stay in a core's cache: a quarter less time than by default."""

_NO_NUMBERS = ("cli", "report", "bench/run.py", "bench/efficiency.py")
"""What only shows and sums up what cells hold."""
_KEPT = 2
"""Settings that a process keeps in memory: its tasks come setting by setting."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a setting is: a task, a world of its own, and how they are measured."""

    task: Task
    name: str
    """Of the world in the config."""
    seed: int
    world: World
    folder: Path

    @property
    def known(self) -> dict[str, str | int]:
        """What its rows are told apart by."""
        return {"task": self.task, "world": self.name, "seed": self.seed}


def place(config: BenchConfig, task: Task, name: str, seed: int, out: Path) -> Place:
    """The place of a setting below `out`, named by all that decides what is in it."""
    world = World(task=task, seed=seed, **config.worlds[name].model_dump())
    decides = {
        "world": world_fingerprint(world),
        "reference": world_fingerprint(_unlearned(world)),
        **config.model_dump(mode="json", include={"pool", "held_out", "reward", "ensemble"}),
        "code": _code(),
        "versions": versions(),
    }
    return Place(task, name, seed, world, out / "settings" / fingerprint(decides)[:16])


@cache
def _code() -> str:
    """All of the package that may change a number: a benchmark of other code is another."""
    package = Path(dissonance.__file__).parent
    without = [package / name for name in _NO_NUMBERS]
    files = [file for file in sorted(package.rglob("*.py")) if not {file, *file.parents} & set(without)]
    return fingerprint([[str(file.relative_to(package)), file.read_text(encoding="utf-8")] for file in files])


def make_setting(here: Place, config: BenchConfig) -> None:
    """Build the world, sample and score, train the ensemble; nothing if that is done.

    Leaves pool/ and held_out/, each with prompts.parquet and completions.parquet as in a run's round. The pool's have
    `ref_logprob`, of a policy of the same world that never saw what is right, and `member_rewards`.
    """
    from dissonance.huggingface import quiet_transformers
    from dissonance.sandbox.train import train_policy

    if here.folder.is_dir():
        return
    here.folder.parent.mkdir(parents=True, exist_ok=True)
    with quiet_transformers(), atomic_folder(here.folder) as folder:
        sandbox = build_sandbox(here.world)
        train_policy(_unlearned(here.world), folder / "reference")
        for name, part, reference in (("pool", config.pool, folder / "reference"), ("held_out", config.held_out, None)):
            _measure(sandbox, here, name, part, reference, folder)
        _add_ensemble(sandbox, config, here.seed, folder)


def _unlearned(world: World) -> World:
    """Its policy has learnt to speak from as many answers, none of which is right on purpose."""
    return World(task=world.task, seed=world.seed, policy_competence=0.0, n_demonstrations=world.n_demonstrations)


def _measure(sandbox: Sandbox, here: Place, name: str, part: PoolConfig, reference: Path | None, folder: Path) -> None:
    source = sandbox.prompts if name == "pool" else sandbox.eval_prompts
    settings = AuditConfig(
        prompts=PromptsConfig(source=str(source), limit=part.prompts),
        policy=PolicyConfig(
            model=str(sandbox.policy),
            n=part.n,
            max_new_tokens=MAX_NEW_TOKENS,
            dtype=DTYPE,
            reference=None if reference is None else str(reference),
        ),
        reward_model=proxy(sandbox),
        seed=here.seed,
    )
    prompts = load_prompts(**settings.prompts.model_dump()).prompts
    (folder / name).mkdir()
    engine = LocalEngine()
    engine.prepare(settings, prompts).measure(folder / name, quiet)
    engine.forget(folder / name)


def _add_ensemble(sandbox: Sandbox, config: BenchConfig, seed: int, folder: Path) -> None:
    from dissonance.refine.ensemble import member_folders, train_ensemble, with_member_rewards
    from dissonance.refine.pairs import read_preferences
    from dissonance.rewards import HFRewardModel

    start, original = proxy(sandbox), read_preferences(sandbox.preferences)
    train_ensemble(config.reward, start, original, (), folder / "ensemble", members=config.ensemble, seed=seed)
    members = [
        HFRewardModel(start.model_copy(update={"model": str(path)})) for path in member_folders(folder / "ensemble")
    ]
    path = folder / "pool" / "completions.parquet"
    write_table(path, with_member_rewards(read_table(path), read_table(folder / "pool" / "prompts.parquet"), members))


def proxy(sandbox: Sandbox) -> RewardConfig:
    """The world's reward model before anybody was asked."""
    return RewardConfig(
        model=str(sandbox.reward_model), kind=sandbox.reward_kind, dtype=DTYPE, tokens_per_batch=_CACHED_TOKENS
    )


@dataclass(frozen=True)
class Answers:
    """The N answers to each of P prompts of a world, in the order of the prompts and of completion_id."""

    prompts: pa.Table
    completions: pa.Table
    conversations: tuple[tuple[Message, ...], ...]
    """(P,)"""
    texts: tuple[tuple[str, ...], ...]
    """(P, N)"""
    gold: FloatArray
    """(P, N), the exact gold reward."""
    reward: FloatArray
    """(P, N), the proxy's."""

    def pool(self, likelihood: Likelihood) -> Pool:
        """What a strategy chooses from, with the conflict of that likelihood."""
        table = self.completions
        values = loglikelihood(table, likelihood)
        n = self.gold.shape[1]
        found = conflicts(self.reward.ravel(), values, np.arange(len(self.texts) + 1) * n)
        scored = table.set_column(table.schema.get_field_index("pacs"), "pacs", pa.array(found.pacs))
        asked = self.prompts
        for name, column in (("kendall_tau_distance", found.kendall_tau_distance), ("degenerate", found.degenerate)):
            asked = asked.set_column(asked.schema.get_field_index(name), name, pa.array(column))
        return pool_from_tables(asked, scored, likelihood)


@dataclass(frozen=True)
class Setting:
    """What a setting's folder holds, in memory."""

    sandbox: Sandbox
    pool: Answers
    held_out: Answers
    original: tuple[Preference, ...]
    """What the proxy learnt from."""


@lru_cache(maxsize=_KEPT)
def load_setting(here: Place) -> Setting:
    """A setting that was made; the last few stay in memory."""
    from dissonance.refine.pairs import read_preferences

    sandbox = build_sandbox(here.world)
    return Setting(
        sandbox=sandbox,
        pool=_answers(here.folder / "pool", here.world),
        held_out=_answers(here.folder / "held_out", here.world),
        original=tuple(read_preferences(sandbox.preferences)),
    )


def _answers(folder: Path, world: World) -> Answers:
    prompts, unordered = read_table(folder / "prompts.parquet"), read_table(folder / "completions.parquet")
    place_of = {name: row for row, name in enumerate(prompts["prompt_id"].to_pylist())}
    rows = zip(unordered["prompt_id"].to_pylist(), unordered["completion_id"].to_pylist(), strict=True)
    order = sorted(range(len(unordered)), key=[(place_of[name], k) for name, k in rows].__getitem__)
    completions = unordered.take(order)
    n = len(completions) // len(prompts)
    flat = completions["text"].to_pylist()
    texts = tuple(tuple(flat[at : at + n]) for at in range(0, len(flat), n))
    conversations = tuple(
        tuple(Message(turn["role"], turn["content"]) for turn in turns) for turns in prompts["messages"].to_pylist()
    )
    values = [
        [gold_reward(world, turns[-1].content, text) for text in row]
        for turns, row in zip(conversations, texts, strict=True)
    ]
    reward = completions["reward"].to_numpy().reshape(len(prompts), n)
    return Answers(prompts, completions, conversations, texts, np.array(values), reward)
