"""Preferences as files, in every form that TRL knows, and as a mixture with weights."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dissonance.errors import DataError, SettingsError
from dissonance.feedback.aggregate import PreferencePair
from dissonance.feedback.exchange import write_preferences
from dissonance.records import Message, Preference, Question
from dissonance.refine.pairs import mix, new_share, pairs_table, read_preferences, resample, write_pairs

ASKED = (Message("system", "be brief"), Message("user", "why?"))
PAIR = Preference(ASKED, "because", "no idea", prompt_id="p")


def pairs(n: int, weight: float = 1.0) -> list[Preference]:
    return [replace(PAIR, chosen=f"c{i}", weight=weight * (1 + i % 3), prompt_id=str(i)) for i in range(n)]


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


# ---- reading and writing ----


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": turns("why?"), "chosen": turns("", "yes")[1:], "rejected": turns("", "no")[1:]},
        {"prompt": "why?", "chosen": "yes", "rejected": "no"},
        {"prompt": turns("why?"), "chosen": "yes", "rejected": "no"},
        {"prompt": None, "chosen": turns("why?", "yes"), "rejected": turns("why?", "no")},
        {"chosen": turns("why?", "yes"), "rejected": turns("why?", "no")},
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_every_form_of_a_preference_is_read(tmp_path: Path, row: dict[str, Any], suffix: str) -> None:
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        text = "\n" + json.dumps(row) + "\n\n"
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    assert read_preferences(path) == [Preference((Message("user", "why?"),), "yes", "no")]


def test_what_is_known_of_a_pair_is_read(tmp_path: Path) -> None:
    row = {
        "prompt": "why?", "chosen": "yes\u2028", "rejected": "no", "weight": 0.25, "source": "pairwise/majority",
        "tie": True, "chosen_safe": True, "rejected_safe": False, "prompt_id": "p7", "chosen_id": 3,
    }  # fmt: skip
    (found,) = read_preferences(write_rows(tmp_path / "pairs.jsonl", row))
    assert found == Preference(
        (Message("user", "why?"),), "yes\u2028", "no", 0.25, True, "pairwise/majority", True, False, "p7"
    )


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    given = [
        replace(PAIR, weight=0.5, source="pairwise/majority", tie=True, chosen_safe=True),
        replace(PAIR, chosen="ümlaut \u2028 line", rejected_safe=False, weight=2.0),
    ]
    write_pairs(tmp_path / "pairs.parquet", given)
    assert read_preferences(tmp_path / "pairs.parquet") == given
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.parquet"]


def test_columns_of_safety_are_there_only_where_it_is_known() -> None:
    assert not {"chosen_safe", "rejected_safe"} & set(pairs_table([PAIR]).column_names)
    assert {"chosen_safe", "rejected_safe"} <= set(pairs_table([replace(PAIR, rejected_safe=False)]).column_names)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_an_export_of_the_labels_is_read(tmp_path: Path, suffix: str) -> None:
    question = Question("q", "p", "pairwise", ASKED, (0, 4), ("because", "no idea"))
    pair = PreferencePair("p", 4, 0, 0.5, tie=False, source="pairwise/majority", n_annotators=2, chosen_safe=True)
    tie = replace(pair, chosen_id=0, rejected_id=4, tie=True)
    path = tmp_path / f"export{suffix}"
    write_preferences(path, [pair, tie], [question], suffix=suffix, ties=True)
    first, second = read_preferences(path)
    assert first == replace(
        PAIR, chosen="no idea", rejected="because", weight=0.5, source="pairwise/majority", chosen_safe=True
    )
    assert (second.tie, second.chosen) == (True, "because")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], r":2: \[\] is no JSON object"),
        ({"prompt": "x", "chosen": "a"}, ":2: no 'rejected' among prompt, chosen: a preference needs chosen and"),
        ({"prompt": "x", "chosen": None, "rejected": "b"}, ":2: no 'chosen'"),
        ({"chosen": "a", "rejected": "b"}, ":2: no prompt, and chosen and rejected do not begin with one"),
        ({"chosen": turns("x", "a"), "rejected": turns("y", "b")}, ":2: no prompt, and chosen and rejected do not"),
        ({"prompt": "x", "chosen": 3, "rejected": "b"}, ":2: chosen is 3: it must be text or a list of messages"),
        ({"prompt": "x", "chosen": turns("a"), "rejected": "b"}, ":2: chosen is .'user'.: it must be one assistant"),
        ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, ":2: a message of prompt is {'role': 'user'}"),
        ({"prompt": [{"role": "bot", "content": ""}], "chosen": "a", "rejected": "b"}, ":2: unknown role 'bot'"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, ":2: a pair has no messages"),
        (
            {"prompt": turns("x", "y"), "chosen": "a", "rejected": "b"},
            ":2: a pair has a prompt that ends with the assis",
        ),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "weight": 0}, ":2: weight is 0: it must be a number above 0"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "weight": float("nan")}, ":2: weight is nan"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "weight": 10**400}, ":2: weight is 1000"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "weight": True}, ":2: weight is True"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "tie": "no"}, ":2: tie is 'no': it must be true or false"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "chosen_safe": 1}, ":2: chosen_safe is 1: it must be true or"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "source": []}, r":2: source is \[\]: it must be text"),
    ],
)
def test_rows_that_are_no_preference_are_named(tmp_path: Path, row: Any, message: str) -> None:
    good = {"prompt": "x", "chosen": "a", "rejected": "b"}
    path = write_rows(tmp_path / "pairs.jsonl", good, row)
    with pytest.raises(DataError, match=f"^{path}{message}") as caught:
        read_preferences(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": \n', ":1: not valid JSON at column 12"),
        ("a.jsonl", b"\n\n", ": holds no preferences"),
        ("a.jsonl", b"\xff", ": not UTF-8"),
        ("a.jsonl.gz", b"abc", ": damaged gzip"),
        ("a.parquet", b"abc", ": damaged Parquet"),
        ("a.csv", b"abc", ": preferences are read from .jsonl, .jsonl.gz and .parquet"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_preferences(tmp_path / name)


@pytest.mark.parametrize("name", ["none.jsonl", "none.jsonl.gz", "none.parquet"])
def test_a_missing_file_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name}: (cannot be read|no such file)"):
        read_preferences(tmp_path / name)


# ---- mixing ----

PARTS = st.lists(st.floats(0.01, 100), max_size=8).map(lambda ws: [replace(PAIR, weight=w) for w in ws])


@given(PARTS, PARTS, st.none() | st.floats(0.01, 0.99))
def test_a_mixture_has_the_share_that_was_asked_for(
    original: list[Preference], new: list[Preference], share: float | None
) -> None:
    mixed = mix(original, new, share)
    assert len(mixed) == len(original) + len(new)
    if not mixed:
        return
    first, second = mixed[: len(original)], mixed[len(original) :]
    total = sum(pair.weight for pair in mixed)
    assert total == pytest.approx(len(mixed)), "the mean weight is 1"
    sums = [sum(pair.weight for pair in part) for part in (original, new)]
    expected = new_share(sums[0], sums[1], share)
    assert sum(pair.weight for pair in second) / total == pytest.approx(expected)
    if original and new and share is not None:
        assert expected == share
    for part, mixed_part in ((original, first), (new, second)):
        proportions = [pair.weight / part[0].weight for pair in part]
        assert [pair.weight / mixed_part[0].weight for pair in mixed_part] == pytest.approx(proportions)
    unweighted = [replace(pair, weight=1.0) for pair in mixed]
    assert unweighted == [replace(pair, weight=1.0) for pair in [*original, *new]]


def test_the_default_share_lies_between_the_natural_and_the_equal_one() -> None:
    assert new_share(2_000, 300, None) == pytest.approx(0.279, abs=5e-4)
    assert new_share(100_000, 300, None) == pytest.approx(0.052, abs=5e-4)
    assert new_share(300, 300, None) == 0.5
    for original, new in ((2_000, 300), (100_000, 300), (500, 20)):
        assert new / (original + new) < new_share(original, new, None) < 0.5
    assert (new_share(0, 5, None), new_share(5, 0, None), new_share(0, 5, 0.1)) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_of_all_or_nothing_is_refused(share: float) -> None:
    with pytest.raises(SettingsError, match="give a share between 0 and 1"):
        mix([PAIR], [PAIR], share)


def test_a_bootstrap_sample_leaves_out_a_third() -> None:
    given = pairs(2000)
    rng = np.random.default_rng(0)
    drawn = resample(given, rng)
    assert len(drawn) == 2000
    assert set(drawn) <= set(given)
    assert len(set(drawn)) / 2000 == pytest.approx(1 - np.exp(-1), abs=0.03)
    assert resample(given, rng) != drawn
    assert resample([], rng) == []


# ---- the record ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": 0.0}, "a pair of prompt 'p' has weight 0.0: give a number above 0"),
        ({"weight": float("inf")}, "has weight inf"),
        ({"messages": ()}, "has no messages"),
        (
            {"messages": (Message("assistant", "a"),), "prompt_id": ""},
            "^a pair has a prompt that ends with the assistant",
        ),
    ],
)
def test_a_preference_that_makes_no_sense_cannot_be_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(PAIR, **changes)
