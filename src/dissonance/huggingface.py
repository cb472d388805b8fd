"""What loading a Hugging Face policy and a Hugging Face reward model have in common."""

import gc
import importlib.util
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from dissonance.config import Dtype, ModelConfig
from dissonance.errors import ModelError, SettingsError
from dissonance.records import Message

PLAIN_TEMPLATE = "Question: {prompt}\n\nAnswer:"
_CPU_TOKENS, _GPU_TOKENS = 8_192, 131_072


@dataclass(frozen=True)
class Source:
    """Where a model's files are, in the words of `from_pretrained`."""

    name: str
    """A hub id or a folder."""

    kwargs: Mapping[str, Any]
    """`gguf_file` for a .gguf file, nothing otherwise."""

    def model_kwargs(self) -> dict[str, Any]:
        """Arguments for a model: a GGUF file's weights are unpacked, since packed ones compute in float32 only."""
        config = getattr(transformers, "GgufConfig", None)
        if not self.kwargs or config is None:
            return dict(self.kwargs)
        return {**self.kwargs, "quantization_config": config(dequantize=True)}


def resolve_source(name: str, role: str) -> Source:
    """Tell a .gguf file from a folder from a hub id; a path that is not there is a ModelError."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{role}: no such file: {name}")
        if importlib.util.find_spec("gguf") is None:
            raise ModelError(f"{role}: {name} needs the gguf package: pip install 'dissonance[gguf]'")
        return Source(str(path.parent), {"gguf_file": path.name})
    if path.is_dir():
        return Source(str(path), {})
    if path.exists() or name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ModelError(f"{role}: {name} is not a model: give a hub id, a folder with config.json, or a .gguf file")
    if "/" in name and path.parent.is_dir() and not isinstance(try_to_load_from_cache(name, "config.json"), str):
        raise ModelError(
            f"{role}: there is no {path.name} in the folder {path.parent}: give a folder with config.json (for the "
            f"hub's {name}, run `hf download {name}` first)"
        )
    return Source(name, {})


def resolve_device(name: str) -> torch.device:
    """`auto`: CUDA, then Apple's GPU, then the CPU."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"device {name!r} cannot be used here: {_first_line(error)}") from error
    return device


def resolve_dtype(name: Dtype, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on a GPU that computes in it, else float32: CPUs that have it are slower in it."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0) else torch.float32


def resolve_tokens_per_batch(config: ModelConfig, device: torch.device) -> int:
    """The token budget of one batch."""
    return config.tokens_per_batch or (_CPU_TOKENS if device.type == "cpu" else _GPU_TOKENS)


def resolved(config: ModelConfig) -> dict[str, Any]:
    """What `auto` means on this machine, for the ledger: results in float32 and in bfloat16 are not the same run.

    Of a model behind a server, nothing: it does not run here.
    """
    if config.server is not None:
        return {}
    device = resolve_device(config.device)
    dtype = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
    return {"device": device.type, "dtype": dtype, "tokens_per_batch": resolve_tokens_per_batch(config, device)}


@contextmanager
def loading(role: str, name: str) -> Iterator[None]:
    """Turn the many errors of `from_pretrained` into a ModelError of one line, and keep it from talking."""
    try:
        with quiet_transformers():
            yield
    except ModelError:
        raise
    except Exception as error:  # safetensors, tokenizers and Jinja have roots of their own
        raise ModelError(f"{role}: {name} cannot be loaded: {_first_line(error)}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the progress bars and advice of Transformers and PEFT off the terminal."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def base_and_adapter(config: ModelConfig, role: str) -> tuple[str, str | None]:
    """The names of the base model and of the adapter; a folder with only an adapter in it names its base itself."""
    folder = Path(config.model).expanduser()
    if (
        config.adapter is not None
        or not (folder / "adapter_config.json").is_file()
        or (folder / "config.json").is_file()
    ):
        return config.model, config.adapter
    with loading(role, config.model):
        described = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = described.get("base_model_name_or_path")
        if not isinstance(base, str):
            raise ModelError(f"{role}: {config.model} names no base model: give the base, and this as its adapter")
        return base, config.model


def free_memory() -> None:
    """Give back what deleted models held on an accelerator."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def load_tokenizer(config: ModelConfig, role: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the adapter when it brings one, else of the base."""
    name, adapter = base_and_adapter(config, role)
    if adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file():
        name = adapter
    source = resolve_source(name, role)
    with loading(role, name):
        return AutoTokenizer.from_pretrained(source.name, trust_remote_code=config.trust_remote_code, **source.kwargs)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception means that the batch was too large for the memory, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(some in str(error) for some in words)


def uses_chat_template(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, role: str) -> bool:
    """Whether conversations go through the tokenizer's chat template."""
    if config.template == "chat" and tokenizer.chat_template is None:
        raise ModelError(f"{role}: {config.model} has no chat template: use --template 'Question: {{prompt}} Answer:'")
    return config.template == "chat" or (config.template == "auto" and tokenizer.chat_template is not None)


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """A conversation through the tokenizer's chat template."""
    turns = [{"role": m.role, "content": m.content} for m in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # Jinja raises what the template's author chose
        raise ModelError(
            f"the chat template refuses a conversation ({_first_line(error)}): use another template"
        ) from error
    return str(text)


def render_plain(messages: Sequence[Message], template: str) -> str:
    """A conversation as plain text, ready for the answer.

    Each user turn goes through the template, each answer follows its turn after a space, a system prompt stands first.
    Trailing spaces are dropped: "Answer: " would split from the answer's first word in a place that no text has.
    """
    template = template.rstrip(" ")
    pieces = []
    for message in messages:
        if message.role == "user":
            pieces.append(template.replace("{prompt}", message.content))
        elif message.role == "assistant" and pieces:
            pieces[-1] = join_answer(pieces[-1], message.content)
        else:
            pieces.append(message.content)
    return "\n\n".join(pieces)


def join_answer(prompt: str, answer: str) -> str:
    """A rendered prompt and its answer, with a space between them unless one is there."""
    return f"{prompt}{answer}" if prompt[-1:].isspace() or answer[:1].isspace() else f"{prompt} {answer}"


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, rendered: bool) -> list[int]:
    """Token ids; special tokens are added unless the text came from a chat template or begins with them already."""
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer(text, add_special_tokens=not (rendered or has_bos))["input_ids"]
    return ids
