"""One cell: choose, ask, learn, grade. The parts are those of a run; only the answers are drawn beforehand."""

import hashlib
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dissonance.artifacts import fingerprint, source_fingerprint
from dissonance.bench.config import BenchConfig, FeedbackKind, PolicyCells, StrategyConfig
from dissonance.bench.setting import DTYPE, MAX_NEW_TOKENS, Answers, Place, Setting, load_setting, proxy
from dissonance.callables import function_source, import_callable
from dissonance.config import PolicyConfig, RewardConfig, RewardTraining
from dissonance.errors import DataError, DissonanceError, SettingsError
from dissonance.evaluate.detection import correctness, ordered_pairs
from dissonance.feedback.aggregate import aggregate
from dissonance.feedback.annotators.rewards import Rewards
from dissonance.feedback.annotators.simulated import SimulatedAnnotator, SimulatedSettings
from dissonance.records import Label, Preference, Prompt, Query, Question
from dissonance.sandbox import cell as cell_of
from dissonance.sandbox import gold_reward
from dissonance.selection import Pool, parse_threshold, select
from dissonance.selection.pool import FloatArray
from dissonance.selection.selection import query_id

_GRADED_ANSWERS = 4
"""Answers of a trained policy to each held-out prompt."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One strategy, budget and kind of feedback in one setting."""

    here: Place
    strategy: str
    budget: int
    feedback: str

    @property
    def known(self) -> dict[str, str | int]:
        """What its row is told apart by."""
        return {**self.here.known, "strategy": self.strategy, "budget": self.budget, "feedback": self.feedback}

    def settings(self, config: BenchConfig) -> tuple[StrategyConfig, FeedbackKind, PolicyCells | None]:
        """Its parts of the config; the last is None where no policy is trained."""
        policy = config.policy
        trained = (
            policy is not None
            and self.budget == policy.budget
            and self.feedback == next(iter(config.feedback))
            and self.strategy in (config.strategies if policy.strategies is None else policy.strategies)
        )
        return config.strategies[self.strategy], config.feedback[self.feedback], policy if trained else None

    def file(self, config: BenchConfig, out: Path) -> Path:
        """Where its result is, named by all that decides it."""
        strategy, feedback, policy = self.settings(config)
        decides = {
            "setting": self.here.folder.name,
            "strategy": {**strategy.model_dump(), "strategy": config.asked[self.strategy]},
            "callable": _source(config.asked[self.strategy]),
            "feedback": feedback.model_dump(exclude={"strategies", "budgets"}),
            "budget": self.budget,
            "reward": config.reward.model_dump(),
            "policy": policy and policy.training.model_dump(),
        }
        return out / "cells" / f"{fingerprint(decides)[:24]}.json"


def _source(named: str) -> str | None:
    """What is in the file of a strategy that is a callable, so that one that was edited is another."""
    file = function_source(named) if ":" in named else None
    return None if file is None else source_fingerprint(str(file))


def cells_of(config: BenchConfig, here: Place) -> list[Cell]:
    """All cells of a setting; those of worlds after the first have none."""
    if here.name != next(iter(config.worlds)):
        return []
    return [
        Cell(here, strategy, budget, feedback)
        for strategy in config.strategies
        for budget in config.budgets
        for feedback, kind in config.feedback.items()
        if (kind.strategies is None or strategy in kind.strategies) and (kind.budgets is None or budget in kind.budgets)
    ]


def play(cell: Cell, config: BenchConfig) -> dict[str, Any]:
    """Play a cell: the keys of `bench --json`'s cells."""
    strategy, feedback, policy = cell.settings(config)
    setting, seed = load_setting(cell.here), cell.here.seed
    queries = choose(setting.pool.pool(strategy.likelihood), cell.strategy, strategy, feedback, cell.budget, seed)
    questions = _questions(setting.pool, queries)
    labels = _ask(questions, setting, feedback, seed)
    found = aggregate(labels, questions, {}, feedback.method)
    new = _preferences(found.pairs, questions)
    worlds = [cell_of(cell.here.world, question.category or "") for question in questions.values()]
    with tempfile.TemporaryDirectory() as scratch:
        refined = _refined(setting, new, config.reward, Path(scratch) / "reward_model", _own_seed(cell))
        graded = grade(setting.held_out, _score(refined, setting.held_out))
        trained = None if policy is None else _train_policy(setting, refined, policy, cell, Path(scratch) / "policy")
    return {
        **cell.known,
        "judgements": sum(query.judgements for query in queries) * feedback.overlap,
        "pairs": len(new),
        **graded,
        "shared_ignorance_share": float(np.mean([world == "neither" for world in worlds])) if worlds else None,
        "policy_gold_reward": trained,
    }


