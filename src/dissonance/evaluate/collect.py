"""Held-out prompts and models -> tables of answers, pairs and labels, a row for each thing that is averaged.

One model is in memory at a time: each is made when its turn comes and let go after.
"""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dissonance.errors import DataError, DissonanceError
from dissonance.evaluate.guards import Grader, HeldOut
from dissonance.models import Policy, ReferenceModel, RewardModel
from dissonance.overlap import overlapped
from dissonance.progress import ProgressFactory
from dissonance.records import Completion, Message, Prompt

POLICIES = ("start", "new")
_SCORED_AT_ONCE = 256

_ITEM = [("prompt_id", pa.string()), ("cluster", pa.string()), ("category", pa.string())]

ANSWERS_SCHEMA = pa.schema(
    [
        ("policy", pa.string()),
        *_ITEM,
        ("completion_id", pa.int32()),
        ("text", pa.string()),
        ("n_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("logprob", pa.float64()),
        ("start_logprob", pa.float64()),
        ("ref_logprob", pa.float64()),
        ("gold", pa.float64()),
        ("proxy", pa.float64()),
        ("refined", pa.float64()),
    ]
)
"""A row per held-out answer: `policy` is `start` or `new`, logprob is its own, the other two are of its tokens under
the start policy and under the reference model; gold, proxy and refined are rewards, higher is better. Null where there
is no such model."""

PAIRS_SCHEMA = pa.schema(
    [
        ("pair", pa.int32()),
        *_ITEM,
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("proxy_chosen", pa.float64()),
        ("proxy_rejected", pa.float64()),
        ("refined_chosen", pa.float64()),
        ("refined_rejected", pa.float64()),
    ]
)
"""A row per held-out pair, `pair` its place among those given."""

LABELS_SCHEMA = pa.schema(
    [
        *_ITEM,
        ("chosen_id", pa.int32()),
        ("rejected_id", pa.int32()),
        ("tie", pa.bool_()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("degenerate", pa.bool_()),
        ("kendall_tau_distance", pa.float64()),
        ("pacs_chosen", pa.float64()),
        ("pacs_rejected", pa.float64()),
        ("proxy_chosen", pa.float64()),
        ("proxy_rejected", pa.float64()),
        ("refined_chosen", pa.float64()),
        ("refined_rejected", pa.float64()),
    ]
)
"""A row per pair that was asked about and came to a preference or a tie; conflict and the proxy's rewards are those it
was chosen by."""


@dataclass(frozen=True)
class Models:
    """What makes each model."""

    start: Callable[[], Policy]
    """The policy before."""

    new: Callable[[], Policy]
    """The policy after. For the KL to be between the two, both are sampled at temperature 1 and top-p 1."""

    start_likelihood: Callable[[], ReferenceModel]
    """The policy before, as it reads the other's answers."""

    proxy: Callable[[], RewardModel]
    """The reward model before."""

    refined: Callable[[], RewardModel] | None = None
    """The reward model after; None where it was left as it was."""

    reference: Callable[[], ReferenceModel] | None = None
    """Of the `relative` likelihood."""


class Judged(Protocol):
    """What people said of a pair, such as `feedback.aggregate.PreferencePair`."""

    @property
    def prompt_id(self) -> str: ...  # noqa: D102
    @property
    def chosen_id(self) -> int: ...  # noqa: D102
    @property
    def rejected_id(self) -> int: ...  # noqa: D102
    @property
    def tie(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class Asked:
    """What was asked in a round, and what people said."""

    judged: Sequence[Judged]

    prompts: pa.Table
    """The round's `prompts.parquet`."""

    completions: pa.Table
    """The round's `completions.parquet`."""

    clusters: Mapping[str, str] | None = None
    """By prompt_id, as in `HeldOut`; by default, each prompt is one."""


def answers_table(
    held_out: HeldOut, models: Models, grader: Grader | None, n: int, progress: ProgressFactory
) -> pa.Table:
    """Sample both policies on the held-out prompts, and score what they say; `ANSWERS_SCHEMA`.

    Raises:
        DissonanceError: a policy gave another number of completions than n for each prompt.
    """
    tables = []
    for name, make in zip(POLICIES, (models.start, models.new), strict=True):
        sampled = _sample(make(), held_out.prompts, n, f"held-out answers, {name} policy", progress)
        gc.collect()  # the model is in no reach now; what it held is free for the next
        own = [c.logprob for _, completions in sampled for c in completions]
        columns = {"logprob": own, "start_logprob": own}
        if name == "new":
            columns["start_logprob"] = _likelihoods(models.start_likelihood, sampled, n, "start policy", progress)
        if models.reference is not None:
            columns["ref_logprob"] = _likelihoods(models.reference, sampled, n, "reference model", progress)
        tables.append(_answers(held_out, name, sampled, columns))
    table = pa.concat_tables(tables)
    messages = {prompt.prompt_id: prompt.messages for prompt in held_out.prompts}
    asked = [messages[prompt_id] for prompt_id in table["prompt_id"].to_pylist()]
    judges = {"gold": None if grader is None else grader.model, "proxy": models.proxy, "refined": models.refined}
    for name, judge in judges.items():
        if judge is not None:
            (values,) = _rewards(judge, asked, [table["text"].to_pylist()], f"{name} rewards", progress)
            table = _set(table, name, values)
    return table


_Sampled = list[tuple[list[Prompt], list[Completion]]]
"""By the policy's batches, so that another model reads what the policy could hold."""


def _sample(policy: Policy, prompts: Sequence[Prompt], n: int, label: str, progress: ProgressFactory) -> _Sampled:
    batches = policy.plan(prompts)
    if sorted(p.prompt_id for batch in batches for p in batch) != sorted(p.prompt_id for p in prompts):
        raise DissonanceError("the policy's plan does not hold each held-out prompt once")
    sampled: _Sampled = []
    with (
        progress(label, n * len(prompts), "completions") as advance,
        closing(overlapped(policy, batches, policy.sample)) as computed,
    ):
        for batch, completions in computed:
            if [(c.prompt_id, c.completion_id) for c in completions] != [
                (p.prompt_id, i) for p in batch for i in range(n)
            ]:
                raise DissonanceError(
                    f"the policy gave {len(completions)} completions for {len(batch)} prompts, not {n} for each in turn"
                )
            sampled.append((batch, completions))
            advance(len(completions))
    place = {prompt.prompt_id: at for at, batch in enumerate(batches) for prompt in batch}
    return sorted(sampled, key=lambda one: place[one[0][0].prompt_id])


def _likelihoods(
    make: Callable[[], ReferenceModel], sampled: _Sampled, n: int, label: str, progress: ProgressFactory
) -> list[float]:
    model = make()
    sums: list[float] = []
    with progress(f"likelihoods, {label}", sum(len(c) for _, c in sampled), "completions") as advance:
        for batch, completions in sampled:
            ids = [c.token_ids for c in completions]
            grouped = [ids[at : at + n] for at in range(0, len(ids), n)]
            sums += [value for values in model.logprobs(batch, grouped) for value in values]
            advance(len(ids))
    del model
    gc.collect()
    return sums


def _answers(held_out: HeldOut, policy: str, sampled: _Sampled, columns: dict[str, list[float]]) -> pa.Table:
    """The rows of one policy, in the order of the prompts, as yet without rewards."""
    rows = [c for _, completions in sampled for c in completions]
    place = {p.prompt_id: at for at, p in enumerate(held_out.prompts)}
    at = [place[c.prompt_id] for c in rows]
    clusters = held_out.cluster_of(held_out.prompts)
    table = {
        "policy": [policy] * len(rows),
        "prompt_id": [c.prompt_id for c in rows],
        "cluster": [clusters[i] for i in at],
        "category": [held_out.prompts[i].category for i in at],
        "completion_id": [c.completion_id for c in rows],
        "text": [c.text for c in rows],
        "n_tokens": [len(c.token_ids) for c in rows],
        "finish_reason": [c.finish_reason for c in rows],
        **columns,
    }
    return _filled(table, ANSWERS_SCHEMA).take(pa.array(np.argsort(at, kind="stable")))


def _filled(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """A table of the schema, null where there is no column."""
    rows = len(next(iter(columns.values())))
    return pa.table({f.name: columns.get(f.name, pa.nulls(rows, f.type)) for f in schema}, schema=schema)


def _set(table: pa.Table, name: str, values: list[float]) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place), pa.array(values, pa.float64()))


def _rewards(
    make: Callable[[], RewardModel],
    asked: Sequence[tuple[Message, ...]],
    texts: Sequence[list[str]],
    label: str,
    progress: ProgressFactory,
) -> list[list[float]]:
    """Rewards of each list of texts, all of which follow on `asked`.

    What is the same is scored once, so that no rounding breaks a tie between two policies.
    """
    keys = [list(zip(asked, some, strict=True)) for some in texts]
    wanted = list(dict.fromkeys(key for some in keys for key in some))
    values: dict[tuple[tuple[Message, ...], str], float] = {}
    model = make()
    with progress(label, len(wanted), "answers") as advance:
        for start in range(0, len(wanted), _SCORED_AT_ONCE):
            part = wanted[start : start + _SCORED_AT_ONCE]
            rewards = model.score([messages for messages, _ in part], [text for _, text in part])
            values |= {key: _finite(reward.value, key[1], label) for key, reward in zip(part, rewards, strict=True)}
            advance(len(part))
    del model
    gc.collect()
    return [[values[key] for key in some] for some in keys]


def _finite(reward: float, text: str, label: str) -> float:
    if not math.isfinite(reward):
        raise DataError(f"{label}: {reward} for {text[:60]!r}: rewards must be finite numbers")
    return reward


def pairs_table(held_out: HeldOut, models: Models, progress: ProgressFactory) -> pa.Table:
    """Score the held-out pairs that are no ties; `PAIRS_SCHEMA`."""
    kept = [(at, pair) for at, pair in enumerate(held_out.pairs) if not pair.tie]
    categories = {p.prompt_id: p.category for p in held_out.prompts}
    table = _filled(
        {
            "pair": [at for at, _ in kept],
            "prompt_id": [pair.prompt_id for _, pair in kept],
            "cluster": held_out.cluster_of([pair for _, pair in kept]),
            "category": [categories.get(pair.prompt_id) for _, pair in kept],
            "chosen": [pair.chosen for _, pair in kept],
            "rejected": [pair.rejected for _, pair in kept],
        },
        PAIRS_SCHEMA,
    )
    asked = [pair.messages for _, pair in kept]
    for name, judge in {"proxy": models.proxy, "refined": models.refined}.items():
        if judge is not None:
            table = _judged(table, judge, asked, name, f"{name} rewards of held-out pairs", progress)
    return table


def _judged(
    table: pa.Table,
    judge: Callable[[], RewardModel],
    asked: Sequence[tuple[Message, ...]],
    name: str,
    label: str,
    progress: ProgressFactory,
) -> pa.Table:
    """Fill in the rewards of the columns `chosen` and `rejected`."""
    sides = ("chosen", "rejected")
    found = _rewards(judge, asked, [table[side].to_pylist() for side in sides], label, progress)
    for side, values in zip(sides, found, strict=True):
        table = _set(table, f"{name}_{side}", values)
    return table


def labels_table(asked: Asked, models: Models, progress: ProgressFactory) -> pa.Table:
    """What people said beside what the reward models say, and the conflict it was asked for; `LABELS_SCHEMA`.

    Raises:
        DataError: a pair is about a completion that the tables do not hold, or a prompt has no cluster; with a refined
            reward model, the tables hold no messages or texts.
    """
    prompts = {row["prompt_id"]: row for row in asked.prompts.to_pylist()}
    names = pa.array({j.prompt_id for j in asked.judged}, pa.string())
    rows = asked.completions.filter(pc.is_in(asked.completions["prompt_id"], names)).to_pylist()
    answers = {(row["prompt_id"], row["completion_id"]): row for row in rows}
    sides = {
        "chosen": [_answer(answers, j.prompt_id, j.chosen_id) for j in asked.judged],
        "rejected": [_answer(answers, j.prompt_id, j.rejected_id) for j in asked.judged],
    }
    of = [prompts[j.prompt_id] for j in asked.judged]
    columns: dict[str, Any] = {
        "prompt_id": [j.prompt_id for j in asked.judged],
        "cluster": [_cluster(asked.clusters, j.prompt_id) for j in asked.judged],
        "category": [prompt.get("category") for prompt in of],
        "chosen_id": [j.chosen_id for j in asked.judged],
        "rejected_id": [j.rejected_id for j in asked.judged],
        "tie": [j.tie for j in asked.judged],
        "degenerate": [prompt["degenerate"] for prompt in of],
        "kendall_tau_distance": [prompt["kendall_tau_distance"] for prompt in of],
    }
    for side, some in sides.items():
        columns |= {side: [row.get("text") for row in some], f"proxy_{side}": [row["reward"] for row in some]}
        columns[f"pacs_{side}"] = [row["pacs"] for row in some]
    table = _filled(columns, LABELS_SCHEMA)
    if models.refined is None:
        return table
    if table["chosen"].null_count or table["rejected"].null_count or not all(prompt.get("messages") for prompt in of):
        raise DataError("the round's tables hold no messages or texts, which the refined reward model is to read")
    messages = [tuple(Message(m["role"], m["content"]) for m in prompt["messages"]) for prompt in of]
    return _judged(table, models.refined, messages, "refined", "refined rewards of what was asked", progress)


def _answer(answers: dict[tuple[str, int], dict[str, Any]], prompt_id: str, completion_id: int) -> dict[str, Any]:
    if (prompt_id, completion_id) not in answers:
        raise DataError(
            f"the round has no completion {completion_id} of prompt {prompt_id!r}, of which something was said"
        )
    return answers[prompt_id, completion_id]


def _cluster(clusters: Mapping[str, str] | None, prompt_id: str) -> str:
    if clusters is None:
        return prompt_id
    if prompt_id not in clusters:
        raise DataError(
            f"prompt {prompt_id!r}, which was asked about, has no cluster: give one for each, or none at all"
        )
    return clusters[prompt_id]
