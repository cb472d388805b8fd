"""Scores against independent forwards, whatever the batch and the padding; and what must be refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForSequenceClassification

from conftest import CLASSIFIERS, WORDS
from dissonance.classifier import Classifier
from dissonance.config import RewardConfig
from dissonance.errors import DataError, ModelError
from dissonance.records import Message
from dissonance.rewards import FunctionRewardModel, HFRewardModel, load_reward_model
from dissonance.shared_prefix import can_share, families

CONVERSATIONS = [(Message("user", " ".join(WORDS[i : i + 1 + i % 7])),) for i in range(12)]
ANSWERS = [" ".join(WORDS[i : i + 1 + (i * 5) % 9]) for i in range(12)]


def config(folder: Path | str, **settings: Any) -> RewardConfig:
    return RewardConfig(model=str(folder), **settings)


def values(model: Any, answers: list[str] = ANSWERS) -> list[float]:
    return [r.value for r in model.score(CONVERSATIONS[: len(answers)], answers)]


def independent(folder: Path, text: str, pair: str | None = None, *, special: bool) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, pair, return_tensors="pt", add_special_tokens=special)
    accepted = {"input_ids", "attention_mask"} | ({"token_type_ids"} if pair else set())
    with torch.inference_mode():
        return float(model(**{k: v for k, v in inputs.items() if k in accepted}).logits[0, 0])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_chat_scores_equal_single_forwards(make_reward_model: Any, kind: str) -> None:
    folder = make_reward_model(kind)
    found = values(HFRewardModel(config(folder)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for value, messages, answer in zip(found, CONVERSATIONS, ANSWERS, strict=True):
        turns = [{"role": "user", "content": messages[0].content}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        assert value == pytest.approx(independent(folder, text, special=False), abs=1e-5)
    assert len(set(found)) == 12


def test_plain_text_ends_with_eos_as_trl_trains_it(make_reward_model: Any) -> None:
    folder = make_reward_model(chat=False)
    found = values(HFRewardModel(config(folder)))
    for value, messages, answer in zip(found, CONVERSATIONS, ANSWERS, strict=True):
        text = f"Question: {messages[0].content}\n\nAnswer: {answer}<eos>"
        # White-space splitting keeps "<eos>" a token of its own.
        assert value == pytest.approx(independent(folder, text, special=True), abs=1e-5)


def test_encoders_read_prompt_and_answer_as_a_pair(make_reward_model: Any) -> None:
    folder = make_reward_model("bert")
    found = values(HFRewardModel(config(folder)))
    for value, messages, answer in zip(found, CONVERSATIONS, ANSWERS, strict=True):
        assert value == pytest.approx(independent(folder, messages[0].content, answer, special=True), abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_neither_batch_size_nor_padding_side_matters(make_reward_model: Any, kind: str) -> None:
    folder = make_reward_model(kind)
    whole = values(HFRewardModel(config(folder)))
    assert values(HFRewardModel(config(folder, tokens_per_batch=1))) == pytest.approx(whole, abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        tokenizer.save_pretrained(folder)
        assert values(HFRewardModel(config(folder))) == whole


def test_a_model_without_a_pad_id_is_read_at_its_last_token(make_reward_model: Any) -> None:
    folder = make_reward_model(seed=5)
    padded = values(HFRewardModel(config(folder)))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.pad_token_id = None
    model.save_pretrained(folder)
    assert values(HFRewardModel(config(folder))) == pytest.approx(padded, abs=1e-5)


def test_a_cost_model_is_negated(reward_folder: Path) -> None:
    rewards = values(HFRewardModel(config(reward_folder)))
    assert values(HFRewardModel(config(reward_folder, kind="cost"))) == [-value for value in rewards]


def test_an_output_can_be_chosen(make_reward_model: Any) -> None:
    folder = make_reward_model(num_labels=3)
    columns = [values(HFRewardModel(config(folder, index=i))) for i in range(3)]
    assert len({tuple(column) for column in columns}) == 3
    with pytest.raises(ModelError, match="has 3 outputs: name the one to use with --reward-index"):
        HFRewardModel(config(folder))
    with pytest.raises(ModelError, match="has outputs 0 to 2"):
        HFRewardModel(config(folder, index=3))


def test_truncation_is_reported_and_keeps_the_answer(reward_folder: Path) -> None:
    model = HFRewardModel(config(reward_folder, max_length=10))
    long = " ".join(WORDS[:40])
    rewards = model.score([(Message("user", long),), (Message("user", "w7 " + long),), CONVERSATIONS[0]], ["w1"] * 3)
    assert [r.truncated for r in rewards] == [True, True, False]
    assert rewards[0].value == rewards[1].value  # they differ only in what was cut: the start


def test_an_encoder_keeps_its_first_token_and_the_separator_when_it_cuts(make_reward_model: Any) -> None:
    model = HFRewardModel(config(make_reward_model("bert"), max_length=8))
    prompt, answer = range(10, 20), range(30, 34)
    assert model._classifier.cut((1, *prompt, 2, *answer, 2)) == (1, 19, 2, *answer, 2)
    assert model._classifier.cut((1, *prompt, 2, *range(30, 50), 2)) == (1, 2, *range(45, 50), 2)
    reward = model.score([(Message("user", " ".join(WORDS[:60])),)], [" ".join(WORDS[:60])])[0]
    assert reward.truncated


def test_out_of_memory_halves_the_batch_of_the_reward_model(reward_folder: Path) -> None:
    whole = values(HFRewardModel(config(reward_folder)))
    model = HFRewardModel(config(reward_folder))
    sizes: list[int] = []

    def check(_: object, __: object, kwargs: dict[str, Any]) -> None:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("too many rows")

    model._classifier.model.register_forward_pre_hook(check, with_kwargs=True)
    assert values(model) == pytest.approx(whole, abs=1e-6)
    assert max(sizes) > 3


def test_rewards_in_bfloat16_keep_apart_what_float32_keeps_apart(make_reward_model: Any) -> None:
    folder = make_reward_model(seed=3)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.score.weight.mul_(100)  # rewards of a size at which bfloat16 has coarse steps
    model.save_pretrained(folder)
    rough = values(HFRewardModel(config(folder, dtype="bfloat16")))
    assert len(set(rough)) == len(rough)
    assert rough == pytest.approx(values(HFRewardModel(config(folder))), rel=0.1, abs=0.3)


def test_damaged_files_are_one_line(make_reward_model: Any, tmp_path: Path) -> None:
    folder = make_reward_model()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        HFRewardModel(config(folder))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        HFRewardModel(config(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="names no base model"):
        HFRewardModel(config(tmp_path))


def test_equal_answers_get_equal_rewards(reward_folder: Path) -> None:
    rewards = HFRewardModel(config(reward_folder)).score([CONVERSATIONS[1]] * 7, [*ANSWERS[:6], ANSWERS[0]])
    assert rewards[0] == rewards[6]


def groups(sizes: list[int], longest: int = 9) -> tuple[list[tuple[Message, ...]], list[str]]:
    """Prompts of uneven length, and so many answers to each, most of which begin alike."""
    conversations, answers = [], []
    for prompt, size in enumerate(sizes):
        text = " ".join(WORDS[prompt : prompt + 4 + prompt * 5 % longest])
        conversations += [(Message("user", text),)] * size
        answers += [" ".join(WORDS[:2] + WORDS[10 + i : 11 + i + i * 3 % 7]) for i in range(size)]
    return conversations, answers


def alone(model: Any, conversations: Any, answers: list[str]) -> list[float]:
    """Each scored by itself: there is nothing to share."""
    return [model.score([c], [a])[0].value for c, a in zip(conversations, answers, strict=True)]


def positions_read(classifier: Classifier) -> list[tuple[int, int]]:
    """The (rows, tokens) of every forward pass from now on."""
    read: list[tuple[int, int]] = []
    classifier.model.register_forward_pre_hook(
        lambda _, __, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return read


def classifier(folder: Path, kind: str, **settings: Any) -> tuple[Classifier, list[tuple[int, ...]]]:
    """One of an architecture, and rows for it: of uneven prompts, most of whose answers begin alike."""
    torch.manual_seed(2)
    tokens = config(folder)
    made = Classifier(tokens, CLASSIFIERS[kind](num_labels=1, **settings).eval())
    return made, Classifier(tokens).encode(*groups([5, 1, 3, 2, 8]))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen2"])
def test_answers_to_a_prompt_share_its_keys_and_values(reward_folder: Path, kind: str) -> None:
    model, rows = classifier(reward_folder, kind)
    expected = [model.score([row])[0] for row in rows]  # by itself, a row has nothing to share
    read = positions_read(model)
    found = model.score(rows)
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(set(found)) == len(rows)
    assert sum(rows * tokens for rows, tokens in read) < 0.8 * sum(map(len, rows))


_STRETCHED = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}


@pytest.mark.parametrize(
    ("kind", "settings"), [("bert", {}), ("mistral", {}), ("llama", _STRETCHED), ("qwen2", {"is_causal": False})]
)
def test_what_is_not_causal_over_all_that_came_before_is_read_whole(
    reward_folder: Path, kind: str, settings: dict[str, Any]
) -> None:
    model, rows = classifier(reward_folder, kind, **settings)
    expected = [model.score([row])[0] for row in rows]
    read = positions_read(model)
    assert model.score(rows) == pytest.approx(expected, abs=1e-5)
    assert sum(rows * tokens for rows, tokens in read) >= sum(map(len, rows))


def test_a_head_of_somebody_else_may_look_at_the_prompt(make_reward_model: Any) -> None:
    model = LlamaForSequenceClassification.from_pretrained(make_reward_model())
    assert can_share(model)
    own = type("Own", (LlamaForSequenceClassification,), {"__module__": "somewhere.else"})
    assert not can_share(own(model.config))


def test_cut_conversations_share_what_is_left_of_their_beginning(reward_folder: Path) -> None:
    model = HFRewardModel(config(reward_folder, max_length=14))
    conversations, answers = groups([6, 5, 7], longest=12)
    rewards = model.score(conversations, answers)
    assert [r.value for r in rewards] == pytest.approx(alone(model, conversations, answers), abs=1e-5)
    assert 0 < sum(r.truncated for r in rewards) < len(rewards)


@pytest.mark.parametrize("pad", [2, None])
def test_the_token_that_the_head_reads_is_never_shared(make_reward_model: Any, pad: int | None) -> None:
    folder = make_reward_model(chat=False)  # <eos>, 2, ends every row
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.pad_token_id = pad
    model.save_pretrained(folder)
    reward_model = HFRewardModel(config(folder))
    conversations = [(Message("user", "w1 w2 w3 w4 w5"),)] * 5
    answers = ["", "<eos>", "<eos> <eos>", "w6", "w6 w7"]
    found = [r.value for r in reward_model.score(conversations, answers)]
    assert found == pytest.approx(alone(reward_model, conversations, answers), abs=1e-5)


def test_equal_answers_tie_where_prompts_are_shared(reward_folder: Path) -> None:
    conversations, answers = groups([4, 3])
    once = HFRewardModel(config(reward_folder)).score(conversations, answers)
    twice = HFRewardModel(config(reward_folder)).score(conversations * 2, answers * 2)
    assert twice == [*once, *once]


def test_an_adapter_shares_too(policy_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(policy_folder, num_labels=1)
    settings = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=["score"])
    get_peft_model(base, settings).save_pretrained(tmp_path)
    model = HFRewardModel(config(policy_folder, adapter=str(tmp_path)))
    conversations, answers = groups([5, 4])
    expected = alone(model, conversations, answers)
    read = positions_read(model._classifier)
    assert [r.value for r in model.score(conversations, answers)] == pytest.approx(expected, abs=1e-5)
    assert len(read) == 2


def test_sharing_in_bfloat16_rounds_as_reading_whole_does(make_reward_model: Any) -> None:
    folder = make_reward_model(seed=3)
    conversations, answers = groups([6, 5])
    exact = [r.value for r in HFRewardModel(config(folder)).score(conversations, answers)]
    rough = HFRewardModel(config(folder, dtype="bfloat16"))
    found = [r.value for r in rough.score(conversations, answers)]
    whole = alone(rough, conversations, answers)
    assert max(map(abs, map(float.__sub__, found, whole))) < 3 * max(map(abs, map(float.__sub__, whole, exact)))
    assert len(set(found)) == len(set(exact))


@pytest.mark.parametrize("limit", [0, 3])
def test_out_of_memory_on_a_shared_prompt_halves_the_batch(reward_folder: Path, limit: int) -> None:
    """There is no room for what is shared and a row beside it, or for some rows only."""
    conversations, answers = groups([5, 4, 6])
    model = HFRewardModel(config(reward_folder))
    expected = alone(model, conversations, answers)

    def check(_: object, __: object, kwargs: dict[str, Any]) -> None:
        if len(kwargs["input_ids"]) > max(limit, 1) or (kwargs.get("past_key_values") and not limit):
            raise torch.OutOfMemoryError("too many rows")

    model._classifier.model.register_forward_pre_hook(check, with_kwargs=True)
    assert [r.value for r in model.score(conversations, answers)] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("budget", [30, 64, 200])
def test_the_budget_bounds_what_is_read_and_held_at_once(reward_folder: Path, budget: int) -> None:
    model = HFRewardModel(config(reward_folder, tokens_per_batch=budget))
    conversations, answers = groups([8, 3, 8, 2])
    expected = alone(model, conversations, answers)
    held, prefixes = [], []

    def check(_: object, __: object, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        prefixes.extend([len(kwargs["input_ids"])] if kwargs["use_cache"] and cache is None else [])
        kept = cache.layers[0].keys.shape[0] * cache.layers[0].keys.shape[2] if cache else 0
        held.append(kwargs["attention_mask"].numel() + kept)

    model._classifier.model.register_forward_pre_hook(check, with_kwargs=True)
    assert [r.value for r in model.score(conversations, answers)] == pytest.approx(expected, abs=1e-5)
    assert max(held) <= budget
    if budget > 30:  # where there is room, each prompt once, however few of its rows at a time
        assert sum(prefixes) == 4


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple), unique=True, max_size=14))
def test_families_are_rows_that_begin_alike(rows: list[tuple[int, ...]]) -> None:
    found = families(rows, pad_id=0)
    members = [row for family in found for row in family.rows]
    assert len(members) == len(set(members))
    assert set(members) <= set(rows)
    for family in found:
        assert len(family.rows) > 1
        assert {row[: family.shared] for row in family.rows} == {family.prefix}
        # Something that the head reads is left of each, unless there is nothing of the kind in it.
        assert all(any(row[family.shared :]) for row in family.rows)


def test_families_are_the_prompts_whatever_all_prompts_share() -> None:
    system = tuple(range(100, 110))
    prompts = [(*system, *range(10 * p, 10 * p + 6 + p)) for p in range(4)]
    rows = [(*prompt, 200 + i, 300) for prompt in prompts for i in range(6)]
    assert [family.prefix for family in families(rows[::-1], pad_id=0)] == prompts
    assert families([row[-2:] for row in rows[:6]], pad_id=0) == []


def test_a_causal_lm_is_refused(policy_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"is a causal LM \(LlamaForCausalLM\); its reward head would be random"):
        HFRewardModel(config(policy_folder))


def test_a_head_without_weights_is_refused(make_reward_model: Any) -> None:
    folder = make_reward_model()
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    state = {name: value for name, value in model.state_dict().items() if name != "score.weight"}
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(ModelError, match=r"has no weights for score\.weight"):
        HFRewardModel(config(folder))


@pytest.mark.parametrize("with_head", [True, False])
def test_an_adapter_must_bring_its_head(policy_folder: Path, tmp_path: Path, with_head: bool) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(policy_folder, num_labels=1)
    settings = {"modules_to_save": ["score"]} if with_head else {"modules_to_save": []}
    # task_type is left out on purpose: with SEQ_CLS, PEFT saves the head by itself.
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **settings))
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(policy_folder).save_pretrained(tmp_path / "adapter")
    if not with_head:
        with pytest.raises(ModelError, match="modules_to_save"):
            HFRewardModel(config(tmp_path / "adapter"))
        return
    with torch.inference_mode():
        tokenizer = AutoTokenizer.from_pretrained(policy_folder)
        turns = [{"role": "user", "content": CONVERSATIONS[0][0].content}, {"role": "assistant", "content": ANSWERS[0]}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
        expected = float(adapted.eval()(input_ids=ids).logits[0, 0])
    for chosen in (config(tmp_path / "adapter"), config(policy_folder, adapter=str(tmp_path / "adapter"))):
        assert values(HFRewardModel(chosen), ANSWERS[:1]) == pytest.approx([expected], abs=1e-6)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "file.txt", "a b"])
def test_what_is_not_a_model_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("x")
    with pytest.raises(ModelError, match="is not a model"):
        HFRewardModel(config(name))


def test_a_hub_id_out_of_reach_is_one_line() -> None:
    with pytest.raises(ModelError, match="reward model: nobody/nothing cannot be loaded") as caught:
        HFRewardModel(config("nobody/nothing"))
    assert "\n" not in str(caught.value)


def test_nan_weights_give_a_clear_error(make_reward_model: Any) -> None:
    folder = make_reward_model()
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.nn.init.constant_(model.score.weight, float("nan"))
    model.save_pretrained(folder)
    with pytest.raises(DataError, match="gave nan for"):
        values(HFRewardModel(config(folder)))


FUNCTIONS = """
import torch
def length(prompts, completions):
    assert prompts[0][0]["role"] == "user"
    return torch.tensor([float(len(c)) for c in completions])
