"""Tables of answers, pairs and labels -> every figure of an evaluation, a JSON-able dict.

The tables alone decide the figures: whoever has the Parquet files can have each of them again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dissonance.config import EvaluationConfig
from dissonance.conflict import Conflicts, conflicts
from dissonance.evaluate.collect import POLICIES
from dissonance.evaluate.detection import correctness, detection, ordered_pairs, predictors
from dissonance.evaluate.statistics import Bootstrap, FloatArray, codes, kl_estimates, ratio_of, win_rates
from dissonance.likelihood import loglikelihood

Figures = dict[str, Any]
JUDGES = ("proxy", "refined", "gold")


@dataclass(frozen=True)
class Answers:
    """The answers of both policies to the same P prompts, N to each."""

    bootstrap: Bootstrap
    """Over the prompts."""

    columns: Mapping[str, Mapping[str, FloatArray]]
    """By policy and name, (P, N): logprob, start_logprob, loglikelihood (in the reading that conflict is measured in),
    n_tokens, unfinished, repeated; and gold, proxy, refined, those there are."""

    @property
    def judges(self) -> list[str]:
        """Which of `JUDGES` there are."""
        return [name for name in JUDGES if name in self.columns["start"]]

    def conflicts(self, policy: str, judge: str) -> Conflicts:
        """Of a policy's likelihoods with a judge's rewards, prompt by prompt."""
        own = self.columns[policy]
        prompts, n = own[judge].shape
        return conflicts(own[judge].ravel(), own["loglikelihood"].ravel(), np.arange(prompts + 1) * n)


def figures(answers: pa.Table, pairs: pa.Table | None, labels: pa.Table | None, config: EvaluationConfig) -> Figures:
    """Work out the evaluation.

    Args:
        answers: `ANSWERS_SCHEMA`.
        pairs: `PAIRS_SCHEMA`; None where there are no held-out pairs.
        labels: `LABELS_SCHEMA`; None where nothing was asked.
        config: likelihood, gold_tie, bands, replicates and seed count.

    Returns:
        The keys that docs/evaluate.md lists. An interval is {"mean", "low", "high"}; null where nothing is to average.
    """
    read = read_answers(answers, config)
    prompts, n = read.columns["start"]["logprob"].shape
    return {
        "prompts": prompts,
        "clusters": read.bootstrap.clusters,
        "completions": n,
        "gold_reward": _gold(read, config),
        "by_category": _by_category(answers, config),
        "reward_accuracy": {
            **{policy: _sampled_accuracy(read, policy, config) for policy in POLICIES},
            "pairs": None if pairs is None else _paired_accuracy(pairs, config),
        },
        "conflict": _conflict(read),
        "kl": _kl(read),
        "entropy": _entropy(read),
        "length": _change(read, "n_tokens"),
        "unfinished": _change(read, "unfinished"),
        "repeated_answers": _change(read, "repeated"),
        "error_detection": {
            "held_out": _held_out_detection(read, config),
            "asked": None if labels is None else _asked_detection(labels, config),
        },
        "asked": None if labels is None else _paired_accuracy(labels, config),
        "bootstrap": {"replicates": config.replicates, "seed": config.seed, "level": 0.95},
    }


def read_answers(table: pa.Table, config: EvaluationConfig) -> Answers:
    """Arrange the rows of `ANSWERS_SCHEMA`."""
    rows = {policy: table.filter(pc.equal(table["policy"], policy)) for policy in POLICIES}
    prompts = rows["start"].filter(pc.equal(rows["start"]["completion_id"], 0))
    return Answers(
        _bootstrap(prompts, config), {policy: _columns(some, len(prompts), config) for policy, some in rows.items()}
    )


def _columns(rows: pa.Table, prompts: int, config: EvaluationConfig) -> dict[str, FloatArray]:
    found = {"loglikelihood": loglikelihood(rows, config.likelihood)}
    for name in ("logprob", "start_logprob", "n_tokens", *JUDGES):
        if not rows[name].null_count:
            found[name] = rows[name].to_numpy().astype(np.float64)
    found["unfinished"] = np.array([reason == "length" for reason in rows["finish_reason"].to_pylist()], np.float64)
    texts, _ = codes(rows["text"].to_pylist())
    found["repeated"] = _repeats(texts.reshape(prompts, -1)).ravel()
    return {name: values.reshape(prompts, -1) for name, values in found.items()}


def _repeats(texts: Any) -> FloatArray:
    """1 where an answer is that of an earlier one of its prompt; texts are codes, (P, N)."""
    same = texts[:, :, None] == texts[:, None, :]
    repeats: FloatArray = np.tril(same, k=-1).any(axis=2).astype(np.float64)
    return repeats


def _bootstrap(table: pa.Table, config: EvaluationConfig) -> Bootstrap:
    cluster, _ = codes(table["cluster"].to_pylist())
    return Bootstrap(cluster, config.replicates, config.seed)


def _change(read: Answers, name: str) -> Figures:
    """Means over the prompts of a column, and of its change."""
    start, new = (read.columns[policy][name].mean(axis=1) for policy in POLICIES)
    mean = read.bootstrap.mean
    return {"start": mean(start), "new": mean(new), "change": mean(new - start)}


def _gold(read: Answers, config: EvaluationConfig) -> Figures | None:
    if "gold" not in read.judges:
        return None
    start, new = (read.columns[policy]["gold"] for policy in POLICIES)
    wins = win_rates(new, start, config.gold_tie)
    return {**_change(read, "gold"), "win_rate": read.bootstrap.mean(wins)}


def _by_category(table: pa.Table, config: EvaluationConfig) -> Figures:
    """What depends on gold, for the prompts of each category alone; prompts without a category are left out."""
    found = {}
    for name in sorted(set(table["category"].drop_null().to_pylist())):
        read = read_answers(table.filter(pc.equal(table["category"], name)), config)
        found[name] = {
            "prompts": len(read.bootstrap.cluster),
            "clusters": read.bootstrap.clusters,
            "gold_reward": _gold(read, config),
            "reward_accuracy": {policy: _sampled_accuracy(read, policy, config) for policy in POLICIES},
        }
    return found


def _sampled_accuracy(read: Answers, policy: str, config: EvaluationConfig) -> Figures | None:
    """Of the reward models, on all pairs of a policy's answers to one prompt that gold tells apart."""
    if "gold" not in read.judges:
        return None
    own = read.columns[policy]
    pairs = ordered_pairs(own["gold"], config.gold_tie)
    margins = {judge: pairs.margin(own[judge]) for judge in read.judges if judge != "gold"}
    n = own["gold"].shape[1]
    ties = len(own["gold"]) * n * (n - 1) // 2 - pairs.prompt.size
    return _accuracy(margins, read.bootstrap.under(pairs.prompt), ties)


