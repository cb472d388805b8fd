"""Files and datasets -> prompts: formats, columns, duplicates, and one clear line for whatever is wrong."""

import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dissonance.errors import DataError, SettingsError
from dissonance.prompts import load_prompts, prompts_fingerprint
from dissonance.records import Message, Prompt

ROWS = [
    {"id": "a", "text": "Why is the sky blue?", "kind": "benign"},
    {"id": "b", "text": 'Línea uno\nline two, "quoted"', "kind": "harmful"},
    {"id": "c", "text": "Tell me a joke.", "kind": None},
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Why is the sky blue?"},
]
ANSWER = {"role": "assistant", "content": "Rayleigh scattering."}


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, content: str | bytes | list) -> str:
    data = as_lines(content) if isinstance(content, list) else content
    data = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def write_csv(path: Path, rows: list[dict]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def texts(source: str, **options) -> list[str]:
    return [prompt.messages[-1].content for prompt in load_prompts(source, **options).prompts]


@pytest.fixture(autouse=True)
def _cache_here(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


# ---- formats ----


def sources(folder: Path) -> dict[str, str]:
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, folder / "p.parquet")
    plain = write_csv(folder / "p.csv", ROWS)
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(folder / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(folder / "many")
    (folder / "repo").mkdir()
    write(folder / "repo" / "train.jsonl", ROWS)
    return {
        "jsonl": write(folder / "p.jsonl", ROWS),
        "jsonl.gz": write(folder / "p.jsonl.gz", ROWS),
        "json lines": write(folder / "lines.json", ROWS),
        "json list": write(folder / "list.json", json.dumps(ROWS, indent=2)),
        "json.gz": write(folder / "list.json.gz", "\n " + json.dumps(ROWS)),
        "byte-order mark": write(folder / "bom.jsonl", b"\xef\xbb\xbf" + as_lines(ROWS).encode()),
        "blank lines, CRLF": write(folder / "crlf.JSONL", "\n" + as_lines(ROWS).replace("\n", "\r\n\r\n")),
        "csv": plain,
        "csv.gz": write(folder / "p.csv.gz", Path(plain).read_bytes()),
        "parquet": str(folder / "p.parquet"),
        "saved dataset": str(folder / "one"),
        "saved splits": str(folder / "many"),
        "folder of files": str(folder / "repo"),
    }


def test_every_format_gives_the_same_prompts(tmp_path, capfd):
    expected = tuple(Prompt(r["id"], (Message("user", r["text"]),), r["kind"]) for r in ROWS)
    for name, source in sources(tmp_path).items():
        loaded = load_prompts(source)
        assert (loaded.prompts, loaded.n_rows, loaded.n_duplicates) == (expected, 3, 0), name
    assert texts(str(tmp_path / "many"), split="test") == [ROWS[1]["text"]]


def test_chat_messages_keep_the_system_prompt_and_every_turn(tmp_path):
    expected = tuple(Message(turn["role"], turn["content"]) for turn in CHAT)
    row = {"prompt": CHAT, "chosen": [ANSWER]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "p.parquet")
    for source in (write(tmp_path / "p.jsonl", [row]), str(tmp_path / "p.parquet")):
        assert load_prompts(source).prompts[0].messages == expected


def test_a_reference_answer_is_dropped_but_a_prefill_is_refused(tmp_path):
    source = write(tmp_path / "p.jsonl", [{"messages": [*CHAT, ANSWER, ANSWER]}])
    assert [turn.content for turn in load_prompts(source).prompts[0].messages] == [turn["content"] for turn in CHAT]
    source = write(tmp_path / "q.jsonl", [{"prompt": [*CHAT, ANSWER]}])
    with pytest.raises(DataError, match=r"q\.jsonl:1: .*ends with the assistant's turn"):
        load_prompts(source)


# ---- columns ----


def test_columns_are_found_in_their_documented_order(tmp_path):
    row = {"query": "6", "instruction": "5", "question": "4", "text": "3", "messages": CHAT, "prompt": "1"}
    for name in ("prompt", "messages", "text", "question", "instruction", "query"):
        source = write(tmp_path / "p.jsonl", [row])
        value = row.pop(name)
        assert texts(source) == [CHAT[-1]["content"] if value is CHAT else value]


def test_ids_and_categories(tmp_path):
    rows = [
        {"prompt_id": 7, "prompt": "x", "type": "t", "kind": "k", "category": ["a", 1]},
        {"prompt_id": "", "prompt": "y", "category": True},
        {"prompt": "z", "category": ""},
    ]
    one, two, three = load_prompts(write(tmp_path / "p.jsonl", rows)).prompts
    assert (one.prompt_id, one.category, two.category, three.category) == ("7", '["a", 1]', "true", None)
    moved = load_prompts(write(tmp_path / "q.jsonl", [{"prompt": "new"}, *rows[::-1]])).prompts
    assert moved[3] == one, "found wherever they stand"
    assert [p.prompt_id for p in moved[1:3]] == [three.prompt_id, two.prompt_id], "made from the content, not the place"
    assert len({p.prompt_id for p in moved}) == 4
    assert all(len(p.prompt_id) == 16 for p in moved[:3])


def test_columns_can_be_named(tmp_path):
    source = write(tmp_path / "p.jsonl", [{"prompt": "no", "ask": "yes", "id": 1, "key": "k", "kind": 0, "group": "g"}])
    (prompt,) = load_prompts(source, text_column="ask", id_column="key", category_column="group").prompts
    assert prompt == Prompt("k", (Message("user", "yes"),), "g")


@pytest.mark.parametrize("option", ["text_column", "id_column", "category_column"])
def test_a_named_column_that_is_missing_lists_those_there(tmp_path, option):
    source = write(tmp_path / "p.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no column 'nope' among 'id', 'text', 'kind': correct --" + option[:2]):
        load_prompts(source, **{option: "nope"})


# ---- duplicates, limit, sample ----


def numbered(folder: Path, n: int = 20) -> str:
    """Distinct prompts, each followed by its copy under another id."""
    rows = [{"id": f"{i}{copy}", "text": str(i)} for i in range(n) for copy in "ab"]
    return write(folder / "numbered.jsonl", rows)


def test_duplicates_are_dropped_and_counted(tmp_path):
    loaded = load_prompts(numbered(tmp_path))
    assert [p.prompt_id for p in loaded.prompts] == [f"{i}a" for i in range(20)]
    assert (loaded.n_rows, loaded.n_duplicates) == (40, 20)
    assert loaded.summary == "20 of 20 distinct prompts (40 rows, 20 duplicates dropped)"


def test_the_role_is_part_of_the_content(tmp_path):
    rows = [{"messages": [{"role": role, "content": "x"}, CHAT[1]]} for role in ("system", "user")]
    assert len(load_prompts(write(tmp_path / "p.jsonl", rows)).prompts) == 2


def test_limit_takes_the_first_after_deduplication_and_stops_reading(tmp_path):
    source = numbered(tmp_path)
    with Path(source).open("a") as file:
        file.write("broken")
    loaded = load_prompts(source, limit=3)
    assert [p.messages[0].content for p in loaded.prompts] == ["0", "1", "2"]
    assert (loaded.n_rows, loaded.n_duplicates) == (5, 2)


def test_sample_draws_by_seed_in_file_order(tmp_path):
    source = numbered(tmp_path)
    drawn = [texts(source, sample=5, seed=seed) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1]
    assert len(set(map(tuple, drawn))) == 3
    assert all(len(set(d)) == 5 and d == sorted(d, key=int) for d in drawn)
    assert max(int(text) for seed in range(9) for text in texts(source, limit=6, sample=3, seed=seed)) == 5
    assert load_prompts(source, sample=5).summary == "5 of 20 distinct prompts (40 rows, 20 duplicates dropped)"
    assert len(texts(source, sample=500)) == 20, "more than there are: all"


@pytest.mark.parametrize("options", [{"limit": 0}, {"sample": 0}, {"sample": -3}, {"seed": -1}])
def test_numbers_out_of_range(tmp_path, options):
    with pytest.raises(SettingsError, match=f"--{next(iter(options))} is {next(iter(options.values()))}"):
        load_prompts(numbered(tmp_path), **options)


# ---- what is wrong, in one line with its place ----

BROKEN = {
    "broken line": ("p.jsonl", '{"text": "a"}\n{"text": "b"\n', r"p\.jsonl:2: broken JSON"),
    "broken list": ("p.json", '[{"text": "a"},\n {"text" 1}]', r"p\.json:2: broken JSON"),
    "endless nesting": ("p.jsonl", "[" * 100_000, r"p\.jsonl:1: broken JSON"),
    "huge integer": ("p.jsonl", '{"id": %s}' % ("9" * 5000), r"p\.jsonl:1: broken JSON"),
    "not an object": ("p.jsonl", '{"text": "a"}\n["b"]\n', r"p\.jsonl:2: must be a JSON object .* not a list"),
    "string in a list": ("p.json", '[{"text": "a"}, "b"]', r"p\.json:2: must be a JSON object .* not text"),
    "empty file": ("p.jsonl", "", r"p\.jsonl: holds no prompts"),
    "only blank lines": ("p.json", "\n\n", r"p\.json: holds no prompts"),
    "empty list": ("p.json", "[]", r"p\.json: holds no prompts"),
    "only a header": ("p.csv", "text\n", r"p\.csv: holds no prompts"),
    "empty prompt": ("p.jsonl", '{"text": "a"}\n{"text": " "}\n', r"p\.jsonl:2: the prompt in column 'text' is empty"),
    "null prompt": ("p.jsonl", '{"text": null}', r"p\.jsonl:1: column 'text' must hold text .* not null"),
    "number": ("p.jsonl", '{"text": 3}', r"p\.jsonl:1: column 'text' must hold text .* not an integer"),
    "text as messages": ("p.jsonl", '{"messages": "a"}', r"'messages' must hold a list of messages, not text"),
    "no messages": ("p.jsonl", '{"prompt": []}', r"p\.jsonl:1: the prompt in column 'prompt' is empty"),
    "only an answer": ("p.jsonl", {"messages": [ANSWER]}, r"p\.jsonl:1: the prompt in column 'messages' is empty"),
    "ShareGPT": ("p.jsonl", {"prompt": [{"from": "human", "value": "x"}]}, r"found keys 'from', 'value'"),
    "no content": ("p.jsonl", {"prompt": [{"role": "user", "content": None}]}, r"must be {role, content}, both text"),
    "text as a turn": ("p.jsonl", {"prompt": ["x"]}, r"must be {role, content}, both text; found text"),
    "unknown role": ("p.jsonl", {"prompt": [{"role": "bot", "content": "x"}]}, r"p\.jsonl:1: unknown role 'bot'"),
    "no prompt column": ("p.jsonl", {"foo": 1, "bar": 2}, r"p\.jsonl:1: no prompt column .* among 'foo', 'bar'"),
    "column lost": ("p.jsonl", '{"text": "a"}\n{"txt": "b"}', r"p\.jsonl:2: no column 'text' among 'txt'"),
    "odd id": ("p.jsonl", {"text": "a", "id": 1.5}, r"p\.jsonl:1: the id must be text .* not a float"),
    "truth as id": ("p.jsonl", {"text": "a", "id": True}, r"the id must be .* not a truth value"),
    "same id": ("p.jsonl", [{"text": t, "id": 1} for t in "aab"], r"p\.jsonl:3: id '1' .* at .*p\.jsonl:1: make"),
    "id of a duplicate": ("p.jsonl", [{"text": t, "id": i} for t, i in ("ax", "ay", "by")], r":3: id 'y' .*:2: make"),
    "surrogate": ("p.jsonl", '{"text": "\\ud800"}', r"p\.jsonl:1: the prompt holds half of a surrogate pair"),
    "surrogate id": ("p.jsonl", '{"text": "a", "id": "\\udfff"}', r"p\.jsonl:1: the id holds half of a surrogate"),
    "not UTF-8": ("p.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"p\.jsonl:2: not UTF-8 \(byte 0xff\)"),
    "UTF-16": ("p.csv", "text\na".encode("utf-16"), r"p\.csv:1: not UTF-8"),
    "too many fields": ("p.csv", 'text\n"a\nb"\nc,d\n', r"p\.csv:4: 2 fields where the header has 1"),
    "open quote": ("p.csv", 'text\na\n"b\nc\n', r"p\.csv:3: broken CSV \(unexpected end of data\)"),
    "empty cell": ("p.csv", "text,id\na,1\n,2\n", r"p\.csv:3: the prompt in column 'text' is empty"),
    "not Parquet": ("p.parquet", b"PAR1" + b"x" * 50, r"p\.parquet: not a readable Parquet file"),
    "empty Parquet": ("p.parquet", b"", r"p\.parquet: not a readable Parquet file"),
    "format": ("p.txt", "hello", r"p\.txt: unknown format: use one of \.jsonl,"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=list(BROKEN))
def test_one_line_says_what_is_wrong_and_where(tmp_path, name, content, message):
    source = write(tmp_path / name, [content] if isinstance(content, dict) else content)
    with pytest.raises(DataError, match=message) as caught:
        load_prompts(source)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(source)


@pytest.mark.parametrize("damage", [lambda data: data[:-30], lambda data: b"x" + data[1:], lambda data: data[:20] * 3])
def test_a_corrupt_gzip_names_the_file(tmp_path, damage):
    path = Path(write(tmp_path / "p.jsonl.gz", [{"text": str(i * 7919)} for i in range(3000)]))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"p\.jsonl\.gz:\d+: corrupt gzip"):
        load_prompts(str(path))


def test_a_parquet_file_damaged_inside_names_the_file(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"text": [str(i) for i in range(5000)]}), path, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[200:1200] = b"\x00" * 1000
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"p\.parquet: not a readable Parquet file"):
        load_prompts(str(path))


def test_parquet_that_is_no_text(tmp_path):
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"text": bad}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"p\.parquet: not a readable Parquet file"):
        load_prompts(str(tmp_path / "p.parquet"))
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "q.parquet")
    with pytest.raises(DataError, match=r"q\.parquet:2: column 'text' must hold text"):
        load_prompts(str(tmp_path / "q.parquet"))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "r.parquet")
    with pytest.raises(DataError, match=r"r\.parquet: holds no prompts"):
        load_prompts(str(tmp_path / "r.parquet"))


