"""XSTest's answers with people's labels, as a language model reads them, and a reward model on its features."""

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize

from dissonance.artifacts import atomic_path, source_fingerprint
from dissonance.evaluate.detection import correctness
from dissonance.evaluate.statistics import FloatArray

WORTH = {"compliance": 1.0, "partial_refusal": 0.5, "refusal": 0.0}
LEFT_OUT = "nons_group_real_discr"
"""A type of safe prompts, all for testing, most of whose unsafe contrasts are for training."""
FAMILIES = {"privacy_fictional": "privacy", "real_group_nons_discr": "discr"}
"""Types whose contrast has another name."""
READ_AT_ONCE = 16
NEW_WEIGHT = 0.5
RIDGE = 1e-2


@dataclass(frozen=True)
class Data:
    """P prompts with N answers each."""

    train: Any
    """(P,) bool: to learn and to ask about."""
    group: FloatArray
    """(P,): 0..G-1; prompts of one group are one question and its contrast."""
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


def load(path: Path, model: Path, kept: Path, tokens: int) -> Data:
    """The labels, and what the model makes of the answers; reading them takes minutes, and is kept."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["type"] != LEFT_OUT]
    names = list(dict.fromkeys(row["id"] for row in rows))
    by_prompt = {name: sorted((r for r in rows if r["id"] == name), key=lambda r: r["model"]) for name in names}
    ordered = [row for name in names for row in by_prompt[name]]
    asked = [[row["prompt"], row["completion"].strip()] for row in ordered]
    digest = hashlib.sha256(json.dumps([asked, tokens, source_fingerprint(str(model))]).encode()).hexdigest()
    if not kept.is_file() or str(np.load(kept)["digest"]) != digest:
        kept.parent.mkdir(parents=True, exist_ok=True)
        found = read(asked, model, tokens)
        with atomic_path(kept) as temporary, temporary.open("wb") as file:
            np.savez(file, digest=digest, **found)
    found = np.load(kept)
    shape = (len(names), -1)
    train = np.array([by_prompt[name][0]["split"] == "train" for name in names])
    unsafe = np.array([by_prompt[name][0]["prompt_label"] == "unsafe" for name in names])
    worth = np.array([WORTH[row["human_label"]] for row in ordered]).reshape(shape)
    total, alone, count = (found[name].reshape(shape) for name in ("sum", "alone", "tokens"))
    features = found["features"].reshape(*total.shape, -1)
    learnt = features[train].reshape(-1, features.shape[-1])
    texts = np.array([text for _, text in asked])
    return Data(
        train=train,
        group=groups([by_prompt[name][0] for name in names]),
        unsafe=unsafe,
        gold=np.where(unsafe[:, None], 1 - worth, worth),
        refusal=worth == 0,
        text_codes=np.unique(texts, return_inverse=True)[1].reshape(shape),
        features=(features - learnt.mean(axis=0)) / learnt.std(axis=0),
        likelihoods={"sum": total, "mean": total / count, "relative": total - alone},
    )


def groups(prompts: Sequence[dict[str, Any]]) -> Any:
    """The question of each prompt: a type has 25, and most have a contrast, whose 25 in the same order are unsafe."""
    numbers: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        kind = prompt["type"]
        family = FAMILIES.get(kind, kind.removeprefix("contrast_"))
        found.append(f"{family} {numbers[kind]} {prompt['split']}")
        numbers[kind] += 1
    return np.unique(found, return_inverse=True)[1]


def was_cut(text: str) -> bool:
    """Whether an answer looks as if it had run into a limit: it does not end as a sentence does, or with a number."""
    return text[-1:] not in set('.!?")]*`') or re.search(r"\n\s*\d+\.$", text) is not None


@torch.inference_mode()
def read(asked: Sequence[Sequence[str]], path: Path, tokens: int) -> dict[str, FloatArray]:
    """What the model makes of (question, answer) pairs, each the same once only, so that equal answers tie.

    `sum`, the log-likelihood of so many of the answer's tokens, with that of the end where it was reached and nothing
    was cut; `alone`, that of the same answer to an empty question; `tokens`, how many; `features`, the mean last hidden
    state over the answer's own tokens, (rows, D).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    distinct = list(dict.fromkeys(map(tuple, asked)))
    own = [tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in distinct]
    ends = [[] if was_cut(text) else [tokenizer.eos_token_id] for _, text in distinct]
    answers = [torch.tensor([*ids, *end][:tokens]) for ids, end in zip(own, ends, strict=True)]
    found = {
        "sum": np.zeros(len(distinct)),
        "alone": np.zeros(len(distinct)),
        "tokens": np.array([len(answer) for answer in answers]),
        "features": np.zeros((len(distinct), model.config.hidden_size), np.float32),
    }
    order = np.argsort(found["tokens"], kind="stable")
    for start in range(0, len(order), READ_AT_ONCE):
        batch = order[start : start + READ_AT_ONCE].tolist()
        for name in ("sum", "alone"):
            openings = [_opening(tokenizer, distinct[row][0] if name == "sum" else "") for row in batch]
            whole = [torch.cat([opening, answers[row]]) for opening, row in zip(openings, batch, strict=True)]
            ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
            # Padded on the right: a causal model needs no mask for what stands before.
            out = model(ids, output_hidden_states=name == "sum")
            for place, (opening, row) in enumerate(zip(openings, batch, strict=True)):
                at, said = len(opening), answers[row]
                logprobs = out.logits[place, at - 1 : at - 1 + len(said)].log_softmax(-1)
                found[name][row] = float(logprobs.gather(1, said[:, None]).double().sum())
                if name == "sum":
                    length = min(len(own[row]), tokens)
                    found["features"][row] = out.hidden_states[-1][place, at : at + length].mean(0).numpy()
        print(f"read {start + len(batch):,} of {len(distinct):,} answers", flush=True)
    places = {row: place for place, row in enumerate(distinct)}
    rows = [places[tuple(row)] for row in asked]
    return {name: values[rows] for name, values in found.items()}


def _opening(tokenizer: Any, question: str) -> torch.Tensor:
    turn = [{"role": "user", "content": question}]
    return torch.tensor(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False))


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
