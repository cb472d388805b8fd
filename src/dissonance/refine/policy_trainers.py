"""TRL's trainers, fed with the token ids that the audit works with.

TRL would tokenise prompts and answers itself. Here a prompt's ids come from `PromptEncoder`, so that no special token
is there twice and no space is lost, and the answers' ids of offline methods are those that the policy produced.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from dissonance.config import PolicyConfig, PolicyTraining, Tracker
from dissonance.errors import DissonanceError, SettingsError
from dissonance.huggingface import resolve_device, resolve_dtype
from dissonance.models import RewardModel
from dissonance.records import Completion, Prompt
from dissonance.refine.distil import Pair
from dissonance.refine.learner import Learner
from dissonance.refine.session import on_one_device
from dissonance.refine.watch import REWARD

ONLINE = ("rloo", "grpo")
IGNORED = -100
_MEASURED_ONLY = 1e-30
"""TRL measures KL only where its coefficient is not 0; this one moves no float32 reward and no weight."""


@dataclass(frozen=True)
class Setting:
    """What every trainer is made from."""

    config: PolicyTraining
    start: PolicyConfig
    learner: Learner
    prompts: Sequence[Prompt]
    prompt_ids: Sequence[Sequence[int]]
    reward_model: RewardModel
    max_new_tokens: int
    seed: int
    work: Path
    """For what TRL writes."""
    trackers: Sequence[Tracker] = ()
    """Where TRL logs to."""


class _TakesIds:
    """The prompt column holds rows of `prompt_ids`; without this override TRL would fail on them, not tokenise them."""

    def __init__(self, *args: Any, prompt_ids: Sequence[Sequence[int]], **kwargs: Any) -> None:
        self._prompt_ids = prompt_ids
        if not hasattr(super(), "_tokenize_prompts"):
            raise DissonanceError("this version of TRL takes prompts in another way: install trl 1.16")
        super().__init__(*args, **kwargs)

    def _tokenize_prompts(self, prompts: Sequence[int]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [list(self._prompt_ids[row]) for row in prompts], None, {}


class _Rloo(_TakesIds, RLOOTrainer):  # type: ignore[misc]  # TRL is untyped
    pass


class _Grpo(_TakesIds, GRPOTrainer):  # type: ignore[misc]
    pass


class _Dpo(DPOTrainer):  # type: ignore[misc]
    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        # It has the columns that the collator wants.
        return dataset


def online_trainer(setting: Setting) -> Any:
    """RLOO or GRPO against the reward model."""
    trainer, arguments = {"rloo": (_Rloo, RLOOConfig), "grpo": (_Grpo, GRPOConfig)}[setting.config.method]
    config = setting.config
    rows = config.prompts_per_step * config.n
    own = {
        "num_generations": config.n,
        "max_completion_length": setting.max_new_tokens,
        "temperature": config.temperature,
        "beta": config.kl_coefficient or _MEASURED_ONLY,
        "disable_dropout": True,
    }
    return _make(
        setting, trainer, arguments, rows, own,
        train_dataset=Dataset.from_dict({"prompt": list(range(len(setting.prompts)))}),
        reward_funcs=reward_functions(setting),
        prompt_ids=setting.prompt_ids,
    )  # fmt: skip


def dpo_trainer(setting: Setting, pairs: Sequence[Pair]) -> Any:
    """DPO on pairs."""
    ids = dict(zip((p.prompt_id for p in setting.prompts), setting.prompt_ids, strict=True))
    rows = {
        "prompt_ids": [list(ids[pair.prompt.prompt_id]) for pair in pairs],
        "chosen_ids": [list(pair.chosen.token_ids) for pair in pairs],
        "rejected_ids": [list(pair.rejected.token_ids) for pair in pairs],
    }
    own = {"beta": setting.config.kl_coefficient, "max_length": None, "disable_dropout": True}
    return _make(setting, _Dpo, DPOConfig, setting.config.prompts_per_step, own, train_dataset=Dataset.from_dict(rows))


def sft_trainer(setting: Setting, answers: Sequence[tuple[Prompt, Completion]]) -> Any:
    """Supervised fine-tuning on answers; the prompts' tokens cost nothing."""
    ids = dict(zip((p.prompt_id for p in setting.prompts), setting.prompt_ids, strict=True))
    examples = [(list(ids[prompt.prompt_id]), list(answer.token_ids)) for prompt, answer in answers]
    rows = {
        "input_ids": [prompt + answer for prompt, answer in examples],
        "labels": [[IGNORED] * len(prompt) + answer for prompt, answer in examples],
    }
    own = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return _make(
        setting, SFTTrainer, SFTConfig, setting.config.prompts_per_step, own, train_dataset=Dataset.from_dict(rows)
    )


