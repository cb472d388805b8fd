"""The sampler against independent forward passes, other batchings, and its own definition."""

import json
import math
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import POLICIES, WORDS
from dissonance.config import PolicyConfig
from dissonance.errors import DataError, DissonanceError, ModelError
from dissonance.records import Completion, Message, Prompt
from dissonance.sampling import HFPolicy, HFReference, decode
from dissonance.sampling.draw import draw, keyed_uniforms, token_logprobs
from dissonance.sampling.shared_prefix import share_prefixes, shares_prefixes


def prompts(count: int = 6) -> list[Prompt]:
    return [Prompt(f"p{i}", (Message("user", " ".join(WORDS[i : i + 1 + 3 * (i % 4)])),)) for i in range(count)]


def config(folder: Path, **settings: Any) -> PolicyConfig:
    return PolicyConfig(**{"model": str(folder), "n": 5, "max_new_tokens": 12, **settings})


def sample(policy: HFPolicy, asked: list[Prompt]) -> dict[tuple[str, int], Completion]:
    found = [c for batch in policy.plan(asked) for c in policy.sample(batch)]
    return {(c.prompt_id, c.completion_id): c for c in found}


@cache
def _exact(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def independent_logprob(folder: Path, prompt: Prompt, completion: Completion, *, chat: bool = True) -> float:
    """One full forward over prompt and completion, no cache, no padding, float64."""
    model, tokenizer = _exact(folder)
    turns = [{"role": m.role, "content": m.content} for m in prompt.messages]
    if chat:
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer(f"Question: {turns[0]['content']}\n\nAnswer:")["input_ids"]
    both = torch.tensor([[*ids, *completion.token_ids]])
    with torch.inference_mode():
        logprobs = model(both).logits[0].log_softmax(-1)
    return sum(float(logprobs[len(ids) - 1 + t, token]) for t, token in enumerate(completion.token_ids))


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("chat", [True, False])
def test_every_logprob_equals_an_independent_full_forward(make_policy: Any, kind: str, chat: bool) -> None:
    folder = make_policy(kind, chat=chat)
    asked = prompts()
    found = sample(HFPolicy(config(folder, temperature=0.7, top_p=0.9)), asked)
    assert len(found) == 30
    assert {c.finish_reason for c in found.values()} == {"stop", "length"}
    for prompt in asked:
        for i in range(5):
            c = found[prompt.prompt_id, i]
            assert c.logprob == pytest.approx(independent_logprob(folder, prompt, c, chat=chat), abs=2e-4)
            assert (c.token_ids[-1] == 2) == (c.finish_reason == "stop")
            assert 2 not in c.token_ids[:-1]
            assert "<" not in c.text


@pytest.mark.parametrize("kind", POLICIES)
def test_batches_change_nothing_but_rounding(make_policy: Any, kind: str) -> None:
    folder = make_policy(kind)
    whole = sample(HFPolicy(config(folder), seed=3), prompts())
    single = sample(HFPolicy(config(folder, tokens_per_batch=1), seed=3), prompts())
    subset = sample(HFPolicy(config(folder, n=2), seed=3), prompts()[2:4])
    for key, c in whole.items():
        assert single[key].token_ids == c.token_ids
        assert single[key].logprob == pytest.approx(c.logprob, abs=1e-4)
    for key, c in subset.items():
        assert whole[key].token_ids == c.token_ids
    assert sample(HFPolicy(config(folder), seed=4), prompts()) != whole


def test_plan_fits_the_budget_and_loses_nothing(policy_folder: Path) -> None:
    policy = HFPolicy(config(policy_folder, tokens_per_batch=5 * 30 * 2))
    batches = policy.plan(prompts(9))
    assert sorted(p.prompt_id for b in batches for p in b) == sorted(p.prompt_id for p in prompts(9))
    assert len(batches) > 1
    for batch in batches:
        longest = max(len(p.messages[0].content.split()) for p in batch) + 2
        assert len(batch) == 1 or len(batch) * (longest + 5 * 12) <= 300  # a prompt's keys are held once


def test_out_of_memory_halves_the_batch_and_goes_on(policy_folder: Path, capsys: Any) -> None:
    whole = sample(HFPolicy(config(policy_folder)), prompts())
    policy = HFPolicy(config(policy_folder))
    sizes = _limit_rows(policy, 4)
    assert {k: c.token_ids for k, c in sample(policy, prompts()).items()} == {k: c.token_ids for k, c in whole.items()}
    assert max(sizes) == 30
    assert Counter(size > 4 for size in sizes)[True] == 3  # 30, 15, 5: then what fits is known


def test_out_of_memory_on_one_row_is_an_error(policy_folder: Path) -> None:
    policy = HFPolicy(config(policy_folder))
    _limit_rows(policy, 0)
    with pytest.raises(DissonanceError, match="out of memory for one completion of prompt 'p"):
        sample(policy, prompts(1))


def _limit_rows(policy: HFPolicy, limit: int) -> list[int]:
    """Let the real model run out of memory at every forward of more than `limit` decoding rows."""
    sizes: list[int] = []

    def check(_: object, __: object, kwargs: dict[str, Any]) -> None:
        rows = kwargs["input_ids"].shape[0] * (5 if kwargs["past_key_values"] is None else 1)
        if kwargs["past_key_values"] is not None:
            sizes.append(rows)
            if rows > limit:
                raise torch.OutOfMemoryError("too many rows")

    policy._model.register_forward_pre_hook(check, with_kwargs=True)
    return sizes


def test_a_prompt_that_leaves_no_room_is_refused(policy_folder: Path) -> None:
    long = Prompt("long", (Message("user", " ".join(WORDS[:60])),))
    with pytest.raises(DataError, match="1 prompts leave no room for 12 new tokens.*'long', has 62 tokens"):
        HFPolicy(config(policy_folder)).plan([*prompts(2), long])


def test_equal_answers_have_equal_logprobs(policy_folder: Path) -> None:
    found = sample(HFPolicy(config(policy_folder, n=40, max_new_tokens=1, temperature=0.2)), prompts())
    by_answer: dict[tuple[str, tuple[int, ...]], set[float]] = {}
    for c in found.values():
        by_answer.setdefault((c.prompt_id, c.token_ids), set()).add(c.logprob)
    assert len(by_answer) < len(found)
    assert all(len(values) == 1 for values in by_answer.values())


@pytest.mark.parametrize("kind", POLICIES)
def test_reference_logprobs_equal_an_independent_forward(make_policy: Any, kind: str) -> None:
    folder, other = make_policy(kind), make_policy(kind, seed=7)
    asked = prompts()
    found = sample(HFPolicy(config(folder)), asked)
    reference = HFReference(config(folder), str(other))
    ids = [[found[p.prompt_id, i].token_ids for i in range(5)] for p in asked]
    decode._FORCED_LOGITS, whole = 60, decode._FORCED_LOGITS  # several slices even here
    try:
        values = reference.logprobs(asked, ids)
    finally:
        decode._FORCED_LOGITS = whole
    for p, row in zip(asked, values, strict=True):
        for i, value in enumerate(row):
            assert value == pytest.approx(independent_logprob(other, p, found[p.prompt_id, i]), abs=2e-4)


def test_the_policy_as_its_own_reference_has_no_relative_likelihood(policy_folder: Path) -> None:
    asked = prompts()
    found = sample(HFPolicy(config(policy_folder)), asked)
    ids = [[found[p.prompt_id, i].token_ids for i in range(5)] for p in asked]
    values = HFReference(config(policy_folder), str(policy_folder)).logprobs(asked, ids)
    for p, row in zip(asked, values, strict=True):
        assert row == pytest.approx([found[p.prompt_id, i].logprob for i in range(5)], abs=2e-4)


def test_a_reference_with_other_words_is_refused(policy_folder: Path, make_policy: Any, tmp_path: Path) -> None:
    other = make_policy()
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ModelError, match="another vocabulary"):
        HFReference(config(policy_folder), str(other))


