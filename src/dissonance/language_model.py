"""A Hugging Face causal LM that answers prompts: what sampling and training a policy share.

What a policy is trained on is then exactly what it is sampled and audited on: the same tokens before its answer, the
same ids that end it.
"""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dissonance.config import PolicyConfig
from dissonance.errors import ModelError
from dissonance.huggingface import (
    PLAIN_TEMPLATE,
    base_and_adapter,
    encode_text,
    load_tokenizer,
    loading,
    render_chat,
    render_plain,
    resolve_device,
    resolve_dtype,
    resolve_source,
    uses_chat_template,
)
from dissonance.records import Prompt


class PromptEncoder:
    """The policy's tokenizer with its chat template, or a plain one."""

    def __init__(self, config: PolicyConfig) -> None:
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(config, "policy")
        self._chat = uses_chat_template(config, self.tokenizer, "policy")
        self._template = PLAIN_TEMPLATE if config.template == "auto" else config.template

    def __call__(self, prompt: Prompt) -> list[int]:
        """Token ids of one prompt, special tokens included once."""
        if self._chat:
            text = render_chat(self.tokenizer, prompt.messages, add_generation_prompt=True)
        else:
            text = render_plain(prompt.messages, self._template)
        return encode_text(self.tokenizer, text, rendered=self._chat)


def load_language_model(config: PolicyConfig, role: str) -> PreTrainedModel:
    """A causal LM in eval mode, still in main memory, its adapter merged.

    Raises:
        ModelError: it cannot be loaded, is not a causal LM, or lacks weights.
    """
    model = load_base(config, role)
    _, adapter = base_and_adapter(config, role)
    if adapter is not None:
        with loading(role, config.model):
            from peft import PeftModel

            check_adapter(adapter, role)
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.eval()


def check_generates(config: PolicyConfig, role: str) -> PreTrainedConfig:
    """A causal LM's configuration; reads no weights.

    Raises:
        ModelError: what is named is a classifier.
    """
    name, _ = base_and_adapter(config, role)
    source = resolve_source(name, role)
    with loading(role, config.model):
        known = AutoConfig.from_pretrained(source.name, trust_remote_code=config.trust_remote_code, **source.kwargs)
    architecture = (known.architectures or [""])[0]
    if architecture.endswith("ForSequenceClassification"):
        raise ModelError(f"{role}: {name} is a classifier ({architecture}), not a causal LM")
    return known


def generation_config(config: PolicyConfig, known: PreTrainedConfig, role: str) -> GenerationConfig:
    """What the loaded model's would be: the one that comes with the model, else what its configuration says."""
    source = resolve_source(base_and_adapter(config, role)[0], role)
    try:
        return GenerationConfig.from_pretrained(source.name)
    except OSError:
        return GenerationConfig.from_model_config(known)


def load_base(config: PolicyConfig, role: str) -> PreTrainedModel:
    """A causal LM without its adapter; errors as `load_language_model`."""
    name, _ = base_and_adapter(config, role)
    source = resolve_source(name, role)
    check_generates(config, role)
    with loading(role, config.model):
        model, info = AutoModelForCausalLM.from_pretrained(
            source.name, dtype=resolve_dtype(config.dtype, resolve_device(config.device)), output_loading_info=True,
            trust_remote_code=config.trust_remote_code, **source.model_kwargs(),
        )  # fmt: skip
        if info["missing_keys"]:
            raise ModelError(f"{role}: {name} has no weights for {', '.join(sorted(info['missing_keys'])[:3])}")
    return model


def check_adapter(adapter: str | Path, role: str) -> None:
    """Raise ModelError unless the adapter is one for a causal LM."""
    from peft import PeftConfig

    task = PeftConfig.from_pretrained(adapter).task_type
    if task not in (None, "CAUSAL_LM"):
        raise ModelError(f"{role}: {adapter} is an adapter for {task}, not for a causal LM")


def end_ids(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a completion: the generation config's ids and the tokenizer's.

    Raises:
        ModelError: there are none.
    """
    configured = generation.eos_token_id
    ids = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id}
    known = sorted(i for i in ids if i is not None)
    if not known:
        raise ModelError("policy: neither its generation config nor its tokenizer names an end-of-sequence token")
    return known
