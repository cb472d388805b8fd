"""Does conflict predict the proxy's errors? Every measure against the exact gold, pair by pair and prompt by prompt."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

import numpy as np

from dissonance.bench.setting import Answers, Setting
from dissonance.conflict import Conflicts, conflicts
from dissonance.evaluate.detection import Ordered, correctness, ordered_pairs, predictors
from dissonance.evaluate.statistics import auc_of
from dissonance.likelihood import LIKELIHOODS, loglikelihood
from dissonance.sandbox import World, cell
from dissonance.sandbox.world import Cell
from dissonance.selection.pool import FloatArray

BANDS = 10
_POLICY_KNOWS = ("both", "policy_only")


def detect(setting: Setting, world: World) -> dict[str, Any]:
    """A setting's `rows`, one per subset, N, level and metric, and the error rate by decile of each metric in `bands`.

    Subsets are all prompts, those of categories that the policy knows, and each cell of the 2 x 2. A pair's error is 1
    where the proxy prefers the answer that gold does not, 1/2 where it prefers neither; a prompt's is 1 where the proxy
    errs on more than half of its pairs. `auc` is the chance that an error scores higher than the rest, `correlation`
    Pearson's, with the pair's error or the prompt's share of errors.
    """
    answers = setting.pool
    where = np.array([cell(world, category) for category in answers.prompts["category"].to_pylist()])
    subsets = {
        "all": np.ones(where.size, bool),
        "policy_knows": np.isin(where, _POLICY_KNOWS),
        **{name: where == name for name in get_args(Cell)},
    }
    rows = []
    n = answers.gold.shape[1]
    for size in sorted({max(2, n // 2), n}):
        pairs, scores = _measures(answers, size)
        error = 1 - correctness(pairs.margin(answers.reward))
        for subset, kept in subsets.items():
            for level, found in (("pair", _by_pair), ("prompt", _by_prompt)):
                known = {"subset": subset, "n": size, "level": level}
                rows += [{**known, **row} for row in found(pairs, error, scores, kept)]
    return {"rows": rows, "bands": _bands(error, scores)}


def _measures(answers: Answers, n: int) -> tuple[Ordered, dict[str, FloatArray]]:
    """The pairs among the first n answers to each prompt, and every measure of each."""
    shape = answers.gold.shape
    pairs = ordered_pairs(answers.gold[:, :n])
    margin = pairs.margin(answers.reward)
    scores: dict[str, FloatArray] = {}
    for likelihood in LIKELIHOODS:
        ll = loglikelihood(answers.completions, likelihood).reshape(shape)[:, :n]
        found = _conflicts(answers.reward[:, :n], ll)
        pacs = found.pacs.reshape(-1, n)
        of = pacs[pairs.prompt, pairs.better], pacs[pairs.prompt, pairs.worse]
        for name, values in predictors(found.kendall_tau_distance[pairs.prompt], of, margin).items():
            scores[name if name == "reward_margin" else f"{name}_{likelihood}"] = values
    members = np.array(answers.completions["member_rewards"].to_pylist()).reshape(*shape, -1)
    gaps = members[pairs.prompt, pairs.better] - members[pairs.prompt, pairs.worse]
    return pairs, {**scores, "ensemble_sd": gaps.std(axis=1)}


def _conflicts(reward: FloatArray, ll: FloatArray) -> Conflicts:
    return conflicts(reward.ravel(), ll.ravel(), np.arange(len(reward) + 1) * reward.shape[1])


def _by_pair(
    pairs: Ordered, error: FloatArray, scores: Mapping[str, FloatArray], kept: np.ndarray[Any, np.dtype[np.bool_]]
) -> Iterator[dict[str, Any]]:
    inside = kept[pairs.prompt]
    for metric, values in scores.items():
        yield {"metric": metric, **_related(values[inside], error[inside], error[inside])}


def _by_prompt(
    pairs: Ordered, error: FloatArray, scores: Mapping[str, FloatArray], kept: np.ndarray[Any, np.dtype[np.bool_]]
) -> Iterator[dict[str, Any]]:
    counts = np.bincount(pairs.prompt, minlength=kept.size)
    inside = kept & (counts > 0)

    def mean(values: FloatArray) -> FloatArray:
        total: FloatArray = np.bincount(pairs.prompt, values, kept.size)[inside] / counts[inside]
        return total

    share = mean(error)
    for metric, values in scores.items():
        yield {"metric": metric, **_related(mean(values), (share > 0.5).astype(np.float64), share)}


def _related(values: FloatArray, wrong: FloatArray, share: FloatArray) -> dict[str, float | None]:
    if not values.size:
        return {"auc": None, "correlation": None, "error": None}
    auc = float(auc_of(values, wrong, np.zeros(values.size, np.int64))(np.ones((1, 1)))[0])
    varied = np.ptp(values) > 0 and np.ptp(share) > 0
    return {
        "auc": None if np.isnan(auc) else auc,
        "correlation": float(np.corrcoef(values, share)[0, 1]) if varied else None,
        "error": float(share.mean()),
    }


def _bands(error: FloatArray, scores: Mapping[str, FloatArray]) -> dict[str, list[float] | None]:
    """Error rate by tenth of the pairs, lowest scores first; None of fewer pairs than tenths."""
    return {
        metric: [float(part.mean()) for part in np.array_split(error[np.argsort(values, kind="stable")], BANDS)]
        if error.size >= BANDS
        else None
        for metric, values in scores.items()
    }
