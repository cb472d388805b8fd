"""Reward models refined for real: what they learn, what is saved, and each way in which that went wrong elsewhere."""

import json
import random
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    TrainingArguments,
)

from conftest import WORDS, make_tokenizer
from dissonance.config import RewardConfig, RewardTraining
from dissonance.errors import DataError, DissonanceError, ModelError, RunError, SettingsError
from dissonance.huggingface import quiet_transformers
from dissonance.records import Message, Preference
from dissonance.refine import reward as reward_module
from dissonance.refine import reward_model as saving
from dissonance.refine.reward import refine_reward_model
from dissonance.refine.session import on_one_device
from dissonance.rewards import load_reward_model
from dissonance.sandbox.answers import answer
from dissonance.sandbox.answers import preferences as sandbox_preferences
from dissonance.sandbox.gold import gold_cost, gold_reward, truth
from dissonance.sandbox.train import train_proxy
from dissonance.sandbox.world import Split, World, questions
from dissonance.sections import parse_section

GOOD, BAD, ASKED = WORDS[:8], WORDS[8:16], WORDS[20:60]


def preferences(n: int, seed: int = 0, **changes: Any) -> list[Preference]:
    """Answers of four good words are better than answers of four bad ones; ids p0, p1, ..."""
    rng = np.random.default_rng(seed)

    def text(words: Sequence[str], length: int) -> str:
        return " ".join(rng.choice(words, size=length))

    return [
        Preference((Message("user", text(ASKED, 3)),), text(GOOD, 4), text(BAD, 4), prompt_id=f"p{seed}-{i}", **changes)
        for i in range(n)
    ]


def swapped(pairs: Sequence[Preference]) -> list[Preference]:
    return [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]


def settings(**changes: Any) -> RewardTraining:
    """Fast enough to learn something in a few steps of a random tiny model."""
    return parse_section(RewardTraining, {"learning_rate": 1e-2, "batch_size": 8, "evaluations": 4, **changes})


def started(folder: Path, **changes: Any) -> RewardConfig:
    return RewardConfig(model=str(folder), **changes)


def refined(start: RewardConfig, out: Path) -> RewardConfig:
    return start.model_copy(update={"model": str(out), "adapter": None})


def leads(config: RewardConfig, pairs: Sequence[Preference]) -> np.ndarray:
    """How much higher the loaded reward model, oriented, puts the chosen answers."""
    model = load_reward_model(config)
    conversations = [pair.messages for pair in pairs]
    chosen, rejected = (
        [reward.value for reward in model.score(conversations, texts)]
        for texts in ([p.chosen for p in pairs], [p.rejected for p in pairs])
    )
    return np.array(chosen) - np.array(rejected)


def refine(start: RewardConfig, out: Path, **given: Any) -> dict[str, Any]:
    """One refinement; `config` and the four sets of pairs may be given, else there are 64 new pairs."""
    config = given.pop("config", settings())
    sets = {"original": (), "new": preferences(64), "held_out_original": (), "held_out_new": (), **given}
    seed = sets.pop("seed", 0)
    return refine_reward_model(config, start, *sets.values(), out, seed=seed)


# ---- what is learnt, and in which direction ----


@pytest.mark.parametrize("kind", ["reward", "cost"])
@pytest.mark.parametrize("lora_rank", [None, 4])
def test_the_refined_model_prefers_what_was_chosen(
    reward_folder: Path, tmp_path: Path, kind: str, lora_rank: int | None
) -> None:
    start, held_out = started(reward_folder, kind=kind), preferences(40, seed=9)
    found = refine(start, tmp_path / "out", held_out_new=held_out, config=settings(lora_rank=lora_rank, epochs=3))
    after = leads(refined(start, tmp_path / "out"), held_out)
    assert (after > 0).mean() > 0.9
    assert found["held_out_new"]["after"]["accuracy"]["mean"] == (after > 0).mean()
    assert found["held_out_new"]["after"]["mean_lead"] == pytest.approx(after.mean())
    before = leads(start, held_out)
    assert found["held_out_new"]["before"]["accuracy"]["mean"] == (before > 0).mean()
    assert after.mean() > before.mean() + 1
    # The folder of a cost model gives costs: the chosen answer's is the lower.
    raw = leads(started(tmp_path / "out"), held_out)
    assert (raw.mean() > 0) == (kind == "reward")


