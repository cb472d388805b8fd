"""An ensemble of real, tiny reward models: resampled, saved, and asked where its members differ."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dissonance.errors import DataError, SettingsError
from dissonance.refine.ensemble import member_folders, member_rewards, train_ensemble, with_member_rewards
from dissonance.rewards import load_reward_model
from dissonance.selection import pool_from_tables, select
from test_refine_reward import BAD, GOOD, leads, preferences, refined, settings, started, weights


def tables(n: int = 6) -> tuple[pa.Table, pa.Table]:
    """Prompts with a good, a bad, and a mixed answer."""
    turns = [[{"role": "user", "content": f"w{20 + i}"}] for i in range(n)]
    prompts = pa.table(
        {
            "prompt_id": [f"p{i}" for i in range(n)],
            "messages": turns,
            "kendall_tau_distance": [0.5] * n,
            "degenerate": [False] * n,
        }
    )
    good, bad = [GOOD[i % 8] for i in range(n)], [BAD[i % 8] for i in range(n)]
    texts = [text for g, b in zip(good, bad, strict=True) for text in (f"{g} {g}", f"{b} {b}", f"{b} {g}")]
    completions = pa.table(
        {
            "prompt_id": [f"p{i}" for i in range(n) for _ in range(3)],
            "completion_id": [0, 1, 2] * n,
            "text": texts,
            "reward": [0.0] * 3 * n,
            "logprob": [-1.0] * 3 * n,
            "pacs": [0.0] * 3 * n,
        }
    )
    return prompts, completions


def test_members_learn_the_same_from_different_samples(reward_folder: Path, tmp_path: Path) -> None:
    start, pairs = started(reward_folder, kind="cost"), preferences(64)
    out = tmp_path / "ensemble"
    found = train_ensemble(settings(epochs=2), start, (), pairs, out, members=3, seed=5)
    folders = member_folders(out)
    assert [folder.name for folder in folders] == ["member-00", "member-01", "member-02"]
    assert {path.name for path in tmp_path.iterdir()} == {"ensemble"}
    stored = [weights(folder) for folder in folders]
    assert stored[0] != stored[1] != stored[2] != stored[0]
    for folder, metrics in zip(folders, found, strict=True):
        assert (leads(refined(start, folder), preferences(40, seed=9)) > 0).mean() > 0.85
        assert metrics["pairs"]["new"] == 64
    train_ensemble(settings(epochs=2), start, (), pairs, tmp_path / "again", members=3, seed=5)
    assert [weights(folder) for folder in member_folders(tmp_path / "again")] == stored


def test_their_rewards_are_added_and_selected_by(reward_folder: Path, tmp_path: Path) -> None:
    start = started(reward_folder, kind="cost")
    train_ensemble(settings(epochs=2), start, (), preferences(32), tmp_path / "ensemble", members=3)
    models = [load_reward_model(refined(start, folder)) for folder in member_folders(tmp_path / "ensemble")]
    prompts, completions = tables()
    scored = with_member_rewards(completions, prompts, models)
    assert scored.schema.field("member_rewards").type == pa.list_(pa.float64())
    rewards = np.array(scored["member_rewards"].to_pylist())
    assert rewards.shape == (18, 3)
    assert (rewards[0::3] > rewards[1::3]).mean() > 0.8, "oriented: the good answer is above the bad one"
    again = with_member_rewards(scored, prompts, models)
    assert again.column_names == scored.column_names

    pool = pool_from_tables(prompts, scored, "sum")
    chosen = select(pool, "ensemble", budget=1, rng=np.random.default_rng(0)).queries[0]
    spreads = {
        (p, i, j): np.std(rewards[3 * p + i] - rewards[3 * p + j])
        for p in range(6)
        for i, j in ((0, 1), (0, 2), (1, 2))
    }
    p, i, j = max(spreads, key=lambda key: spreads[key])
    assert (chosen.prompt_id, chosen.completion_ids) == (f"p{p}", (i, j))
    assert chosen.priority == pytest.approx(max(spreads.values()))


def test_what_is_no_ensemble_is_refused(reward_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="an ensemble of 1 reward models has no variance: train 2 or more"):
        train_ensemble(settings(), started(reward_folder), (), preferences(8), tmp_path / "one", members=1)
    prompts, completions = tables()
    with pytest.raises(DataError, match="prompt 'p0' has completions, but no row in the table of prompts"):
        with_member_rewards(completions, prompts[1:], [])
    model = load_reward_model(started(reward_folder))
    assert member_rewards([model, model], [], []).size == 0
