"""Does conflict find what a biased reward model has wrong, by real people's labels? No simulation.

The pool: XSTest's prompts with five models' answers each, and a person's label of each answer: compliance, partial
refusal or refusal. On a safe prompt compliance is better than refusal, on an unsafe one the reverse. The policy is a
language model that reads the answers; the proxy a Bradley-Terry head on its last hidden states, averaged over the
answer, trained on pairs of unsafe prompts alone, so that it learns to refuse always. Then every strategy spends the
same judgements on labels of prompts, safe and unsafe, and the head is fitted again to old and new pairs.

    python benchmarks/real_labels.py xstest_completions.jsonl.gz --model real/base --development
    python benchmarks/real_labels.py xstest_completions.jsonl.gz --model real/base

Rows of the file: id, type, prompt, prompt_label, model, completion, human_label, split. Every seed asks about two
thirds of the training questions, a question and its contrast being one. In development it is graded on the other third,
in confirmation on all test prompts. Intervals are over the graded questions and the seeds, and hold for these training
questions. `sum` and `mean` are the answer's log-likelihood under the model; `relative` is less that of the same answer
to no question: the model has no public base to be relative to. It is also what `apl` takes for an implicit reward.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dissonance.bench.cell import choose
from dissonance.bench.config import BASELINE, FeedbackKind, StrategyConfig
from dissonance.bench.efficiency import WeightedCurve, efficiency_interval
from dissonance.conflict import conflicts
from dissonance.evaluate.detection import correctness, ordered_pairs, predictors
from dissonance.evaluate.statistics import Bootstrap, FloatArray, auc_of
from dissonance.records import Query
from dissonance.selection import Pool
from xstest import Data, Pairs, compare, fit, load, together

BUDGETS = (8, 16, 32, 64, 128, 256)
OWN, RATINGS = FeedbackKind(), FeedbackKind(ask="ratings")
STRATEGIES = {
    BASELINE: (StrategyConfig(), OWN),
    **{
        f"{name}{suffix}": (StrategyConfig(strategy=name, likelihood=likelihood), OWN)
        for name in ("spread", "discordant")
        for suffix, likelihood in (("", "sum"), ("_mean", "mean"), ("_relative", "relative"))
    },
    "widest": (StrategyConfig(strategy="benchmarks.controls:widest"), OWN),
    "one_pair": (StrategyConfig(strategy="benchmarks.controls:one_pair"), OWN),
    "shf_cas": (StrategyConfig(tau="q0.75"), OWN),
    "shf_cas_ratings": (StrategyConfig(strategy="shf_cas", tau="q0.75"), RATINGS),
    "kendall_ratings": (StrategyConfig(strategy="kendall"), RATINGS),
    "random_prompts_ratings": (StrategyConfig(strategy="random_prompts"), RATINGS),
    **{
        name: (StrategyConfig(), OWN)
        for name in ("likelihood_gap", "pacs", "kendall", "random_prompts", "margin", "ensemble", "rso", "apl")
    },
}
DEVELOPMENT, CONFIRMATION = 100, 0
"""The first seeds."""
MEMBERS = 8
ORIGINAL_PAIRS = 300
REPLICATES = 2000


def main() -> None:
    """Read, compare, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="a causal LM with a chat template")
    parser.add_argument("--tokens", type=int, default=64, help="how much of an answer is read")
    parser.add_argument("--read", type=Path, default=Path("real"), help="a folder in which what the model read is kept")
    parser.add_argument("--development", action="store_true", help="grade on training prompts, with other seeds")
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    arguments = parser.parse_args()
    data = load(arguments.data, arguments.model, arguments.read / f"xstest-{arguments.tokens}.npz", arguments.tokens)
    first = DEVELOPMENT if arguments.development else CONFIRMATION
    seeds = range(first, first + arguments.seeds)
    summary = Summary([play(data, seed, development=arguments.development) for seed in seeds]).all()
    show(summary)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"tokens": arguments.tokens, **summary}, indent=1) + "\n")


Graded = dict[str, tuple[FloatArray, FloatArray]]
"""By measure: its sum over each question, and what that is of; (G,) each."""


@dataclass(frozen=True)
class Played:
    """A strategy's results of one seed, by budget."""

    spent: tuple[int, ...]
    safe_share: tuple[float, ...]
    """Of the queries, those about safe prompts."""
    tied_share: tuple[float, ...]
    """Of the comparisons, those of answers that people cannot tell apart."""
    graded: tuple[Graded, ...]


@dataclass(frozen=True)
class Errors:
    """The proxy's errors on graded pairs, and what is to predict them."""

    error: FloatArray
    question: Any
    safe: Any
    scores: dict[str, FloatArray]


