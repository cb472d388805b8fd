"""Does conflict find what a biased reward model has wrong, by real people's labels? No simulation.

The pool: XSTest's 450 prompts with five models' answers each, and a person's label of each answer: compliance, partial
refusal or refusal. On a safe prompt compliance is better than refusal, on an unsafe one the reverse. The policy is a
language model that reads the answers; the proxy a Bradley-Terry head on its last hidden states, averaged over the
answer, trained on pairs of unsafe prompts alone, so that it learns to refuse always. Then every strategy spends the
same judgements on labels of prompts, safe and unsafe, and the head is fitted again to old and new pairs.

    python benchmarks/real_labels.py xstest_completions.jsonl.gz --model real/base --development
    python benchmarks/real_labels.py xstest_completions.jsonl.gz --model real/base

Rows of the file: id, type, prompt, prompt_label, model, completion, human_label, split. Every seed chooses from a pool
of two thirds of the training questions, a question and its contrasts being one; in development it is graded on the rest
of the training prompts, in confirmation on all test prompts. Intervals draw the graded questions and the seeds anew.
`sum` and `mean` are the answer's log-likelihood under the model; `relative` is less that of the same answer to no
question: the model has no public base to be relative to.
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

from dissonance.bench.cell import choose
from dissonance.bench.config import BASELINE, FeedbackKind, StrategyConfig
from dissonance.bench.efficiency import efficiency_interval
from dissonance.conflict import conflicts
from dissonance.evaluate.detection import correctness, ordered_pairs, predictors
from dissonance.evaluate.statistics import Bootstrap, FloatArray, auc_of
from dissonance.selection import Pool

TOKENS = (64, 256)
"""How much of an answer is read: what shows a refusal at once, or all that the file holds."""
END_OF_SENTENCE = ".!?\"')]*`"
"""An answer that ends otherwise was cut, and gets no end-of-sequence token."""
READ_AT_ONCE = 16
WORTH = {"compliance": 1.0, "partial_refusal": 0.5, "refusal": 0.0}
BUDGETS = (8, 16, 32, 64, 128, 256)
RATINGS = FeedbackKind(ask="ratings")
COMPARISONS = FeedbackKind()
STRATEGIES = {
    BASELINE: (StrategyConfig(), COMPARISONS),
    **{
        f"{name}{suffix}": (StrategyConfig(strategy=name, likelihood=likelihood), COMPARISONS)
        for name in ("spread", "discordant")
        for suffix, likelihood in (("", "sum"), ("_mean", "mean"), ("_relative", "relative"))
    },
    "widest": (StrategyConfig(strategy="benchmarks.controls:widest"), COMPARISONS),
    "one_pair": (StrategyConfig(strategy="benchmarks.controls:one_pair"), COMPARISONS),
    "shf_cas": (StrategyConfig(tau="q0.75"), COMPARISONS),
    "shf_cas_ratings": (StrategyConfig(strategy="shf_cas", tau="q0.75"), RATINGS),
    "kendall_ratings": (StrategyConfig(strategy="kendall"), RATINGS),
    "random_prompts_ratings": (StrategyConfig(strategy="random_prompts"), RATINGS),
    **{
        name: (StrategyConfig(), COMPARISONS)
        for name in ("pacs", "kendall", "random_prompts", "margin", "ensemble", "rso", "apl")
    },
}
DEVELOPMENT, CONFIRMATION = range(100, 120), range(20)
MEMBERS = 8
ORIGINAL_PAIRS = 300
NEW_WEIGHT = 0.5
RIDGE = 1e-2
REPLICATES = 2000
FAMILIES = {"privacy_public": "privacy", "privacy_fictional": "privacy", "real_group_nons_discr": "discr"}
"""Types whose contrast has another name."""


@dataclass(frozen=True)
class Data:
    """P prompts with N answers each."""

    train: Any
    """(P,) bool: to learn and to ask about."""
    group: FloatArray
    """(P,): 0..G-1; prompts of one group are one question and its contrasts."""
    unsafe: Any
    """(P,) bool."""
    gold: FloatArray
    """(P, N) in [0, 1]."""
    refusal: Any
    """(P, N) bool."""
    text_codes: Any
    """(P, N): within a prompt, equal if and only if the answers are."""
    features: FloatArray
    """(P, N, D), standardised."""
    likelihoods: dict[str, FloatArray]
    """(P, N) each."""


def main() -> None:
    """Read, compare, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="a causal LM with a chat template")
    parser.add_argument("--tokens", type=int, choices=TOKENS, default=TOKENS[0], help="how much of an answer is read")
    parser.add_argument("--read", type=Path, default=Path("real/xstest.npz"), help="what the model read is kept here")
    parser.add_argument("--development", action="store_true", help="grade on training prompts, with other seeds")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    arguments = parser.parse_args()
    data = load(arguments.data, arguments.model, arguments.read, arguments.tokens)
    seeds = DEVELOPMENT if arguments.development else CONFIRMATION
    summary = summarise([play(data, seed, development=arguments.development) for seed in seeds])
    show(summary)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(summary, indent=1) + "\n")


