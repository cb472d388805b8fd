"""Does conflict find what a biased reward model has wrong, by real people's labels? No simulation.

The pool: XSTest's 450 prompts with five models' answers each, and a person's label of each answer: compliance, partial
refusal or refusal. On a safe prompt compliance is better than refusal, on an unsafe one the reverse. The policy is a
language model that reads the answers; the proxy a Bradley-Terry head on its last hidden states, averaged over the
answer, trained on pairs of unsafe prompts alone, so that it learns to refuse always. Then every strategy spends the
same judgements on labels of the training prompts, safe and unsafe, and the head is fitted again to old and new pairs.

    python benchmarks/real_labels.py xstest_completions.jsonl.gz --model real/base

Rows of the file: id, type, prompt, prompt_label, model, completion, human_label. A seed splits the prompts anew, by
question and its unsafe counterparts of one type: two thirds to learn and to ask about, one third to grade.
`sum` and `mean` are the answer's log-likelihood under the model; `relative` is less that of the same answer to no
question: the model has no public base to be relative to.

Development seeds were looked at while the method was chosen, confirmation seeds only for the table.
"""

import argparse
import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize

from dissonance.bench.efficiency import efficiency_interval
from dissonance.conflict import conflicts
from dissonance.evaluate.detection import correctness, ordered_pairs, predictors
from dissonance.evaluate.statistics import Bootstrap, FloatArray, auc_of
from dissonance.selection import Pool, select

LONGEST = 64
"""Tokens of an answer that are read: a refusal shows at once."""
WORTH = {"compliance": 1.0, "partial_refusal": 0.5, "refusal": 0.0}
BUDGETS = (8, 16, 32, 64, 128, 256)
STRATEGIES = {
    "random_pairs": ("random_pairs", "sum"),
    "random_prompts": ("random_prompts", "sum"),
    "shf_cas": ("shf_cas", "sum"),
    "pacs": ("pacs", "sum"),
    "kendall": ("kendall", "sum"),
    "spread": ("spread", "sum"),
    "spread_mean": ("spread", "mean"),
    "spread_relative": ("spread", "relative"),
    "discordant": ("discordant", "sum"),
    "discordant_mean": ("discordant", "mean"),
    "discordant_relative": ("discordant", "relative"),
    "margin": ("margin", "sum"),
    "ensemble": ("ensemble", "sum"),
    "rso": ("rso", "sum"),
    "apl": ("apl", "sum"),
}
DEVELOPMENT, CONFIRMATION = range(100, 120), range(40)
MEMBERS = 8
ORIGINAL_PAIRS = 300
NEW_WEIGHT = 0.5
RIDGE = 1e-2


@dataclass(frozen=True)
class Data:
    """P prompts with N answers each."""

    group: FloatArray
    """(P,): prompts of one group are split together."""
    unsafe: Any
    """(P,) bool."""
    gold: FloatArray
    """(P, N) in [0, 1]."""
    refusal: Any
    """(P, N) bool."""
    features: FloatArray
    """(P, N, D), standardised."""
    likelihoods: dict[str, FloatArray]
    """(P, N) each."""


