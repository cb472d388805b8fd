"""What a strategy chooses from: every prompt's conflict and every completion's scores, as flat arrays."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dissonance.errors import DataError
from dissonance.likelihood import Likelihood, has_reading, loglikelihood

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Pool:
    """P prompts and their R completions; those of prompt p stand at `offsets[p]:offsets[p + 1]`.

    A flat index is a position in 0..R-1. Built once per round by `pool_from_tables`; raises DataError, naming
    the prompt, for arrays that do not fit together or values that are not numbers.
    """

    prompt_ids: tuple[str, ...]
    """P, distinct."""

    kendall_tau_distance: FloatArray
    """(P,), in [0, 1]."""

    degenerate: NDArray[np.bool_]
    """(P,): rewards or log-likelihoods are constant, so that conflict says nothing."""

    offsets: IntArray
    """(P + 1,): where each prompt's completions start; every prompt has at least one."""

    completion_ids: IntArray
    """(R,), distinct within the prompt."""

    reward: FloatArray
    """(R,), higher is better."""

    loglikelihood: FloatArray
    """(R,), nats, in the reading the conflicts were computed with."""

    pacs: FloatArray
    """(R,), z(reward) - z(loglikelihood)."""

    text_codes: IntArray
    """(R,): within a prompt, equal if and only if the texts are."""

    member_rewards: FloatArray | None = None
    """(R, K): the rewards of an ensemble's K >= 2 members, where there is one."""

    implicit_reward: FloatArray | None = None
    """(R,): log pi(y | x) - log pi_ref(y | x), nats, where there is a reference model: DPO's reward over its beta."""

    mean_loglikelihood: FloatArray | None = None
    """(R,): nats per token, where the answers' lengths are known."""

    def __post_init__(self) -> None:
        self._check_shapes()
        self._check_values()

    def __len__(self) -> int:
        """Count the prompts, P."""
        return len(self.prompt_ids)

    @cached_property
    def prompt_of(self) -> IntArray:
        """(R,): the prompt, 0..P-1, of each completion."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @cached_property
    def z_reward(self) -> FloatArray:
        """(R,): the rewards' z-scores within the prompt; 0 where they are constant."""
        return _standardized(self.reward, self.offsets)

    @cached_property
    def z_loglikelihood(self) -> FloatArray:
        """(R,): the log-likelihoods' z-scores within the prompt, likewise."""
        return _standardized(self.loglikelihood, self.offsets)

    @cached_property
    def answers(self) -> IntArray:
        """Flat indices, ascending, of the first completion with each text of each prompt: one per distinct text.

        Strategies choose among these alone, so that identical texts are neither compared nor rated twice.
        """
        order = np.lexsort((self.text_codes, self.prompt_of))
        codes, prompts = self.text_codes[order], self.prompt_of[order]
        first = np.ones(len(order), dtype=bool)
        first[1:] = (codes[1:] != codes[:-1]) | (prompts[1:] != prompts[:-1])
        return np.sort(order[first])

    @cached_property
    def answer_offsets(self) -> IntArray:
        """(P + 1,): where each prompt's part of `answers` starts."""
        return np.searchsorted(self.answers, self.offsets)

    @cached_property
    def n_answers(self) -> IntArray:
        """(P,): distinct texts of each prompt."""
        return np.diff(self.answer_offsets)

    def _check_shapes(self) -> None:
        n_prompts, n_rows = len(self.prompt_ids), len(self.completion_ids)
        per_prompt = {"kendall_tau_distance": n_prompts, "degenerate": n_prompts, "offsets": n_prompts + 1}
        per_row = dict.fromkeys(("reward", "loglikelihood", "pacs", "text_codes"), n_rows)
        for name, length in (per_prompt | per_row).items():
            if getattr(self, name).shape != (length,):
                raise DataError(f"pool: {name} has shape {getattr(self, name).shape}, expected ({length},)")
        for name in ("mean_loglikelihood", "implicit_reward"):
            if (values := getattr(self, name)) is not None and values.shape != (n_rows,):
                raise DataError(f"pool: {name} has shape {values.shape}, expected ({n_rows},)")
        members = self.member_rewards
        if members is not None and (members.ndim != 2 or len(members) != n_rows or members.shape[1] < 2):
            raise DataError(f"pool: member_rewards has shape {members.shape}, expected ({n_rows}, 2 or more)")
        if self.offsets[0] != 0 or self.offsets[-1] != n_rows:
            raise DataError(f"pool: offsets run from {self.offsets[0]} to {self.offsets[-1]}, expected 0 to {n_rows}")
        self._refuse_prompts(np.diff(self.offsets) < 1, "has no completions: score it, or leave it out")
        if len(set(self.prompt_ids)) != n_prompts:
            raise DataError("pool: a prompt_id stands for two prompts: make the ids unique")

    def _check_values(self) -> None:
        k = self.kendall_tau_distance
        self._refuse_prompts(~((k >= 0) & (k <= 1)), "has a kendall_tau_distance outside [0, 1]")
        for name in ("reward", "loglikelihood", "pacs", "mean_loglikelihood", "implicit_reward"):
            if (values := getattr(self, name)) is not None:
                self._refuse_rows(~np.isfinite(values), f"has a completion whose {name} is not a finite number")
        if self.member_rewards is not None:
            self._refuse_rows(
                np.asarray(~np.isfinite(self.member_rewards).all(axis=1)), "has member_rewards that are no numbers"
            )
        order = np.lexsort((self.completion_ids, self.prompt_of))
        ids, prompts = self.completion_ids[order], self.prompt_of[order]
        repeated = np.zeros(len(order), dtype=bool)
        repeated[order[1:]] = (ids[1:] == ids[:-1]) & (prompts[1:] == prompts[:-1])
        self._refuse_rows(repeated, "has two completions with the same completion_id")

    def _refuse_prompts(self, bad: NDArray[np.bool_], problem: str) -> None:
        if bad.any():
            raise DataError(f"prompt {self.prompt_ids[int(np.argmax(bad))]!r} {problem}")

    def _refuse_rows(self, bad: NDArray[np.bool_], problem: str) -> None:
        if bad.any():
            raise DataError(f"prompt {self.prompt_ids[int(self.prompt_of[np.argmax(bad)])]!r} {problem}")


