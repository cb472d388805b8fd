"""The policy, trained against a reward model: by reinforcement learning, or from its own answers.

gold pairs -> does the reward model point the right way?          gold_sign.py
the policy's answers -> pairs, or the best of n                    distil.py      dpo, rso, best_of_n
prompts -> answers -> rewards -> steps                             TRL            rloo, grpo
reward, KL, length and entropy as it goes; the last good policy    watch.py, probe.py
"""

import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from dissonance.artifacts import atomic_folder
from dissonance.config import PolicyConfig, PolicyTraining, Tracker
from dissonance.errors import DataError, DissonanceError, ModelError, RunError, SettingsError
from dissonance.huggingface import free_memory, load_tokenizer, resolve_device, resolve_dtype, resolve_tokens_per_batch
from dissonance.language_model import load_language_model
from dissonance.models import RewardModel
from dissonance.progress import ProgressFactory, quiet
from dissonance.records import Completion, Preference, Prompt
from dissonance.refine.distil import best_answers, ranked_pairs, rejection_pairs, score_candidates
from dissonance.refine.gold_sign import check_gold_sign
from dissonance.refine.learner import Learner, check_trainable, load_learner, weights_digest
from dissonance.refine.policy_trainers import ONLINE, Setting, dpo_trainer, online_trainer, sft_trainer
from dissonance.refine.probe import Probe
from dissonance.refine.session import check_trackers, training_session
from dissonance.refine.watch import Limits, Measurement, Watch, check_reference

_EXACT, _ROUNDED = 1e-3, 2e-2
"""Nats per token that rounding may put between a policy and its own copy: in float32, and in half precision."""


def refine_policy(  # noqa: PLR0913 - a stage is one call
    config: PolicyTraining,
    start: PolicyConfig,
    reward_model: RewardModel,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    seed: int = 0,
    progress: ProgressFactory = quiet,
    gold_pairs: Sequence[Preference] | None = None,
    completions: Sequence[Completion] | None = None,
    trackers: Sequence[Tracker] = (),
) -> dict[str, Any]:
    """Train a policy against a reward model.

    Leaves a folder that loads as a policy, with `PolicyConfig(model=out)`: all weights, or an adapter that names its
    base. It is there when all of it is, or not at all.

    Args:
        config: the method and its settings.
        start: the policy to train; it is also what KL is measured from.
        reward_model: oriented so that higher is better.
        prompts: what the policy is asked.
        out: the folder to leave.
        seed: of everything that is drawn.
        progress: opens the progress of the training.
        gold_pairs: held-out pairs whose better answer is known; the reward model must rank them above chance. None
            leaves its direction unchecked, and the metrics say so.
        completions: the start policy's answers to the prompts, for the methods that learn from them: dpo, rso,
            best_of_n.
        trackers: where the training is logged to.

    Returns:
        method, steps, kept_step (whose policy `out` is), stopped ({step, reason} or None), gold_check, start and end
        (reward, kl, length, entropy, unfinished of the start policy and of `out`, on the same prompts), history (a list
        of such rows with their step), trained_parameters, processes (that shared the steps), and data (of what the
        offline methods learned from).

    Raises:
        ModelError: the reward model ranks gold pairs no better than chance, the KL reference is not the start policy,
            or the policy's weights never changed.
        SettingsError: the settings contradict each other, or the policy ran away before anything could be kept.
        DataError: the prompts, pairs or completions cannot be used.
        RunError: `out` is there already.
    """
    _check_request(config, prompts, out, completions)
    check_trackers(trackers)
    gold = _gold_check(config, reward_model, gold_pairs)
    with training_session(out, seed), _workplace(out) as work:
        learner = load_learner(start, config.lora_rank, work)
        setting = replace(_setting(config, start, learner, reward_model, prompts, seed, work), trackers=trackers)
        trainer, data = _trainer(setting, completions)
        course = _train(setting, trainer, progress)
        metrics = _metrics(setting, trainer, course)
        if trainer.is_world_process_zero():
            with atomic_folder(out) as temporary:
                (work / "kept").rename(temporary)
        trainer.accelerator.wait_for_everyone()
        del trainer, learner, setting
    free_memory()
    return {**metrics, "gold_check": gold, "data": data}