def test_multi_turn_plain_prompts_have_one_bos_and_no_trailing_space(make_policy: Any) -> None:
    policy = HFPolicy(config(make_policy(chat=False), template="Question : {prompt} Answer : "))
    turns = (Message("system", "w9"), Message("user", "w1"), Message("assistant", "w2"), Message("user", "w3"))
    ids = policy._encode(Prompt("p", turns))
    tokenizer = policy._encode.tokenizer
    assert tokenizer.decode(ids) == "<bos> w9 Question : w1 Answer : w2 Question : w3 Answer :"
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_template_that_begins_with_bos_does_not_double_it(make_policy: Any) -> None:
    policy = HFPolicy(config(make_policy(chat=False), template="<bos> {prompt} :"))
    assert policy._encode(Prompt("p", (Message("user", "w1"),)))[:2] != [1, 1]


def test_chat_template_wanted_but_missing(make_policy: Any) -> None:
    with pytest.raises(ModelError, match="has no chat template"):
        HFPolicy(config(make_policy(chat=False), template="chat"))


def test_bfloat16_agrees_with_float32(policy_folder: Path) -> None:
    asked = prompts()
    exact = sample(HFPolicy(config(policy_folder)), asked)
    rough = sample(HFPolicy(config(policy_folder, dtype="bfloat16")), asked)
    same = [key for key in exact if exact[key].token_ids == rough[key].token_ids]
    assert len(same) > len(exact) / 2
    assert all(rough[key].logprob == pytest.approx(exact[key].logprob, abs=0.5) for key in same)