def baseline(here: Place) -> dict[str, Any]:
    """What a setting is worth before anybody was asked, and at best."""
    held_out = load_setting(here).held_out
    found = grade(held_out, held_out.reward)
    best = {
        "gold_reward_start": float(held_out.gold.mean()),
        "gold_reward_best": float(held_out.gold.max(axis=1).mean()),
    }
    return {**here.known, **found, **best}


def choose(
    pool: Pool, name: str, strategy: StrategyConfig, feedback: FeedbackKind, budget: int, seed: int
) -> list[Query]:
    """What is asked within the budget, which pays for every answer of every annotator."""
    affordable = budget // feedback.overlap
    if affordable == 0:
        return []
    tau = None if strategy.tau is None else parse_threshold(str(strategy.tau), "tau")
    delta = None if strategy.delta is None else parse_threshold(str(strategy.delta), "delta")
    rng = np.random.default_rng([seed, budget])
    named = strategy.strategy or name
    ask = import_callable(named, "strategy") if ":" in named else named
    try:
        chosen = select(pool, ask, budget=affordable, rng=rng, tau=tau, delta=delta)
    except Exception as error:
        if isinstance(error, DissonanceError) or ":" not in named:
            raise  # what a built-in strategy does wrong is no mistake of the config
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise SettingsError(
            f"strategy {name} ({named}) failed with seed {seed} and budget {budget}: "
            f"{type(error).__name__}: {error} ({at.filename}:{at.lineno})"
        ) from None
    queries = list(chosen.queries)
    return _as_ratings(pool, queries, affordable) if feedback.ask == "ratings" else queries


def _as_ratings(pool: Pool, queries: Sequence[Query], budget: int) -> list[Query]:
    """Ratings of all answers to the prompts asked about, in the same order, within the budget."""
    number = {name: p for p, name in enumerate(pool.prompt_ids)}
    asked = []
    for prompt_id in dict.fromkeys(query.prompt_id for query in queries):
        p = number[prompt_id]
        answers = pool.answers[pool.answer_offsets[p] : pool.answer_offsets[p + 1]]
        ids = pool.completion_ids[answers].tolist()
        asked += [Query(prompt_id, "rating", (i,), 0.0, "every answer to the prompt") for i in ids]
    return asked[:budget]


def _questions(answers: Answers, queries: Sequence[Query]) -> dict[str, Question]:
    number = {name: p for p, name in enumerate(answers.prompts["prompt_id"].to_pylist())}
    categories = answers.prompts["category"].to_pylist()
    found = {}
    for query in queries:
        p = number[query.prompt_id]
        texts = tuple(answers.texts[p][k] for k in query.completion_ids)
        name = query_id(query, 0)
        found[name] = Question(
            name, query.prompt_id, query.kind, answers.conversations[p], query.completion_ids, texts, categories[p]
        )
    return found


def _ask(questions: Mapping[str, Question], setting: Setting, feedback: FeedbackKind, seed: int) -> list[Label]:
    """Everybody's answers; ratings mean fifths of the gold of the whole pool."""
    world, pool = setting.sandbox.world, setting.pool
    of = {
        name: tuple(gold_reward(world, question.messages[-1].content, text) for text in question.completions)
        for name, question in questions.items()
    }
    cuts = np.quantile(pool.gold, [0.2, 0.4, 0.6, 0.8]).tolist()
    labels = []
    for who in range(feedback.overlap):
        settings = SimulatedSettings(
            name=f"simulated-{who}",
            seed=seed,
            kind=setting.sandbox.reward_kind,
            temperature=feedback.temperature,
            flip=feedback.flip,
        )
        person = SimulatedAnnotator(settings, Rewards(of, tuple(cuts)))
        labels += [
            Label(who * len(questions) + k, name, person.name, person.kind, person.answer(question), 0.0)
            for k, (name, question) in enumerate(questions.items())
        ]
    return labels


