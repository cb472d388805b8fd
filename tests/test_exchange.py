"""What goes out comes back, in every format; what is wrong is one line, and nothing is stored."""

import csv
import json
import math
import shutil
from collections import Counter
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dissonance.errors import DataError, SettingsError
from dissonance.feedback.aggregate import PreferencePair
from dissonance.feedback.blind import blind_order
from dissonance.feedback.exchange import (
    FORMATS,
    import_labels,
    write_argilla,
    write_csv,
    write_label_studio,
    write_preferences,
)
from dissonance.feedback.exchange.asked import Asked
from dissonance.feedback.exchange.reading import read_rows
from dissonance.feedback.exchange.tables import parse_csv_row
from dissonance.feedback.store import Store
from dissonance.records import Answer, Label, Message, Question

CONVERSATION = (Message("system", "Be brief."), Message("user", "What is 2 + 2?"))
QUESTIONS = (
    Question("pair", "p1", "pairwise", CONVERSATION, (3, 0), ("four <b>", "5\n\nor so")),
    Question("flip", "p2", "pairwise", CONVERSATION[1:], (0, 1), ("vier", "fünf 🙂")),
    Question("rate", "p1", "rating", CONVERSATION, (2,), ("=SUM(A1)",)),
    Question("rank", "p2", "ranking", CONVERSATION[1:], (0, 4, 2), ("vier", "http://b", "c\u2028d")),
)
BY_ID = {question.query_id: question for question in QUESTIONS}


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "labels.db", "run") as opened:
        opened.add_questions(QUESTIONS)
        yield opened


@pytest.fixture(scope="module")
def fresh_store(tmp_path_factory):
    """Open a store that has the questions and no labels, made once and copied."""
    made = tmp_path_factory.mktemp("made") / "labels.db"
    with Store.open(made, "other") as store:
        store.add_questions(QUESTIONS)

    def opened(folder):
        shutil.copy(made, folder / "fresh.db")
        return Store.open(folder / "fresh.db", "other")

    return opened


def fill(store, labels):
    """Record labels as if they had been given on the page, or by models."""
    for number, label in enumerate(labels):
        person = store.annotator(label.annotator, label.annotator_kind)
        store.record(
            person.annotator_id, label.query_id, label.answer,
            key=f"page-{number}", shown=label.shown, seconds=label.seconds, note=label.note, flagged=label.flagged,
        )  # fmt: skip
    return store.labels()


def label(query_id, answer, annotator="anna", kind="person", **more):
    return Label(0, query_id, annotator, kind, answer, 0.0, **more)


LABELS = (
    label("pair", Answer("first"), note="why,\n\"not\""),
    label("pair", Answer("second"), "ben", seconds=2.5, shown=(0, 3)),
    label("pair", Answer("tie"), "judge", "judge"),
    label("flip", Answer("both_bad")),
    label("flip", Answer("second"), "ben"),
    label("rate", Answer(rating=4, safe=False), flagged=True),
    label("rate", Answer(rating=1), "ben"),
    label("rate", Answer(rating=5, safe=True), "judge", "judge"),
    label("rank", Answer(ranks=(2, 1, 3))),
    label("rank", Answer(ranks=(3, 2, 1)), "judge", "judge"),
)  # fmt: skip


def said(labels):
    """What each annotator said, and in which words."""
    return {(one.annotator, one.query_id): (dense(one.answer), one.note) for one in labels}


def dense(answer):
    """Ranks without gaps: 1, 1, 3 says what 1, 1, 2 says."""
    if answer.ranks is None:
        return answer
    return replace(answer, ranks=tuple(sorted(set(answer.ranks)).index(rank) + 1 for rank in answer.ranks))


def write(kind, folder, labels):
    """Export, and give the files that then can be imported."""
    if kind == "csv":
        write_csv(folder / "labels.csv", labels, QUESTIONS)
        return [folder / "labels.csv"]
    writer = write_argilla if kind == "argilla" else write_label_studio
    writer(folder / kind, QUESTIONS, labels)
    pattern = "*/records.json" if kind == "argilla" else "*.json"
    return sorted((folder / kind).glob(pattern))


# -- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "argilla", "label-studio"])
def test_labels_come_back_into_a_fresh_store(kind, store, fresh_store, tmp_path):
    labels = fill(store, LABELS)
    files = write(kind, tmp_path, labels)
    with fresh_store(tmp_path) as fresh:
        for file in files:
            report = import_labels(fresh, file, predictions=True)
            assert report.format == kind
            assert report.added == report.labels > 0
        assert said(fresh.labels()) == said(labels)
        assert {person.kind for person in fresh.annotators()} == {"import"}
        # Again, and back into the store they came from: nothing new.
        for other in (fresh, store):
            before = other.labels(current=False)
            for file in files:
                report = import_labels(other, file, predictions=True)
                assert (report.added, report.already) == (0, report.labels)
            assert other.labels(current=False) == before


