"""The start policy made ready for training: its trainable weights, and the reference that KL is measured from."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from dissonance.config import PolicyConfig
from dissonance.errors import ModelError
from dissonance.huggingface import base_and_adapter, loading, resolve_source
from dissonance.language_model import PromptEncoder, check_adapter, end_ids, load_base, load_language_model

_ROLE = "policy"
REFERENCE = "ref"
"""The name under which TRL keeps a frozen copy of an adapter that goes on being trained."""


@dataclass(frozen=True)
class Learner:
    """A policy in training, as TRL takes it."""

    model: PreTrainedModel
    """In float32 where all weights are trained: steps of 1e-6 vanish in bfloat16."""
    new_adapter: Any
    """PEFT's configuration of an adapter that TRL is to put on the model; None where there is one, or none at all."""
    encode: PromptEncoder
    end_ids: list[int]
    """What ends a completion."""
    base: str
    """What an adapter stands on, as its own configuration is to name it."""


def load_learner(start: PolicyConfig, lora_rank: int | None, work: Path) -> Learner:
    """Load the start policy for training.

    Without `lora_rank` all weights are trained, an adapter of the start policy merged into them. With it, an adapter
    is: the start policy's own, which keeps its rank, or else a new one.

    Args:
        start: the policy.
        lora_rank: of a new adapter.
        work: a folder for what has to be written down on the way.

    Raises:
        ModelError: the policy cannot be loaded, or nothing of it would be trained.
    """
    name, adapter = base_and_adapter(start, _ROLE)
    base = str(Path(name).expanduser().resolve()) if Path(name).expanduser().exists() else name
    encode = PromptEncoder(start)
    new_adapter = None
    if lora_rank is None:
        model = _load_whole(start, work)
    elif adapter is None:
        model, new_adapter = load_base(start, _ROLE), _lora(lora_rank)
    else:
        model = _load_adapted(start, adapter)
    return Learner(model, new_adapter, encode, end_ids(model.generation_config, encode.tokenizer), base)


def _load_whole(start: PolicyConfig, work: Path) -> PreTrainedModel:
    """All weights, in float32, from a folder that holds the start policy itself.

    TRL loads its reference from the name that the model was loaded under. Of a base with an adapter, that would be the
    base alone: another policy than the one that training starts from.
    """
    whole = start.model_copy(update={"dtype": "float32"})
    name, adapter = base_and_adapter(start, _ROLE)
    if adapter is None and not resolve_source(name, _ROLE).kwargs:
        return load_base(whole, _ROLE)
    folder = work / "start"
    load_language_model(whole, _ROLE).save_pretrained(folder)
    return load_base(whole.trained(folder), _ROLE)


def _load_adapted(start: PolicyConfig, adapter: str) -> PreTrainedModel:
    from peft import PeftModel

    with loading(_ROLE, start.model):
        check_adapter(adapter, _ROLE)
        # Adapters are loaded frozen unless one asks.
        return PeftModel.from_pretrained(load_base(start, _ROLE), adapter, is_trainable=True)


def _lora(rank: int) -> Any:
    from peft import LoraConfig

    # All linear layers but the output; the scale is the usual 2.
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def check_trainable(model: Module) -> int:
    """How many parameters are trained.

    Raises:
        ModelError: none.
    """
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not count:
        raise ModelError("policy: none of its weights are trainable (an adapter loaded frozen?): nothing would change")
    return count


def weights_digest(model: Module) -> str:
    """A hash of the trainable weights: of equal ones equal."""
    digest = blake2b(digest_size=32)
    for parameter in model.parameters():
        if parameter.requires_grad:
            digest.update(_bytes(parameter.detach()))
    return digest.hexdigest()


def _bytes(weights: Tensor) -> memoryview:
    local = getattr(weights, "to_local", lambda: weights)()
    return local.contiguous().view(-1).view(torch.uint8).cpu().numpy().data


@contextmanager
def as_reference(model: Any) -> Iterator[None]:
    """Inside, a model with an adapter answers as the start policy did.

    With a new adapter that is the model without it, otherwise the copy that was taken of the adapter.
    """
    if REFERENCE not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    active = model.active_adapter
    model.set_adapter(REFERENCE)
    try:
        yield
    finally:
        model.set_adapter(active)
