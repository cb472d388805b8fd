"""What a report of a large round shows: whole prompts, drawn at random, the same ones each time."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dissonance
from dissonance import round_sample
from dissonance.errors import RunError
from dissonance.report import render_report
from dissonance.round_sample import sampled
from dissonance.stages import round_length_correlation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of 3,000 prompts with 2 to 6 completions each; longer answers have lower log-likelihoods."""
    rng = np.random.default_rng(0)
    n = rng.integers(2, 7, 3000)
    lengths = rng.integers(1, 50, n.sum())
    table = {
        "prompt_id": [f"p{i}" for i, count in enumerate(n) for _ in range(count)],
        "completion_id": [k for count in n for k in range(count)],
        "text": [f"answer {i}" for i in range(n.sum())],
        "logprob": -lengths - rng.random(n.sum()),
        "reward": rng.normal(size=n.sum()),
        "n_tokens": lengths.astype(np.int32),
    }
    pq.write_table(pa.table(table), tmp_path / "scored.parquet")
    dissonance.conflicts(tmp_path / "scored.parquet", tmp_path / "run")
    return tmp_path / "run"


def read(folder: Path, name: str) -> Any:
    return pq.read_table(folder / f"{name}.parquet").to_pandas()


def test_a_sample_holds_whole_prompts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = folder / "round-000"
    with sampled(whole) as shown:
        assert shown == whole
    monkeypatch.setattr(round_sample, "MOST_COMPLETIONS", 4000)
    monkeypatch.setattr(round_sample, "_BATCH_ROWS", 700)
    with sampled(whole) as shown:
        prompts, completions = read(shown, "prompts"), read(shown, "completions")
    assert 3500 < len(completions) < 4500
    everything = read(whole, "completions")
    assert completions.equals(everything[everything.prompt_id.isin(prompts.prompt_id)].reset_index(drop=True))
    assert (completions.groupby("prompt_id").size()[prompts.prompt_id].to_numpy() == prompts.n_completions).all()
    assert prompts.prompt_id.str[1:].astype(int).is_monotonic_increasing
    with sampled(whole, (["n_completions"], ["pacs"])) as again:
        assert read(again, "prompts").prompt_id.equals(prompts.prompt_id)
        assert read(again, "completions").pacs.equals(completions.pacs)
    assert not again.exists()


def test_reports_say_that_they_show_a_sample(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = round_length_correlation(folder / "round-000")
    assert "drawn at random" not in render_report(folder)
    monkeypatch.setattr(round_sample, "MOST_COMPLETIONS", 4000)
    page = render_report(folder)
    assert "drawn at random from 3,000" in page
    rho = round_length_correlation(folder / "round-000")
    assert exact is not None
    assert rho is not None
    assert rho != exact
    assert rho == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize("prompts", [1, 2])
def test_a_few_prompts_with_many_completions_are_shown(prompts: int, tmp_path: Path) -> None:
    rng, n = np.random.default_rng(0), 70_000
    table = {
        "prompt_id": np.repeat([f"p{i}" for i in range(prompts)], n),
        "n_tokens": rng.integers(1, 9, n * prompts),
        "logprob": -rng.random(n * prompts),
        "reward": rng.normal(size=n * prompts),
    }
    with sampled(round_of(table, tmp_path)) as shown:
        assert len(read(shown, "prompts")) == 1
        assert len(read(shown, "completions")) == n


def round_of(table: dict[str, Any], tmp_path: Path) -> Path:
    """The two tables that `conflicts` would leave, but for what a sample does without."""
    ids, counts = np.unique(table["prompt_id"], return_counts=True)
    pq.write_table(pa.table(table), tmp_path / "completions.parquet")
    pq.write_table(pa.table({"prompt_id": ids, "n_completions": counts}), tmp_path / "prompts.parquet")
    return tmp_path


def test_completions_in_another_order_are_found_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "round-000" / "completions.parquet"
    pq.write_table(pq.read_table(path).sort_by([("reward", "ascending")]), path)
    monkeypatch.setattr(round_sample, "MOST_COMPLETIONS", 4000)
    with pytest.raises(RunError, match="order of its prompts"), sampled(folder / "round-000"):
        pass