def _standardized(values: FloatArray, offsets: IntArray) -> FloatArray:
    if not values.size:
        return values
    sizes, starts = np.diff(offsets), offsets[:-1]
    centred = values - np.repeat(np.add.reduceat(values, starts) / sizes, sizes)
    deviation = np.sqrt(np.add.reduceat(centred**2, starts) / sizes)
    scores: FloatArray = centred / np.repeat(np.where(deviation > 0, deviation, 1.0), sizes)
    return scores


def pool_from_tables(prompts: pa.Table, completions: pa.Table, likelihood: Likelihood) -> Pool:
    """Build the pool of a run from its two tables (`records.PROMPTS_SCHEMA`, `records.COMPLETIONS_SCHEMA`).

    Rows may stand in any order; within a prompt the pool's run by completion_id. Without a text, or without the
    column, a completion counts as distinct from all others.
    """
    prompt_index = pc.index_in(completions["prompt_id"], value_set=prompts["prompt_id"].combine_chunks())
    if prompt_index.null_count:
        stray = completions["prompt_id"].filter(prompt_index.is_null())[0].as_py()
        raise DataError(f"prompt {stray!r} has completions, but no row in the table of prompts")
    prompt_of = prompt_index.to_numpy().astype(np.int64)
    completion_ids = _numbers(completions, "completion_id", pa.int64())
    order = np.lexsort((completion_ids, prompt_of))
    return Pool(
        prompt_ids=tuple(prompts["prompt_id"].to_pylist()),
        kendall_tau_distance=_numbers(prompts, "kendall_tau_distance", pa.float64()),
        degenerate=_numbers(prompts, "degenerate", pa.bool_()),
        offsets=np.concatenate(([0], np.cumsum(np.bincount(prompt_of, minlength=len(prompts))))),
        completion_ids=completion_ids[order],
        reward=_numbers(completions, "reward", pa.float64())[order],
        loglikelihood=loglikelihood(completions, likelihood)[order],
        pacs=_numbers(completions, "pacs", pa.float64())[order],
        text_codes=_text_codes(completions)[order],
        member_rewards=None if (members := _member_rewards(completions)) is None else members[order],
        mean_loglikelihood=_reading(completions, "mean", order),
        implicit_reward=_reading(completions, "relative", order),
    )


def _reading(completions: pa.Table, name: Likelihood, order: IntArray) -> FloatArray | None:
    return loglikelihood(completions, name)[order] if has_reading(completions, name) else None


def _numbers(table: pa.Table, name: str, dtype: pa.DataType) -> NDArray[Any]:
    if table[name].null_count:
        row = table[name].is_null().index(True).as_py()
        raise DataError(f"prompt {table['prompt_id'][row].as_py()!r} has no {name}")
    values: NDArray[Any] = table[name].cast(dtype).to_numpy()
    return values


def _member_rewards(completions: pa.Table) -> FloatArray | None:
    """The optional column `member_rewards`, one list of equally many rewards for each completion."""
    if "member_rewards" not in completions.column_names or not len(completions):
        return None
    column = completions["member_rewards"].combine_chunks()
    lengths = pc.list_value_length(column)
    if lengths.null_count or pc.min(lengths).as_py() != pc.max(lengths).as_py():
        raise DataError("member_rewards holds lists of different lengths: score all completions with the same models")
    flat = column.flatten().cast(pa.float64()).to_numpy(zero_copy_only=False)
    members: FloatArray = flat.reshape(len(completions), lengths[0].as_py())
    return members


def _text_codes(completions: pa.Table) -> IntArray:
    n_rows = len(completions)
    if "text" not in completions.column_names or not n_rows:
        return np.arange(n_rows)
    encoded = completions["text"].dictionary_encode().unify_dictionaries()
    indices = pa.chunked_array([chunk.indices for chunk in encoded.chunks])
    alone = indices.is_null().to_numpy()
    codes: IntArray = indices.fill_null(0).to_numpy().astype(np.int64)
    return np.where(alone, n_rows + np.arange(n_rows), codes)
