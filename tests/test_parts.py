"""Parts of stages in flight, in a folder and in a storage over the network."""

import shutil
from array import array
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pyarrow as pa
import pytest

from dissonance.artifacts import create_run
from dissonance.errors import DissonanceError, RunError, SettingsError
from dissonance.parts import Parts, check_storage, parts_of
from dissonance.stages import REFERENCE, SAMPLING, SCORING, STAGES, Batch, waiting
from storage import ftp

TABLE = pa.table({"prompt_id": ["a", "b"], "reward": [1.5, -2.0]})


@pytest.fixture(params=["folder", "ftp"])
def parts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Parts]:
    if request.param == "folder":
        (tmp_path / "round-000").mkdir()
        yield Parts(tmp_path / "round-000" / "parts")
    else:
        with ftp(tmp_path) as address:
            yield Parts(f"{address}/round-000/parts")


def test_a_part_comes_back_as_it_went(parts: Parts, tmp_path: Path) -> None:
    assert parts.names() == frozenset()
    parts.write("rewards", 3, 14, TABLE, seconds=2.5)
    parts.write("rewards", 3, 15, TABLE, seconds=1.0)
    parts.write("rewards", 3, 15, TABLE.slice(1), seconds=1.0)  # again: it is replaced
    assert parts.names() == {parts.name("rewards", 3, 14), parts.name("rewards", 3, 15)}
    assert parts.has("rewards", 3, 14)
    assert not parts.has("rewards", 3, 16)
    found = parts.read("rewards", 3, 14)
    assert found.equals(TABLE)
    assert float(found.schema.metadata[b"seconds"]) == 2.5
    assert parts.read("rewards", 3, 15).equals(TABLE.slice(1))
    (tmp_path / "round-000/parts/rewards-000003-00014.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(RunError, match="rewards-000003-00014.parquet cannot be read"):
        parts.read("rewards", 3, 14)
    with pytest.raises(RunError, match="rewards-000004-00000.parquet"):
        parts.read("rewards", 4, 0)
    parts.drop("rewards", 3, 14)
    assert not parts.has("rewards", 3, 14)
    parts.remove()
    assert parts.names() == frozenset()
    parts.remove()


def test_what_is_no_storage_is_said() -> None:
    with pytest.raises(SettingsError, match="nowhere://there is no storage"):
        Parts("nowhere://there").names()
    with pytest.raises(SettingsError, match="--storage runs/x is no URL"):
        check_storage("runs/x")
    with pytest.raises(SettingsError, match="--storage holds a password") as refused:
        check_storage("ftp://me:hunter2@127.0.0.1:9/x")
    assert "hunter2" not in str(refused.value)
    with pytest.raises(DissonanceError, match="ftp://127.0.0.1:9/x"):
        check_storage("ftp://127.0.0.1:9/x")


@pytest.mark.parametrize("without", ["", "w", "f", "d", "r"])
def test_a_storage_that_does_not_let_us_do_all_that_a_round_does(without: str, tmp_path: Path) -> None:
    rights = "".join(set("elradfmwMT") - set(without))
    with ftp(tmp_path, rights=rights) as address:
        if without:
            with pytest.raises(SettingsError, match=f"--storage {address}/audits cannot be used: 550 Not enough priv"):
                check_storage(f"{address}/audits")
        else:
            check_storage(f"{address}/audits")
            assert [path.name for path in tmp_path.rglob("*")] == ["audits"]


def test_a_process_sees_what_another_has_written_since_it_looked(tmp_path: Path) -> None:
    with ftp(tmp_path) as address:
        here, there = Parts(f"{address}/parts"), Parts(tmp_path / "parts")
        here.write("rewards", 0, 0, TABLE, 0.0)
        assert len(here.names()) == 1
        there.write("rewards", 0, 1, TABLE, 0.0)
        (tmp_path / "parts" / "rewards-000000-00002.parquet.1f.tmp").write_bytes(b"PAR1")
        assert len(here.names()) == 2
        assert here.has("rewards", 0, 1)
        assert here.read("rewards", 0, 1).equals(TABLE)


def test_a_round_goes_on_where_its_parts_are(tmp_path: Path) -> None:
    with create_run(tmp_path / "run", "audit", {}, {}) as run, ftp(tmp_path / "run") as address:
        parts_of(run.round(), address)
        assert parts_of(run.round(), address).place == f"{address}/{run.run_id}/round-000"
        for other in (None, "s3://elsewhere"):
            with pytest.raises(RunError, match=f"begun with --storage {address}"):
                parts_of(run.round(), other)
        shutil.rmtree(run.round() / "parts")
        parts_of(run.round()).write("rewards", 0, 0, TABLE, 0.0)
        with pytest.raises(RunError, match="begun with no --storage"):
            parts_of(run.round(), address)


def test_what_was_computed_of_lost_completions_is_computed_again(tmp_path: Path) -> None:
    parts, table = Parts(tmp_path / "parts"), pa.table({"x": [1]})
    batches = [Batch(0, number, array("i", [number])) for number in (0, 1)]
    for stage, batch in product(STAGES.values(), batches):
        parts.write(stage.name, batch.window, batch.number, table, 0.0)
    assert waiting(parts, SAMPLING, batches) == []
    parts.drop(SAMPLING.name, 0, 1)
    assert waiting(parts, SAMPLING, batches) == batches[1:]
    for later in (REFERENCE, SCORING):
        assert waiting(parts, later, batches) == batches[1:]
