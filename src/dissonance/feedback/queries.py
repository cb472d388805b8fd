"""What is to be asked: the queries of each round, gold questions, checks of a model's answers, and how far it is."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, and_, bindparam, case, exists, func, insert, select, update

from dissonance.errors import DataError
from dissonance.feedback.answers import is_current, recount
from dissonance.feedback.people import find_by_name
from dissonance.feedback.rows import answer_from_json, answer_to_json, is_text, question_from_row, question_row
from dissonance.feedback.schema import gold_answers, labels, queries
from dissonance.records import Answer, Question


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the asking is; retired queries and gold questions do not count."""

    queries: int
    closed: int
    """Queries that want no more answers: as many annotators as wanted have answered, or a lead has settled them."""
    wanted: int
    """Answers wanted in all."""
    answered: int
    """Of those, answers that are there; as many as wanted once every query is closed."""


def add_queries(
    connection: Connection, questions: Sequence[Question], overlap: int | None, round_number: int, now: float
) -> int:
    """Add a round's questions; see `Store.add_questions`."""
    if overlap is not None and overlap < 1:
        raise DataError(f"overlap is {overlap}: ask at least 1 annotator")
    _check_distinct([question.query_id for question in questions])
    held = _check_held(connection, questions)
    # A checked query wants one more than the others, so it does not say what was asked for.
    usual = select(func.max(queries.c.overlap)).where(~queries.c.is_gold, ~queries.c.people_only)
    wanted = overlap or connection.scalar(usual) or 1
    rows = [question_row(q, position, round_number, wanted, now) for position, q in enumerate(questions)]
    fresh = [row for row in rows if row["query_id"] not in held]
    again = [{"held_id": row["query_id"], "place": row["position"]} for row in rows if row["query_id"] in held]
    ordinary = and_(queries.c.round == round_number, ~queries.c.is_gold)
    connection.execute(update(queries).where(ordinary, queries.c.retired_at.is_(None)).values(retired_at=now))
    if again:
        asked = update(queries).where(queries.c.query_id == bindparam("held_id"), ~queries.c.is_gold)
        place = {"round": round_number, "position": bindparam("place"), "retired_at": None}
        if overlap is not None:
            # What people are to check wants one more than have answered, whatever the others want.
            checked = and_(queries.c.people_only, queries.c.overlap > overlap)
            place["overlap"] = case((checked, queries.c.overlap), else_=overlap)
        connection.execute(asked.values(place), again)
        connection.execute(recount(and_(ordinary, queries.c.retired_at.is_(None)), now))
    if fresh:
        connection.execute(insert(queries), fresh)
    return len(fresh)


def add_gold_questions(connection: Connection, gold: Sequence[tuple[Question, Answer, str]], now: float) -> int:
    """Add questions whose answer is known; see `Store.add_gold`."""
    _check_distinct([question.query_id for question, _, _ in gold])
    held = _check_held(connection, [question for question, _, _ in gold], in_order=True)
    for position, (question, answer, why) in enumerate(gold):
        if answer.skipped:
            raise DataError(f"gold question {question.query_id!r} has no answer: give one")
        if not is_text(why):
            raise DataError(f"the reason of gold question {question.query_id!r} holds a character that is no text")
        answer.fits(question)
        row = question_row(question, position, 0, 1, now)
        if question.query_id not in held:
            connection.execute(insert(queries).values(row | {"is_gold": True}))
        elif not held[question.query_id]:
            same = update(queries).where(queries.c.query_id == question.query_id)
            connection.execute(same.values(is_gold=True, closed_at=None, retired_at=None))
        known = {"answer": answer_to_json(answer), "why": why}
        if held.get(question.query_id):
            mine = gold_answers.c.query_id == question.query_id
            connection.execute(update(gold_answers).where(mine).values(known))
        else:
            connection.execute(insert(gold_answers).values(known | {"query_id": question.query_id}))
    return sum(not held.get(question.query_id, False) for question, _, _ in gold)


def _check_distinct(query_ids: Sequence[str]) -> None:
    query_id, count = Counter(query_ids).most_common(1)[0] if query_ids else ("", 0)
    if count > 1:
        raise DataError(f"query {query_id!r} is there {count} times: give each question its own query_id")