def _check_request(
    config: PolicyTraining, prompts: Sequence[Prompt], out: Path, completions: Sequence[Completion] | None
) -> None:
    """What can be seen to be wrong before a model is loaded."""
    if out.exists():
        raise RunError(f"{out} is there already: name a folder that is not, or remove it")
    if config.method in ONLINE and len(prompts) < config.prompts_per_step:
        raise SettingsError(f"prompts_per_step is {config.prompts_per_step}, but there are {len(prompts)} prompts")
    if config.method not in ONLINE and not completions:
        raise DataError(f"{config.method} learns from the start policy's answers: sample the prompts first")


def _gold_check(
    config: PolicyTraining, reward_model: RewardModel, gold_pairs: Sequence[Preference] | None
) -> dict[str, Any]:
    if not gold_pairs:
        return {"checked": False, "why_not": "no held-out gold pairs were given: whether the reward model points the "
                "right way is not known"}  # fmt: skip
    found = check_gold_sign(reward_model, gold_pairs, margin=config.gold_margin, confidence=config.gold_confidence)
    return {"checked": True, **found.metrics()}


@contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """A folder beside the result, so that it can be renamed; a run folder sweeps what a killed process leaves of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _setting(
    config: PolicyTraining,
    start: PolicyConfig,
    learner: Learner,
    reward_model: RewardModel,
    prompts: Sequence[Prompt],
    seed: int,
    work: Path,
) -> Setting:
    prompt_ids = [learner.encode(prompt) for prompt in prompts]
    new = config.max_new_tokens or start.max_new_tokens
    context = getattr(learner.model.config.get_text_config(), "max_position_embeddings", None)
    too_long = [p.prompt_id for p, ids in zip(prompts, prompt_ids, strict=True) if context and len(ids) + new > context]
    if too_long:
        raise DataError(
            f"{len(too_long)} prompts leave no room for {new} new tokens in the policy's {context} positions (the "
            f"first is {too_long[0]!r}): shorten them or lower max_new_tokens"
        )
    return Setting(config, start, learner, prompts, prompt_ids, reward_model, new, seed, work)


def _trainer(setting: Setting, completions: Sequence[Completion] | None) -> tuple[Any, dict[str, Any] | None]:
    """TRL's trainer for the method, and what is to be said of its data."""
    config = setting.config
    if config.method in ONLINE:
        return online_trainer(setting), None
    candidates = score_candidates(setting.reward_model, setting.prompts, completions or (), config.missing_eos_penalty)
    if config.method == "best_of_n":
        answers = best_answers(candidates)
        return sft_trainer(setting, answers), {"answers": len(answers)}
    if config.method == "rso":
        rng = np.random.default_rng(setting.seed)
        found = rejection_pairs(candidates, config.rso_keep, config.rso_beta, rng)
    else:
        found = ranked_pairs(candidates)
    if not found.pairs:
        raise DataError(f"{config.method}: the reward model tells none of the {found.tied} pairs of answers apart")
    return dpo_trainer(setting, found.pairs), {"pairs": len(found.pairs), "left_out_as_tied": found.tied}


def _train(setting: Setting, trainer: Any, progress: ProgressFactory) -> Watch:
    """Take the steps; `kept` in the workplace is then the last good policy."""
    config = setting.config
    check_trainable(trainer.model)
    _check_sharding(trainer)
    probe = _probe(setting, trainer)
    exact = resolve_dtype(setting.start.dtype, resolve_device(setting.start.device)) == torch.float32
    before: list[str] = []

    def begin() -> Measurement:
        answers = probe.answer()
        lengths = [len(ids) for ids in answers.token_ids]
        check_reference(answers.log_ratios, lengths, _EXACT if exact else _ROUNDED)
        before.append(weights_digest(trainer.model))
        return probe.judge(answers)

    with progress(f"{config.method}: training the policy", config.steps, "steps") as advance:
        watch = Watch(
            Limits(config.max_kl, config.max_length_ratio), config.check_every,
            online=config.method in ONLINE, measure=lambda: _of_the_first(probe.measure()),
            begin=lambda: _of_the_first(begin()),
            keep=lambda _: _save(setting, trainer), advance=advance,
        )  # fmt: skip
        trainer.add_callback(watch)
        trainer.train()
    if weights_digest(trainer.model) == before[0]:
        raise ModelError(
            f"policy: after {trainer.state.global_step} steps none of its weights has changed: is learning_rate "
            f"{config.peak_learning_rate:g} too low, or do all answers have the same reward?"
        )
    if watch.kept is None:
        stopped = watch.stopped or {}
        raise SettingsError(
            f"policy: {stopped.get('reason')}, at step {stopped.get('step')}, before the first check at step "
            f"{config.check_every} could keep a policy: lower learning_rate or check_every, or raise beta"
        )
    return watch