def _preferences(pairs: Sequence[Any], questions: Mapping[str, Question]) -> list[Preference]:
    texts = {
        (question.prompt_id, k): text
        for question in questions.values()
        for k, text in zip(question.completion_ids, question.completions, strict=True)
    }
    messages = {question.prompt_id: question.messages for question in questions.values()}
    return [
        Preference(
            messages[pair.prompt_id],
            texts[pair.prompt_id, pair.chosen_id],
            texts[pair.prompt_id, pair.rejected_id],
            weight=pair.weight,
            tie=pair.tie,
            source=pair.source,
            chosen_safe=pair.chosen_safe,
            rejected_safe=pair.rejected_safe,
            prompt_id=pair.prompt_id,
        )
        for pair in pairs
    ]


def _refined(
    setting: Setting, new: Sequence[Preference], training: RewardTraining, out: Path, seed: int
) -> RewardConfig:
    from dissonance.refine.reward import refine_reward_model

    start = proxy(setting.sandbox)
    refine_reward_model(training, start, setting.original, new, (), (), out, seed=seed)
    return start.trained(out)


def _score(model: RewardConfig, answers: Answers) -> FloatArray:
    from dissonance.rewards import HFRewardModel

    turns = [conversation for conversation, row in zip(answers.conversations, answers.texts, strict=True) for _ in row]
    rewards = HFRewardModel(model).score(turns, [text for row in answers.texts for text in row])
    return np.array([reward.value for reward in rewards]).reshape(answers.gold.shape)


def grade(answers: Answers, rewards: FloatArray) -> dict[str, float]:
    """`gold_reward` of the best of each prompt's answers by these rewards (P, N), and their `reward_accuracy`.

    The accuracy is over all pairs of a prompt's answers that gold tells apart, ties half.
    """
    best = rewards.argmax(axis=1)
    gold = answers.gold[np.arange(len(best)), best]
    right = correctness(ordered_pairs(answers.gold).margin(rewards))
    if not right.size:
        raise DataError("gold tells no two answers to a held-out prompt apart: raise held_out.prompts or held_out.n")
    return {"gold_reward": float(gold.mean()), "reward_accuracy": float(right.mean())}


def _train_policy(setting: Setting, reward_model: RewardConfig, policy: PolicyCells, cell: Cell, out: Path) -> float:
    """Mean gold of a policy trained against the refined reward model, on the held-out prompts."""
    from dissonance.refine.policy import refine_policy
    from dissonance.rewards import HFRewardModel
    from dissonance.sampling import HFPolicy

    start = PolicyConfig(
        model=str(setting.sandbox.policy), n=_GRADED_ANSWERS, max_new_tokens=MAX_NEW_TOKENS, dtype=DTYPE
    )
    refine_policy(
        policy.training, start, HFRewardModel(reward_model), _prompts(setting.pool), out, seed=_own_seed(cell)
    )
    trained = HFPolicy(start.trained(out), cell.here.seed)
    asked = _prompts(setting.held_out)
    said = {prompt.prompt_id: prompt.messages[-1].content for prompt in asked}
    world = setting.sandbox.world
    drawn = [answer for batch in trained.plan(asked) for answer in trained.sample(batch)]
    return float(np.mean([gold_reward(world, said[answer.prompt_id], answer.text) for answer in drawn]))


def _prompts(answers: Answers) -> list[Prompt]:
    names = answers.prompts["prompt_id"].to_pylist()
    return [Prompt(name, messages) for name, messages in zip(names, answers.conversations, strict=True)]


def _own_seed(cell: Cell) -> int:
    """Of a cell's trainings: the same for all strategies, so that they differ in what was asked alone."""
    said = f"{cell.here.seed}\0{cell.budget}"
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=4).digest()) >> 1
