"""The benchmark on people's labels: what is read of an answer, which prompts are one question, and the whole script."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import WORDS
from dissonance.records import Query

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODELS = ("a", "b", "c")


@pytest.fixture(scope="module", autouse=True)
def _scripts():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def prompt(name, kind, split):
    unsafe = kind.startswith("contrast")
    return {
        "id": name,
        "type": kind,
        "split": split,
        "prompt": f"{WORDS[len(name)]} {name}?",
        "prompt_label": "unsafe" if unsafe else "safe",
    }


@pytest.fixture
def answers(tmp_path):
    """Twelve questions with their contrasts; on every prompt one answer of three complies."""
    rows = []
    for number in range(12):
        for kind in ("homonyms", "contrast_homonyms"):
            of = prompt(f"{kind}-{number}", kind, "train" if number < 8 else "test")
            for k, model in enumerate(MODELS):
                complies = (number + k) % len(MODELS) == 0
                said = (
                    f"{WORDS[number]} {WORDS[number + k]}."
                    if complies
                    else f"{WORDS[-1]} {WORDS[number + k]} {WORDS[k]}."
                )
                label = "compliance" if complies else "refusal"
                rows.append({**of, "model": model, "completion": f"{said}.", "human_label": label})
    rows.append(
        {**prompt("odd", "nons_group_real_discr", "test"), "model": "a", "completion": "x", "human_label": "refusal"}
    )
    path = tmp_path / "answers.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def test_a_question_and_its_contrast_are_one():
    from xstest import groups

    order = ("homonyms", "contrast_homonyms", "privacy_fictional", "contrast_privacy", "privacy_public")
    asked = [prompt(f"{kind}-{k}", kind, "train") for kind in order for k in range(2)]
    a, b, a_, b_, p, q, p_, q_, *others = groups(asked)
    assert (a, b, p, q) == (a_, b_, p_, q_)
    assert len({a, b, p, q, *others}) == 6


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("So it is.", False),
        ("Is it?", False),
        ("so it", True),
        ("First,", True),
        ("Three:\n\n1. One\n2.", True),
        ("", True),
    ],
)
def test_what_ends_like_no_sentence_was_cut(text, cut):
    from xstest import was_cut

    assert was_cut(text) == cut


def test_what_is_read_is_the_answer_alone(policy_folder):
    from xstest import read

    asked = [
        ("what is it?", "It is so."),
        ("what?", "it is, it is, it is"),
        ("what?", "It is so."),
        ("what?", "It is so."),
    ]
    found = read(asked, policy_folder, 5)
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    model = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32).eval()
    for row, (question, text) in enumerate(asked):
        turn = [{"role": "user", "content": question}]
        opening = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        said = [*own, *([tokenizer.eos_token_id] if text.endswith(".") else [])][:5]
        with torch.inference_mode():
            out = model(torch.tensor([[*opening, *said]]), output_hidden_states=True)
        logprobs = out.logits[0].log_softmax(-1)
        expected = sum(float(logprobs[len(opening) - 1 + k, token]) for k, token in enumerate(said))
        assert found["sum"][row] == pytest.approx(expected, abs=1e-4)
        assert found["tokens"][row] == len(said)
        state = out.hidden_states[-1][0, len(opening) : len(opening) + min(len(own), 5)].mean(0)
        np.testing.assert_allclose(found["features"][row], state.numpy(), atol=1e-4)
    assert found["sum"][2] == found["sum"][3], "equal answers tie"
    assert found["alone"][0] == found["alone"][2], "without the question they are alike"


def test_ratings_weigh_as_far_as_they_are_apart(answers, policy_folder, tmp_path):
    from real_labels import revealed
    from xstest import load

    data = load(answers, policy_folder, tmp_path / "read.npz", 8)
    assert data.gold.shape == (24, len(MODELS)), "the type whose contrasts are for training is left out"
    data.gold[0] = (1.0, 0.5, 0.5)
    rated = [Query("0", "rating", (k,), 0.0, "") for k in range(3)]
    found = revealed(data, np.arange(24), rated)
    np.testing.assert_allclose(found.weight, [0.5 * 2 / 3, 0.5 * 2 / 3])
    assert found.target.tolist() == [1.0, 1.0]
    pair = revealed(data, np.arange(24), [Query("0", "pairwise", (1, 2), 0.0, "")])
    assert (pair.weight.tolist(), pair.target.tolist()) == ([1.0], [0.5])


def test_the_whole_script_twice(answers, policy_folder, tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/real_labels.py", answers, "--model", policy_folder, "--tokens", "8"]
    command += ["--read", tmp_path / "read", "--seeds", "2", "--out", out]
    runs = []
    for options in ([], [], ["--development"]):
        done = subprocess.run(
            [*map(str, command), *options],
            cwd=BENCHMARKS.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        runs.append((done.stdout, json.loads(out.read_text())))
    assert "read 72 of 72 answers" in runs[0][0]
    assert "read 72" not in runs[1][0], "what was read is kept"
    assert runs[0][1] == runs[1][1]
    found = runs[0][1]
    assert found["questions"] == 4
    assert runs[2][1]["questions"] > 4, "in development, of the training questions"
    by_strategy = {(row["strategy"], row["budget"]): row for row in found["table"]}
    assert by_strategy["random_pairs", 8]["spent"] == 8
    assert by_strategy["random_pairs", 256]["spent"] < 256, "there is no more to ask"
    assert 0 <= by_strategy["spread", 8]["safe_share"] <= 1
    assert set(found["label_efficiency"]["accuracy"]) == {name for name, _ in by_strategy} - {"random_pairs"}
