"""Real models, tiny, made from a config: what every test of sampling and scoring runs on."""

import gc
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import trl  # noqa: F401 - with the others, before what they hold is frozen
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    MistralForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from postgres import make_postgres_url, postgres_server, postgres_url  # noqa: F401

os.environ["HF_HUB_OFFLINE"] = "1"
# The profile `ci`, which pyproject.toml asks for, but with other examples each time: --hypothesis-profile anew
settings.register_profile("anew", settings.get_profile("ci"), derandomize=False)
# A shell's background job ignores Ctrl-C, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tiny models: threads cost more than they bring
# A model that goes is collected, and each time the collector would walk through all that the libraries hold for good.
gc.collect()
gc.freeze()

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% if m.role == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
WORDS = [f"w{i}" for i in range(80)]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>"]


def make_tokenizer(*, chat: bool = True, encoder: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "Question", "Answer", ":", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(":", "isolated")]
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "extra_special_tokens": ["<user>", "<assistant>", "<system>"]}
    if encoder:
        names |= {"cls_token": "<bos>", "sep_token": "<eos>"}
        ids = [("<bos>", 1), ("<eos>", 2)]
        inner.post_processor = processors.TemplateProcessing("<bos> $A <eos>", "<bos> $A <eos> $B:1 <eos>:1", ids)
    else:
        names |= {"bos_token": "<bos>", "eos_token": "<eos>"}
        inner.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **names)
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


_SHAPE = {"vocab_size": 90, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    **_SHAPE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_GPT2 = {**_SHAPE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

POLICIES: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**{**_LLAMA, "num_key_value_heads": 4})),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_LLAMA, sliding_window=8)),
}
CLASSIFIERS: dict[str, Callable[..., torch.nn.Module]] = {
    "llama": lambda **kw: LlamaForSequenceClassification(LlamaConfig(**_LLAMA, **kw)),
    "gpt2": lambda **kw: GPT2ForSequenceClassification(GPT2Config(**_GPT2, **kw)),
    "gpt_neox": lambda **kw: GPTNeoXForSequenceClassification(
        GPTNeoXConfig(**{**_LLAMA, "num_key_value_heads": 4}, **kw)
    ),
    "qwen2": lambda **kw: Qwen2ForSequenceClassification(Qwen2Config(**_LLAMA, **kw)),
    "mistral": lambda **kw: MistralForSequenceClassification(MistralConfig(**_LLAMA, sliding_window=8, **kw)),
    "bert": lambda **kw: BertForSequenceClassification(
        BertConfig(
            vocab_size=90,
            pad_token_id=0,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            **kw,
        )
    ),
}


@pytest.fixture(scope="session")
def make_policy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A causal LM folder with random weights, spread enough that likelihoods differ."""

    def make(kind: str = "llama", *, chat: bool = True, seed: int = 0, scale: float = 4.0) -> Path:
        folder = tmp_path_factory.mktemp(f"policy-{kind}")
        torch.manual_seed(seed)
        model = POLICIES[kind]()
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(scale)
        model.save_pretrained(folder)
        make_tokenizer(chat=chat).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_reward_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A sequence classifier folder with random weights."""

    def make(kind: str = "llama", *, chat: bool = True, seed: int = 1, num_labels: int = 1, **config: object) -> Path:
        folder = tmp_path_factory.mktemp(f"reward-{kind}")
        torch.manual_seed(seed)
        CLASSIFIERS[kind](num_labels=num_labels, **config).save_pretrained(folder)
        make_tokenizer(chat=chat and kind != "bert", encoder=kind == "bert").save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def policy_folder(make_policy: Callable[..., Path]) -> Path:
    return make_policy()


@pytest.fixture(scope="session")
def reward_folder(make_reward_model: Callable[..., Path]) -> Path:
    return make_reward_model()


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    """Twelve prompts of different lengths, in two categories."""
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"id": f"p{i}", "prompt": " ".join(WORDS[i : i + 2 + i % 5]), "category": "even" if i % 2 == 0 else "odd"}
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