def test_a_cost_model_learns_the_sign_of_what_is_safe(reward_folder: Path, tmp_path: Path) -> None:
    start = started(reward_folder, kind="cost")
    both_safe = preferences(96, chosen_safe=True, rejected_safe=True)
    found = refine(start, tmp_path / "safe", new=both_safe, held_out_new=both_safe, config=settings(epochs=2))
    assert found["new"]["after"]["sign_accuracy"]["mean"] > 0.95
    model = load_reward_model(refined(start, tmp_path / "safe"))
    texts = [pair.rejected for pair in both_safe]
    assert np.mean([r.value > 0 for r in model.score([p.messages for p in both_safe], texts)]) > 0.9
    # The same pairs called unsafe: rewards of both sides below 0, the chosen still above the rejected.
    unsafe = [replace(pair, chosen_safe=False, rejected_safe=False) for pair in both_safe]
    refine(start, tmp_path / "unsafe", new=unsafe, config=settings(epochs=2))
    model = load_reward_model(refined(start, tmp_path / "unsafe"))
    assert np.mean([r.value < 0 for r in model.score([p.messages for p in unsafe], [p.chosen for p in unsafe])]) > 0.9
    assert (leads(refined(start, tmp_path / "unsafe"), unsafe) > 0).mean() > 0.9
    off = refine(start, tmp_path / "off", new=both_safe, config=settings(epochs=2, safe_sign=0))
    assert off["new"]["after"]["sign_accuracy"]["mean"] < 0.95


def test_safety_means_nothing_to_a_reward_model(reward_folder: Path, tmp_path: Path) -> None:
    found = refine(started(reward_folder), tmp_path / "a", new=preferences(32))
    other = refine(started(reward_folder), tmp_path / "b", new=preferences(32, chosen_safe=False, rejected_safe=True))
    assert "sign_accuracy" not in found["new"]["after"]
    assert found["history"] == other["history"]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def weights(folder: Path) -> dict[str, list[float]]:
    names = ("model.safetensors", "adapter_model.safetensors")
    stored = next(folder / name for name in names if (folder / name).exists())
    return {name: tensor.flatten().tolist() for name, tensor in load_file(stored).items()}


def test_heavier_pairs_win_over_lighter_ones_that_say_the_opposite(reward_folder: Path, tmp_path: Path) -> None:
    pairs, start = preferences(48), started(reward_folder)
    for weight in (9.0, 1 / 9):
        out = tmp_path / str(weight)
        contradicting = [replace(pair, weight=weight) for pair in pairs] + swapped(pairs)
        refine(start, out, new=contradicting, config=settings(epochs=8))
        # At the optimum the odds of a preference are those of the weights.
        assert np.median(leads(refined(start, out), pairs)) == pytest.approx(np.log(weight), abs=0.3)


def test_the_new_pairs_carry_the_weight_that_was_asked_for(reward_folder: Path, tmp_path: Path) -> None:
    pairs, start = preferences(48), started(reward_folder)
    undecided = [*preferences(10, seed=3), *swapped(preferences(10, seed=3))]  # half of them right, whatever is learnt
    for share in (0.1, 0.9):
        out = tmp_path / str(share)
        config = settings(epochs=6, new_weight=share, evaluations=1)
        sets = {"original": pairs * 2, "new": swapped(pairs), "held_out_original": undecided}
        found = refine(start, out, config=config, **sets)
        assert found["new_weight"] == share
        assert np.median(leads(refined(start, out), pairs)) == pytest.approx(np.log((1 - share) / share), abs=0.3)


def test_ties_bring_two_answers_together(make_reward_model: Callable[..., Path], tmp_path: Path) -> None:
    start = started(make_reward_model(seed=4))
    pairs = preferences(64)
    refine(start, tmp_path / "apart", new=pairs, config=settings(epochs=2))
    apart = refined(start, tmp_path / "apart")
    ties = [replace(pair, tie=True) for pair in pairs]
    found = refine(apart, tmp_path / "tied", new=ties, config=settings(epochs=2))
    together = leads(refined(start, tmp_path / "tied"), preferences(40, seed=9))
    assert np.abs(together).mean() < 0.3 * np.abs(leads(apart, preferences(40, seed=9))).mean()
    assert found["ties"]["new"] == 64
    assert found["new"]["after"] == {
        "pairs": 0, "ties": 64, "accuracy": None, "loss": found["new"]["after"]["loss"], "mean_lead": None,
        "calibration": None,
    }  # fmt: skip
    assert found["new"]["after"]["loss"] >= np.log(2)