def _check_held(connection: Connection, questions: Sequence[Question], *, in_order: bool = False) -> dict[str, bool]:
    """Every query there is, and whether it is gold; refuses a question that would inherit the answers to another.

    `in_order` asks for the same order of completions, for answers that come with their question.
    """
    given = {question.query_id: question for question in questions}
    held = {}
    for row in connection.execute(select(queries)):
        held[row.query_id] = row.is_gold
        if row.query_id in given and (other := _differs(question_from_row(row), given[row.query_id], in_order)):
            raise DataError(
                f"query {row.query_id!r} is in the store with {other}, and its labels are about that: "
                "give this question another query_id, or use another store"
            )
    return held


def _differs(held: Question, given: Question, in_order: bool) -> str | None:
    if held.kind != given.kind:
        return f"another kind ({held.kind}, not {given.kind})"
    if held.messages != given.messages:
        return "other messages"
    # Answers are kept in the order that is held, in whichever the question comes again.
    texts = [dict(zip(q.completion_ids, q.completions, strict=True)) for q in (held, given)]
    if texts[0] != texts[1]:
        return "other completions"
    return "its completions in another order" if in_order and held.completion_ids != given.completion_ids else None


def reopen_for_checks(connection: Connection, annotator: str, size: int, seed: int) -> int:
    """Ask people about a sample of what a model has answered; see `Store.check_sample`."""
    if size < 0:
        raise DataError(f"a sample of {size} cannot be drawn: use 0 or more")
    annotator_id = find_by_name(connection, annotator).annotator_id
    about = exists().where(labels.c.query_id == queries.c.query_id, ~labels.c.skipped, is_current())
    said = about.where(labels.c.annotator_id == annotator_id)
    in_sample = and_(queries.c.people_only, queries.c.retired_at.is_(None), said)
    drawn = connection.scalar(select(func.count()).select_from(queries).where(in_sample)) or 0
    answered = connection.scalars(
        select(queries.c.query_id)
        .where(queries.c.closed_at.is_not(None), queries.c.retired_at.is_(None), ~queries.c.people_only)
        .where(said, ~about.where(labels.c.adjudicated))
        .order_by(queries.c.round, queries.c.position, queries.c.query_id)
    ).all()
    sample = random.Random(seed).sample(answered, min(max(size - drawn, 0), len(answered)))
    if sample:
        again = update(queries).where(queries.c.query_id == bindparam("held_id"))
        one_more = {"overlap": queries.c.answers + 1, "people_only": True, "closed_at": None}
        connection.execute(again.values(one_more), [{"held_id": query_id} for query_id in sample])
    still_open = select(func.count()).select_from(queries).where(in_sample, queries.c.closed_at.is_(None))
    return connection.scalar(still_open) or 0


def all_questions(connection: Connection, *, retired: bool) -> list[Question]:
    """Every question, in the order of asking."""
    chosen = select(queries).order_by(queries.c.round, queries.c.position, queries.c.query_id)
    rows = connection.execute(chosen if retired else chosen.where(queries.c.retired_at.is_(None)))
    return [question_from_row(row) for row in rows]


def find_question(connection: Connection, query_id: str) -> Question:
    """One question; a DataError if there is none of this id."""
    chosen = select(queries).where(queries.c.query_id == query_id)
    row = connection.execute(chosen).one_or_none() if is_text(query_id) else None
    if row is None:
        raise DataError(f"there is no query {query_id!r} in this store")
    return question_from_row(row)


def known_answers(connection: Connection) -> dict[str, Answer]:
    """The answers of the gold questions, by query_id."""
    return {row.query_id: answer_from_json(row.answer) for row in connection.execute(select(gold_answers))}


def count_progress(connection: Connection, round_number: int | None = None) -> Progress:
    """How far the asking is, in one round or in all."""
    had = case((queries.c.answers > queries.c.overlap, queries.c.overlap), else_=queries.c.answers)
    wanted = case((queries.c.closed_at.is_(None), queries.c.overlap), else_=had)
    chosen = select(func.count(), func.count(queries.c.closed_at), func.sum(wanted), func.sum(had))
    chosen = chosen.where(queries.c.retired_at.is_(None), ~queries.c.is_gold)
    if round_number is not None:
        chosen = chosen.where(queries.c.round == round_number)
    row = connection.execute(chosen).one()
    return Progress(row[0], row[1], int(row[2] or 0), int(row[3] or 0))