def main() -> None:
    """Read, compare, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="a causal LM with a chat template")
    parser.add_argument("--read", type=Path, default=Path("real/xstest.npz"), help="what the model read is kept here")
    parser.add_argument("--development", action="store_true", help="take the development seeds")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    arguments = parser.parse_args()
    data = load(arguments.data, arguments.model, arguments.read)
    seeds = DEVELOPMENT if arguments.development else CONFIRMATION
    rows = [play(data, seed) for seed in seeds]
    summary = summarise(rows, len(seeds))
    show(summary)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(summary, indent=1) + "\n")


def load(path: Path, model: Path, kept: Path) -> Data:
    """The labels, and what the model makes of the answers; reading them takes minutes, and is kept."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    names = list(dict.fromkeys(row["id"] for row in rows))
    by_prompt = {name: sorted((r for r in rows if r["id"] == name), key=lambda r: r["model"]) for name in names}
    ordered = [row for name in names for row in by_prompt[name]]
    digest = hashlib.sha256(json.dumps([[r["prompt"], r["completion"]] for r in ordered]).encode()).hexdigest()
    if not kept.is_file() or str(np.load(kept)["digest"]) != digest:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(kept, digest=digest, **read(ordered, model))
    found = np.load(kept)
    shape = (len(names), -1)
    unsafe = np.array([by_prompt[name][0]["prompt_label"] == "unsafe" for name in names])
    worth = np.array([WORTH[row["human_label"]] for row in ordered]).reshape(shape)
    total, alone, count = (found[name].reshape(shape) for name in ("sum", "alone", "tokens"))
    features = found["features"].reshape(*total.shape, -1)
    flat = features.reshape(-1, features.shape[-1])
    kinds = [by_prompt[name][0]["type"].removeprefix("contrast_") for name in names]
    numbers = Counter()
    group = []
    for name, kind in zip(names, kinds, strict=True):
        # A type has 25 questions and most have a contrast: 25 in the same order that differ in what is unsafe.
        group.append(f"{kind}-{numbers[by_prompt[name][0]['type']]}")
        numbers[by_prompt[name][0]["type"]] += 1
    return Data(
        group=np.unique(group, return_inverse=True)[1],
        unsafe=unsafe,
        gold=np.where(unsafe[:, None], 1 - worth, worth),
        refusal=worth == 0,
        features=(features - flat.mean(axis=0)) / flat.std(axis=0),
        likelihoods={"sum": total, "mean": total / count, "relative": total - alone},
    )