@given(st.integers(0, 2**31), st.text(max_size=8), st.integers(0, 100))
@settings(max_examples=50)
def test_uniforms_are_keyed(seed: int, prompt_id: str, completion_id: int) -> None:
    first = keyed_uniforms(seed, prompt_id, completion_id, 16)
    assert ((first >= 0) & (first < 1)).all()
    assert (keyed_uniforms(seed, prompt_id, completion_id, 5) == first[:5]).all()
    assert (keyed_uniforms(seed, prompt_id, completion_id + 1, 16) != first).any()
    assert (keyed_uniforms(seed + 1, prompt_id, completion_id, 16) != first).any()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.5, 0.8), (1.0, 0.3)])
def test_draws_follow_the_distribution(temperature: float, top_p: float) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -30.0]])
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    tokens, logprobs = draw(logits.expand(len(grid), -1), grid, temperature, top_p)
    expected = torch.softmax(logits[0].double() / temperature, -1)
    order = expected.argsort(descending=True)
    inside = order[: int((expected[order].cumsum(0) < top_p).sum()) + 1]
    kept = torch.zeros_like(expected)
    kept[inside] = expected[inside] / expected[inside].sum()
    share = torch.bincount(tokens, minlength=6) / len(grid)
    assert torch.allclose(share.double(), kept, atol=2e-5)
    assert torch.allclose(logprobs, logits[0].double().log_softmax(-1)[tokens], atol=1e-6)


def test_the_nucleus_grows_past_its_first_guess() -> None:
    logits = torch.zeros(2, 5000)
    tokens, _ = draw(logits, torch.tensor([0.0, 1 - 1e-12], dtype=torch.float64), 1.0, 0.99)
    assert tokens.tolist() == [0, 4999]  # all equally likely: ties stay in together


def test_the_largest_uniform_never_draws_a_token_without_mass() -> None:
    logits = torch.full((1, 50_000), -1e4)
    logits[0, 7] = 0.0
    for u in (0.0, 0.5, np.nextafter(1.0, 0.0)):
        token, logprob = draw(logits, torch.tensor([u], dtype=torch.float64), 1.0, 1.0)
        assert token.item() == 7
        assert logprob.item() == pytest.approx(0.0, abs=1e-6)


def test_token_logprobs_are_stable_for_large_logits() -> None:
    logits = torch.tensor([[1e4, 1e4 - 1.0, -1e4]])
    assert token_logprobs(logits, torch.tensor([0])).item() == pytest.approx(-math.log(1 + math.exp(-1)), abs=1e-3)


def test_several_end_of_sequence_ids_all_end(make_policy: Any) -> None:
    folder = make_policy(seed=2)
    settings_file = folder / "generation_config.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"eos_token_id": [2, 20, 30, 40]}))
    found = sample(HFPolicy(config(folder, n=30)), prompts())
    ends = {c.token_ids[-1] for c in found.values() if c.finish_reason == "stop"}
    assert len(ends) > 1
    assert ends <= {2, 20, 30, 40}
    assert all(not {2, 20, 30, 40} & set(c.token_ids[:-1]) for c in found.values())


