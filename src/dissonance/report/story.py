"""What the rounds of a run left, for the page: the pictures' `Round`s, a table, and what was asked in words."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dissonance.artifacts import read_json
from dissonance.report.examples import clip
from dissonance.report.headline import number, plural
from dissonance.report.round_parts import Round, Values, in_words

_QUESTION_CHARACTERS, _ANSWER_CHARACTERS = 300, 400
_ASKED = 12


@dataclass(frozen=True)
class AskedPair:
    """One pair that people judged."""

    question: str
    chosen: str
    rejected: str
    before: float
    """By how much the reward model preferred what people preferred; below 0 it was wrong."""
    after: float | None


@dataclass(frozen=True)
class RoundStory:
    """One round in the table."""

    name: str
    folder: str
    cells: Mapping[str, str]
    asked: Sequence[AskedPair]
    explanation: Sequence[str]
    """How the queries were chosen, and what became of the labels."""


def read_rounds(run: Path) -> tuple[list[Round], list[RoundStory]]:
    """Read every round that is finished, in order; empty where the run was only audited."""
    rounds, stories = [], []
    for folder in sorted(run.glob("round-[0-9][0-9][0-9]")):
        if (folder / "metrics.json").is_file():
            metrics = read_json(folder / "metrics.json")
            one = _round(folder, metrics)
            rounds.append(one)
            stories.append(_story(folder, metrics, one))
    return rounds, stories


def _round(folder: Path, metrics: Values) -> Round:
    labels = _labels(folder)
    return Round(
        policy=metrics.get("policy") or {},
        reward_model=metrics.get("reward_model") or {},
        evaluation=metrics.get("evaluation") or {},
        labels=labels,
        prompts=_questions(folder, {row["prompt_id"] for row in labels}),
    )


def _labels(folder: Path) -> list[dict[str, Any]]:
    """What people said: as the evaluation left it, or else with the rewards that it was chosen by alone."""
    if (folder / "evaluation_labels.parquet").is_file():
        return list(pq.read_table(folder / "evaluation_labels.parquet").to_pylist())
    if not (folder / "pairs.parquet").is_file():
        return []
    columns = ["prompt_id", "chosen_id", "rejected_id", "tie", "chosen", "rejected"]
    rows = pq.read_table(folder / "pairs.parquet", columns=columns).to_pylist()
    table = _of_prompts(folder / "completions.parquet", {row["prompt_id"] for row in rows}, ("completion_id", "reward"))
    rewards = {(row["prompt_id"], row["completion_id"]): row["reward"] for row in table.to_pylist()}
    return [
        {
            "prompt_id": row["prompt_id"],
            "tie": row["tie"],
            **{side: row[side][0]["content"] for side in ("chosen", "rejected")},
            **{f"proxy_{side}": rewards[row["prompt_id"], row[f"{side}_id"]] for side in ("chosen", "rejected")},
            **{f"refined_{side}": None for side in ("chosen", "rejected")},
        }
        for row in rows
    ]


def _questions(folder: Path, wanted: set[str]) -> dict[str, str]:
    if not wanted:
        return {}
    kept = _of_prompts(folder / "prompts.parquet", wanted, ("messages",))
    return {row["prompt_id"]: row["messages"][-1]["content"] for row in kept.to_pylist() if row["messages"]}


def _of_prompts(path: Path, prompt_ids: set[str], columns: Sequence[str]) -> pa.Table:
    """The rows of some prompts; no others are held."""
    return pq.read_table(path, columns=["prompt_id", *columns], filters=pc.field("prompt_id").isin(sorted(prompt_ids)))


def _story(folder: Path, metrics: Values, one: Round) -> RoundStory:
    selection, pairs = metrics.get("selection") or {}, metrics.get("pairs") or {}
    return RoundStory(
        name=f"Round {metrics.get('round', 0)}",
        folder=folder.name,
        cells=dict(_cells(metrics)),
        asked=list(_asked(one)),
        explanation=[*selection.get("explanation", ()), *pairs.get("explanation", ())],
    )


def _cells(metrics: Values) -> Iterator[tuple[str, str]]:
    evaluation, reward = metrics.get("evaluation") or {}, metrics.get("reward_model") or {}
    selection, feedback = metrics.get("selection") or {}, metrics.get("feedback") or {}
    distance = metrics["conflict"]["kendall_tau_distance"]["mean"]
    yield "mean K", "" if distance is None else number(distance, 3)
    if selection:
        yield "asked", f"{selection['judgements']:,} judgements, {selection['strategy']}"
        yield "answered by", str(feedback.get("annotator", ""))
    if "pairs" in metrics:
        yield "pairs", f"{metrics['pairs']['pairs']:,}"
    for name, title in (
        ("held_out_original", "accuracy, held-out original"),
        ("held_out_new", "accuracy, held-out new"),
    ):
        measured = reward.get(name) or {}
        if measured.get("after"):
            said = _arrow((measured.get("before") or {}).get("accuracy"), measured["after"]["accuracy"])
            yield title, f"{said} ({measured['after']['pairs']:,} {plural('pair', measured['after']['pairs'])})"
    if gold := evaluation.get("gold_reward"):
        yield "gold reward", _arrow(gold["start"], gold["new"])
        yield "win rate", in_words(gold["win_rate"], 3) if gold["win_rate"] else ""
    if policy := metrics.get("policy"):
        yield "policy", f"{policy['method']}, {policy['kept_step']:,} steps"
        yield "KL in training, nats an answer", number(policy["end"]["kl"], 2)
        yield "length in training, tokens", _change(policy["start"]["length"], policy["end"]["length"])
    if kl := evaluation.get("kl"):
        yield "KL, held-out prompts", in_words(kl["k1"], 2)


def _change(before: float, after: float) -> str:
    return f"{number(before, 1)} → {number(after, 1)}"


def _arrow(before: Values | None, after: Values | None) -> str:
    said = [in_words(one, 3) for one in (before, after) if one]
    return " → ".join(said)


def _asked(one: Round) -> Iterator[AskedPair]:
    """The pairs on which the reward model was furthest from people."""
    decided = [row for row in one.labels if not row["tie"]]
    for row in sorted(decided, key=lambda row: row["proxy_chosen"] - row["proxy_rejected"])[:_ASKED]:
        refined = row["refined_chosen"]
        yield AskedPair(
            clip(one.prompts.get(row["prompt_id"], row["prompt_id"]), _QUESTION_CHARACTERS),
            clip(row["chosen"] or "", _ANSWER_CHARACTERS),
            clip(row["rejected"] or "", _ANSWER_CHARACTERS),
            row["proxy_chosen"] - row["proxy_rejected"],
            None if refined is None else refined - row["refined_rejected"],
        )