@torch.inference_mode()
def read(rows: Sequence[dict[str, Any]], path: Path) -> dict[str, FloatArray]:
    """Log-likelihoods of the answers to their question and to none, and the mean last hidden state of each answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found: dict[str, list[Any]] = {"sum": [], "alone": [], "tokens": [], "features": []}
    for number, row in enumerate(rows):
        ids = tokenizer(row["completion"].strip(), add_special_tokens=False)["input_ids"][:LONGEST]
        for name, question in (("sum", row["prompt"]), ("alone", "")):
            turn = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
            out = model(
                torch.tensor([[*prompt, *ids]]), output_hidden_states=name == "sum", logits_to_keep=len(ids) + 1
            )
            logprobs = out.logits[0, :-1].log_softmax(-1)
            found[name].append(float(logprobs.gather(1, torch.tensor(ids)[:, None]).sum()))
            if name == "sum":
                found["features"].append(out.hidden_states[-1][0, len(prompt) :].mean(0).numpy())
        found["tokens"].append(len(ids))
        if number % 100 == 99:
            print(f"read {number + 1:,} of {len(rows):,} answers", flush=True)
    return {name: np.array(values) for name, values in found.items()}


@dataclass(frozen=True)
class Pairs:
    """Differences of features, and what was said of them."""

    gap: FloatArray
    """(M, D), first less second."""
    target: FloatArray
    """(M,), probability that the first is better: 1, or 1/2 for a tie."""
    weight: FloatArray
    """(M,)"""


def fit(pairs: Pairs) -> FloatArray:
    """A Bradley-Terry head with weights and soft labels, by L-BFGS with a ridge; (D,)."""
    share = pairs.weight / pairs.weight.sum()

    def loss(head: FloatArray) -> tuple[float, FloatArray]:
        margin = pairs.gap @ head
        value = share @ (np.logaddexp(0, margin) - pairs.target * margin) + RIDGE / 2 * head @ head
        return float(value), pairs.gap.T @ (share * (1 / (1 + np.exp(-margin)) - pairs.target)) + RIDGE * head

    head: FloatArray = minimize(loss, np.zeros(pairs.gap.shape[1]), jac=True, method="L-BFGS-B").x
    return head


def compare(data: Data, prompt: Any, first: Any, second: Any) -> Pairs:
    """What people say of pairs of answers."""
    gap = data.features[prompt, first] - data.features[prompt, second]
    target = correctness(data.gold[prompt, first] - data.gold[prompt, second])
    return Pairs(gap, target, np.ones(len(gap)))


def together(old: Pairs, new: Pairs) -> Pairs:
    """Old and new pairs, the new ones with `NEW_WEIGHT` of all weight."""
    if not len(new.gap):
        return old
    weights = [part.weight / part.weight.sum() * share for part, share in ((old, 1 - NEW_WEIGHT), (new, NEW_WEIGHT))]
    return Pairs(np.concatenate([old.gap, new.gap]), np.concatenate([old.target, new.target]), np.concatenate(weights))


def play(data: Data, seed: int) -> dict[str, Any]:
    """Everything of one split."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(data.group.max() + 1)
    learn = np.isin(data.group, groups[: 2 * len(groups) // 3])
    asked, graded = np.flatnonzero(learn), np.flatnonzero(~learn)
    known = ordered_pairs(data.gold[asked[data.unsafe[asked]]])
    original = compare(data, asked[data.unsafe[asked]][known.prompt], known.better, known.worse)
    some = rng.permutation(len(original.gap))[:ORIGINAL_PAIRS]
    original = Pairs(original.gap[some], original.target[some], original.weight[some])
    proxy = fit(original)
    pools = {name: pool(data, asked, proxy, original, name, rng) for name in data.likelihoods}
    rows = []
    for name, (strategy, likelihood) in STRATEGIES.items():
        for budget in BUDGETS:
            chosen = select(pools[likelihood], strategy, budget=budget, rng=np.random.default_rng([seed, budget]))
            head = fit(together(original, revealed(data, asked, chosen.queries)))
            safe = np.mean([not data.unsafe[asked[int(query.prompt_id)]] for query in chosen.queries])
            rows.append({"strategy": name, "budget": budget, "safe_share": float(safe), **grade(data, graded, head)})
    return {"seed": seed, "proxy": grade(data, graded, proxy), "rows": rows, "auc": errors(data, asked, proxy, pools)}


def pool(data: Data, asked: Any, proxy: FloatArray, original: Pairs, likelihood: str, rng: Any) -> Pool:
    """What strategies choose from."""
    n = data.gold.shape[1]
    reward, ll = (data.features[asked] @ proxy).ravel(), data.likelihoods[likelihood][asked].ravel()
    offsets = np.arange(len(asked) + 1) * n
    found = conflicts(reward, ll, offsets)
    draws = [rng.integers(len(original.gap), size=len(original.gap)) for _ in range(MEMBERS)]
    members = [fit(Pairs(original.gap[d], original.target[d], original.weight[d])) for d in draws]
    return Pool(
        prompt_ids=tuple(str(place) for place in range(len(asked))),
        kendall_tau_distance=found.kendall_tau_distance,
        degenerate=found.degenerate,
        offsets=offsets,
        completion_ids=np.tile(np.arange(n), len(asked)),
        reward=reward,
        loglikelihood=ll,
        pacs=found.pacs,
        text_codes=np.arange(len(reward)),
        member_rewards=np.stack([(data.features[asked] @ head).ravel() for head in members], axis=1),
        implicit_reward=data.likelihoods["relative"][asked].ravel(),
    )


def revealed(data: Data, asked: Any, queries: Sequence[Any]) -> Pairs:
    """The pairs that the labels of these queries come to; a prompt's ratings are compared with one another.

    As the package weighs them: all pairs out of N ranked or rated answers count 2/N each.
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
        for place, i in enumerate(some):
            for j in some[place + 1 :]:
                tied = data.gold[asked[int(prompt_id)], i] == data.gold[asked[int(prompt_id)], j]
                if kind == "ranking" or not tied:
                    found.append((int(prompt_id), i, j, 2 / len(some)))
    if not found:
        return Pairs(np.empty((0, data.features.shape[-1])), np.empty(0), np.empty(0))
    prompt, first, second, weight = (np.array(column) for column in zip(*found, strict=True))
    return replace(compare(data, asked[prompt], first, second), weight=weight.astype(np.float64))


def grade(data: Data, graded: Any, head: FloatArray) -> dict[str, float]:
    """On held-out prompts: accuracy on pairs that people tell apart, the best of five answers, over-refusal."""
    reward = data.features[graded] @ head
    best = reward.argmax(axis=1)
    rows, safe = np.arange(len(graded)), ~data.unsafe[graded]
    pairs = ordered_pairs(data.gold[graded])
    right = correctness(pairs.margin(reward))
    return {
        "accuracy": float(right.mean()),
        "accuracy_safe": float(right[safe[pairs.prompt]].mean()),
        "accuracy_unsafe": float(right[~safe[pairs.prompt]].mean()),
        "gold_reward": float(data.gold[graded][rows, best].mean()),
        "over_refusal": float(data.refusal[graded][rows, best][safe].mean()),
    }


def errors(data: Data, asked: Any, proxy: FloatArray, pools: dict[str, Pool]) -> dict[str, float]:
    """AUC of every measure for the proxy's error on a pair that people tell apart."""
    reward = data.features[asked] @ proxy
    pairs = ordered_pairs(data.gold[asked])
    margin = pairs.margin(reward)
    error = 1 - correctness(margin)
    scores: dict[str, FloatArray] = {}
    for name, found in pools.items():
        pacs = found.pacs.reshape(reward.shape)
        of = pacs[pairs.prompt, pairs.better], pacs[pairs.prompt, pairs.worse]
        for measure, values in predictors(found.kendall_tau_distance[pairs.prompt], of, margin).items():
            scores[measure if measure == "reward_margin" else f"{measure}_{name}"] = values
    members = pools["sum"].member_rewards
    assert members is not None
    by_prompt = members.reshape(*reward.shape, -1)
    scores["ensemble_sd"] = (by_prompt[pairs.prompt, pairs.better] - by_prompt[pairs.prompt, pairs.worse]).std(axis=1)
    one = np.zeros(error.size, np.int64)
    return {name: float(auc_of(values, error, one)(np.ones((1, 1)))[0]) for name, values in scores.items()}


def summarise(found: Sequence[dict[str, Any]], seeds: int) -> dict[str, Any]:
    """Means over the splits with 95 % intervals, and label efficiency against random pairs."""
    bootstrap = Bootstrap(np.arange(seeds), 4000, seed=0)
    measures = list(found[0]["proxy"])

    def curves(name: str, measure: str) -> FloatArray:
        return np.array([[row[measure] for row in one["rows"] if row["strategy"] == name] for one in found])

    table = [
        {
            "strategy": name,
            "budget": budget,
            **{m: bootstrap.mean(curves(name, m)[:, k]) for m in (*measures, "safe_share")},
        }
        for name in STRATEGIES
        for k, budget in enumerate(BUDGETS)
    ]
    efficiency = {
        measure: {
            name: efficiency_interval(
                BUDGETS, curves("random_pairs", measure), BUDGETS, curves(name, measure), bootstrap
            )
            for name in STRATEGIES
            if name != "random_pairs"
        }
        for measure in ("accuracy", "gold_reward")
    }
    return {
        "seeds": [one["seed"] for one in found],
        "proxy": {m: bootstrap.mean([one["proxy"][m] for one in found]) for m in measures},
        "table": table,
        "label_efficiency": efficiency,
        "auc": {name: bootstrap.mean([one["auc"][name] for one in found]) for name in found[0]["auc"]},
    }


def show(summary: dict[str, Any]) -> None:
    """Print the table."""
    print("proxy:", ", ".join(f"{name} {said(value)}" for name, value in summary["proxy"].items()))
    for row in summary["table"]:
        figures = "  ".join(said(row[name]) for name in ("accuracy", "accuracy_safe", "gold_reward", "over_refusal"))
        print(f"{row['strategy']:20} {row['budget']:4} {figures}  {row['safe_share']['mean']:.2f} safe")
    for measure, found in summary["label_efficiency"].items():
        print(f"label efficiency, {measure}:", "; ".join(f"{name} {said(value, 2)}" for name, value in found.items()))
    print("AUC for the proxy's errors:", "; ".join(f"{name} {said(value)}" for name, value in summary["auc"].items()))


def said(interval: Any, decimals: int = 3) -> str:
    """An estimate with its interval."""
    bound = f"{interval['bound']} " if interval.get("bound") else ""
    if interval["low"] is None:
        return f"{bound}{interval['mean']:.{decimals}f}"
    return f"{bound}{interval['mean']:.{decimals}f} ({interval['low']:.{decimals}f} to {interval['high']:.{decimals}f})"


if __name__ == "__main__":
    main()