def nan(prompts, completions):
    return [0.0] * (len(completions) - 1) + [float("nan")]
def words(prompts, completions):
    return ["good"] * len(completions)
def short(prompts, completions):
    return [1.0]
def nothing(prompts, completions):
    return None
def fails(prompts, completions):
    raise KeyError("oops")
def talks(prompts, completions):
    print("hello")
    return [0.0] * len(completions)
number = 3
"""


def test_any_callable_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    model = load_reward_model(config("my_rewards:length", kind="cost"))
    assert isinstance(model, FunctionRewardModel)
    assert values(model) == [-len(answer) for answer in ANSWERS]
    for name, message in {
        "nan": "returned nan for .*: rewards must be finite numbers",
        "words": "returned 'good' for",
        "short": "returned 1 rewards for 12 completions",
        "nothing": "failed: TypeError",
        "fails": "failed: KeyError",
    }.items():
        with pytest.raises((DataError, ModelError), match=message):
            values(load_reward_model(config(f"my_rewards:{name}")))
    values(load_reward_model(config("my_rewards:talks")))
    assert capsys.readouterr().out == ""
    for name, message in {
        "my_rewards:missing": "cannot be imported",
        "no_such_module_here:f": "cannot be imported",
        "my_rewards:number": "is a int, not a callable",
    }.items():
        with pytest.raises(ModelError, match=message):
            load_reward_model(config(name))
