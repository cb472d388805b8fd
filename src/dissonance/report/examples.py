"""The prompts and answers that the report spells out: only their rows are read, and long texts are clipped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dissonance.conflict import standardize
from dissonance.report.statistics import rows_by_prompt
from dissonance.report.tables import Completions, Floats, Integers, Prompts, read_rows

_ANSWERS = 16
_ANSWER_CHARACTERS = 800
_TURN_CHARACTERS = 600
_TURNS = 8
_NAME_CHARACTERS = 80
_TOOLTIP_PROMPT, _TOOLTIP_ANSWER = 100, 200


@dataclass(frozen=True)
class Answer:
    """One completion, ready to be shown."""

    row: int
    """In `completions.parquet`."""

    completion_id: int
    text: str | None
    """Clipped; None when the scores came without text."""

    reward: float
    loglikelihood: float
    """In the run's reading."""

    n_tokens: int | None
    pacs: float
    reward_rank: int
    """1: the highest reward of the prompt."""

    likelihood_rank: int
    """1: the highest log-likelihood of the prompt, in the run's reading."""


@dataclass(frozen=True)
class Case:
    """One prompt with its answers, ready to be shown."""

    prompt_id: str
    category: str | None
    turns: tuple[tuple[str, str], ...]
    """(role, text) of the conversation, clipped; empty when the scores came without it."""

    distance: float
    p_value: float
    mean_abs_pacs: float
    answers: tuple[Answer, ...]
    """By falling reward."""

    @property
    def shown(self) -> tuple[Answer, ...]:
        """All answers, or of more than 16 the eight of either end."""
        half = _ANSWERS // 2
        return self.answers if len(self.answers) <= _ANSWERS else self.answers[:half] + self.answers[-half:]

    @property
    def question(self) -> str:
        """The last turn, or the prompt's id when there is no text."""
        return self.turns[-1][1] if self.turns else self.prompt_id


@dataclass(frozen=True)
class Extreme:
    """A completion with a large |PACS|, and the answer of the same prompt that shows why."""

    case: Case
    answer: Answer
    other: Answer | None
    """PACS > 0: the policy's likeliest other answer; PACS < 0: the other answer with the highest reward."""


def clip(text: str, limit: int) -> str:
    """Keep the first `limit` characters, and say how many are left out."""
    return text if len(text) <= limit else f"{text[:limit].rstrip()} … ({len(text) - limit:,} more characters)"


def read_cases(
    folder: Path, prompts: Prompts, completions: Completions, p_values: Floats, rows: Mapping[int, Integers]
) -> dict[int, Case]:
    """Read the cases of the prompt rows in `rows`, which maps them to their completion rows."""
    heads = read_rows(folder / "prompts.parquet", rows, ("prompt_id", "messages", "category"))
    wanted = np.concatenate([*rows.values(), np.empty(0, np.int64)])
    bodies = read_rows(folder / "completions.parquet", wanted.tolist(), ("completion_id", "text"))
    cases = {}
    for prompt, answers in rows.items():
        head = heads[prompt]
        cases[prompt] = Case(
            prompt_id=clip(head["prompt_id"], _NAME_CHARACTERS),
            category=clip(head["category"], _NAME_CHARACTERS) if head.get("category") else None,
            turns=_turns(head.get("messages")),
            distance=float(prompts.distance[prompt]),
            p_value=float(p_values[prompt]),
            mean_abs_pacs=float(prompts.mean_abs_pacs[prompt]),
            answers=_answers(completions, answers, bodies),
        )
    return cases


def _turns(messages: Sequence[Mapping[str, str]] | None) -> tuple[tuple[str, str], ...]:
    return tuple((m["role"], clip(m["content"], _TURN_CHARACTERS)) for m in (messages or ())[-_TURNS:])


def _answers(completions: Completions, rows: Integers, bodies: Mapping[int, Mapping[str, Any]]) -> tuple[Answer, ...]:
    reward_rank = _ranks(completions.reward[rows])
    likelihood_rank = _ranks(_z_scores(completions, rows)[1])
    answers = [
        Answer(
            row=row,
            completion_id=bodies[row]["completion_id"],
            text=None if bodies[row].get("text") is None else clip(bodies[row]["text"], _ANSWER_CHARACTERS),
            reward=float(completions.reward[row]),
            loglikelihood=float(completions.loglikelihood[row]),
            n_tokens=None if completions.n_tokens is None else int(completions.n_tokens[row]),
            pacs=float(completions.pacs[row]),
            reward_rank=int(reward_rank[place]),
            likelihood_rank=int(likelihood_rank[place]),
        )
        for place, row in enumerate(rows.tolist())
    ]
    return tuple(sorted(answers, key=lambda answer: (answer.reward_rank, answer.completion_id)))


def _z_scores(completions: Completions, rows: Integers) -> tuple[Floats, Floats]:
    """z(r) and z(l) of one prompt's completions; z(l) as z(r) - PACS, whatever the reading."""
    z_reward, _ = standardize(completions.reward[rows])
    return z_reward, z_reward - completions.pacs[rows]


def _ranks(values: Floats) -> Integers:
    """1 for the highest; equal values (beyond rounding) share the better rank."""
    rounded = np.round(values, 9)
    return np.asarray(1 + (rounded[None, :] > rounded[:, None]).sum(axis=1))


def extreme(case: Case, row: int) -> Extreme:
    """Pair the case's completion in `row` of `completions.parquet` with its counterpart."""
    answer = next(answer for answer in case.answers if answer.row == row)
    others = [other for other in case.answers if other.row != row]
    if answer.pacs > 0:
        return Extreme(case, answer, min(others, key=lambda other: other.likelihood_rank, default=None))
    return Extreme(case, answer, min(others, key=lambda other: other.reward_rank, default=None))


def read_points(folder: Path, prompts: Prompts, completions: Completions, rows: Integers) -> list[dict[str, Any]]:
    """Read the given completion rows as points of the reward-likelihood picture, with clipped texts."""
    of = completions.prompt
    bodies = read_rows(folder / "completions.parquet", rows.tolist(), ("text",))
    heads = read_rows(folder / "prompts.parquet", of[rows].tolist(), ("prompt_id", "messages"))
    z: dict[int, tuple[float, float]] = {}
    for group in rows_by_prompt(completions, of[rows].tolist()).values():
        z.update(zip(group.tolist(), zip(*_z_scores(completions, group), strict=True), strict=True))
    points = []
    for row in rows.tolist():
        head = heads[int(of[row])]
        question = head["messages"][-1]["content"] if head.get("messages") else head["prompt_id"]
        points.append(
            {
                "x": round(float(z[row][1]), 4),
                "y": round(float(z[row][0]), 4),
                "pacs": round(float(completions.pacs[row]), 4),
                "reward": round(float(completions.reward[row]), 4),
                "loglikelihood": round(float(completions.loglikelihood[row]), 4),
                "distance": round(float(prompts.distance[of[row]]), 4),
                "prompt": clip(question, _TOOLTIP_PROMPT),
                "answer": clip(bodies.get(row, {}).get("text") or "", _TOOLTIP_ANSWER),
            }
        )
    return points
