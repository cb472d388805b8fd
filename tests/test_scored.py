"""Every format and layout gives the same two tables; everything wrong gives one line and no file."""

import csv
import gzip
import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dissonance.conflict import conflicts, kendall_null, tally
from dissonance.errors import DataError, SettingsError
from dissonance.records import COMPLETIONS_SCHEMA, PROMPTS_SCHEMA
from dissonance.scored import measure_scored

SIZES = [3, 2, 8, 8, 5, 4, 8, 2, 6, 3, 3]


def scored_rows(sizes=SIZES, seed=0):
    """A list of plain rows, those of a prompt together; the second prompt is degenerate."""
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt_id": f"p{p}",
            "completion_id": i,
            "text": f"answer, {p}\n{i}",
            "n_tokens": int(rng.integers(1, 9)),
            "logprob": -float(rng.integers(1, 100)),
            "reward": 1.0 if p == 1 else float(rng.integers(-9, 9)) / 2,
            "category": "even" if p % 2 == 0 else "odd",
            "source": f"00{p}",
        }
        for p, n in enumerate(sizes)
        for i in range(n)
    ]


def to_wide(rows):
    """A row per prompt, with lists."""
    prompts = {}
    for row in rows:
        fixed = {"prompt_id": row["prompt_id"], "category": row["category"], "source": row["source"]}
        prompt = prompts.setdefault(row["prompt_id"], fixed)
        for name in ("completion_id", "text", "n_tokens", "logprob", "reward"):
            prompt.setdefault(name, []).append(row[name])
    return list(prompts.values())


def to_columns(rows):
    """A row per prompt, with a column per completion; N must be the same for all."""
    return [
        {
            key: value
            for name, values in prompt.items()
            for key, value in (
                [(f"{name}_{i}", v) for i, v in enumerate(values)] if isinstance(values, list) else [(name, values)]
            )
        }
        for prompt in to_wide(rows)
    ]


