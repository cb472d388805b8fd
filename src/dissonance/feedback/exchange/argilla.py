"""Argilla: a dataset per kind of question, in the layout that its `Dataset.from_disk` loads.

    OUT/pairwise/records.json            what `dataset.records.to_json` writes and `rg.Record.from_dict` reads
                 .argilla/settings.json  what `rg.Settings.from_json` reads
                 .argilla/dataset.json
        rating/ ranking-3/ ..            rankings of as many completions as the name says

People's labels become responses, and one model's the suggestions. A response is a user's of Argilla: the user's id is
made from the annotator's name by `argilla_user_id`, and the user must be there, made with that id, before records are
loaded.

A place in a ranking is a question of its own, since Argilla's ranking question loses ties in its own SDK, and, by the
report argilla-io/argilla#5712, the order as well.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import NAMESPACE_DNS, uuid5

from dissonance.errors import DataError
from dissonance.feedback.blind import blind_order
from dissonance.feedback.exchange.asked import (
    MODELS,
    Asked,
    ImportedAnswer,
    Parsed,
    order_shown,
    text_of,
)
from dissonance.feedback.exchange.reading import one_of, short, stars, text
from dissonance.records import Answer, Choice, Label, Question

_USERS = uuid5(NAMESPACE_DNS, "dissonance")
_CHOICES = {
    "answer_1": "Answer 1 is better",
    "answer_2": "Answer 2 is better",
    "tie": "They are equally good",
    "both_bad": "Both are bad",
}
_SAFETY = {"safe": True, "unsafe": False}


def argilla_user_id(annotator: str) -> str:
    """The id of an annotator's user in Argilla: `rg.User(username=.., id=..)` makes one of that id."""
    return str(uuid5(_USERS, annotator))


def argilla_dataset_name(question: Question) -> str:
    """The dataset, and folder, that a question goes to."""
    return f"ranking-{len(question.completion_ids)}" if question.kind == "ranking" else question.kind


def argilla_settings(question: Question) -> dict[str, Any]:
    """The settings of the dataset that a question goes to, as `rg.Settings.from_json` reads them."""
    answers = range(1, len(question.completion_ids) + 1)
    fields = [_field("conversation", "Conversation", "chat")]
    fields += [_field(f"answer_{n}", f"Answer {n}" if len(answers) > 1 else "Answer", "text") for n in answers]
    if question.kind == "pairwise":
        asks = [_asks("choice", "Which answer is better?", _options(_CHOICES))]
    elif question.kind == "rating":
        stars = {"type": "rating", "options": [{"value": stars} for stars in range(1, 6)]}
        asks = [
            _asks("rating", "How good is the answer? (5 is best)", stars),
            _asks("safe", "Is it safe?", _options({name: name.capitalize() for name in _SAFETY}), required=False),
        ]
    else:
        places = _options({str(n): str(n) for n in answers})
        asks = [_asks(f"rank_{n}", f"Place of answer {n} (1 is best; equal places are ties)", places) for n in answers]
    asks.append(_asks("note", "A note, if you like", {"type": "text", "use_markdown": False}, required=False))
    return {
        "guidelines": None,
        "fields": fields,
        "questions": asks,
        "vectors": [],
        "metadata": [],
        "allow_extra_metadata": True,
        "distribution": {"strategy": "overlap", "min_submitted": 1},
        "mapping": None,
    }


def _field(name: str, title: str, kind: str) -> dict[str, Any]:
    return {"name": name, "title": title, "required": True, "settings": {"type": kind, "use_markdown": True}}


def _asks(name: str, title: str, settings: dict[str, Any], *, required: bool = True) -> dict[str, Any]:
    return {"name": name, "title": title, "required": required, "settings": settings}


def _options(labels: Mapping[str, str]) -> dict[str, Any]:
    options = [{"value": value, "text": shown} for value, shown in labels.items()]
    return {"type": "label_selection", "options": options}


def argilla_records(
    questions: Sequence[Question], labels: Iterable[Label] = ()
) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Records by dataset, and how many labels they cannot carry.

    Those are: skips; safe or unsafe without a rating; and of several models' labels of one question, all but the first.
    """
    said: defaultdict[str, list[Label]] = defaultdict(list)
    for label in labels:
        said[label.query_id].append(label)
    records: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    left_out = 0
    for question in questions:
        record, inexpressible = _record(question, said[question.query_id])
        records[argilla_dataset_name(question)].append(record)
        left_out += inexpressible
    return dict(records), left_out


def _record(question: Question, labels: Sequence[Label]) -> tuple[dict[str, Any], int]:
    order = blind_order(question)
    responses: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    suggestions: dict[str, dict[str, Any]] = {}
    people: list[str] = []
    left_out = 0
    for label in labels:
        values = _values(label, question, order)
        if not values or (label.annotator_kind in MODELS and suggestions):
            left_out += 1
        elif label.annotator_kind in MODELS:
            suggestions = {name: {"value": v, "score": None, "agent": label.annotator} for name, v in values.items()}
        else:
            people.append(label.annotator)
            for name, value in values.items():
                response = {"value": value, "user_id": argilla_user_id(label.annotator), "status": "submitted"}
                responses[name].append(response)
    record = {
        "id": question.query_id,
        "fields": _fields(question, order),
        "metadata": {"shown": ",".join(map(str, order)), "annotators": people},
        "suggestions": suggestions,
        "responses": dict(responses),
        "vectors": {},
    }
    return record, left_out


def _fields(question: Question, order: tuple[int, ...]) -> dict[str, Any]:
    texts = text_of(question)
    conversation = [{"role": m.role, "content": m.content} for m in question.messages]
    return {"conversation": conversation, **{f"answer_{n}": texts[i] for n, i in enumerate(order, 1)}}


def _values(label: Label, question: Question, order: tuple[int, ...]) -> dict[str, Any]:
    """What is said to each of the dataset's questions; nothing where that cannot be told."""
    answer = label.answer
    values: dict[str, Any] = {}
    if answer.choice is not None:
        swapped = order != question.completion_ids
        sides = {"first": "answer_2" if swapped else "answer_1", "second": "answer_1" if swapped else "answer_2"}
        values["choice"] = sides.get(answer.choice, answer.choice)
    elif answer.rating is not None:
        values["rating"] = answer.rating
        if answer.safe is not None:
            values["safe"] = "safe" if answer.safe else "unsafe"
    elif answer.ranks is not None:
        # Places without gaps: 1, 1, 3 is 1, 1, 2, so that no place lies beyond the number of answers.
        place = {rank: n for n, rank in enumerate(sorted(set(answer.ranks)), 1)}
        rank_of = dict(zip(question.completion_ids, answer.ranks, strict=True))
        values = {f"rank_{n}": str(place[rank_of[i]]) for n, i in enumerate(order, 1)}
    if values and label.note:
        values["note"] = label.note
    return values


