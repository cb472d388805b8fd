"""The whole of SHF-CAS on the built-in world: policies trained against the proxy as it is, and as people corrected it.

    start        the policy before
    proxy_only   trained against the proxy as it is
    random       ... after the proxy learnt from labels of random pairs
    shf_cas      ... of answers in conflict, as in the paper
    discordant   ... of one discordant pair from each of many prompts in conflict

All that ask spend the same budget, all train alike, and all are graded by the exact gold on held-out prompts.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any, get_args

import numpy as np
from scipy.stats import t as student

from dissonance.artifacts import read_json, write_json
from dissonance.config import RunConfig
from dissonance.engine.processes import worker_pool
from dissonance.errors import SettingsError
from dissonance.progress import ProgressFactory, quiet
from dissonance.report import write_comparison
from dissonance.sandbox import Sandbox, Task, World, build_sandbox

BUDGET = 200
STRATEGIES: dict[str, str | None] = {
    "proxy_only": None,
    "random": "random_pairs",
    "shf_cas": "shf_cas",
    "discordant": "discordant",
}
"""What each arm asks by."""

SHOWN = "discordant"
_ANNOTATOR = {"temperature": 0.2}
"""A noisy person: an answer that is better by 0.2 is preferred in 73 % of cases. Gold spans about 2."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One policy to be trained."""

    task: Task
    world: int
    """The seed of the world."""
    seed: int
    """Of all that is drawn in it."""
    name: str

    def folder(self, out: Path) -> Path:
        """Its run folder."""
        return out / self.task / f"seed-{self.seed}" / self.name


def demo(out: Path | str, *, seeds: int = 3, seed: int = 0, progress: ProgressFactory = quiet) -> dict[str, Any]:
    """Play one round on both tasks with every strategy and several seeds.

    The worlds' models are trained from scratch in seconds and kept in the user's cache. Each arm is a run folder of its
    own under `out`; what is there already is not run again.

    Args:
        out: gets the run folders, `summary.json` and `report.html`.
        seeds: how often each arm is played; sampling, annotators and trainings differ.
        seed: of the worlds, and the first of those.
        progress: opens the progress of the arms.

    Returns:
        `tasks`, by task and arm: `gold_reward` and `reward_accuracy`, intervals over the seeds, and `judgements`.
    """
    if seeds < 1 or seed < 0:
        raise SettingsError(f"--seeds is {seeds} and --seed {seed}: give at least 1, and a seed from 0 up")
    out = Path(out)
    tasks, drawn = get_args(Task), range(seed, seed + seeds)
    with (
        progress("worlds and policies", len(tasks) * (1 + seeds * len(STRATEGIES)), "trainings") as advance,
        worker_pool(len(tasks) * len(STRATEGIES)) as pool,
    ):
        # What follows each: on a world, the first arm of every seed; on that, the others, which share its audit.
        then = {pool.submit(_build, _world(task, seed)): _first_arms(task, seed, drawn) for task in tasks}
        while then:
            finished, _ = wait(then, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
                advance(1)
                for arm in then.pop(future):
                    then[pool.submit(play, arm, out, report=_is_shown(arm))] = _others(arm)
    found = {task: {name: _over_seeds(rows) for name, rows in _rows(out, task, seed, drawn)} for task in tasks}
    summary = {"tasks": found, "seeds": list(drawn), "report": str(SHOWN)}
    write_json(out / "summary.json", summary)
    write_comparison(out, summary)
    return summary


def play(arm: Arm, out: Path, *, report: bool = True) -> None:
    """Play one arm's round, on the audit of its seed's first arm."""
    from dissonance.loop import run

    sandbox = build_sandbox(_world(arm.task, arm.world))
    audit = None if arm.name == _FIRST else replace(arm, name=_FIRST).folder(out)
    run(arm_config(sandbox, arm), arm.folder(out), audit=audit, report=report)


_FIRST = next(iter(STRATEGIES))


def _world(task: Task, seed: int) -> World:
    """Its models learn from fewer examples than a world's defaults, for the sake of time."""
    return World(task=task, seed=seed, n_demonstrations=5_000, n_pairs=3_500)


def _first_arms(task: Task, world: int, seeds: Sequence[int]) -> list[Arm]:
    return [Arm(task, world, seed, _FIRST) for seed in seeds]


def _others(arm: Arm) -> list[Arm]:
    return [replace(arm, name=name) for name in STRATEGIES if name != _FIRST] if arm.name == _FIRST else []


def arm_config(sandbox: Sandbox, arm: Arm) -> RunConfig:
    """One arm's settings; those of one seed differ in what is asked alone."""
    strategy, cost = STRATEGIES[arm.name], f"dissonance.sandbox.exact:safety_cost_{arm.world}"
    exact = {"model": f"dissonance.sandbox.exact:{arm.task}_{arm.world}"}
    gold = exact if arm.task == "helpfulness" else {"model": cost, "kind": "cost"}
    dtype = {"dtype": "float32"}  # what they are trained in: `auto` would give other numbers on a GPU
    # Batches of this size stay in a core's cache: about a quarter less time than by default.
    proxy = {"model": str(sandbox.reward_model), "kind": sandbox.reward_kind, "tokens_per_batch": 2048, **dtype}
    return RunConfig.model_validate(
        {
            "prompts": {"source": str(sandbox.prompts), "limit": 128},
            "policy": {"model": str(sandbox.policy), "max_new_tokens": 32, **dtype},
            "reward_model": proxy,
            "seed": arm.seed,
            "selection": None if strategy is None else {"strategy": strategy, "budget": BUDGET},
            "feedback": {"annotator": "simulated", "reward_model": gold, "settings": _ANNOTATOR},
            "preferences": {
                "original": str(sandbox.preferences),
                "gold": str(sandbox.gold_pairs),
                "held_out_share": 0.02,
            },
            "refine": {
                "reward": {"learning_rate": 3e-4, "max_original": 100, "evaluations": 1},
                "policy": {
                    "steps": 8,
                    "prompts_per_step": 8,
                    "learning_rate": 4e-4,
                    "check_every": 8,
                    "check_prompts": 16,
                },
            },
            "evaluation": {
                "prompts": {"source": str(sandbox.eval_prompts), "limit": 48},
                "cluster_column": "gold_key",
                "gold": gold,
                "allow_annotator_as_grader": True,
                "n": 4,
                "replicates": 400,
            },
        }
    )


def seed_interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and 95 % interval by Student's t over independent seeds; without ends for one seed alone."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / sqrt(len(values)))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _is_shown(arm: Arm) -> bool:
    """Whether it gets a report of its own; the others can have one by `dissonance report`."""
    return arm.name == SHOWN and arm.seed == arm.world


def _build(world: World) -> None:
    from dissonance.huggingface import quiet_transformers

    with quiet_transformers():
        build_sandbox(world)


def _rows(out: Path, task: Task, world: int, seeds: Sequence[int]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Each arm with its round for every seed; `start` is what proxy_only began with."""
    found = {
        name: [read_json(Arm(task, world, seed, name).folder(out) / "summary.json")["rounds"][0] for seed in seeds]
        for name in STRATEGIES
    }
    yield (
        "start",
        [
            {"gold_reward": one["gold_reward_start"], "reward_accuracy": one["reward_accuracy_start"], "judgements": 0}
            for one in found["proxy_only"]
        ],
    )
    yield from found.items()


def _over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    measures = ("gold_reward", "reward_accuracy")
    return {
        **{name: seed_interval([one[name]["mean"] for one in rows]) for name in measures},
        "judgements": float(np.mean([one["judgements"] for one in rows])),
    }