def _paired_accuracy(table: pa.Table, config: EvaluationConfig) -> Figures:
    """Of the reward models, on pairs of known order."""
    ties = pc.sum(table["tie"]).as_py() or 0 if "tie" in table.column_names else 0
    kept = table.filter(pc.invert(table["tie"])) if ties else table
    margins = {judge: _margin(kept, judge) for judge in ("proxy", "refined") if not kept[f"{judge}_chosen"].null_count}
    return _accuracy(margins, _bootstrap(kept, config), ties)


def _margin(table: pa.Table, judge: str) -> FloatArray:
    chosen, rejected = (table[f"{judge}_{side}"].to_numpy() for side in ("chosen", "rejected"))
    margin: FloatArray = chosen - rejected
    return margin


def _accuracy(margins: Mapping[str, FloatArray], bootstrap: Bootstrap, ties: int) -> Figures:
    right = {judge: correctness(margin) for judge, margin in margins.items()}
    proxy, refined = right["proxy"], right.get("refined")
    return {
        "pairs": proxy.size,
        "ties": ties,
        "proxy": bootstrap.mean(proxy),
        "refined": None if refined is None else bootstrap.mean(refined),
        "change": None if refined is None else bootstrap.mean(refined - proxy),
    }


def _conflict(read: Answers) -> Figures:
    """K of both policies against every judge, and how it changed from before to after."""
    found = {policy: {judge: read.conflicts(policy, judge) for judge in read.judges} for policy in POLICIES}
    before, after = found["start"]["proxy"], found["new"]["refined" if "refined" in read.judges else "proxy"]
    both = np.flatnonzero(~before.degenerate & ~after.degenerate)
    mean = read.bootstrap.under(both).mean
    return {
        **{policy: {judge: _distance(read, some) for judge, some in of.items()} for policy, of in found.items()},
        "change": {
            "kendall_tau_distance": mean((after.kendall_tau_distance - before.kendall_tau_distance)[both]),
            "distinct_distance": mean((after.distinct_distance - before.distinct_distance)[both]),
        },
    }