@pytest.mark.parametrize(
    "source", ["nowhere/prompts.jsonl", "prompts.JSONL.GZ", "/no/such/place", "a b", "prompts.txt", "prompts.jsn"]
)
def test_a_missing_file_is_named(source):
    with pytest.raises(DataError, match=f"^{source}: no such file$"):
        load_prompts(source)


def test_a_dataset_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"^nobody/nothing: neither a file nor a dataset .*split 'train'") as caught:
        load_prompts("nobody/nothing:default")
    assert "\n" not in str(caught.value)
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"d: no split 'dev' among 'train': correct --split"):
        load_prompts(str(tmp_path / "d"), split="dev")
    (tmp_path / "d" / "train" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"d: datasets cannot load it"):
        load_prompts(str(tmp_path / "d"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: neither a file nor a dataset"):
        load_prompts(str(tmp_path / "empty"))


def test_a_hub_name_with_its_configuration_reaches_datasets(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_prompts("owner/name.v2:main", split="test[:10%]").prompts) == 3
    assert len(load_prompts("name").prompts) == 3
    assert asked == [(("owner/name.v2", "main"), {"split": "test[:10%]"}), (("name", None), {"split": "train"})]


# ---- fingerprint ----


def test_the_fingerprint_tells_ids_texts_roles_and_order_apart():
    def prompt(prompt_id="a", role="user", content="x", category=None):
        return Prompt(prompt_id, (Message(role, content),), category)

    lists = [[], [prompt()], [prompt("b")], [prompt(role="system")], [prompt(content="y")]]
    lists += [[prompt(), prompt("b")], [prompt("b"), prompt()]]
    assert len({prompts_fingerprint(prompts) for prompts in lists}) == len(lists)
    assert prompts_fingerprint([prompt()]) == prompts_fingerprint(iter([prompt()]))
    assert prompts_fingerprint([prompt(category="c")]) != prompts_fingerprint([prompt()])  # the report groups by it


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1))
def test_any_text_survives_json_lines(tmp_path_factory, contents):
    source = write(tmp_path_factory.mktemp("any") / "p.jsonl", [{"prompt": text} for text in contents])
    assert texts(source) == list(dict.fromkeys(contents))
