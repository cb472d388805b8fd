"""Training steps a second: this package's refinements against bare TRL, on the same data with the same settings.

Both run in turn in one process, in changing order. A step is timed from the end of the one before it to its own end, so
that loading, encoding and tokenising are outside; steps that follow an evaluation, a check or a saving are left out of
the mean, and what these took is reported apart. The first step of each training is left out too.

    python benchmarks/refine.py                                                   (the built-in world's models)
    python benchmarks/refine.py --only reward --reward-model FOLDER --preferences pairs.jsonl
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, RewardTrainer, RLOOConfig, RLOOTrainer
from trl import RewardConfig as TrlRewardConfig

from dissonance.config import PolicyConfig, PolicyTraining, RewardConfig, RewardTraining
from dissonance.prompts import load_prompts
from dissonance.records import Completion, Preference, Prompt
from dissonance.refine.distil import ranked_pairs, score_candidates
from dissonance.refine.pairs import read_preferences
from dissonance.refine.policy import refine_policy
from dissonance.refine.reward import refine_reward_model
from dissonance.refine.session import training_session
from dissonance.rewards import HFRewardModel
from dissonance.sampling import HFPolicy
from in_turn import choose_clock, conditions, in_turn, ratios, spread


@dataclass
class Clock(TrainerCallback):  # type: ignore[misc]
    """When a training's steps ended: TRL's callback, and our progress."""

    now: Callable[[], float]
    begun: float
    ends: list[float] = field(default_factory=list)
    finished: float = 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step of TRL's."""
        self.ends.append(self.now())

    @contextmanager
    def progress(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """A step of ours."""
        del label, total, unit
        yield lambda _: self.ends.append(self.now())

    def plain(self, interrupted: set[int]) -> list[float]:
        """Seconds of the steps but the first and those after an interruption."""
        gaps = zip(self.ends, self.ends[1:], strict=False)
        return [b - a for step, (a, b) in enumerate(gaps, start=1) if step not in interrupted]

    def interruptions(self, interrupted: set[int]) -> list[float]:
        """Seconds of what stood between two steps."""
        usual = statistics.mean(self.plain(interrupted))
        gaps = zip(self.ends, self.ends[1:], strict=False)
        return [b - a - usual for step, (a, b) in enumerate(gaps, start=1) if step in interrupted]


@dataclass(frozen=True)
class Subject:
    """What is trained, by whom, and the steps after which ours evaluates."""

    name: str
    ours: Callable[[Path, Clock], Any]
    trl: Callable[[Path, Clock], Any]
    interrupted: set[int]
    interruption: str


def main() -> None:
    arguments = _arguments()
    print(f"{arguments.name}, float32, {conditions(arguments)}")
    subjects = {"reward": _reward, "rloo": _rloo, "dpo": _dpo}
    for name in arguments.only:
        _compare(arguments, subjects[name](arguments))
        sys.stdout.flush()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["reward", "rloo", "dpo"], choices=["reward", "rloo", "dpo"])
    parser.add_argument("--policy", help="default: the built-in world's")
    parser.add_argument("--reward-model", help="likewise")
    parser.add_argument("--prompts", help="likewise; a file of prompts")
    parser.add_argument("--preferences", help="likewise; pairs in TRL's format, as messages")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16, help="pairs, or prompts, in a step")
    parser.add_argument("--n", type=int, default=4, help="answers that RLOO draws to a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="time by the seconds of CPU, not by the clock")
    found = parser.parse_args()
    found.name = "given models"
    if not all((found.policy, found.reward_model, found.prompts, found.preferences)):
        from dissonance.sandbox import World, build_sandbox

        sandbox = build_sandbox(World(task="helpfulness"))
        own = {"policy": sandbox.policy, "reward_model": sandbox.reward_model, "prompts": sandbox.prompts}
        for option, path in {**own, "preferences": sandbox.preferences}.items():
            setattr(found, option, getattr(found, option) or str(path))
        found.name = "the built-in world's models"
    return found


def _compare(arguments: argparse.Namespace, subject: Subject) -> None:
    now = choose_clock(cpu_time=arguments.cpu_time)
    clocks: dict[str, list[Clock]] = {"ours": [], "trl": []}

    def train(way: str) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            timed = Clock(now, now())
            clocks[way].append(timed)
            (subject.ours if way == "ours" else subject.trl)(Path(scratch) / "out", timed)
            timed.finished = now()

    in_turn({way: partial(train, way) for way in clocks}, arguments.repeats)
    rates = {way: [1 / statistics.mean(c.plain(subject.interrupted)) for c in each] for way, each in clocks.items()}
    print(f"  {subject.name}")
    for way, each in rates.items():
        print(f"    {way:5} steps/s          {spread(each)}")
    print(f"    ours / trl             {spread(ratios(rates['ours'], rates['trl']))}")
    between = [s for c in clocks["ours"] for s in c.interruptions(subject.interrupted)]
    if between:
        print(f"    ours, {subject.interruption}, each {statistics.median(between):.2f} s")
    for way, each in clocks.items():
        before, after = ([c.ends[0] - c.begun for c in each], [c.finished - c.ends[-1] for c in each])
        print(
            f"    {way:5} to the first step's end {statistics.median(before):.1f} s, "
            f"from the last step's {statistics.median(after):.1f} s"
        )


def _shared(arguments: argparse.Namespace, rate: float) -> dict[str, Any]:
    """What both sides' trainers are told."""
    return {
        "seed": 0, "max_steps": arguments.steps, "learning_rate": rate, "lr_scheduler_type": "linear",
        "warmup_steps": arguments.steps // 10, "use_cpu": True, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "log_level": "error", "gradient_checkpointing": False, "bf16": False,
    }  # fmt: skip


def _train(out: Path, trainer: Callable[[], Any]) -> None:
    """Train with TRL, as quietly as ours do, and from the same random state."""
    with training_session(out, 0):
        made = trainer()
        made.remove_callback(PrinterCallback)
        made.train()


def _reward(arguments: argparse.Namespace) -> Subject:
    pairs = read_preferences(arguments.preferences)
    need = arguments.steps * arguments.batch_size
    held_out, training = pairs[: len(pairs) // 10], (pairs[len(pairs) // 10 :] * need)[:need]
    config = RewardTraining(batch_size=arguments.batch_size, learning_rate=1e-5, evaluations=4, patience=0)
    every = -(-arguments.steps // config.evaluations)
    start = RewardConfig(model=arguments.reward_model, device="cpu", dtype="float32")

    def ours(out: Path, timed: Clock) -> None:
        refine_reward_model(config, start, training, [], held_out, [], out, progress=timed.progress)

    def trl(out: Path, timed: Clock) -> None:
        settings = {
            **_shared(arguments, 1e-5), "per_device_train_batch_size": arguments.batch_size, "logging_steps": every,
            "weight_decay": 0.01, "max_length": None,
        }  # fmt: skip

        def made() -> Any:
            model = AutoModelForSequenceClassification.from_pretrained(arguments.reward_model, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(arguments.reward_model)
            return RewardTrainer(
                model=model, args=TrlRewardConfig(output_dir=str(out), **settings), callbacks=[timed],
                train_dataset=_dataset(training), processing_class=tokenizer,
            )  # fmt: skip

        _train(out, made)

    return Subject(
        f"reward model: {arguments.steps} steps of {arguments.batch_size} pairs",
        ours, trl, set(range(every, arguments.steps, every)),
        f"evaluations of {len(held_out)} held-out pairs, with the saving of the best",
    )  # fmt: skip


def _dataset(pairs: Sequence[Preference]) -> Dataset:
    turns = [[{"role": m.role, "content": m.content} for m in pair.messages] for pair in pairs]
    sides = {side: [[{"role": "assistant", "content": getattr(p, side)}] for p in pairs] for side in _SIDES}
    return Dataset.from_dict({"prompt": turns, **sides})


_SIDES = ("chosen", "rejected")


def _policy(arguments: argparse.Namespace, method: str) -> tuple[PolicyTraining, PolicyConfig, list[Prompt]]:
    config = PolicyTraining(
        method=method, steps=arguments.steps, prompts_per_step=arguments.batch_size, n=arguments.n,
        learning_rate=1e-6, check_every=arguments.steps // 2, max_kl=None, max_length_ratio=None,
    )  # fmt: skip
    start = PolicyConfig(
        model=arguments.policy, max_new_tokens=arguments.max_new_tokens, device="cpu", dtype="float32", n=arguments.n
    )
    return config, start, list(load_prompts(arguments.prompts).prompts)


def _checks(config: PolicyTraining) -> dict[str, Any]:
    return {
        "interrupted": set(range(config.check_every, config.steps, config.check_every)),
        "interruption": f"checks on {config.check_prompts} prompts, with the saving of the policy",
    }


def _rloo(arguments: argparse.Namespace) -> Subject:
    config, start, prompts = _policy(arguments, "rloo")
    reward_model = HFRewardModel(RewardConfig(model=arguments.reward_model, device="cpu", dtype="float32"))

    def ours(out: Path, timed: Clock) -> None:
        refine_policy(config, start, reward_model, prompts, out, progress=timed.progress)

    def trl(out: Path, timed: Clock) -> None:
        settings = {
            **_shared(arguments, 1e-6), "per_device_train_batch_size": arguments.batch_size * arguments.n,
            "num_generations": arguments.n, "max_completion_length": arguments.max_new_tokens, "logging_steps": 1,
            "beta": config.kl_coefficient, "temperature": 1.0, "disable_dropout": True,
        }  # fmt: skip
        turns = [[{"role": m.role, "content": m.content} for m in prompt.messages] for prompt in prompts]

        def made() -> Any:
            model = AutoModelForCausalLM.from_pretrained(arguments.policy, dtype=torch.float32)
            return RLOOTrainer(
                model=model, args=RLOOConfig(output_dir=str(out), **settings), callbacks=[timed],
                reward_funcs=arguments.reward_model, train_dataset=Dataset.from_dict({"prompt": turns}),
                processing_class=AutoTokenizer.from_pretrained(arguments.policy),
            )  # fmt: skip

        _train(out, made)

    name = f"policy, rloo: {arguments.steps} steps of {arguments.batch_size} prompts x {arguments.n} answers"
    return Subject(name, ours, trl, **_checks(config))


def _dpo(arguments: argparse.Namespace) -> Subject:
    config, start, prompts = _policy(arguments, "dpo")
    reward_model = HFRewardModel(RewardConfig(model=arguments.reward_model, device="cpu", dtype="float32"))
    policy = HFPolicy(start)
    answers: list[Completion] = [answer for batch in policy.plan(prompts) for answer in policy.sample(batch)]
    found = ranked_pairs(score_candidates(reward_model, prompts, answers, 0.0)).pairs
    pairs = [Preference(p.prompt.messages, p.chosen.text, p.rejected.text) for p in found]

    def ours(out: Path, timed: Clock) -> None:
        refine_policy(config, start, reward_model, prompts, out, progress=timed.progress, completions=answers)

    def trl(out: Path, timed: Clock) -> None:
        settings = {
            **_shared(arguments, 1e-6), "per_device_train_batch_size": arguments.batch_size, "logging_steps": 1,
            "beta": config.kl_coefficient, "max_length": None, "disable_dropout": True,
        }  # fmt: skip

        def made() -> Any:
            model = AutoModelForCausalLM.from_pretrained(arguments.policy, dtype=torch.float32)
            return DPOTrainer(
                model=model, args=DPOConfig(output_dir=str(out), **settings), callbacks=[timed],
                train_dataset=_dataset(pairs), processing_class=AutoTokenizer.from_pretrained(arguments.policy),
            )  # fmt: skip

        _train(out, made)

    name = f"policy, dpo: {arguments.steps} steps of {arguments.batch_size} pairs"
    return Subject(name, ours, trl, **_checks(config))


if __name__ == "__main__":
    main()