def test_a_policy_with_an_adapter_is_the_adapted_model(policy_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(policy_folder)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = tmp_path / "merged"
    adapted.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(policy_folder).save_pretrained(merged)
    plain = sample(HFPolicy(config(policy_folder)), prompts(2))
    expected = sample(HFPolicy(config(merged)), prompts(2))
    for chosen in (config(policy_folder, adapter=str(tmp_path / "adapter")), config(tmp_path / "adapter")):
        found = sample(HFPolicy(chosen), prompts(2))
        assert {key: c.token_ids for key, c in found.items()} == {key: c.token_ids for key, c in expected.items()}
        assert all(c.logprob == pytest.approx(expected[key].logprob, abs=1e-3) for key, c in found.items())
        assert {key: c.token_ids for key, c in found.items()} != {key: c.token_ids for key, c in plain.items()}
    described = tmp_path / "adapter" / "adapter_config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"task_type": "SEQ_CLS"}))
    with pytest.raises(ModelError, match="is an adapter for SEQ_CLS"):
        HFPolicy(config(policy_folder, adapter=str(tmp_path / "adapter")))


def test_nan_logits_are_refused(make_policy: Any) -> None:
    folder = make_policy()
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match="NaN or infinite logits"):
        sample(HFPolicy(config(folder)), prompts(1))


def test_the_reference_splits_what_does_not_fit(policy_folder: Path) -> None:
    asked = prompts(3)
    found = sample(HFPolicy(config(policy_folder)), asked)
    ids = [[found[p.prompt_id, i].token_ids for i in range(5)] for p in asked]
    whole = HFReference(config(policy_folder), str(policy_folder)).logprobs(asked, ids)
    reference = HFReference(config(policy_folder), str(policy_folder))

    def check(_: object, __: object, kwargs: dict[str, Any]) -> None:
        if kwargs["past_key_values"] is not None and len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("too many rows")

    reference._model.register_forward_pre_hook(check, with_kwargs=True)
    for row, expected in zip(reference.logprobs(asked, ids), whole, strict=True):
        assert row == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama.cpp file with a tiny Llama and a byte-level tokenizer."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    letters = [chr(code) for code in range(33, 127)]
    words = ["<unk>", "<s>", "</s>", *letters, "\u0120", "ab"]
    writer = gguf.GGUFWriter(str(path), "llama")
    width, heads, layers, hidden = 64, 4, 2, 96
    for add, value in {
        "context_length": 128, "embedding_length": width, "block_count": layers, "feed_forward_length": hidden,
        "head_count": heads, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "vocab_size": len(words),
        "rope_dimension_count": width // heads, "tokenizer_model": "gpt2", "token_list": words,
        "token_types": [3, 3, 3] + [1] * (len(words) - 3), "token_merges": ["a b"],
        "bos_token_id": 1, "eos_token_id": 2,
    }.items():  # fmt: skip
        getattr(writer, f"add_{add}")(value)
    rng = np.random.default_rng(0)

    def add_tensor(name: str, *shape: int, scale: float = 0.2) -> None:
        writer.add_tensor(name, (rng.standard_normal(shape) * scale).astype(np.float32))

    add_tensor("token_embd.weight", len(words), width)
    add_tensor("output.weight", len(words), width)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for block in range(layers):
        for name, shape in {
            "attn_q": (width, width), "attn_k": (width // 2, width), "attn_v": (width // 2, width),
            "attn_output": (width, width), "ffn_gate": (hidden, width), "ffn_up": (hidden, width),
            "ffn_down": (width, hidden),
        }.items():  # fmt: skip
            add_tensor(f"blk.{block}.{name}.weight", *shape)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_a_policy(gguf_file: Path) -> None:
    policy = HFPolicy(config(gguf_file, template="{prompt}"))
    asked = [Prompt("p", (Message("user", "Hello"),)), Prompt("q", (Message("user", "Hi"),))]
    found = sample(policy, asked)
    assert len(found) == 10
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32).eval()
    for prompt in asked:
        ids = policy._encode(prompt)
        c = found[prompt.prompt_id, 0]
        with torch.inference_mode():
            logprobs = model(torch.tensor([[*ids, *c.token_ids]])).logits[0].log_softmax(-1)
        total = sum(float(logprobs[len(ids) - 1 + t, token]) for t, token in enumerate(c.token_ids))
        assert c.logprob == pytest.approx(total, abs=1e-3)
    with pytest.raises(ModelError, match="no such file"):
        HFPolicy(config(gguf_file.with_name("other.gguf")))