# ---- trap 1: a cost model used as a reward, or the other way round ----


def test_a_model_read_with_the_wrong_sign_is_refused_before_it_is_trained(reward_folder: Path, tmp_path: Path) -> None:
    refine(started(reward_folder), tmp_path / "trained", new=preferences(64), config=settings(epochs=2))
    wrong = started(tmp_path / "trained", kind="cost")
    with pytest.raises(ModelError, match=r"read as a cost model, prefers the rejected answer in .* set kind to reward"):
        refine(wrong, tmp_path / "out", original=preferences(64))
    assert not (tmp_path / "out").exists()


# ---- trap 2: the preferred side swapped ----


def test_swapped_pairs_are_refused_when_the_original_ones_show_it(reward_folder: Path, tmp_path: Path) -> None:
    refine(started(reward_folder), tmp_path / "trained", new=preferences(64), config=settings(epochs=2))
    start = started(tmp_path / "trained")
    with pytest.raises(ModelError, match="turn the pairs round if chosen and rejected are swapped"):
        refine(start, tmp_path / "out", held_out_original=swapped(preferences(64, seed=1)))
    # New pairs are often those that the model has wrong: that they are swapped cannot be told, and must be allowed.
    found = refine(start, tmp_path / "out", new=swapped(preferences(64, seed=1)))
    assert found["new"]["before"]["accuracy"]["high"] < 0.5


def test_a_training_that_turns_the_model_round_is_refused(reward_folder: Path, tmp_path: Path) -> None:
    refine(started(reward_folder), tmp_path / "trained", new=preferences(64), config=settings(epochs=2))
    sets = {"new": swapped(preferences(96, seed=1)), "held_out_original": preferences(40, seed=9)}
    config = settings(epochs=3, patience=0, evaluations=1)
    with pytest.raises(
        ModelError, match=r"prefers the rejected answer .* people who contradicted them, set may_overturn"
    ):
        refine(started(tmp_path / "trained"), tmp_path / "out", config=config, **sets)
    assert not (tmp_path / "out").exists()
    allowed = config.model_copy(update={"may_overturn": True})
    found = refine(started(tmp_path / "trained"), tmp_path / "out", config=allowed, **sets)
    assert found["held_out_original"]["after"]["accuracy"]["high"] < 0.5 < found["new"]["after"]["accuracy"]["low"]
    with pytest.raises(
        ModelError, match=r"set kind to cost, or turn the pairs round if chosen and rejected are swapped$"
    ):
        refine(started(tmp_path / "out"), tmp_path / "again", config=allowed, **sets)  # it was wrong before, too


# ---- trap 4: another model saved, or another loaded ----


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "bert"])
@pytest.mark.parametrize("lora_rank", [None, 4])
def test_every_architecture_is_trained_saved_and_loaded(
    make_reward_model: Callable[..., Path], tmp_path: Path, kind: str, lora_rank: int | None
) -> None:
    start = started(make_reward_model(kind))
    found = refine(start, tmp_path / "out", config=settings(lora_rank=lora_rank, epochs=3))
    assert (leads(refined(start, tmp_path / "out"), preferences(40, seed=9)) > 0).mean() > 0.85
    assert found["lora_rank"] == lora_rank
    stored = weights(tmp_path / "out")
    assert any("score" in name or "classifier" in name for name in stored), "the head is saved"
    assert (tmp_path / "out" / "adapter_config.json").exists() == (lora_rank is not None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_outputs_of_the_loaded_model_are_those_of_the_trained_one_to_the_bit(
    dtype: Any, reward_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, ...]] = []
    compare = saving.Probe.check_same

    def watch(probe: saving.Probe, loaded: Any) -> None:
        seen.append(probe.outputs)
        compare(probe, loaded)

    monkeypatch.setattr(saving.Probe, "check_same", watch)
    pairs = preferences(64)
    refine(started(reward_folder, dtype=dtype), tmp_path / "out", new=pairs, config=settings(lora_rank=4))
    model = load_reward_model(started(tmp_path / "out", dtype=dtype))
    texts = [pair.chosen for pair in pairs[:32]] + [pair.rejected for pair in pairs[:32]]
    values = [r.value for r in model.score([pair.messages for pair in pairs[:32]] * 2, texts)]
    assert len(set(values)) > 32
    assert [tuple(values)] == seen