def reward_functions(setting: Setting) -> list[Callable[..., list[float]]]:
    """The reward model, and the penalty for answers without an end, as TRL calls them."""
    conversations = [prompt.messages for prompt in setting.prompts]
    ends = set(setting.learner.end_ids)
    penalty = setting.config.missing_eos_penalty

    def score(prompts: Sequence[int], completions: Sequence[str], **_: Any) -> list[float]:
        rewards = setting.reward_model.score([conversations[row] for row in prompts], completions)
        return [reward.value for reward in rewards]

    def missing_eos(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [0.0 if ids[-1] in ends else -penalty for ids in completion_ids]

    score.__name__ = REWARD
    return [score, missing_eos] if penalty else [score]


def _make(setting: Setting, trainer: Any, arguments: Any, rows: int, own: dict[str, Any], **kwargs: Any) -> Any:
    """A trainer whose errors about settings are ours."""
    learner, config = setting.learner, setting.config
    taken = {**_arguments(setting, rows), **own}
    if clash := sorted(set(config.trl_arguments) & set(taken)):
        raise SettingsError(f"trl_arguments: {clash[0]} has a setting of its own, or cannot be changed")
    try:
        made = trainer(
            model=learner.model,
            args=on_one_device(arguments(**taken, **config.trl_arguments)),
            processing_class=learner.encode.tokenizer,
            peft_config=learner.new_adapter,
            **kwargs,
        )
    except (TypeError, ValueError, ImportError) as error:
        raise SettingsError(f"policy: TRL refuses the settings: {str(error).strip().splitlines()[0]}") from error
    made.remove_callback(PrinterCallback)
    return made


def _arguments(setting: Setting, rows: int) -> dict[str, Any]:
    """What all of TRL's configurations share; `rows` is what a step reads over all devices."""
    config = setting.config
    device = resolve_device(setting.start.device)
    if device.index:
        raise SettingsError(f"device {device}: training takes the first; choose it with CUDA_VISIBLE_DEVICES")
    half = resolve_dtype(setting.start.dtype, device)
    return {
        "output_dir": str(setting.work / "trl"),
        "seed": setting.seed,
        "max_steps": config.steps,
        "learning_rate": config.peak_learning_rate,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": round(config.warmup * config.steps),
        "gradient_checkpointing": config.gradient_checkpointing,
        "bf16": half == torch.bfloat16,
        "fp16": half == torch.float16,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": list(setting.trackers) or "none",
        "disable_tqdm": True,
        "log_level": "error",
        **_batch(config, rows, PartialState(cpu=device.type == "cpu").num_processes),
    }


def _batch(config: PolicyTraining, rows: int, processes: int) -> dict[str, int]:
    """How a step's rows are dealt out to devices and to forward passes."""
    each, left = divmod(rows, processes)
    size = min(config.micro_batch or each, each)
    if left or not size or each % size:
        raise SettingsError(
            f"micro_batch {config.micro_batch}: {rows} rows a step on {processes} devices cannot be dealt out evenly"
        )
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": each // size}