def shared_and_plain(folder: Path, **settings: Any) -> tuple[HFPolicy, HFPolicy]:
    """The same policy with prompts whose keys are shared among their rows, and with a copy for every row."""
    shared, plain = HFPolicy(config(folder, **settings)), HFPolicy(config(folder, **settings))
    assert shares_prefixes(shared._model)
    plain._model.set_attn_implementation("sdpa")
    return shared, plain


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize(("count", "n"), [(6, 5), (1, 7), (5, 2)])
def test_sharing_a_prompt_changes_nothing_but_rounding(make_policy: Any, kind: str, count: int, n: int) -> None:
    folder = make_policy(kind)
    found, expected = (sample(policy, prompts(count)) for policy in shared_and_plain(folder, n=n))
    assert len(found) == count * n
    for key, c in expected.items():
        assert found[key].token_ids == c.token_ids
        assert found[key].logprob == pytest.approx(c.logprob, abs=1e-5)


def test_rows_that_finish_leave_a_shared_prompt(make_policy: Any) -> None:
    folder = make_policy(seed=2)
    settings_file = folder / "generation_config.json"
    ends = list(range(2, 50))
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"eos_token_id": ends}))
    shared, plain = shared_and_plain(folder, n=9)
    prefixes: list[int] = []
    shared._model.register_forward_pre_hook(
        lambda _, __, kwargs: (
            prefixes.append(len(kwargs["past_key_values"].layers[0].prefix_keys))
            if kwargs["past_key_values"] is not None
            else None
        ),
        with_kwargs=True,
    )
    found, expected = sample(shared, prompts()), sample(plain, prompts())
    assert len({len(c.token_ids) for c in found.values()}) > 3
    assert prefixes[0] == 6 > prefixes[-1]  # a prompt none of whose rows go on is dropped too
    for key, c in expected.items():
        assert found[key].token_ids == c.token_ids
        assert found[key].logprob == pytest.approx(c.logprob, abs=1e-5)


@pytest.mark.parametrize("together", [1, 10, 10_000])
def test_shared_prompts_are_read_in_any_number_at_a_time(
    policy_folder: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    shared, plain = shared_and_plain(policy_folder)
    monkeypatch.setattr(decode, "_READ_TOGETHER", together)
    found, expected = sample(shared, prompts()), sample(plain, prompts())
    assert {k: c.token_ids for k, c in found.items()} == {k: c.token_ids for k, c in expected.items()}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("slice_", [1, 60, 10_000])
def test_several_tokens_at_once_behind_a_shared_prompt(
    make_policy: Any, monkeypatch: pytest.MonkeyPatch, kind: str, slice_: int
) -> None:
    folder = make_policy(kind)
    policy = HFPolicy(config(folder))
    found = sample(policy, prompts())
    monkeypatch.setattr(decode, "_FORCED_LOGITS", slice_)
    ids = [[found[p.prompt_id, i].token_ids for i in range(5)] for p in prompts()]
    values = decode.teacher_force(policy._model, [policy._encode(p) for p in prompts()], ids)
    for p, row in zip(prompts(), values, strict=True):
        for i, value in enumerate(row):
            assert value == pytest.approx(independent_logprob(folder, p, found[p.prompt_id, i]), abs=1e-5)


def test_a_shared_prompt_in_bfloat16_rounds_like_copies_of_it(policy_folder: Path) -> None:
    shared, plain = shared_and_plain(policy_folder, dtype="bfloat16")
    found = sample(shared, prompts())
    ids = [[found[p.prompt_id, i].token_ids for i in range(5)] for p in prompts()]
    copies = decode.teacher_force(plain._model, [plain._encode(p) for p in prompts()], ids)
    for p, row in zip(prompts(), copies, strict=True):
        assert row == pytest.approx([found[p.prompt_id, i].logprob for i in range(5)], abs=0.25)


def test_attention_that_is_not_plain_keeps_its_own(make_policy: Any) -> None:
    assert not shares_prefixes(HFPolicy(config(make_policy("mistral")))._model)  # it has a sliding window
    eager = AutoModelForCausalLM.from_pretrained(make_policy(), attn_implementation="eager")
    share_prefixes(eager)
    assert not shares_prefixes(eager)


def test_a_token_is_found_by_its_block_as_by_the_whole_sum() -> None:
    torch.manual_seed(0)
    for size in (1, 255, 256, 257, 1000, 49_152):
        logits, uniforms = torch.randn(64, size) * 4, torch.rand(64, dtype=torch.float64)
        cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
        expected = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
        tokens, logprobs = draw(logits, uniforms, 1.0, 1.0)
        assert torch.equal(tokens, expected)
        assert torch.allclose(logprobs, token_logprobs(logits, tokens), atol=1e-5)