def old_model(start: Path) -> Callable[[Any, Path], None]:
    """What a wrong path would save or load: the model from before."""

    def write(_: Any, folder: Path) -> None:
        AutoModelForSequenceClassification.from_pretrained(start).save_pretrained(folder)
        AutoTokenizer.from_pretrained(start).save_pretrained(folder)

    return write


def test_the_old_model_in_place_of_the_refined_one_is_noticed(
    reward_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_module, "save", old_model(reward_folder))
    with pytest.raises(DissonanceError, match="the saved model is not the trained one: its outputs differ by up to"):
        refine(started(reward_folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("trap", ["left out", "new", "one bit"])
def test_a_head_that_is_not_the_trained_one_is_noticed(
    reward_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    honest = saving.save

    def tamper(classifier: Any, folder: Path) -> None:
        honest(classifier, folder)
        path = folder / "adapter_model.safetensors"
        stored = load_file(path)
        (head,) = [name for name in stored if "score" in name]
        if trap == "left out":
            del stored[head]
            described = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps({**described, "modules_to_save": None}))
        elif trap == "new":
            stored[head] = torch.randn_like(stored[head])
        else:
            first = stored[head][0, 0]
            stored[head][0, 0] = torch.nextafter(first, first + 1)
        save_file(stored, path, metadata={"format": "pt"})

    monkeypatch.setattr(reward_module, "save", tamper)
    with pytest.raises(DissonanceError, match="the saved model is not the trained one|cannot be loaded: .*score"):
        refine(started(reward_folder), tmp_path / "out", config=settings(lora_rank=4))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_reads_otherwise_is_noticed(
    reward_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = saving.save

    def tamper(classifier: Any, folder: Path) -> None:
        honest(classifier, folder)
        make_tokenizer(chat=False).save_pretrained(folder)
        (folder / "chat_template.jinja").unlink(missing_ok=True)

    monkeypatch.setattr(reward_module, "save", tamper)
    with pytest.raises(DissonanceError, match="the saved tokenizer reads other tokens"):
        refine(started(reward_folder), tmp_path / "out")


def test_a_training_that_changes_nothing_is_an_error(reward_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the training changed nothing: raise learning_rate or epochs"):
        refine(started(reward_folder), tmp_path / "out", config=settings(learning_rate=1e-30))


def test_a_training_that_diverges_is_an_error(reward_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the training diverged: lower learning_rate"):
        refine(started(reward_folder), tmp_path / "out", config=settings(learning_rate=1e30))


# ---- from where, and to where ----


def test_an_adapter_is_trained_further_on_its_own_base(reward_folder: Path, tmp_path: Path) -> None:
    first = started(reward_folder)
    refine(first, tmp_path / "one", config=settings(lora_rank=4, epochs=2))
    second = refined(first, tmp_path / "one")
    before = leads(second, preferences(40, seed=9)).mean()
    found = refine(second, tmp_path / "two", config=settings(lora_rank=4, epochs=2), seed=1)
    assert found["new"]["before"]["mean_lead"] > 1, "it goes on from what the adapter had learnt"
    assert leads(refined(first, tmp_path / "two"), preferences(40, seed=9)).mean() > before
    described = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert Path(described["base_model_name_or_path"]) == reward_folder
    with pytest.raises(SettingsError, match="is an adapter of rank 4: set lora_rank to that, or leave it out"):
        refine(second, tmp_path / "three", config=settings(lora_rank=8))


def test_an_adapter_is_merged_where_all_weights_are_trained(reward_folder: Path, tmp_path: Path) -> None:
    first = started(reward_folder)
    refine(first, tmp_path / "one", config=settings(lora_rank=4, epochs=2))
    second = refined(first, tmp_path / "one")
    found = refine(second, tmp_path / "two", config=settings(epochs=1))
    assert found["new"]["before"]["mean_lead"] == pytest.approx(leads(second, preferences(64)).mean(), abs=1e-4)
    assert (tmp_path / "two" / "model.safetensors").exists()
    assert not (tmp_path / "two" / "adapter_config.json").exists()


def test_a_relative_path_of_the_base_is_found_from_anywhere(
    reward_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(reward_folder.parent)
    refine(started(Path("./" + reward_folder.name)), tmp_path / "out", config=settings(lora_rank=4))
    monkeypatch.chdir(tmp_path)
    assert len(leads(started(tmp_path / "out"), preferences(3))) == 3


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_a_causal_lm_as_base_gets_a_head_that_is_trained_and_saved(
    policy_folder: Path, reward_folder: Path, tmp_path: Path, lora_rank: int | None
) -> None:
    start = started(reward_folder)
    config = settings(base=str(policy_folder), lora_rank=lora_rank, epochs=3)
    found = refine(start, tmp_path / "out", config=config)
    assert found["base"] == str(policy_folder)
    assert found["new"]["before"] is None
    assert (leads(refined(start, tmp_path / "out"), preferences(40, seed=9)) > 0).mean() > 0.85


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_a_masked_lm_as_base_gets_a_pooler_and_a_head(
    make_reward_model: Callable[..., Path], tmp_path: Path, lora_rank: int | None
) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=90, max_position_embeddings=64, pad_token_id=0, **shape)).save_pretrained(
        tmp_path / "base"
    )
    make_tokenizer(chat=False, encoder=True).save_pretrained(tmp_path / "base")
    start = started(make_reward_model("bert"))
    config = settings(base=str(tmp_path / "base"), lora_rank=lora_rank, epochs=4)
    refine(start, tmp_path / "out", config=config)
    stored = weights(tmp_path / "out")
    assert any("pooler" in name and "lora" not in name for name in stored)
    assert (leads(refined(start, tmp_path / "out"), preferences(40, seed=9)) > 0).mean() > 0.85


def test_the_base_is_what_training_starts_from_not_the_current_model(
    make_reward_model: Callable[..., Path], tmp_path: Path
) -> None:
    one, two = make_reward_model(seed=1), make_reward_model(seed=2)
    for name, current in (("a", one), ("b", two)):
        refine(started(current), tmp_path / name, config=settings(base=str(one)))
    refine(started(two), tmp_path / "c", config=settings())
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


@pytest.mark.parametrize(
    ("model", "changes", "error", "message"),
    [
        ("module:function", {}, SettingsError, "is a callable, which cannot be trained: set base"),
        ("REWARD", {"base": "./nowhere"}, ModelError, "nowhere is not a model"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    reward_folder: Path, tmp_path: Path, model: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    start = RewardConfig(model=model.replace("REWARD", str(reward_folder)))
    with pytest.raises(error, match=message):
        refine(start, tmp_path / "out", config=settings(**changes))
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_trained_are_refused(
    make_reward_model: Callable[..., Path], policy_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="is a causal LM"):
        refine(started(policy_folder), tmp_path / "out")
    with pytest.raises(ModelError, match="has 3 outputs, and training needs one: set base"):
        refine(started(make_reward_model(num_labels=3), index=1), tmp_path / "out")


def test_a_folder_that_is_there_is_not_overwritten(reward_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(RunError, match="is there already"):
        refine(started(reward_folder), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.parametrize(
    "changes", [{"new_weight": 1.0}, {"epochs": 0}, {"lora_rank": 0}, {"epoch": 1}, {"patience": -1}]
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(changes))):
        settings(**changes)


# ---- trap 7: pairs that do not fit ----


def test_pairs_that_do_not_fit_are_counted_and_named_and_not_trained_on(reward_folder: Path, tmp_path: Path) -> None:
    pairs = preferences(40)
    pairs[7] = replace(pairs[7], rejected=" ".join(WORDS[:70]))
    pairs[11] = replace(pairs[11], rejected=pairs[11].chosen)
    held_out = [*preferences(10, seed=3), replace(preferences(1)[0], chosen=" ".join(WORDS[:75]), prompt_id="long")]
    config = settings(max_left_out=0.1)
    found = refine(started(reward_folder), tmp_path / "out", new=pairs, held_out_new=held_out, config=config)
    left_out = found["left_out"]["new"]
    assert (left_out["too_long"], left_out["same_text"]) == (1, 1)
    (too_long,) = left_out["too_long_pairs"]
    assert too_long == {"row": 7, "prompt_id": "p0-7", "tokens": too_long["tokens"]}
    assert too_long["tokens"] > 70
    assert left_out["same_text_pairs"] == [{"row": 11, "prompt_id": "p0-11"}]
    assert [pair["prompt_id"] for pair in found["left_out"]["held_out_new"]["too_long_pairs"]] == ["long"]
    assert found["pairs"] == {"original": 0, "new": 38, "held_out_original": 0, "held_out_new": 10}
    assert found["new"]["after"]["pairs"] == 38
    rest = [pair for i, pair in enumerate(pairs) if i not in (7, 11)]
    refine(started(reward_folder), tmp_path / "rest", new=rest, held_out_new=held_out[:10], config=config)
    assert weights(tmp_path / "rest") == weights(tmp_path / "out")


def test_too_many_pairs_that_do_not_fit_are_an_error(reward_folder: Path, tmp_path: Path) -> None:
    start = started(reward_folder, max_length=9)
    with pytest.raises(DataError, match=r"20 of 20 new pairs are longer than the 9 tokens .* row 0, prompt 'p0-0'"):
        refine(start, tmp_path / "out", new=preferences(20))
    with pytest.raises(DataError, match="no pairs to train on"):
        refine(start, tmp_path / "out", new=preferences(20), config=settings(max_left_out=1.0))
    with pytest.raises(DataError, match="no pairs to train on"):
        refine(start, tmp_path / "out", new=())


def test_rows_keep_their_names_when_some_original_pairs_are_drawn(reward_folder: Path, tmp_path: Path) -> None:
    original = [replace(pair, rejected=pair.chosen) for pair in preferences(50)]
    config = settings(max_original=20)
    found = refine(started(reward_folder), tmp_path / "out", original=original, config=config)
    rows = [pair["row"] for pair in found["left_out"]["original"]["same_text_pairs"]]
    assert len(set(rows)) == 20
    assert rows == sorted(rows) != list(range(20))
    assert [pair["prompt_id"] for pair in found["left_out"]["original"]["same_text_pairs"]] == [f"p0-{r}" for r in rows]


# ---- how training goes ----


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_the_best_model_on_held_out_pairs_is_the_one_that_is_kept(
    reward_folder: Path, tmp_path: Path, lora_rank: int | None
) -> None:
    """A third of the held-out pairs say the opposite: who goes on learning becomes too sure."""
    held_out = [*preferences(28, seed=9), *swapped(preferences(12, seed=8))]
    config = settings(epochs=4, patience=2, evaluations=16, lora_rank=lora_rank)
    found = refine(started(reward_folder), tmp_path / "out", held_out_new=held_out, config=config)
    losses = [entry["held_out_loss"] for entry in found["history"]]
    assert found["stopped_early"]
    assert found["history"][-3]["step"] == found["best_step"] < found["steps"] < 32
    assert losses[-3] == min(losses) < losses[-1]
    assert found["held_out_new"]["after"]["loss"] == pytest.approx(min(losses), abs=1e-6)


def test_without_held_out_pairs_training_goes_to_the_end(reward_folder: Path, tmp_path: Path) -> None:
    found = refine(started(reward_folder), tmp_path / "out", config=settings(epochs=2))
    assert (found["steps"], found["best_step"], found["stopped_early"]) == (16, 16, False)
    assert [entry["step"] for entry in found["history"]] == [4, 8, 12, 16]
    assert all(set(entry) == {"step", "loss"} for entry in found["history"])
    assert found["held_out_new"] == {"before": None, "after": None}


def global_state() -> list[Any]:
    numpy = np.random.get_state()[1].tolist()  # noqa: NPY002  # the global state is what is meant
    return [random.getstate(), numpy, torch.get_rng_state().tolist(), torch.get_num_threads()]


def test_the_seed_decides_everything_and_nothing_else_is_touched(
    reward_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    state = global_state()
    sets = {"new": preferences(32), "held_out_new": preferences(16, seed=9)}
    found = refine(started(reward_folder), tmp_path / "a", **sets)
    assert global_state() == state
    torch.manual_seed(5)
    again = refine(started(reward_folder), tmp_path / "b", **sets)
    other = refine(started(reward_folder), tmp_path / "c", **sets, seed=1)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")
    assert {**found, "seconds": 0} == {**again, "seconds": 0} != {**other, "seconds": 0}
    json.dumps(found, allow_nan=False)
    assert capfd.readouterr() == ("", "")
    assert not list(work.iterdir())
    assert not list((tmp_path / "scratch").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"work", "scratch", "a", "b", "c"}


def test_progress_counts_the_steps(reward_folder: Path, tmp_path: Path) -> None:
    seen: list[Any] = []

    @contextmanager
    def progress(label: str, total: int | None, unit: str) -> Any:
        seen.append((label, total, unit))
        yield seen.append

    refine_reward_model(
        settings(), started(reward_folder), (), preferences(40), (), (), tmp_path / "out", progress=progress
    )
    assert seen == [("reward model: training", 5, "steps"), *[1] * 5]


def test_accumulated_gradients_are_those_of_the_whole_batch(reward_folder: Path, tmp_path: Path) -> None:
    pairs = [replace(pair, weight=1.0 + i % 3) for i, pair in enumerate(preferences(64))]
    refine(started(reward_folder), tmp_path / "whole", new=pairs, config=settings(batch_size=16, learning_rate=1e-3))
    halves = settings(batch_size=4, gradient_accumulation=4, learning_rate=1e-3)
    refine(started(reward_folder), tmp_path / "halves", new=pairs, config=halves)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    for name in whole:
        np.testing.assert_allclose(whole[name], parts[name], atol=2e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_neither_the_padding_side_nor_a_missing_pad_token_changes_what_is_learnt(
    make_reward_model: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    start = make_reward_model(kind, seed=3)
    pairs = [replace(pair, rejected=pair.rejected + " w9 w10 w11" * (i % 2)) for i, pair in enumerate(preferences(48))]
    refine(started(start), tmp_path / "right", new=pairs)
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(start)
    refine(started(start), tmp_path / "left", new=pairs)
    assert weights(tmp_path / "left") == weights(tmp_path / "right")

    model = AutoModelForSequenceClassification.from_pretrained(start)
    model.config.pad_token_id = None
    model.save_pretrained(start)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(start)
    refine(started(start), tmp_path / "none", new=pairs)
    right, none = (leads(started(tmp_path / name), pairs) for name in ("right", "none"))
    np.testing.assert_allclose(none, right, atol=1e-3)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "none").config.pad_token_id is None


def test_plain_templates_are_trained_as_they_are_scored(make_reward_model: Callable[..., Path], tmp_path: Path) -> None:
    start = started(make_reward_model(chat=False), template="Question: {prompt} Answer:")
    refine(start, tmp_path / "out", config=settings(epochs=2))
    assert (leads(refined(start, tmp_path / "out"), preferences(40, seed=9)) > 0).mean() > 0.9


def test_the_length_penalty_takes_the_length_out_of_the_rewards(
    make_reward_model: Callable[..., Path], tmp_path: Path
) -> None:
    """All chosen answers are longer, and nothing else tells them apart."""
    rng = np.random.default_rng(0)
    pairs = [
        replace(pair, chosen=" ".join(rng.choice(WORDS, 9)), rejected=" ".join(rng.choice(WORDS, 3)))
        for pair in preferences(96)
    ]
    start, gaps = started(make_reward_model(seed=2)), {}
    for penalty in (0.0, 10.0):
        out = tmp_path / str(penalty)
        refine(start, out, new=pairs, config=settings(length_penalty=penalty, epochs=2, batch_size=16, length_bins=2))
        gaps[penalty] = leads(refined(start, out), pairs).mean()
    assert gaps[0.0] > 2
    assert abs(gaps[10.0]) < 0.3 * gaps[0.0]


def test_the_margin_is_what_the_better_answer_leads_by(reward_folder: Path, tmp_path: Path) -> None:
    pairs = preferences(48)
    contradicting = [replace(pair, weight=9.0) for pair in pairs] + swapped(pairs)
    for margin, lead in ((0.0, np.log(9)), (3.0, 5.1)):  # where 9 sigma(m - d) = sigma(m + d)
        out = tmp_path / str(margin)
        refine(started(reward_folder), out, new=contradicting, config=settings(margin=margin, epochs=8))
        assert np.median(leads(started(out), pairs)) == pytest.approx(lead, abs=0.4)


def test_centring_keeps_the_rewards_of_a_pair_around_zero(reward_folder: Path, tmp_path: Path) -> None:
    pairs, sizes = preferences(40), []
    conversations = [pair.messages for pair in pairs]
    for center in (0.0, 1.0):
        out = tmp_path / str(center)
        refine(started(reward_folder), out, config=settings(center=center, epochs=3))
        model = load_reward_model(started(out))
        sides = [[p.chosen for p in pairs], [p.rejected for p in pairs]]
        chosen, rejected = ([r.value for r in model.score(conversations, texts)] for texts in sides)
        sizes.append(float(np.mean((np.array(chosen) + np.array(rejected)) ** 2)))
    assert sizes[1] < 0.5 * sizes[0]


def test_gradient_checkpointing_gives_the_same_model(reward_folder: Path, tmp_path: Path) -> None:
    for checkpointing in (False, True):
        config = settings(gradient_checkpointing=checkpointing, lora_rank=4)
        refine(started(reward_folder), tmp_path / str(checkpointing), config=config)
    plain, saved = weights(tmp_path / "False"), weights(tmp_path / "True")
    for name in plain:
        np.testing.assert_allclose(plain[name], saved[name], atol=1e-5)


def test_nothing_is_sent_to_anybody(reward_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("telemetry was sent")

    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", refuse)
    monkeypatch.delenv("CI", raising=False)
    refine(started(reward_folder), tmp_path / "out")


# ---- the built-in world ----


def gold_preferences(world: World, split: Split, n: int, seed: int) -> list[Preference]:
    """Pairs of the kind that the proxy learnt from, on every category, judged by gold."""
    rng, asked, found = np.random.default_rng(seed), questions(world, split), []
    for question in (asked[i] for i in rng.integers(len(asked), size=n)):
        right = truth(world, question.category, question.subject, question.action)
        texts = [answer(world, right, rng.random(), rng) for _ in range(2)]
        worse, better = sorted(texts, key=lambda text: gold_reward(world, question.text, text))
        found.append(
            Preference(
                (Message("user", question.text),),
                better,
                worse,
                prompt_id=question.gold_key,
                chosen_safe=gold_cost(world, question.text, better) < 0,
                rejected_safe=gold_cost(world, question.text, worse) < 0,
            )
        )
    return found


def test_a_proxy_learns_what_it_did_not_know_and_forgets_little(tmp_path: Path) -> None:
    world = World(task="safety", n_pairs=3000)
    with quiet_transformers():
        train_proxy(world, tmp_path / "proxy")
    start = started(tmp_path / "proxy", kind="cost")
    known = [world.categories[i].name for i in world.proxy_knows]
    held_out = gold_preferences(world, "eval", 600, seed=1)
    of_known = [pair for pair in held_out if pair.prompt_id.split("/")[0] in known]
    of_unknown = [pair for pair in held_out if pair.prompt_id.split("/")[0] not in known]
    original = [
        Preference((Message("user", p.prompt),), p.chosen, p.rejected, 1.0, False, "", p.chosen_safe, p.rejected_safe)
        for p in sandbox_preferences(world)
    ]
    found = refine(
        start,
        tmp_path / "out",
        config=settings(learning_rate=1e-3, epochs=2, batch_size=16, max_original=800),
        original=original,
        new=gold_preferences(world, "train", 300, seed=2),
        held_out_original=of_known,
        held_out_new=of_unknown,
    )
    accuracy = {
        (name, when): found[name][when]["accuracy"]["mean"]
        for name in ("held_out_original", "held_out_new")
        for when in ("before", "after")
    }
    assert accuracy["held_out_new", "after"] > accuracy["held_out_new", "before"] + 0.05
    assert accuracy["held_out_original", "after"] > accuracy["held_out_original", "before"] - 0.05
    assert found["pairs"]["original"] + found["left_out"]["original"]["same_text"] == 800
    lead = leads(refined(start, tmp_path / "out"), of_unknown)
    assert ((lead > 0) + 0.5 * (lead == 0)).mean() == pytest.approx(accuracy["held_out_new", "after"], abs=0.02)


def test_a_process_that_sees_many_devices_trains_on_one(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    arguments._n_gpu = 8
    assert on_one_device(arguments).n_gpu == 1