def load(path: Path, model: Path, kept: Path, tokens: int) -> Data:
    """The labels, and what the model makes of the answers; reading them takes minutes, and is kept."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    names = list(dict.fromkeys(row["id"] for row in rows))
    by_prompt = {name: sorted((r for r in rows if r["id"] == name), key=lambda r: r["model"]) for name in names}
    ordered = [row for name in names for row in by_prompt[name]]
    read_what = [TOKENS, END_OF_SENTENCE, [[r["prompt"], r["completion"]] for r in ordered]]
    digest = hashlib.sha256(json.dumps(read_what).encode()).hexdigest()
    if not kept.is_file() or str(np.load(kept)["digest"]) != digest:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(kept, digest=digest, **read(ordered, model))
    found = np.load(kept)
    shape = (len(names), -1)
    unsafe = np.array([by_prompt[name][0]["prompt_label"] == "unsafe" for name in names])
    worth = np.array([WORTH[row["human_label"]] for row in ordered]).reshape(shape)
    total, alone, count = (found[name][:, TOKENS.index(tokens)].reshape(shape) for name in ("sum", "alone", "tokens"))
    features = found["features"][:, TOKENS.index(tokens)].reshape(*total.shape, -1)
    flat = features.reshape(-1, features.shape[-1])
    texts = np.array([row["completion"].strip() for row in ordered])
    return Data(
        train=np.array([by_prompt[name][0]["split"] == "train" for name in names]),
        group=_groups([by_prompt[name][0] for name in names]),
        unsafe=unsafe,
        gold=np.where(unsafe[:, None], 1 - worth, worth),
        refusal=worth == 0,
        text_codes=np.unique(texts, return_inverse=True)[1].reshape(shape),
        features=(features - flat.mean(axis=0)) / flat.std(axis=0),
        likelihoods={"sum": total, "mean": total / count, "relative": total - alone},
    )


def _groups(prompts: Sequence[dict[str, Any]]) -> Any:
    """The question of each prompt: a type has 25, and its contrast 25 in the same order, made unsafe."""
    numbers: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        kind = prompt["type"]
        family = FAMILIES.get(kind, kind.removeprefix("contrast_"))
        found.append(f"{family} {numbers[kind]} {prompt['split']}")
        numbers[kind] += 1
    return np.unique(found, return_inverse=True)[1]


@torch.inference_mode()
def read(rows: Sequence[dict[str, Any]], path: Path) -> dict[str, FloatArray]:
    """Log-likelihoods of the answers to their question and to none, tokens, and the mean last hidden state.

    Each (rows, len(TOKENS)), with as much of the answer; the states (rows, len(TOKENS), D).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    answers = []
    for row in rows:
        text = row["completion"].strip()
        end = [tokenizer.eos_token_id] if text[-1] in END_OF_SENTENCE else []
        answers.append([*tokenizer(text, add_special_tokens=False)["input_ids"], *end][: max(TOKENS)])
    lengths = np.array([[min(len(ids), most) for most in TOKENS] for ids in answers])
    found = {
        "sum": np.zeros(lengths.shape),
        "alone": np.zeros(lengths.shape),
        "tokens": lengths,
        "features": np.zeros((*lengths.shape, model.config.hidden_size), np.float32),
    }
    order = np.argsort(lengths[:, -1], kind="stable")
    for start in range(0, len(order), READ_AT_ONCE):
        batch = order[start : start + READ_AT_ONCE]
        for name in ("sum", "alone"):
            prompts = [_opening(tokenizer, rows[r]["prompt"] if name == "sum" else "") for r in batch]
            whole = [[*prompt, *answers[r]] for prompt, r in zip(prompts, batch, strict=True)]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in whole], batch_first=True)
            # Padded on the right: a causal model needs no mask for what stands before.
            out = model(ids, output_hidden_states=True)
            for place, r in enumerate(batch):
                at = len(prompts[place])
                states = out.hidden_states[-1][place]
                said = torch.tensor(answers[r])
                logprobs = out.logits[place, at - 1 : at - 1 + len(said)].log_softmax(-1)
                total = logprobs.gather(1, said[:, None])[:, 0].double().cumsum(0).numpy()
                for k, length in enumerate(lengths[r]):
                    found[name][r, k] = total[length - 1]
                    if name == "sum":
                        found["features"][r, k] = states[at : at + length].mean(0).numpy()
        print(f"read {start + len(batch):,} of {len(rows):,} answers", flush=True)
    return found


