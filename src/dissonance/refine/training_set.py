"""Preferences -> token ids that fit a classifier, and what becomes of those that do not."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dissonance.classifier import Classifier
from dissonance.conversation_encoder import TokenIds
from dissonance.errors import DataError
from dissonance.records import Preference
from dissonance.refine.losses import PairBatch

_NAMED = 1_000
_INTEGERS = ("chosen_bin", "rejected_bin")
COLUMNS = ("target", "weight", "chosen_sign", "rejected_sign", *_INTEGERS)
"""The fields of a `PairBatch`, which are columns of a training set."""


@dataclass(frozen=True, slots=True)
class EncodedPairs:
    """Preferences with the token ids of both sides."""

    pairs: tuple[Preference, ...] = ()
    chosen: tuple[TokenIds, ...] = ()
    rejected: tuple[TokenIds, ...] = ()

    def __len__(self) -> int:
        """How many pairs."""
        return len(self.pairs)

    def first(self, n: int) -> "EncodedPairs":
        """At most so many of them."""
        return EncodedPairs(self.pairs[:n], self.chosen[:n], self.rejected[:n])

    def reweighted(self, pairs: Sequence[Preference]) -> "EncodedPairs":
        """The same with other weights."""
        return EncodedPairs(tuple(pairs), self.chosen, self.rejected)

    def __add__(self, other: "EncodedPairs") -> "EncodedPairs":
        """These and then the others."""
        return EncodedPairs(self.pairs + other.pairs, self.chosen + other.chosen, self.rejected + other.rejected)

    @property
    def rows(self) -> list[TokenIds]:
        """Both sides, first all that are chosen."""
        return [*self.chosen, *self.rejected]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The pairs that cannot be trained on, by their place in what was given."""

    too_long: tuple[dict[str, Any], ...] = ()
    """row (from 0), prompt_id, and the tokens of the longer side."""
    same_text: tuple[dict[str, Any], ...] = ()
    """row and prompt_id: the model reads both sides alike."""

    def summary(self) -> dict[str, Any]:
        """Counts, and the names of the first thousand of each."""
        return {
            "too_long": len(self.too_long),
            "same_text": len(self.same_text),
            "too_long_pairs": list(self.too_long[:_NAMED]),
            "same_text_pairs": list(self.same_text[:_NAMED]),
        }


def encode_pairs(
    classifier: Classifier,
    pairs: Sequence[Preference],
    name: str,
    max_left_out: float,
    rows: Sequence[int] | None = None,
) -> tuple[EncodedPairs, LeftOut]:
    """Encode both sides of every pair, and leave out what does not fit the model or reads the same.

    Cutting would do no harm to a text that is scored; but two texts of which different parts are missing are no longer
    the two that somebody compared.

    Args:
        classifier: whose tokenizer, template and length hold.
        pairs: any number.
        name: of the set, for the error.
        max_left_out: the largest share that may be too long.
        rows: where the pairs stood before they were drawn; by default 0, 1, ...

    Raises:
        DataError: more of the pairs are too long.
    """
    conversations = [pair.messages for pair in pairs]
    answers = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    ids = classifier.encode(conversations * 2, answers[0] + answers[1])
    sides = list(zip(ids[: len(pairs)], ids[len(pairs) :], strict=True))
    names = [
        {"row": row, "prompt_id": pair.prompt_id} for row, pair in zip(rows or range(len(pairs)), pairs, strict=True)
    ]
    lengths = [max(map(len, both)) for both in sides]
    too_long = [i for i, length in enumerate(lengths) if length > classifier.max_length]
    if len(too_long) > max_left_out * len(pairs):
        first = "row {row}, prompt {prompt_id!r}".format(**names[too_long[0]])
        raise DataError(
            f"{len(too_long):,} of {len(pairs):,} {name} pairs are longer than the {classifier.max_length:,} tokens "
            f"that the reward model reads (the first: {first}): raise its max_length, or max_left_out"
        )
    same = [i for i, both in enumerate(sides) if both[0] == both[1] and lengths[i] <= classifier.max_length]
    gone = {*too_long, *same}
    kept = [i for i in range(len(pairs)) if i not in gone]
    encoded = EncodedPairs(
        tuple(pairs[i] for i in kept), tuple(sides[i][0] for i in kept), tuple(sides[i][1] for i in kept)
    )
    return encoded, LeftOut(tuple({**names[i], "tokens": lengths[i]} for i in too_long), tuple(names[i] for i in same))


def columns(pairs: Sequence[Preference], bins: Sequence[tuple[int, int]]) -> dict[str, list[float]]:
    """The columns of `COLUMNS` for pairs, with the length bins of their two sides."""
    return {
        "target": [0.5 if pair.tie else 1.0 for pair in pairs],
        "weight": [pair.weight for pair in pairs],
        "chosen_sign": [_sign(pair.chosen_safe) for pair in pairs],
        "rejected_sign": [_sign(pair.rejected_safe) for pair in pairs],
        "chosen_bin": [chosen for chosen, _ in bins],
        "rejected_bin": [rejected for _, rejected in bins],
    }


def _sign(safe: bool | None) -> float:
    return 0.0 if safe is None else -1.0 if safe else 1.0


def pair_batch(values: Mapping[str, Any]) -> PairBatch:
    """The columns as tensors."""
    types = {name: torch.int64 if name in _INTEGERS else torch.float32 for name in COLUMNS}
    return PairBatch(**{name: torch.as_tensor(values[name], dtype=types[name]) for name in COLUMNS})


def collate(classifier: Classifier, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of examples: what the model takes, for first all chosen and then all rejected rows, and the columns."""
    rows = [tuple(example[side]) for side in ("chosen_ids", "rejected_ids") for example in examples]
    values = pair_batch({name: [example[name] for example in examples] for name in COLUMNS})
    return {**classifier.inputs(rows), **{name: getattr(values, name) for name in COLUMNS}}


def length_bins(classifier: Classifier, pairs: Sequence[Preference], n_bins: int) -> list[tuple[int, int]]:
    """The bin, 0..n_bins-1, of each pair's two answers: bins of equally many answers, by tokens.

    Where many answers are equally long there are fewer bins.
    """
    lengths = np.array(
        [_tokens(classifier, (p.chosen for p in pairs)), _tokens(classifier, (p.rejected for p in pairs))]
    )
    edges = np.unique(np.quantile(lengths, np.arange(1, n_bins) / n_bins, method="higher"))
    chosen, rejected = np.searchsorted(edges, lengths, side="right").tolist()
    return list(zip(chosen, rejected, strict=True))


def _tokens(classifier: Classifier, answers: Iterable[str]) -> list[int]:
    encoded = classifier.tokenizer(list(answers), add_special_tokens=False, verbose=False)["input_ids"]
    return [len(ids) for ids in encoded]