def _check_sharding(trainer: Any) -> None:
    """Of sharded weights Transformers saves nothing unless they are gathered."""
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise SettingsError(
            f"policy: FSDP's state dict type is {plugin.state_dict_type}, with which no weights would be saved: set "
            "fsdp_state_dict_type to FULL_STATE_DICT"
        )


def _of_the_first(found: Measurement) -> Measurement:
    """What the first process measured, so that all stop, or none."""
    agreed: list[Measurement] = broadcast_object_list([found])
    return agreed[0]


def _probe(setting: Setting, trainer: Any) -> Probe:
    config = setting.config
    rng = np.random.default_rng(setting.seed)
    chosen = rng.permutation(len(setting.prompts))[: config.check_prompts]
    prompt_ids = [setting.prompt_ids[i] for i in chosen]
    longest = max(len(ids) for ids in prompt_ids) + setting.max_new_tokens
    device = resolve_device(setting.start.device)
    return Probe(
        trainer,
        _reference(setting, trainer),
        [setting.prompts[i] for i in chosen],
        prompt_ids,
        setting.reward_model,
        setting.learner.end_ids,
        setting.max_new_tokens,
        config.temperature,
        max(1, resolve_tokens_per_batch(setting.start, device) // longest),
        setting.seed,
    )


def _reference(setting: Setting, trainer: Any) -> Any:
    """The model that TRL measures from; supervised fine-tuning has none, so that it gets the start policy."""
    if getattr(trainer, "ref_model", None) is not None or setting.config.method != "best_of_n":
        return trainer.ref_model
    if setting.learner.new_adapter is not None:
        return None
    from trl.trainer.utils import add_fused_lm_head

    whole = setting.start.model_copy(update={"dtype": str(setting.learner.model.dtype).removeprefix("torch.")})
    model = load_language_model(whole, "policy").to(trainer.accelerator.device)
    add_fused_lm_head(model)
    return model


def _save(setting: Setting, trainer: Any) -> None:
    """Make the policy as it is now the kept one."""
    folder, kept = setting.work / "new", setting.work / "kept"
    model = trainer.accelerator.unwrap_model(trainer.model)
    for adapter in getattr(model, "peft_config", {}).values():
        adapter.base_model_name_or_path = setting.learner.base
    trainer.save_model(str(folder))
    if not trainer.is_world_process_zero():
        return
    shutil.rmtree(folder / "ref", ignore_errors=True)
    for leftover in ("training_args.bin", "README.md"):
        (folder / leftover).unlink(missing_ok=True)
    if not any(folder.glob("*.safetensors")):
        raise DissonanceError("policy: the trainer saved no weights")
    # The tokenizer as it was: TRL gave its own a pad token.
    load_tokenizer(setting.start, "policy").save_pretrained(folder)
    shutil.rmtree(kept, ignore_errors=True)
    folder.rename(kept)


def _metrics(setting: Setting, trainer: Any, watch: Watch) -> dict[str, Any]:
    if watch.start is None or watch.kept is None:
        raise DissonanceError("the policy's training ended without a measurement")
    step, end = watch.kept
    return {
        "method": setting.config.method,
        "steps": trainer.state.global_step,
        "kept_step": step,
        "stopped": watch.stopped,
        "start": asdict(watch.start),
        "end": asdict(end),
        "history": [
            {key: value if math.isfinite(value) else None for key, value in row.items()} for row in watch.history
        ],
        "trained_parameters": check_trainable(trainer.model),
        "processes": trainer.accelerator.num_processes,
    }