def test_csv_carries_everything_but_adjudication(store, fresh_store, tmp_path):
    labels = fill(store, [*LABELS, label("rank", Answer(), "ben"), label("rank", Answer(ranks=(1, 1, 3)), "cy")])
    (file,) = write("csv", tmp_path, labels)
    with fresh_store(tmp_path) as fresh:
        import_labels(fresh, file)

        def parts(one):
            return one.query_id, one.annotator, one.answer, one.shown, one.seconds, one.note, one.flagged

        assert list(map(parts, fresh.labels())) == list(map(parts, labels))


def answers(question):
    if question.kind == "pairwise":
        return st.sampled_from([Answer("first"), Answer("second"), Answer("tie"), Answer("both_bad"), Answer()])
    if question.kind == "rating":
        return st.builds(Answer, rating=st.none() | st.integers(1, 5), safe=st.none() | st.booleans())
    ranks = st.lists(st.integers(1, 4), min_size=3, max_size=3)
    return ranks.map(lambda values: Answer(ranks=tuple(values))) | st.just(Answer())


def expressible(kind, labels):
    """What a format can carry, as its docstring says."""
    kept, models = [], Counter()
    for one in labels:
        answer, model = one.answer, one.annotator_kind == "judge"
        if kind == "label-studio" and (
            (answer.ranks and len(set(answer.ranks)) < 3) or (answer.skipped and (model or one.note))
        ):
            if answer.skipped and not model:
                kept.append(one)
            continue
        if kind == "argilla":
            if answer.skipped or (answer.safe is not None and answer.rating is None):
                continue
            models[one.query_id] += model
            if model and models[one.query_id] > 1:
                continue
        kept.append(one)
    return kept


TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
NAMES = st.sampled_from(["anna", "ben", "=cmd()", 'Zoë, "Z"', "judge", "judge 2"])


@st.composite
def any_labels(draw):
    found = {}
    for _ in range(draw(st.integers(1, 12))):
        question = draw(st.sampled_from(QUESTIONS))
        name = draw(NAMES)
        kind = "judge" if name.startswith("judge") else "person"
        found[name, question.query_id] = label(question.query_id, draw(answers(question)), name, kind, note=draw(TEXTS))
    return list(found.values())


@pytest.mark.parametrize("kind", ["csv", "argilla", "label-studio"])
@settings(max_examples=25)
@given(given_labels=any_labels())
def test_every_label_that_a_format_can_carry_comes_back(kind, fresh_store, tmp_path_factory, given_labels):
    folder = tmp_path_factory.mktemp("trip")
    files = write(kind, folder, given_labels)
    expected = said(expressible(kind, given_labels))
    with fresh_store(folder) as fresh:
        for file in files:
            try:
                import_labels(fresh, file, predictions=True)
            except DataError as error:
                assert "holds no labels" in str(error)  # noqa: PT017
        assert said(fresh.labels()) == expected


def test_exports_count_what_they_cannot_carry(tmp_path):
    ties = [label("rank", Answer(ranks=(1, 1, 2))), label("rank", Answer(), "ben")]
    assert write_label_studio(tmp_path / "a", QUESTIONS, ties).left_out == 1
    assert write_argilla(tmp_path / "b", QUESTIONS, ties).left_out == 1
    assert write_argilla(tmp_path / "c", QUESTIONS).files == {"pairwise": 2, "rating": 1, "ranking-3": 1}


def test_these_tests_meet_both_orders():
    assert [blind_order(question) == question.completion_ids for question in QUESTIONS[:2]] == [True, False]


def test_the_order_elsewhere_is_not_the_strategys():
    pairs = [Question(f"q{n}", "p", "pairwise", CONVERSATION, (0, 1), ("a", "b")) for n in range(400)]
    first = sum(blind_order(pair)[0] == 0 for pair in pairs)
    assert abs(first - 200) < 4 * math.sqrt(100)
    assert [blind_order(pair) for pair in pairs] == [blind_order(pair) for pair in pairs]


# -- TRL -------------------------------------------------------------------------------------------------------------

PAIRS = (
    PreferencePair("p1", 3, 0, 0.75, False, "pairwise/majority", 3, True, None),
    PreferencePair("p2", 1, 0, 1.0, False, "pairwise/majority", 1),
    PreferencePair("p2", 0, 4, 0.5, True, "ranking/dgr", 2),
)


def read_preferences(path):
    return (
        pq.read_table(path).to_pylist()
        if path.suffix == ".parquet"
        else list(map(json.loads, path.read_text().split("\n")[:-1]))
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_preferences_are_trls_conversational_ones(suffix, tmp_path):
    path = tmp_path / f"out{suffix}"
    report = write_preferences(path, PAIRS, QUESTIONS, suffix=suffix)
    assert (report.rows, report.ties_left_out) == (2, 1)
    rows = read_preferences(path)
    assert rows[0] == {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}],
        "chosen": [{"role": "assistant", "content": "four <b>"}],
        "rejected": [{"role": "assistant", "content": "5\n\nor so"}],
        "weight": 0.75, "source": "pairwise/majority", "round": 0, "prompt_id": "p1", "chosen_id": 3, "rejected_id": 0,
        "chosen_safe": True, "rejected_safe": None,
    }  # fmt: skip
    assert "tie" not in rows[1]
    assert rows[1]["chosen_safe"] is None