def _distance(read: Answers, found: Conflicts) -> Figures:
    proper = np.flatnonzero(~found.degenerate)
    mean = read.bootstrap.under(proper).mean
    return {
        "kendall_tau_distance": mean(found.kendall_tau_distance[proper]),
        "null_mean": float(np.mean((1 - found.tied_share[proper]) / 2)) if proper.size else None,
        "distinct_distance": mean(found.distinct_distance[proper]),
        "degenerate": int(found.degenerate.sum()),
    }


def _kl(read: Answers) -> Figures:
    """KL(new || start), nats a completion, from the new policy's own answers."""
    own = read.columns["new"]
    k1, k3, weight = kl_estimates(own["logprob"], own["start_logprob"])
    mean = read.bootstrap.mean
    return {
        "k3": mean(k3.mean(axis=1)),
        "k1": mean(k1.mean(axis=1)),
        "k1_per_token": read.bootstrap.ratio(k1.sum(axis=1), own["n_tokens"].sum(axis=1)),
        "importance_weight": mean(weight.mean(axis=1)),
    }


def _entropy(read: Answers) -> Figures:
    """Nats a token: -log pi of all tokens of a policy's own answers, over their number."""
    sums = {
        policy: (-read.columns[policy]["logprob"].sum(axis=1), read.columns[policy]["n_tokens"].sum(axis=1))
        for policy in POLICIES
    }
    start, new = (ratio_of(*map(read.bootstrap.sums, sums[policy])) for policy in POLICIES)
    return {
        **{policy: read.bootstrap.ratio(*some) for policy, some in sums.items()},
        "change": read.bootstrap.interval(lambda weights: new(weights) - start(weights)),
    }


def _held_out_detection(read: Answers, config: EvaluationConfig) -> Figures | None:
    """Of the proxy's errors on all pairs of the start policy's answers: chosen by nobody, so that nothing is skewed."""
    if "gold" not in read.judges:
        return None
    own, found = read.columns["start"], read.conflicts("start", "proxy")
    gold = np.where(found.degenerate[:, None], 0.0, own["gold"])  # no pairs of prompts that show no conflict either way
    pairs = ordered_pairs(gold, config.gold_tie)
    pacs = found.pacs.reshape(gold.shape)
    scores = predictors(
        found.kendall_tau_distance[pairs.prompt],
        (pacs[pairs.prompt, pairs.better], pacs[pairs.prompt, pairs.worse]),
        margin := pairs.margin(own["proxy"]),
    )
    return detection(margin, scores, read.bootstrap.under(pairs.prompt), config.bands)


def _asked_detection(table: pa.Table, config: EvaluationConfig) -> Figures:
    """Of the proxy's errors on what was asked."""
    kept = table.filter(pc.invert(pc.or_(table["tie"], table["degenerate"])))
    margin = _margin(kept, "proxy")
    pacs = (kept["pacs_chosen"].to_numpy(), kept["pacs_rejected"].to_numpy())
    scores = predictors(kept["kendall_tau_distance"].to_numpy(), pacs, margin)
    return detection(margin, scores, _bootstrap(kept, config), config.bands)