def _opening(tokenizer: Any, question: str) -> list[int]:
    turn = [{"role": "user", "content": question}]
    ids: list[int] = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    return ids


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


def play(data: Data, seed: int, *, development: bool) -> dict[str, Any]:
    """Everything of one seed."""
    rng = np.random.default_rng(seed)
    questions = rng.permutation(np.unique(data.group[data.train]))
    learn = np.isin(data.group, questions[: 2 * len(questions) // 3])
    asked, graded = np.flatnonzero(learn), np.flatnonzero(data.train & ~learn if development else ~data.train)
    known = ordered_pairs(data.gold[asked[data.unsafe[asked]]])
    original = compare(data, asked[data.unsafe[asked]][known.prompt], known.better, known.worse)
    some = rng.permutation(len(original.gap))[:ORIGINAL_PAIRS]
    original = Pairs(original.gap[some], original.target[some], original.weight[some])
    proxy = fit(original)
    pools = {name: pool(data, asked, proxy, original, name, rng) for name in data.likelihoods}
    rows: dict[str, list[Graded]] = {}
    for name, (strategy, kind) in STRATEGIES.items():
        for budget in BUDGETS:
            queries = choose(pools[strategy.likelihood], name, strategy, kind, budget, seed)
            head = fit(together(original, revealed(data, asked, queries)))
            rows.setdefault(name, []).append(grade(data, graded, head))
    return {"proxy": grade(data, graded, proxy), "rows": rows, "auc": errors(data, asked, proxy, pools)}


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
        text_codes=data.text_codes[asked].ravel(),
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


Graded = dict[str, tuple[FloatArray, FloatArray]]
"""By measure: its sum over each question, and what that is of; (G,) each."""


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


def summarise(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds and questions with 95 % intervals, and label efficiency against random pairs."""
    seeds, measures = len(found), list(found[0]["proxy"])
    questions = found[0]["proxy"]["accuracy"][0].size
    # Seeds and questions are clusters of one bootstrap: a mean needs only the ratio of their weights.
    bootstrap = Bootstrap(np.arange(seeds + questions), REPLICATES, seed=0)
    fewest = min(seeds, np.count_nonzero(found[0]["proxy"]["accuracy"][1]))

    def curve(of: Sequence[Sequence[Graded]], measure: str) -> Any:
        """From weights (B, S + G) to the measure at each of K budgets, (B, K)."""
        top, bottom = np.moveaxis(np.array([[row[measure] for row in rows] for rows in of]), 2, 0)  # (S, K, G) each

        def means(weights: FloatArray) -> FloatArray:
            by_seed, by_question = weights[:, :seeds], weights[:, seeds:]
            over, under = (
                np.einsum("bs,skg,bg->bk", by_seed, part, by_question, optimize=True) for part in (top, bottom)
            )
            ratio: FloatArray = over / under
            return ratio

        return means

    def mean(of: Sequence[Graded], measure: str) -> Any:
        means = curve([[row] for row in of], measure)
        return bootstrap.interval(lambda weights: means(weights)[:, 0], fewest)

    def worth(name: str, measure: str) -> Any:
        base, own = (curve([one["rows"][which] for one in found], measure) for which in (BASELINE, name))
        return efficiency_interval(BUDGETS, base, BUDGETS, own, bootstrap, fewest)

    return {
        "seeds": seeds,
        "questions": int(np.count_nonzero(found[0]["proxy"]["accuracy"][1])),
        "proxy": {m: mean([one["proxy"] for one in found], m) for m in measures},
        "table": [
            {
                "strategy": name,
                "budget": budget,
                **{m: mean([one["rows"][name][k] for one in found], m) for m in measures},
            }
            for name in STRATEGIES
            for k, budget in enumerate(BUDGETS)
        ],
        "label_efficiency": {
            measure: {name: worth(name, measure) for name in STRATEGIES if name != BASELINE}
            for measure in ("accuracy", "gold_reward")
        },
        "auc": {
            name: Bootstrap(np.arange(seeds), REPLICATES, seed=0).mean([one["auc"][name] for one in found])
            for name in found[0]["auc"]
        },
    }


def show(summary: dict[str, Any]) -> None:
    """Print the table."""
    print("proxy:", ", ".join(f"{name} {said(value)}" for name, value in summary["proxy"].items()))
    for row in summary["table"]:
        figures = "  ".join(said(row[name]) for name in ("accuracy", "accuracy_safe", "gold_reward", "over_refusal"))
        print(f"{row['strategy']:20} {row['budget']:4} {figures}")
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