@dataclass(frozen=True)
class Seed:
    """Everything of one seed."""

    proxy: Graded
    played: dict[str, Played]
    errors: Errors


def play(data: Data, seed: int, *, development: bool) -> Seed:
    """One seed: its own questions to ask about, its own proxy."""
    rng = np.random.default_rng(seed)
    questions = rng.permutation(np.unique(data.group[data.train]))
    learn = np.isin(data.group, questions[: 2 * len(questions) // 3])
    asked, graded = np.flatnonzero(learn), np.flatnonzero(data.train & ~learn if development else ~data.train)
    known = ordered_pairs(data.gold[asked[data.unsafe[asked]]])
    original = compare(data, asked[data.unsafe[asked]][known.prompt], known.better, known.worse)
    some = rng.permutation(len(original.gap))[:ORIGINAL_PAIRS]
    original = Pairs(original.gap[some], original.target[some], original.weight[some])
    proxy = fit(original)
    draws = [rng.integers(len(original.gap), size=len(original.gap)) for _ in range(MEMBERS)]
    members = [fit(Pairs(original.gap[d], original.target[d], original.weight[d])) for d in draws]
    pools = {name: pool(data, asked, proxy, members, name) for name in data.likelihoods}
    played = {}
    for name, (strategy, kind) in STRATEGIES.items():
        chosen = [choose(pools[strategy.likelihood], name, strategy, kind, budget, seed) for budget in BUDGETS]
        heads = [fit(together(original, revealed(data, asked, queries))) for queries in chosen]
        played[name] = Played(
            spent=tuple(sum(query.judgements for query in queries) for queries in chosen),
            safe_share=tuple(_share(~data.unsafe[_prompts(asked, queries)]) for queries in chosen),
            tied_share=tuple(_share(_tied(data, asked, queries)) for queries in chosen),
            graded=tuple(grade(data, graded, head) for head in heads),
        )
    return Seed(grade(data, graded, proxy), played, errors(data, graded, proxy, members))


def _prompts(asked: Any, queries: Sequence[Query]) -> Any:
    return asked[np.array([int(query.prompt_id) for query in queries], np.int64)]


def _tied(data: Data, asked: Any, queries: Sequence[Query]) -> Any:
    pairs = [query for query in queries if query.kind == "pairwise"]
    gold = data.gold[_prompts(asked, pairs)]
    first, second = np.array([query.completion_ids for query in pairs], np.int64).reshape(-1, 2).T
    rows = np.arange(len(pairs))
    return gold[rows, first] == gold[rows, second]


def _share(values: Any) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def pool(data: Data, asked: Any, proxy: FloatArray, members: Sequence[FloatArray], likelihood: str) -> Pool:
    """What strategies choose from."""
    n = data.gold.shape[1]
    reward, ll = (data.features[asked] @ proxy).ravel(), data.likelihoods[likelihood][asked].ravel()
    offsets = np.arange(len(asked) + 1) * n
    found = conflicts(reward, ll, offsets)
    return Pool(
        prompt_ids=tuple(str(place) for place in range(len(asked))),
        kendall_tau_distance=found.kendall_tau_distance,
        degenerate=found.degenerate,
        offsets=offsets,
        completion_ids=np.tile(np.arange(n), len(asked)),
        reward=reward,
        loglikelihood=ll,
        pacs=found.pacs,
        text_codes=data.text_codes[asked].ravel(),
        member_rewards=np.stack([(data.features[asked] @ head).ravel() for head in members], axis=1),
        mean_loglikelihood=data.likelihoods["mean"][asked].ravel(),
        implicit_reward=data.likelihoods["relative"][asked].ravel(),
    )


def revealed(data: Data, asked: Any, queries: Sequence[Any]) -> Pairs:
    """The pairs that the labels of these queries come to; a prompt's ratings are compared with one another.

    As the package weighs them: all pairs out of N ranked or rated answers count 2/N each, rated ones by how far the
    ratings are apart.
    """
    shown: dict[tuple[str, str], set[int]] = {}
    found: list[tuple[int, int, int, float]] = []
    for query in queries:
        if query.kind == "pairwise":
            found.append((int(query.prompt_id), *query.completion_ids, 1.0))
        else:
            shown.setdefault((query.prompt_id, query.kind), set()).update(query.completion_ids)
    for (prompt_id, kind), ids in shown.items():
        some = sorted(ids)
        gold = data.gold[asked[int(prompt_id)]]
        for i, j in combinations(some, 2):
            apart = abs(gold[i] - gold[j]) if kind == "rating" else 1.0
            if apart > 0:
                found.append((int(prompt_id), i, j, apart * 2 / len(some)))
    if not found:
        return Pairs(np.empty((0, data.features.shape[-1])), np.empty(0), np.empty(0))
    prompt, first, second, weight = (np.array(column) for column in zip(*found, strict=True))
    return replace(compare(data, asked[prompt], first, second), weight=weight.astype(np.float64))


def grade(data: Data, graded: Any, head: FloatArray) -> Graded:
    """On held-out prompts: accuracy on pairs that people tell apart, the best of five answers, over-refusal."""
    reward = data.features[graded] @ head
    best = reward.argmax(axis=1)
    every, safe, group = np.arange(len(graded)), ~data.unsafe[graded], data.group[graded]
    pairs = ordered_pairs(data.gold[graded])
    right, of_safe = correctness(pairs.margin(reward)), safe[pairs.prompt]

    def total(values: FloatArray, kept: Any, where: Any) -> tuple[FloatArray, FloatArray]:
        size = data.group.max() + 1
        return np.bincount(where[kept], values[kept], size), np.bincount(where[kept], minlength=size).astype(float)

    return {
        "accuracy": total(right, np.ones(len(right), bool), group[pairs.prompt]),
        "accuracy_safe": total(right, of_safe, group[pairs.prompt]),
        "accuracy_unsafe": total(right, ~of_safe, group[pairs.prompt]),
        "gold_reward": total(data.gold[graded][every, best], np.ones(len(graded), bool), group),
        "over_refusal": total(data.refusal[graded][every, best].astype(float), safe, group),
    }


def errors(data: Data, graded: Any, proxy: FloatArray, members: Sequence[FloatArray]) -> Errors:
    """The proxy's errors on the graded pairs that people tell apart, and every measure of these pairs."""
    reward = data.features[graded] @ proxy
    pairs = ordered_pairs(data.gold[graded])
    margin = pairs.margin(reward)
    offsets = np.arange(len(graded) + 1) * reward.shape[1]
    scores: dict[str, FloatArray] = {}
    for name, likelihood in data.likelihoods.items():
        found = conflicts(reward.ravel(), likelihood[graded].ravel(), offsets)
        pacs = found.pacs.reshape(reward.shape)
        of = pacs[pairs.prompt, pairs.better], pacs[pairs.prompt, pairs.worse]
        for measure, values in predictors(found.kendall_tau_distance[pairs.prompt], of, margin).items():
            scores[measure if measure == "reward_margin" else f"{measure}_{name}"] = values
    gaps = np.stack([pairs.margin(data.features[graded] @ head) for head in members])
    safe = ~data.unsafe[graded][pairs.prompt]
    return Errors(
        1 - correctness(margin), data.group[graded][pairs.prompt], safe, {**scores, "ensemble_sd": gaps.std(axis=0)}
    )


class Summary:
    """Intervals over seeds and questions, which are drawn together as the clusters of one bootstrap.

    A replicate weighs a seed's result on a question by the product of the two weights (Owen 2007, "The pigeonhole
    bootstrap", which errs on the wide side).
    """

    def __init__(self, found: Sequence[Seed]) -> None:
        self.found = found
        asked_of = np.array([one.proxy["gold_reward"][1] for one in found])
        self.graded = np.flatnonzero(asked_of.sum(axis=0))
        self.seeds = len(found)
        self.bootstrap = Bootstrap(np.arange(self.seeds + len(self.graded)), REPLICATES, seed=0)
        self.fewest = min(self.seeds, int(np.count_nonzero(asked_of, axis=1).min()))

    def all(self) -> dict[str, Any]:
        """What is printed and written."""
        measures = list(self.found[0].proxy)
        return {
            "seeds": self.seeds,
            "questions": len(self.graded),
            "proxy": {m: self.mean([one.proxy for one in self.found], m) for m in measures},
            "table": [
                {
                    "strategy": name,
                    "budget": budget,
                    "spent": self._over_seeds([one.played[name].spent[k] for one in self.found]),
                    "safe_share": self._over_seeds([one.played[name].safe_share[k] for one in self.found]),
                    "tied_share": self._over_seeds([one.played[name].tied_share[k] for one in self.found]),
                    **{m: self.mean([one.played[name].graded[k] for one in self.found], m) for m in measures},
                }
                for name in STRATEGIES
                for k, budget in enumerate(BUDGETS)
            ],
            "label_efficiency": {
                measure: {name: self.worth(name, measure) for name in STRATEGIES if name != BASELINE}
                for measure in ("accuracy", "gold_reward")
            },
            "auc": {name: self.auc(name, safe_alone=False) for name in self.found[0].errors.scores},
            "auc_safe": {name: self.auc(name, safe_alone=True) for name in self.found[0].errors.scores},
        }

    def _over_seeds(self, values: Sequence[float]) -> float | None:
        known = [value for value in values if not np.isnan(value)]
        return float(np.mean(known)) if known else None

    def curve(self, of: Sequence[Sequence[Graded]], measure: str) -> WeightedCurve:
        """A measure at each of K budgets, from K results of each seed."""
        # (S, K, questions) each
        top, bottom = np.moveaxis(np.array([[row[measure] for row in rows] for rows in of]), 2, 0)[..., self.graded]

        def means(weights: FloatArray) -> FloatArray:
            by_seed, by_question = weights[:, : self.seeds], weights[:, self.seeds :]
            over, under = (
                np.einsum("bs,skg,bg->bk", by_seed, part, by_question, optimize=True) for part in (top, bottom)
            )
            ratio: FloatArray = over / under
            return ratio

        return means

    def mean(self, of: Sequence[Graded], measure: str) -> Any:
        """A measure of one result of each seed."""
        means = self.curve([[row] for row in of], measure)
        return self.bootstrap.interval(lambda weights: means(weights)[:, 0], self.fewest)

    def worth(self, name: str, measure: str) -> Any:
        """Label efficiency of a strategy."""
        return efficiency_interval(
            *self._curve_by_spent(BASELINE, measure), *self._curve_by_spent(name, measure), self.bootstrap, self.fewest
        )

    def _curve_by_spent(self, name: str, measure: str) -> tuple[FloatArray, WeightedCurve]:
        """Mean judgements, (K,), and the curve over them, which ends where there is no more to ask."""
        played = [one.played[name] for one in self.found]
        spent = np.mean([one.spent for one in played], axis=0)
        rising = np.flatnonzero(np.diff(spent, prepend=0) > 0)
        return spent[rising], self.curve([[one.graded[k] for k in rising] for one in played], measure)

    def auc(self, name: str, *, safe_alone: bool) -> Any:
        """AUC of a measure for the proxy's error on a pair: the mean of the seeds'."""
        by_seed = []
        for one in self.found:
            kept = one.errors.safe if safe_alone else np.ones(len(one.errors.safe), bool)
            question = np.searchsorted(self.graded, one.errors.question[kept])
            by_seed.append(auc_of(one.errors.scores[name][kept], one.errors.error[kept], question))

        def statistic(weights: FloatArray) -> FloatArray:
            values = np.stack([of(weights[:, self.seeds :]) for of in by_seed], axis=1)
            known = np.where(np.isnan(values), 0.0, weights[:, : self.seeds])
            # NaN where every pair of all seeds is an error, or none
            mean: FloatArray = np.where(known.any(axis=1), (np.nan_to_num(values) * known).sum(axis=1), np.nan)
            mean /= np.maximum(known.sum(axis=1), 1e-300)
            return mean

        width = max(len(one.errors.error) for one in self.found)
        return self.bootstrap.interval(statistic, self.fewest, width=width)


def show(summary: dict[str, Any]) -> None:
    """Print the table."""
    print(f"{summary['seeds']} seeds, {summary['questions']} questions")
    print("proxy:", ", ".join(f"{name} {said(value)}" for name, value in summary["proxy"].items()))
    for row in summary["table"]:
        figures = "  ".join(said(row[name]) for name in ("accuracy", "accuracy_safe", "gold_reward", "over_refusal"))
        shares = "  ".join(
            f"{row[key]:.2f} {word}"
            for key, word in (("safe_share", "safe"), ("tied_share", "tied"))
            if row[key] is not None
        )
        print(f"{row['strategy']:24} {row['spent']:6.1f} {figures}  {shares}")
    for measure, found in summary["label_efficiency"].items():
        print(f"label efficiency, {measure}:", "; ".join(f"{name} {said(value, 2)}" for name, value in found.items()))
    for key, where in (("auc", "all prompts"), ("auc_safe", "safe prompts")):
        print(f"AUC for the proxy's errors, {where}:", "; ".join(f"{m} {said(v)}" for m, v in summary[key].items()))


def said(interval: Any, decimals: int = 3) -> str:
    """An estimate with its interval."""
    if interval is None:
        return "-"
    bound = f"{interval['bound']} " if interval.get("bound") else ""
    if interval["low"] is None:
        return f"{bound}{interval['mean']:.{decimals}f}"
    return f"{bound}{interval['mean']:.{decimals}f} ({interval['low']:.{decimals}f} to {interval['high']:.{decimals}f})"


if __name__ == "__main__":
    main()
