"""Several reward models bootstrapped from one base, and what each of them says: where they disagree, one is wrong.

Members that start from one model and learn from resampled pairs differ where the pairs leave room; what all pairs have
wrong, they have wrong together. That is the strategy's limit, and why it is here: to be compared with.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dissonance.artifacts import atomic_folder
from dissonance.config import RewardConfig, RewardTraining
from dissonance.errors import DataError, SettingsError
from dissonance.models import RewardModel
from dissonance.progress import ProgressFactory, quiet
from dissonance.records import Message, Preference
from dissonance.refine.pairs import resample
from dissonance.refine.reward import refine_reward_model


def train_ensemble(
    config: RewardTraining,
    start: RewardConfig,
    original: Sequence[Preference],
    new: Sequence[Preference],
    out: Path,
    *,
    members: int = 4,
    seed: int = 0,
    progress: ProgressFactory = quiet,
) -> list[dict[str, Any]]:
    """Train reward models on bootstrap samples of the pairs, each from the same start.

    Original and new pairs are resampled apart, so that each member has as many of both. Nothing is held out: a member
    trains for as many steps as every other.

    Args:
        config: how each is trained, as for one.
        start: what each starts from, or `config.base` instead.
        original: as for `refine_reward_model`.
        new: likewise.
        out: the folder to make; its folders `member-00`, `member-01`, ... are the models (`member_folders`).
        members: how many, at least 2.
        seed: of the resampling; each member's own is drawn from it.
        progress: opens the progress of each training.

    Returns:
        What `refine_reward_model` returns, for each.

    Raises:
        SettingsError: fewer than two members.
        InputError: as `refine_reward_model`.
    """
    if members < 2:
        raise SettingsError(f"an ensemble of {members} reward models has no variance: train 2 or more")
    rng = np.random.default_rng(seed)
    with atomic_folder(out) as folder:
        folder.mkdir()
        found = []
        for member in range(members):
            pairs = resample(original, rng), resample(new, rng)
            path = folder / f"member-{member:02d}"
            member_seed = int(rng.integers(2**31))
            found.append(refine_reward_model(config, start, *pairs, (), (), path, seed=member_seed, progress=progress))
    return found


def member_folders(out: Path) -> list[Path]:
    """The folders of an ensemble's models, in order."""
    return sorted(out.glob("member-[0-9][0-9]*"))


def member_rewards(
    models: Sequence[RewardModel], conversations: Sequence[Sequence[Message]], completions: Sequence[str]
) -> NDArray[np.float64]:
    """Each member's rewards (R, K), higher is better, of R completions to conversations[i]."""
    return np.array([[reward.value for reward in model.score(conversations, completions)] for model in models]).T


def with_member_rewards(completions: pa.Table, prompts: pa.Table, models: Sequence[RewardModel]) -> pa.Table:
    """A run's table of completions with the column `member_rewards`, list<float64>, that `ensemble` selects by.

    Args:
        completions: of `records.COMPLETIONS_SCHEMA`; a column of that name is replaced.
        prompts: of `records.PROMPTS_SCHEMA`.
        models: the members.

    Raises:
        DataError: a completion's prompt is not in the table of prompts.
    """
    conversations = {
        prompt_id: tuple(Message(turn["role"], turn["content"]) for turn in messages)
        for prompt_id, messages in zip(prompts["prompt_id"].to_pylist(), prompts["messages"].to_pylist(), strict=True)
    }
    asked = completions["prompt_id"].to_pylist()
    stray = next((prompt_id for prompt_id in asked if prompt_id not in conversations), None)
    if stray is not None:
        raise DataError(f"prompt {stray!r} has completions, but no row in the table of prompts")
    rewards = member_rewards(models, [conversations[prompt_id] for prompt_id in asked], completions["text"].to_pylist())
    kept = completions.drop_columns([name for name in completions.column_names if name == "member_rewards"])
    return kept.append_column("member_rewards", pa.array(rewards.tolist(), pa.list_(pa.float64())))