def test_ties_and_safety_are_columns_only_when_there_is_something_in_them(tmp_path):
    report = write_preferences(tmp_path / "out", PAIRS[1:], QUESTIONS, suffix=".parquet", ties=True)
    assert (report.rows, report.ties_left_out) == (2, 0)
    table = pq.read_table(tmp_path / "out")
    assert table["tie"].to_pylist() == [False, True]
    assert "chosen_safe" not in table.column_names


def test_preferences_need_their_texts(tmp_path):
    with pytest.raises(SettingsError, match=r"\.jsonl or \.parquet, not '\.txt'"):
        write_preferences(tmp_path / "out", PAIRS, QUESTIONS, suffix=".txt")
    with pytest.raises(DataError, match="no question shows completion 3 of prompt 'p1' in round 0"):
        write_preferences(tmp_path / "out", PAIRS, QUESTIONS[1:], suffix=".jsonl")
    other = replace(QUESTIONS[0], query_id="other", completions=("x", "y"))
    with pytest.raises(DataError, match="completion 3 of prompt 'p1' has two texts in round 0"):
        write_preferences(tmp_path / "out", PAIRS, [*QUESTIONS, other], suffix=".jsonl")


def test_preferences_have_the_texts_of_their_round(tmp_path):
    again = (Message("user", "Once more: 2 + 2?"),)
    later = replace(BY_ID["pair"], query_id="later", messages=again, completions=("x", "y"), round=1)
    pairs = [PAIRS[0], replace(PAIRS[0], chosen_id=0, rejected_id=3, round=1)]
    with pytest.raises(DataError, match="no question shows completion 0 of prompt 'p1' in round 1"):
        write_preferences(tmp_path / "out", pairs, QUESTIONS, suffix=".jsonl")
    write_preferences(tmp_path / "out.jsonl", pairs, [*QUESTIONS, later], suffix=".jsonl")
    rows = read_preferences(tmp_path / "out.jsonl")
    assert [(row["round"], row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows] == [
        (0, "four <b>", "5\n\nor so"),
        (1, "y", "x"),
    ]
    assert rows[1]["prompt"] == [{"role": "user", "content": "Once more: 2 + 2?"}]


@pytest.mark.parametrize("completions", [BY_ID["flip"].completions, ("acht", "neun")])
def test_a_preference_and_a_row_come_back_to_their_round(completions, store, tmp_path):
    """A prompt comes back in a later round, with the same texts or with others under the same completion_ids."""
    store.add_questions([replace(BY_ID["flip"], query_id="later", completions=completions)], round_number=1)
    questions = store.questions()
    assert [question.round for question in questions] == [0, 0, 0, 0, 1]
    pair = PreferencePair("p2", 0, 1, 1.0, False, "pairwise/majority", 1, round=1)
    write_preferences(tmp_path / "out.jsonl", [pair], questions, suffix=".jsonl")
    import_labels(store, tmp_path / "out.jsonl", annotator="lab")
    row = {"prompt_id": "p2", "completion_ids": "1,0", "annotator": "ben", "choice": "first"}
    with pytest.raises(DataError, match=r"asked about more than once \(flip, later\): add query_id, or round"):
        import_labels(store, csv_file(tmp_path, row))
    import_labels(store, csv_file(tmp_path, row | {"round": "1"}))
    assert said(store.labels()) == {("lab", "later"): (Answer("first"), ""), ("ben", "later"): (Answer("second"), "")}
    with pytest.raises(DataError, match="asked nothing about completions 1,0 of prompt 'p2' in round 2"):
        import_labels(store, csv_file(tmp_path, row | {"round": "2"}))
    with pytest.raises(DataError, match="round is 'two': write a whole number"):
        import_labels(store, csv_file(tmp_path, row | {"round": "two"}))


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.sampled_from(QUESTIONS[:2]), st.booleans(), st.booleans()), min_size=1, max_size=2,
             unique_by=lambda drawn: drawn[0].query_id),
    st.sampled_from([".jsonl", ".parquet"]),
)  # fmt: skip
def test_preferences_come_back(fresh_store, tmp_path_factory, drawn, suffix):
    folder = tmp_path_factory.mktemp("trl")
    pairs, expected = [], {}
    for question, swapped, tie in drawn:
        ids = question.completion_ids[::-1] if swapped else question.completion_ids
        pairs.append(PreferencePair(question.prompt_id, *ids, 0.5, tie, "pairwise/majority", 1))
        expected["lab", question.query_id] = (Answer("tie" if tie else "second" if swapped else "first"), "")
    write_preferences(folder / "out", pairs, QUESTIONS, suffix=suffix, ties=True)
    with fresh_store(folder) as fresh:
        report = import_labels(fresh, folder / "out", annotator="lab")
        assert (report.format, report.added) == ("trl", len(drawn))
        assert said(fresh.labels()) == expected
        assert import_labels(fresh, folder / "out", annotator="lab").already == len(drawn)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is 2 + 2?", "chosen": "fünf 🙂", "rejected": "vier"},
        {
            "chosen": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "fünf 🙂"}],
            "rejected": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "vier"}],
        },
    ],
)
def test_every_shape_of_trls_preferences_is_read(row, store, tmp_path):
    path = tmp_path / "vendor.json"
    path.write_text(json.dumps([{**row, "annotator": "vendor"}]))
    assert import_labels(store, path).annotators == ("vendor",)
    assert said(store.labels()) == {("vendor", "flip"): (Answer("second"), "")}