def write(path, rows, row_group_size=4):
    opener = gzip.open if path.suffix == ".gz" else open
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    elif ".jsonl" in path.name:
        with opener(path, "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        with opener(path, "wt", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


def measure(source, out, **options):
    """Summary, prompts and completions; and nothing but the two tables is left."""
    out.mkdir(exist_ok=True)
    summary = measure_scored(source, out / "prompts.parquet", out / "completions.parquet", **options)
    assert sorted(p.name for p in out.iterdir()) == ["completions.parquet", "prompts.parquet"]
    return summary, pq.read_table(out / "prompts.parquet"), pq.read_table(out / "completions.parquet")


def refuse(source, out, match, error=DataError, **options):
    out.mkdir(exist_ok=True)
    with pytest.raises(error, match=match) as caught:
        measure_scored(source, out / "prompts.parquet", out / "completions.parquet", **options)
    assert list(out.iterdir()) == []
    assert "\n" not in str(caught.value)
    if error is DataError:
        assert str(caught.value).startswith(f"{source}: ")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def expected(tmp_path):
    """The tables of the plain rows, each column computed here from the dense code."""
    rows = scored_rows()
    found = conflicts([row["reward"] for row in rows], [row["logprob"] for row in rows], np.cumsum([0, *SIZES]))
    completions = pa.Table.from_pylist(rows).append_column("pacs", pa.array(found.pacs))
    prompts = pa.table(
        {
            "prompt_id": [f"p{i}" for i in range(len(SIZES))],
            "category": ["even" if i % 2 == 0 else "odd" for i in range(len(SIZES))],
            "n_completions": SIZES,
            "kendall_tau_distance": found.kendall_tau_distance,
            "mean_abs_pacs": found.mean_abs_pacs,
            "max_abs_pacs": found.max_abs_pacs,
            "degenerate": found.degenerate,
        }
    )
    return tally(found).summary(), prompts, completions


def assert_same(found, expected, ordered=True):
    summary, prompts, completions = found
    assert asdict(summary) == pytest.approx(asdict(expected[0]), rel=1e-12)
    for table, like in ((prompts, expected[1]), (completions, expected[2])):
        keys = [("prompt_id", "ascending"), ("completion_id", "ascending")][
            : 1 + ("completion_id" in like.column_names)
        ]
        rows = table if ordered else table.sort_by(keys)
        rows_like = like if ordered else like.sort_by(keys)
        assert sorted(rows.column_names) == sorted(like.column_names)
        assert rows.select(like.column_names).to_pydict() == rows_like.to_pydict()


@pytest.mark.parametrize(
    ("name", "batch_rows"),
    [
        *((name, rows) for name in ("a.parquet", "a.jsonl", "a.jsonl.gz") for rows in (1, 7, 1 << 16)),
        *((name, rows) for name in ("a.csv", "a.csv.gz") for rows in (7, 1 << 16)),  # a row must fit into a block
    ],
)
def test_every_format_gives_the_same_tables_at_any_batch_size(name, batch_rows, tmp_path, out, expected):
    assert_same(measure(write(tmp_path / name, scored_rows()), out, batch_rows=batch_rows), expected)


@pytest.mark.parametrize("batch_rows", [2, 1 << 16])
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_a_row_per_prompt_with_lists(name, batch_rows, tmp_path, out, expected):
    assert_same(measure(write(tmp_path / name, to_wide(scored_rows())), out, batch_rows=batch_rows), expected)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.csv"])
def test_a_row_per_prompt_with_a_column_per_completion(name, tmp_path, out):
    rows = scored_rows([4] * 9)
    expected = measure(write(tmp_path / "long.parquet", rows), tmp_path / "long")
    assert_same(measure(write(tmp_path / name, to_columns(rows)), out, batch_rows=8), expected)


@pytest.mark.parametrize("layout", ["list", "large_list", "fixed_size_list"])
def test_every_kind_of_list(layout, tmp_path, out):
    rng = np.random.default_rng(0)
    values = {"reward": rng.normal(size=(5, 4)), "logprob": -rng.random((5, 4))}
    kinds = {
        "list": pa.list_(pa.float32()),
        "large_list": pa.large_list(pa.float64()),
        "fixed_size_list": pa.list_(pa.float64(), 4),
    }
    lists = {name: pa.array(v.tolist(), kinds[layout]) for name, v in values.items()}
    pq.write_table(pa.table({"prompt_id": [5, 6, 7, 8, 9], **lists}), tmp_path / "a.parquet")
    _, prompts, completions = measure(tmp_path / "a.parquet", out)
    assert prompts["prompt_id"].to_pylist() == ["5", "6", "7", "8", "9"]
    assert completions["completion_id"].to_pylist() == [0, 1, 2, 3] * 5
    np.testing.assert_allclose(completions["reward"].to_numpy(), values["reward"].ravel(), rtol=1e-6)


@pytest.mark.parametrize("batch_rows", [1, 5, 1 << 16])
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_shuffled_rows_give_the_rows_of_grouped_ones(name, batch_rows, tmp_path, out, expected, monkeypatch):
    monkeypatch.setattr("dissonance.scored._BUCKET_BYTES", 512)
    rows = scored_rows()
    np.random.default_rng(0).shuffle(rows)
    source = write(tmp_path / name, rows)
    found = measure(source, out, batch_rows=batch_rows)
    assert_same(found, expected, ordered=False)
    again = measure(source, tmp_path / "again", batch_rows=batch_rows)
    assert again[1].equals(found[1])
    assert again[2].equals(found[2])


def test_a_prompt_that_comes_back_at_the_very_end_is_put_together(tmp_path, out, expected):
    rows = scored_rows()
    found = measure(write(tmp_path / "a.parquet", [*rows[1:], rows[0]]), out, batch_rows=4)
    assert_same(found, expected, ordered=False)


def test_completions_without_ids_are_numbered_in_the_order_of_the_file(tmp_path, out):
    rows = [{k: v for k, v in row.items() if k != "completion_id"} for row in scored_rows([3, 2])]
    _, _, completions = measure(write(tmp_path / "a.parquet", rows), out)
    assert completions["completion_id"].to_pylist() == [0, 1, 2, 0, 1]
    mixed = [rows[i] for i in (3, 0, 4, 2, 1)]
    _, _, completions = measure(write(tmp_path / "b.parquet", mixed), out)
    numbered = {(r["text"], r["completion_id"]) for r in completions.to_pylist()}
    texts = ["answer, 1\n0", "answer, 1\n1", "answer, 0\n0", "answer, 0\n2", "answer, 0\n1"]
    assert numbered == set(zip(texts, [0, 1, 0, 1, 2], strict=True))


def test_ids_in_any_order_are_kept(tmp_path, out):
    rows = scored_rows([3, 3])
    for row, completion_id in zip(rows, [7, 2, 5, 2, 0, 1], strict=True):
        row["completion_id"] = completion_id
    _, _, completions = measure(write(tmp_path / "a.parquet", rows), out)
    assert completions["completion_id"].to_pylist() == [7, 2, 5, 2, 0, 1]


def test_contract_columns_have_the_contracts_types_and_the_others_their_own(tmp_path, out):
    rows = [{**row, "pacs": 99.0, "length": 3, "when": None} for row in scored_rows()]
    _, prompts, completions = measure(write(tmp_path / "a.parquet", rows), out)
    for field in completions.schema:
        if field.name in COMPLETIONS_SCHEMA.names:
            assert field.type == COMPLETIONS_SCHEMA.field(field.name).type
    assert completions.schema.field("length").type == pa.int64()
    assert 99.0 not in completions["pacs"].to_pylist()
    assert prompts.schema.equals(pa.schema([f for f in PROMPTS_SCHEMA if f.name != "messages"]))


def test_columns_that_csv_does_not_know_stay_text(tmp_path, out):
    _, _, completions = measure(write(tmp_path / "a.csv", scored_rows()), out)
    assert completions["source"][0].as_py() == "000"


def test_its_own_output_can_be_measured_again(tmp_path, out, expected):
    measure(write(tmp_path / "a.parquet", scored_rows()), out)
    assert_same(measure(out / "completions.parquet", tmp_path / "again"), expected)


def test_a_folder_of_parquet_files(tmp_path, out, expected):
    folder = tmp_path / "folder"
    rows = [{k: v for k, v in row.items() if k != "category"} for row in scored_rows()]
    for category in ("even", "odd"):
        part = folder / f"category={category}"
        part.mkdir(parents=True)
        own = [r for r in rows if (int(r["prompt_id"][1:]) % 2 == 0) == (category == "even")]
        write(part / "0.parquet", own[:9])
        write(part / "1.parquet", own[9:])
    (folder / "_SUCCESS").touch()
    (folder / "_hidden.parquet").write_text("not Parquet")
    assert_same(measure(folder, out), expected, ordered=False)


def test_files_of_a_folder_may_differ_in_columns_and_in_the_width_of_numbers(tmp_path, out):
    folder = tmp_path / "folder"
    folder.mkdir()
    rows = scored_rows([2, 2])
    write(folder / "a.parquet", [{k: v for k, v in row.items() if k != "text"} | {"extra": 1} for row in rows[:2]])
    write(folder / "b.parquet", [{**row, "extra": 1.5} for row in rows[2:]])
    _, _, completions = measure(folder, out)
    assert completions["text"].to_pylist() == [None, None, rows[2]["text"], rows[3]["text"]]
    assert completions["extra"].to_pylist() == [1.0, 1.0, 1.5, 1.5]


def test_a_json_column_may_change_from_whole_numbers_and_nulls(tmp_path, out):
    rows = scored_rows([2, 2, 2])
    for row, note in zip(rows, [None, None, 1, 2, 2.5, None], strict=True):
        row["note"] = note
        row["text"] = "2024-01-01" if note is None else "free"
        row["turns"] = [{"content": "2024-01-01"}] if note else []
    _, _, completions = measure(write(tmp_path / "a.jsonl", rows), out, batch_rows=1)
    assert completions["note"].to_pylist() == [None, None, 1.0, 2.0, 2.5, None]
    assert completions["text"].to_pylist()[0] == "2024-01-01"
    assert completions["turns"].to_pylist()[2] == [{"content": "2024-01-01"}]


def test_dictionary_encoded_columns(tmp_path, out, expected):
    table = pa.Table.from_pylist(scored_rows())
    for name in ("prompt_id", "category", "source"):
        table = table.set_column(table.column_names.index(name), name, table[name].dictionary_encode())
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    assert_same(measure(tmp_path / "a.parquet", out, batch_rows=3), expected)


def test_costs_are_negated_and_the_output_is_oriented(tmp_path, out, expected):
    rows = [{**row, "reward": -row["reward"]} for row in scored_rows()]
    found = measure(write(tmp_path / "a.parquet", rows), out, reward_kind="cost")
    assert_same(found, expected)
    assert not np.any(np.signbit(found[2]["reward"].to_numpy()) & (found[2]["reward"].to_numpy() == 0))
    np.random.default_rng(0).shuffle(rows)
    found = measure(write(tmp_path / "b.parquet", rows), out, reward_kind="cost", batch_rows=3)
    assert_same(found, expected, ordered=False)


def test_the_mean_likelihood_divides_by_the_tokens_for_the_conflict_only(tmp_path, out):
    rows = scored_rows()
    _, prompts, completions = measure(write(tmp_path / "a.parquet", rows), out, likelihood="mean")
    per_token = [row["logprob"] / row["n_tokens"] for row in rows]
    found = conflicts([row["reward"] for row in rows], per_token, np.cumsum([0, *SIZES]))
    np.testing.assert_array_equal(completions["pacs"].to_numpy(), found.pacs)
    np.testing.assert_array_equal(prompts["kendall_tau_distance"].to_numpy(), found.kendall_tau_distance)
    assert completions["logprob"].to_pylist() == [row["logprob"] for row in rows]


def test_the_summary_and_the_progress(tmp_path, out):
    told = []
    rows = scored_rows()
    summary, prompts, _ = measure(write(tmp_path / "a.parquet", rows), out, on_progress=told.append, batch_rows=9)
    proper = [p for p in prompts.to_pylist() if not p["degenerate"]]
    distances = [p["kendall_tau_distance"] for p in proper]
    assert sum(told) == summary.completions == len(rows)
    assert len(told) > 2
    told.clear()
    measure(write(tmp_path / "b.parquet", [*rows[1:], rows[0]]), out, on_progress=told.append, batch_rows=9)
    assert sum(told) == len(rows)
    assert min(told) > 0
    assert (summary.prompts, summary.degenerate) == (len(SIZES), 1)
    assert summary.kendall_tau_distance == pytest.approx(np.mean(distances))
    assert summary.share_above_null == pytest.approx(np.mean(np.array(distances) > 0.5))
    assert summary.null_sd == pytest.approx(
        np.sqrt(np.mean([kendall_null(p["n_completions"]).sd ** 2 for p in proper]))
    )


def test_more_prompts_than_one_batch_closes(tmp_path, out):
    prompts = 3000
    rng = np.random.default_rng(0)
    r, ll = rng.normal(size=(prompts, 8)), -rng.random((prompts, 8))
    ids = np.repeat(np.arange(prompts), 8)
    table = pa.table({"prompt_id": ids, "reward": r.ravel(), "logprob": ll.ravel()})
    pq.write_table(table, tmp_path / "a.parquet")
    _, found, completions = measure(tmp_path / "a.parquet", out, batch_rows=501)
    whole = conflicts(r.ravel(), ll.ravel(), np.arange(prompts + 1) * 8)
    np.testing.assert_array_equal(found["kendall_tau_distance"].to_numpy(), whole.kendall_tau_distance)
    np.testing.assert_array_equal(completions["pacs"].to_numpy(), whole.pacs)


NOT_FINITE = [("reward", float("nan")), ("reward", float("inf")), ("logprob", float("-inf")), ("logprob", float("nan"))]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
@pytest.mark.parametrize(("column", "value"), [*NOT_FINITE, ("reward", None), ("logprob", None)])
def test_scores_that_are_missing_or_not_finite_name_the_prompt(name, column, value, tmp_path, out):
    rows = scored_rows()
    rows[10][column] = value
    refuse(write(tmp_path / name, rows), out, rf"prompt 'p2' has (a|no) {column}", batch_rows=8)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
def test_a_positive_logprob_names_the_prompt(name, tmp_path, out):
    rows = scored_rows()
    rows[4]["logprob"] = 1e-7
    measure(write(tmp_path / name, rows), tmp_path / "fine")
    rows[4]["logprob"] = 0.25
    refuse(write(tmp_path / name, rows), out, "prompt 'p1' has a logprob of 0.25")


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_prompt_with_one_completion_is_named(shuffled, tmp_path, out):
    rows = scored_rows([3, 1, 3])
    if shuffled:
        rows = [rows[i] for i in (0, 4, 1, 3, 5, 2, 6)]
    refuse(write(tmp_path / "a.parquet", rows), out, r"prompt 'p1' has 1 completion\(s\)")


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_completion_that_stands_twice_is_named(shuffled, tmp_path, out):
    rows = scored_rows([3, 3, 3])
    rows[5]["completion_id"] = 0
    if shuffled:
        rows = [rows[i] for i in (0, 5, 8, 1, 3, 4, 2, 7, 6)]
    refuse(write(tmp_path / "a.parquet", rows), out, "prompt 'p1' has two rows with completion_id 0")


def test_the_same_rows_appended_twice_are_refused(tmp_path, out):
    refuse(write(tmp_path / "a.parquet", scored_rows() * 2), out, "two rows with completion_id 0", batch_rows=10)


@pytest.mark.parametrize("missing", ["prompt_id", "reward", "logprob"])
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
def test_a_missing_column_is_named_beside_those_found(name, missing, tmp_path, out):
    rows = [{k: v for k, v in row.items() if k != missing} for row in scored_rows()]
    refuse(write(tmp_path / name, rows), out, f"no column {missing}: found .*text.*; needed are prompt_id, reward and")


def test_mean_without_token_counts(tmp_path, out):
    rows = scored_rows()
    source = write(tmp_path / "a.parquet", [{**row, "n_tokens": 0} for row in rows])
    refuse(source, out, "prompt 'p0' has an n_tokens of 0", likelihood="mean")
    source = write(tmp_path / "a.parquet", [{k: v for k, v in row.items() if k != "n_tokens"} for row in rows])
    refuse(source, out, "needs a column n_tokens: found prompt_id", likelihood="mean")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.parquet", b"PAR1 and then nothing", "not readable as Parquet"),
        ("a.parquet", b"", "not readable as Parquet"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b"\n \n", "the file is empty"),
        ("a.jsonl.gz", b"no gzip", "not readable"),
        ("a.csv", b"", "not readable as CSV: Empty CSV file"),
        ("a.csv", b"prompt_id,reward,logprob\n", "there are no rows"),
        ("a.csv.gz", gzip.compress(b"prompt_id,reward,logprob\na,1,-1\n" * 99, mtime=0)[:40], "not readable as CSV"),
        ("a.csv", b"prompt_id,reward,reward,logprob\na,1,1,-1\n", "column reward stands more than once"),
        ("a.txt", b"prompt_id", "unknown kind of file"),
        ("a.jsonl", b'{"prompt_id": "a"}\n{"prompt_id" "a"}\n', "line 2: not valid JSON"),
        ("a.jsonl", b'\n{"a": 1}\n\n[1]\n', "line 4: not a JSON object"),
        ("a.jsonl", b'{"a": 1}\n{"a": null}\n{"a": "x"}\n', "line 3: a is text here and a number before"),
        ("a.jsonl", b'{"a": "b"}\n{"a": "\xff"}\n', "line 2: not valid UTF-8"),
        ("a.jsonl", b'{"a": 1, "a": 1}\n', "after line 1: .*twice"),
        ("a.csv", b"prompt_id,reward,logprob\na,1,-1\na,2\n", "line 3: 2 fields where the header has 3"),
        ("a.csv", b"prompt_id,reward,logprob\na,1,-1\n\na,x,-1\n", "line 4: reward is 'x', not a number"),
        ("a.csv", b"prompt_id,reward,logprob,n_tokens\na,1,-1,2.5\n", "line 2: n_tokens is '2.5', not a whole"),
        ("a.csv", b'prompt_id,text,reward,logprob\na,"b\nc",1,-1\na,"\xff",1,-1\n', "line 4: not valid UTF-8"),
        ("a.csv", b"prompt_id,reward,logprob\na,1,-1\n,2,-2\n", "completion 2 has no prompt_id"),
        ("a.jsonl", b'{"prompt_id": 1.5, "reward": 1, "logprob": -1}\n', "prompt_id holds double"),
        ("a.jsonl", b'{"prompt_id": 1, "reward": [1, 2], "logprob": -1}\n', "one is a list and one is not"),
        ("a.jsonl", b'{"prompt_id": 1, "reward": [1, 2], "logprob": [-1]}\n', "prompt '1' has 2 reward and 1 logprob"),
        ("a.jsonl", b'{"prompt_id": 1, "reward": [1], "logprob": [-1]}\n{"prompt_id": 2, "reward": [], "logprob": []}',
         "prompt '2' has 0 reward and 0 logprob"),
        ("a.jsonl", b'{"prompt_id": 1, "reward": "good", "logprob": -1}\n', "column reward cannot be read as double"),
        ("a.csv", b"prompt_id,reward_0,reward_1,logprob_0\na,1,2,-1\n", "prompt 'a' has 2 reward and 1 logprob"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used(name, content, match, tmp_path, out):
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name, out, match)


def test_json_types_that_change_far_into_the_file(tmp_path, out):
    rows = [{**row, "note": 1 if i < 20 else "x"} for i, row in enumerate(scored_rows())]
    refuse(write(tmp_path / "a.jsonl", rows), out, "at or after line 21: .*note", batch_rows=1)


def test_a_broken_line_far_into_the_file(tmp_path, out):
    source = write(tmp_path / "a.jsonl", scored_rows())
    lines = source.read_bytes().splitlines(keepends=True)
    source.write_bytes(b"".join([*lines[:30], b"{broken\n", *lines[30:]]))
    refuse(source, out, "line 31: not valid JSON", batch_rows=4)


def test_a_parquet_file_that_breaks_off_inside_its_data(tmp_path, out):
    source = write(tmp_path / "a.parquet", scored_rows() * 1, row_group_size=8)
    data = bytearray(source.read_bytes())
    data[40:400] = bytes(360)
    source.write_bytes(bytes(data))
    refuse(source, out, "a.parquet: not readable as Parquet", batch_rows=4)
    folder = tmp_path / "folder" / "day=2"
    folder.mkdir(parents=True)
    write(folder.parent / "a.parquet", scored_rows())
    source.rename(folder / "b.parquet")
    refuse(folder.parent, out, "folder: day=2/b.parquet: not readable as Parquet", batch_rows=4)


def test_paths_that_hold_nothing(tmp_path, out):
    refuse(tmp_path / "missing.parquet", out, "no such file or folder")
    (tmp_path / "folder").mkdir()
    refuse(tmp_path / "folder", out, "no .parquet file")


def test_files_of_a_folder_that_disagree(tmp_path, out):
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "a.parquet", scored_rows([2]))
    write(folder / "b.parquet", [{**row, "reward": "good"} for row in scored_rows([2])])
    refuse(folder, out, "not readable as Parquet: .*reward")


def test_an_earlier_result_survives_an_error(tmp_path, out, expected):
    measure(write(tmp_path / "a.parquet", scored_rows()), out)
    with pytest.raises(DataError):
        measure_scored(tmp_path / "none.parquet", out / "prompts.parquet", out / "completions.parquet")
    bad = write(tmp_path / "bad.parquet", [*scored_rows(), {**scored_rows()[0], "prompt_id": "last"}])
    with pytest.raises(DataError):
        measure_scored(bad, out / "prompts.parquet", out / "completions.parquet", batch_rows=4)
    assert (
        pq.read_table(out / "prompts.parquet")
        .select(expected[1].column_names)
        .equals(expected[1].cast(pq.read_schema(out / "prompts.parquet").remove_metadata()))
    )
    assert len(list(out.iterdir())) == 2


@pytest.mark.parametrize("option", [{"reward_kind": "costs"}, {"likelihood": "relative"}])
def test_options_that_do_not_exist(option, tmp_path, out):
    refuse(write(tmp_path / "a.parquet", scored_rows()), out, "is not known: use", error=SettingsError, **option)
