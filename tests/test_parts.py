"""Parts of stages in flight, in a folder and in a storage over the network."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from dissonance.errors import RunError, SettingsError
from dissonance.parts import Parts
from storage import ftp

TABLE = pa.table({"prompt_id": ["a", "b"], "reward": [1.5, -2.0]})


@pytest.fixture(params=["folder", "ftp"])
def parts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Parts]:
    if request.param == "folder":
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
    parts.remove()
    assert parts.names() == frozenset()
    parts.remove()


def test_what_is_no_storage_is_said() -> None:
    with pytest.raises(SettingsError, match="nowhere://there is no storage"):
        Parts("nowhere://there").names()