def test_preferences_about_other_texts_are_an_error_or_counted(store, tmp_path):
    path = tmp_path / "out.jsonl"
    known = {"prompt": "What is 2 + 2?", "chosen": "vier", "rejected": "fünf 🙂"}
    path.write_text(json.dumps(known) + "\n\n" + json.dumps({**known, "rejected": "sechs"}) + "\n")
    with pytest.raises(DataError, match=r"out\.jsonl:3: this run asked for no comparison of these two answers to"):
        import_labels(store, path, annotator="lab")
    assert store.labels() == []
    report = import_labels(store, path, annotator="lab", skip_unknown=True)
    assert (report.added, report.unknown) == (1, 1)


def test_two_completions_of_one_text_are_told_apart_by_their_ids(tmp_path):
    same = Question("same", "p", "pairwise", CONVERSATION, (0, 1), ("a", "a"))
    rows = [{"prompt": [{"role": m.role, "content": m.content} for m in CONVERSATION], "chosen": "a", "rejected": "a"}]
    path = tmp_path / "out.json"
    with Store.open(tmp_path / "labels.db", "run") as store:
        store.add_questions([same])
        path.write_text(json.dumps(rows))
        with pytest.raises(DataError, match="the same text .*: which one is meant"):
            import_labels(store, path, annotator="lab")
        path.write_text(json.dumps([{**rows[0], "prompt_id": "p", "chosen_id": 1, "rejected_id": 0}]))
        import_labels(store, path, annotator="lab")
        assert store.labels()[0].answer == Answer("second")