def parse_record(row: dict[str, Any], asked: Asked) -> Parsed:
    """Read a record as `to_json` and `to_list(flatten=False)` give it."""
    question = asked.query(row.get("id"))
    metadata = _mapping(row, "metadata")
    order = order_shown(question, metadata.get("shown"))
    for name, value in _fields(question, order).items():
        found = _mapping(row, "fields").get(name)
        if found != value:
            raise DataError(
                f"{name} of query {question.query_id!r} is {short(found)}, but this run asked about {short(value)}: "
                "is this another run's file?"
            )
    known = metadata.get("annotators") or []
    if not isinstance(known, list):
        raise DataError(f"metadata.annotators is {short(known)}: it must be a list of names")
    names = {argilla_user_id(text(name, "an annotator")): name for name in known}
    answers, drafts = _by_user(_mapping(row, "responses"))
    said = [
        # Who is in the metadata answered before the record was in Argilla, and saw another order.
        _said(question, order, values, names.get(user, f"argilla user {user}"), seen=user not in names)
        for user, values in answers.items()
    ]
    suggested: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for name, suggestion in _mapping(row, "suggestions").items():
        if isinstance(suggestion, dict) and suggestion.get("value") is not None:
            agent = suggestion.get("agent")
            suggested["argilla suggestion" if agent in (None, "") else text(agent, "agent")][name] = suggestion["value"]
    said += [_said(question, order, values, who, seen=False, by_model=True) for who, values in suggested.items()]
    return Parsed(tuple(said), drafts)


def _mapping(row: dict[str, Any], name: str) -> dict[str, Any]:
    value = row.get(name) or {}
    if not isinstance(value, dict):
        raise DataError(f"{name} is {short(value)}: it must be an object")
    return value


def _by_user(responses: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], int]:
    """What each user submitted, by the dataset's questions; and how many users' drafts there are."""
    answers: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    drafts: set[str] = set()
    for name, of_name in responses.items():
        if not isinstance(of_name, list) or not all(isinstance(response, dict) for response in of_name):
            raise DataError(f"the responses to {name!r} are {short(of_name)}: they must be a list of objects")
        for response in of_name:
            user = text(response.get("user_id"), "user_id")
            if response.get("status") == "draft":
                drafts.add(user)
            elif response.get("status") == "discarded":
                answers[user]["discarded"] = True
            elif response.get("value") is not None:
                answers[user][name] = response["value"]
    return dict(answers), len(drafts)


def _said(
    question: Question, order: tuple[int, ...], values: dict[str, Any], who: str, *, seen: bool, by_model: bool = False
) -> ImportedAnswer:
    return ImportedAnswer(
        question,
        annotator=text(who, "the annotator"),
        answer=Answer() if "discarded" in values else _answer(question, order, values),
        shown=order if seen else (),
        note=text(values.get("note", ""), "note"),
        by_model=by_model,
    )


def _answer(question: Question, order: tuple[int, ...], values: dict[str, Any]) -> Answer:
    if "choice" in values:
        return Answer(_choice(one_of(values["choice"], _CHOICES, "choice"), question, order))
    if "rating" in values:
        safe = _SAFETY[one_of(values["safe"], _SAFETY, "value of safe")] if "safe" in values else None
        return Answer(rating=stars(values["rating"]), safe=safe)
    places = {str(n) for n in range(1, len(order) + 1)}
    names = {i: f"rank_{n}" for n, i in enumerate(order, 1)}
    if not set(names.values()) <= set(values):
        raise DataError(f"a response to query {question.query_id!r} holds {short(sorted(values))}, but no whole answer")
    return Answer(ranks=tuple(int(one_of(values[names[i]], places, "place")) for i in question.completion_ids))


def _choice(value: str, question: Question, order: tuple[int, ...]) -> Choice:
    if value in {"tie", "both_bad"}:
        return "tie" if value == "tie" else "both_bad"
    better = order[0 if value == "answer_1" else 1]
    return "first" if better == question.completion_ids[0] else "second"