@pytest.mark.parametrize(
    ("tie", "answer"),
    [
        (True, "tie"), ("True", "tie"), ("yes", "tie"), ("1", "tie"),
        (False, "second"), (None, "second"), ("False", "second"), ("no", "second"), ("", "second"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_a_tie_is_a_truth_or_a_word_for_one(tie, answer, suffix, store, tmp_path):
    row = {"prompt": "What is 2 + 2?", "chosen": "fünf 🙂", "rejected": "vier", "tie": tie}
    path = csv_file(tmp_path, row)
    if suffix == ".json":
        path.write_text(json.dumps([row]))
    import_labels(store, path, annotator="lab")
    assert said(store.labels()) == {("lab", "flip"): (Answer(answer), "")}


def test_one_pair_of_texts_asked_about_twice_needs_its_ids(store, tmp_path):
    again = replace(BY_ID["flip"], query_id="again", prompt_id="p3", completion_ids=(7, 8))
    store.add_questions([*QUESTIONS, again])
    path = tmp_path / "out.json"
    row = {"prompt": "What is 2 + 2?", "chosen": "vier", "rejected": "fünf 🙂"}
    other = {"prompt_id": "elsewhere", "chosen_id": 7, "rejected_id": 8}
    for unclear in (row, row | other):
        path.write_text(json.dumps([unclear]))
        with pytest.raises(DataError, match=r"record 1: .*'vier'.* asked about more than once \(flip, again\): add"):
            import_labels(store, path, annotator="lab")
    assert store.labels() == []
    path.write_text(json.dumps([row | {"prompt_id": "p3", "chosen_id": 7, "rejected_id": 8}]))
    import_labels(store, path, annotator="lab")
    import_labels(
        store, csv_file(tmp_path, row | {"prompt_id": "p2", "chosen_id": 0, "rejected_id": 1}), annotator="csv"
    )
    assert said(store.labels()) == {("lab", "again"): (Answer("first"), ""), ("csv", "flip"): (Answer("first"), "")}


BAD_PREFERENCES = [
    ({"tie": "perhaps"}, "unknown value of tie 'perhaps': use one of yes, no"),
    ({"tie": 2}, "tie is 2: it must be"),
    ({"tie": [True]}, "tie is .True.: it must be"),
    ({"chosen_id": [1]}, "chosen_id is .1.: it must be a whole number"),
    ({"rejected_id": {}}, "rejected_id is {}: it must be a whole number"),
    ({"chosen_id": True}, "chosen_id is True: it must be a whole number"),
    ({"chosen_id": "one"}, "chosen_id is 'one'"),
    ({"annotator": {}}, "the annotator is {}: it must be text"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_PREFERENCES)
def test_a_wrong_preference_is_named(wrong, message, store, tmp_path):
    path = tmp_path / "out.json"
    row = {"prompt": "What is 2 + 2?", "chosen": "vier", "rejected": "fünf 🙂", "annotator": "lab"}
    path.write_text(json.dumps([row, row | wrong]))
    with pytest.raises(DataError, match=message) as caught:
        import_labels(store, path)
    assert str(caught.value).startswith(f"{path} record 2: ")
    assert store.labels() == []


# -- CSV -------------------------------------------------------------------------------------------------------------


def csv_file(tmp_path, *rows):
    path = tmp_path / "labels.csv"
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_csv_may_name_completions_in_its_own_order(store, tmp_path):
    path = csv_file(
        tmp_path,
        {"prompt_id": "p1", "completion_ids": "0 3", "annotator": "anna", "choice": "first"},
        {"prompt_id": "p2", "completion_ids": "4,2,0", "annotator": "anna", "ranks": "1,2,3"},
        {"prompt_id": "p1", "completion_ids": "2", "annotator": "anna", "safe": "No"},
    )
    assert import_labels(store, path).format == "csv"
    assert said(store.labels()) == {
        ("anna", "pair"): (Answer("second"), ""),
        ("anna", "rank"): (Answer(ranks=(3, 1, 2)), ""),
        ("anna", "rate"): (Answer(safe=False), ""),
    }


def test_names_are_read_as_they_stand(tmp_path):
    odd = Question(" pair\t", "\tp ", "pairwise", CONVERSATION, (3, 0), ("a", "b"))
    written = label(odd.query_id, Answer("tie"), " anna ", note=" as it is ")
    write_csv(tmp_path / "out.csv", [written], [odd])
    by_ids = {"prompt_id": "\tp ", "completion_ids": " 3,0 ", "annotator": "ben", "choice": " tie "}
    rows = [row for _, row in read_rows(tmp_path / "out.csv")] + [by_ids]
    read = [one for row in rows for one in parse_csv_row(row, Asked([odd])).said]
    assert [(one.question, one.annotator, one.note) for one in read] == [
        (odd, " anna ", " as it is "),
        (odd, "ben", ""),
    ]
    for changed in ({"prompt_id": "p"}, {"query_id": "pair"}):
        with pytest.raises(DataError, match="this run asked no"):
            parse_csv_row(by_ids | changed, Asked([odd]))


@pytest.mark.parametrize("name", [" anna", "anna ", "\u3000anna"])
def test_a_name_with_blanks_around_it_is_no_name(name, store, tmp_path):
    path = csv_file(tmp_path, {"query_id": "pair", "annotator": name, "choice": "tie"})
    with pytest.raises(DataError, match=r"labels\.csv:2: .*anna.* is no annotator's name"):
        import_labels(store, path)
    assert store.annotators() == []


@pytest.mark.parametrize(
    ("wrong", "message"), [({"rating": 4}, "rating is 4"), ({"note": None}, "note is None"), ({"query_id": 1}, "is 1")]
)
def test_a_cell_that_is_no_text_is_named(wrong, message, store, tmp_path):
    path = tmp_path / "cells.json"
    path.write_text(json.dumps([{"query_id": "rate", "annotator": "anna", "rating": "4", "other": None} | wrong]))
    with pytest.raises(DataError, match=rf"cells\.json record 1: .*{message}: it must be text"):
        import_labels(store, path, file_format="csv")


def test_a_note_that_looks_like_a_formula_is_text_in_a_spreadsheet(tmp_path):
    for note in ("=1+1", "'=x", "'", "-", "fine"):
        write_csv(tmp_path / "labels.csv", [label("pair", Answer("tie"), note=note)], QUESTIONS)
        with (tmp_path / "labels.csv").open(newline="") as file:
            (row,) = csv.DictReader(file)
        assert row["note"] == (note if note == "fine" else f"'{note}")


def test_a_person_in_the_store_stays_a_person(store, tmp_path):
    store.annotator("anna", "person", "lead")
    path = csv_file(tmp_path, {"query_id": "pair", "annotator": "anna", "choice": "tie"})
    import_labels(store, path)
    assert [(p.name, p.kind, p.role) for p in store.annotators()] == [("anna", "person", "lead")]
    assert store.labels()[0].annotator_kind == "person"


def test_an_import_corrects_and_never_takes_back_a_correction(store, tmp_path):
    tie = csv_file(tmp_path, {"query_id": "pair", "annotator": "anna", "choice": "tie"})
    import_labels(store, tie)
    other = tmp_path / "other.csv"
    other.write_text("query_id,annotator,choice\npair,anna,first\nflip,anna,tie\n")
    report = import_labels(store, other)
    assert (report.labels, report.added, report.corrected) == (2, 1, 1)
    report = import_labels(store, tie)
    assert (report.added, report.corrected, report.already, report.superseded) == (0, 0, 0, 1)
    assert said(store.labels()) == {("anna", "pair"): (Answer("first"), ""), ("anna", "flip"): (Answer("tie"), "")}
    assert len(store.labels(current=False)) == 3


@pytest.mark.parametrize("between", [";", "\t"])
def test_a_spreadsheet_may_write_no_commas_between_columns(between, store, tmp_path):
    rows = [
        ["query_id", "annotator", "ranks", "choice", "seconds", "note"],
        ["rank", "anna", "2,1,3", "", "2,5" if between == ";" else "2.5", "so, so"],
        ["pair", "anna", "", "tie", "", ""],
    ]
    path = tmp_path / "labels.csv"
    path.write_text("\ufeff" + "\r\n".join(map(between.join, rows)) + "\r\n")
    assert import_labels(store, path).added == 2
    assert said(store.labels())["anna", "rank"] == (Answer(ranks=(2, 1, 3)), "so, so")
    assert [one.seconds for one in store.labels()] == [2.5, None]


def test_a_comma_in_a_number_is_no_decimal_between_commas(store, tmp_path):
    path = csv_file(tmp_path, {"query_id": "pair", "annotator": "anna", "choice": "tie", "seconds": "1,234"})
    with pytest.raises(DataError, match="seconds is '1,234': write a number"):
        import_labels(store, path)


BAD_CSV = [
    ({"choice": "left"}, "unknown choice 'left': use one of first, second, tie, both_bad, skip"),
    ({"rating": "6"}, "unknown rating '6': use a whole number from 1 to 5"),
    ({"rating": "4"}, "is a pairwise question: it takes a choice"),
    ({"query_id": "rank", "ranks": "1,2"}, "2 ranks for 3 completions"),
    ({"query_id": "rank", "ranks": "1,2,x"}, "ranks is '1,2,x': write whole numbers"),
    ({"query_id": "rank", "ranks": "0,1,2"}, "ranks"),
    ({"query_id": "rate", "safe": "maybe"}, "unknown value of safe 'maybe': use one of yes, no"),
    ({"query_id": "other", "choice": "tie"}, "asked no query 'other'"),
    ({"query_id": "", "choice": "tie"}, "which question is this about"),
    ({"query_id": "", "prompt_id": "p1", "completion_ids": "1,2", "choice": "tie"}, "asked nothing about completions"),
    ({"completion_ids": "3,1", "choice": "tie"}, "is about completions 3, 0, not 3, 1"),
    ({"shown": "3", "choice": "tie"}, "shows completions 3, 0"),
    ({"shown": "3," + "1" * 5000, "choice": "tie"}, "shows completions 3, 0"),
    ({"note": "hm"}, "the row says nothing"),
    ({"choice": "skip", "rating": "3"}, "skips and answers at once"),
    ({"choice": "tie", "seconds": "soon"}, "seconds is 'soon'"),
    ({"choice": "tie", "flagged": "red"}, "unknown value of flagged"),
    ({"choice": "tie", "annotator": ""}, "names no annotator: say whose labels the file's are, with --as NAME"),
    ({"choice": "tie", "annotator": "a\u200bnna"}, "is no annotator's name"),
    ({"choice": "tie", "note": "a\0b"}, "NUL|no text"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_CSV)
def test_one_wrong_row_is_named_and_nothing_is_stored(wrong, message, store, tmp_path):
    good = {"query_id": "flip", "annotator": "anna", "choice": "tie", "note": "two\nlines"}
    path = csv_file(tmp_path, good, {"query_id": "pair", "annotator": "anna", **wrong})
    with pytest.raises(DataError, match=message) as caught:
        import_labels(store, path)
    assert str(caught.value).startswith(f"{path}:4: ")
    assert "\n" not in str(caught.value)
    assert store.labels() == []
    assert store.annotators() == []


def test_two_answers_of_one_annotator_are_refused(store, tmp_path):
    row = {"query_id": "pair", "annotator": "anna", "choice": "tie"}
    path = csv_file(tmp_path, row, row, {**row, "choice": "first"})
    with pytest.raises(DataError, match=r"labels\.csv:4: 'anna' answers query 'pair' otherwise at labels\.csv:2"):
        import_labels(store, path)


# -- Label Studio and Argilla ----------------------------------------------------------------------------------------


def tasks(tmp_path, *labels):
    write_label_studio(tmp_path / "ls", QUESTIONS, labels)
    return json.loads((tmp_path / "ls" / "pairwise.json").read_text())


def annotation(choice, user=1, **more):
    value = {"from_name": "choice", "to_name": "answer_1", "type": "choices", "value": {"choices": [choice]}}
    return {"id": 7, "result": [value], "completed_by": user, "updated_by": user, "was_cancelled": False, **more}


def import_tasks(store, tmp_path, rows, **options):
    path = tmp_path / "export.json"
    path.write_text(json.dumps(rows))
    return import_labels(store, path, **options)


def test_label_studios_users_answer_in_the_order_they_saw(store, tmp_path):
    rows = tasks(tmp_path)
    rows[0]["annotations"] = [
        annotation("Answer 1 is better", {"id": 5, "email": "cy@example.org"}, lead_time=3.5),
        annotation("Both are bad", 2, updated_at="2026-01-02"),
        annotation("They are equally good", 2, updated_at="2026-01-01"),
    ]
    report = import_tasks(store, tmp_path, rows)
    assert report.annotators == ("cy@example.org", "label-studio user 2")
    order = blind_order(BY_ID["pair"])
    by_name = {one.annotator: one for one in store.labels()}
    assert by_name["cy@example.org"].answer == Answer("first" if order[0] == 3 else "second")
    assert by_name["cy@example.org"].shown == order
    assert by_name["cy@example.org"].seconds == 3.5
    assert by_name["label-studio user 2"].answer == Answer("both_bad")


def test_what_was_changed_in_label_studio_is_its_editors(store, tmp_path):
    rows = tasks(tmp_path, label("pair", Answer("tie")))
    rows[0]["annotations"][0] |= {"completed_by": 1, "updated_by": 2}
    assert import_tasks(store, tmp_path, rows).annotators == ("label-studio user 2",)


def test_predictions_are_taken_only_when_asked_for(store, tmp_path):
    rows = tasks(tmp_path, label("pair", Answer("tie"), "judge", "judge"))
    assert "answered_by" not in json.dumps(rows[0]["predictions"])
    report = import_tasks(store, tmp_path, rows)
    assert (report.labels, report.by_models) == (0, 1)
    assert import_tasks(store, tmp_path, rows, predictions=True).annotators == ("judge",)


def broken(change):
    def rows(tmp_path):
        (first, _) = tasks(tmp_path)
        first["annotations"] = [annotation("Answer 1 is better")]
        change(first)
        return [first]

    return rows


BAD_TASKS = [
    (lambda t: t["data"].pop("query_id"), "no query_id: it is not one that this package exported"),
    (lambda t: t["data"].update(query_id="other"), "asked no query 'other': is this another run's file"),
    (lambda t: t["data"].update(answer_1="forty"), "answer_1 of query 'pair' is 'forty', but this run asked about"),
    (lambda t: t["data"].update(shown="1,2"), "shows completions 3, 0, not '1,2'"),
    (
        lambda t: t.update(annotations=[annotation("Neither")]),
        "unknown choice 'Neither': use one of Answer 1 is better",
    ),
    (lambda t: t.update(annotations=[annotation(["x"])]), "unknown choice"),
    (lambda t: t.update(annotations=[annotation("x", None)]), "which is no user of Label Studio"),
    (lambda t: t.update(annotations=[{"result": [1], "completed_by": 1}]), "must be a list of objects with a value"),
    (lambda t: t.update(annotations={}), "annotations is {}: it must be a list"),
    (lambda t: t["annotations"][0]["result"][0].update(from_name="stars"), "'stars', but no answer"),
    (lambda t: t["annotations"][0].update(lead_time=10**400), "lead_time is 1000.*: write a number from 0 up"),
    (lambda t: t["annotations"][0].update(lead_time=-1), "lead_time is -1"),
    (lambda t: t["annotations"][0].update(lead_time=math.inf), "lead_time is inf"),
    (lambda t: t["annotations"][0].update(lead_time="2 min"), "lead_time is '2 min'"),
    (lambda t: t["annotations"][0].update(completed_by=10**400), "is no annotator's name"),
]


@pytest.mark.parametrize(("change", "message"), BAD_TASKS)
def test_a_wrong_task_is_named(change, message, store, tmp_path):
    with pytest.raises(DataError, match=message) as caught:
        import_tasks(store, tmp_path, broken(change)(tmp_path))
    assert "export.json record 1: " in str(caught.value)
    assert store.labels() == []


BAD_RECORDS = [
    (lambda r: r.update(id="other"), "asked no query 'other'"),
    (lambda r: r["fields"].update(answer_1="x"), "answer_1 of query 'rate' is 'x'"),
    (lambda r: r.update(responses={"rating": [{"value": 9, "user_id": "u"}]}), "unknown rating 9"),
    (lambda r: r.update(responses={"rating": [{"value": 4.5, "user_id": "u"}]}), "unknown rating 4.5"),
    (lambda r: r.update(responses={"rating": [{"value": 4}]}), "user_id is None"),
    (lambda r: r.update(responses={"rating": 4}), "the responses to 'rating' are 4"),
    (lambda r: r.update(responses={"note": [{"value": "x", "user_id": "u"}]}), "no whole answer"),
    (lambda r: r.update(metadata=[1]), "metadata is"),
    (lambda r: r["metadata"].update(annotators=5), "metadata.annotators is 5: it must be a list"),
    (lambda r: r["metadata"].update(annotators="anna"), "metadata.annotators is 'anna': it must be a list"),
    (lambda r: r["metadata"].update(annotators=[[]]), "an annotator is .*: it must be text"),
    (lambda r: r.update(suggestions={"rating": {"value": 3, "agent": {}}}), "agent is {}: it must be text"),
    (lambda r: r.update(suggestions={"rating": {"value": 3, "agent": [1]}}), "agent is .1.: it must be text"),
]


@pytest.mark.parametrize(("change", "message"), BAD_RECORDS)
def test_a_wrong_record_is_named(change, message, store, tmp_path):
    write_argilla(tmp_path / "out", QUESTIONS, [label("rate", Answer(rating=3))])
    path = tmp_path / "out" / "rating" / "records.json"
    (record,) = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps([record]))
    with pytest.raises(DataError, match=message) as caught:
        import_labels(store, path)
    assert "records.json record 1: " in str(caught.value)
    assert store.labels() == []


def test_argillas_drafts_are_left_out_and_discards_are_skips(store, tmp_path):
    write_argilla(tmp_path / "out", QUESTIONS)
    folder = tmp_path / "out" / "rating"
    (record,) = json.loads((folder / "records.json").read_text())
    users = [{"user_id": "u1", "value": 3, "status": "draft"}, {"user_id": "u2", "value": 3, "status": "discarded"}]
    record["responses"] = {"rating": [*users, {"user_id": "u3", "value": 2}]}
    (folder / "records.json").write_text(json.dumps([record]))
    report = import_labels(store, folder)
    assert (report.added, report.unfinished) == (2, 1)
    assert said(store.labels()) == {
        ("argilla user u2", "rate"): (Answer(), ""),
        ("argilla user u3", "rate"): (Answer(rating=2), ""),
    }


# -- files that are something else -----------------------------------------------------------------------------------

BAD_FILES = [
    (b"", "the file is empty"),
    (b" \n ", "the file is empty"),
    (b"[]", "holds no labels"),
    (b"query_id,annotator\n", "holds no labels"),
    ("query_id,annotator\npair,Zoë\n".encode("latin-1"), ":2: not UTF-8"),
    ("query_id,annotator\npair,anna\n".encode("utf-16"), ":1: not UTF-8"),
    (b'[{"data": {}, "annot', r"not valid JSON at column 15: .*is the file cut off"),
    (b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": ', ":2: not valid JSON at column 12: .*cut off"),
    (b"[1]", "record 1: 1 is no JSON object"),
    (b'[{"image": 1, "label": "cat"}]', "'image', 'label', which is no known format"),
    (b'[{"id": 1, "choice.responses": ["a"]}]', "flattened records"),
    (b"PAR1nonsense", "damaged Parquet"),
    (b"query_id,annotator\npair\n", ":2: 1 cells under 2 columns"),
    (b"query_id;annotator\npair,anna\n", ":2: 1 cells under 2 columns"),
    (b"query_id,query_id\na,b\n", "a column stands twice"),
    (b'query_id,annotator\n"pair,anna\n', "not valid CSV"),
    (b"id,annotator,annotation_id\n1,1,1\n", "Label Studio's CSV leaves out"),
    (b"[" * 100_000, "not valid JSON at|nested too deep"),
    (b'[\n{"id": ' + b"1" * 5000 + b"}]", r"labels\.bin:2: .*a number of more than 4300 digits"),
    (b'{}\n{"id": ' + b"1" * 5000 + b"}", r"labels\.bin:2: .*a number of more than 4300 digits"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_a_file_that_is_no_labels_is_one_line(content, message, store, tmp_path):
    path = tmp_path / "labels.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        import_labels(store, path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_unknown_format(store, tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        import_labels(store, tmp_path / "none.json")
    with pytest.raises(DataError, match="unknown format 'xml'"):
        import_labels(store, tmp_path, file_format="xml")
    assert FORMATS == ("trl", "argilla", "label-studio", "csv")


NESTS = [
    "[{}]",
    '[{{"id": {}, "fields": {{}}, "responses": {{}}}}]',
    '[{{"data": {{"query_id": {}}}, "annotations": []}}]',
    '[{{"prompt": {}, "chosen": "a", "rejected": "b"}}]',
]


@pytest.mark.parametrize("nest", NESTS)
def test_nesting_that_json_can_just_hold_is_one_line(nest, store, tmp_path):
    # Whatever follows on reading takes a few levels more or fewer than reading itself.
    path = tmp_path / "deep.json"
    for depth in range(850, 1000, 5):
        path.write_text(nest.format("[" * depth + "]" * depth))
        with pytest.raises(DataError) as caught:
            import_labels(store, path, annotator="x")
        assert str(caught.value).startswith(str(path))
        assert len(str(caught.value)) < len(str(path)) + 250


KEYS = [
    *("data", "annotations", "predictions", "result", "value", "annotator", "annotation_id"),
    *("fields", "responses", "suggestions", "metadata", "id", "user_id", "shown", "query_id"),
    *("prompt", "chosen", "rejected"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)


@settings(max_examples=150)
@given(content=st.binary(max_size=60) | JSON.map(lambda value: json.dumps([value]).encode()))
def test_no_content_ends_in_anything_but_one_line(fresh_store, tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "fuzz").write_bytes(content)
    if not (folder / "fresh.db").exists():
        fresh_store(folder).close()
    with Store.open(folder / "fresh.db", "other") as store:
        with pytest.raises(DataError) as caught:
            import_labels(store, folder / "fuzz", annotator="x", predictions=True)
        assert "\n" not in str(caught.value)
