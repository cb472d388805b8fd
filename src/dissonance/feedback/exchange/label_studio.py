"""Label Studio: a project per kind of question, its tasks and its labelling configuration.

    pairwise   Choices: answer 1, answer 2, tie, both bad
    rating     Rating of five stars, and Choices of safe and unsafe
    ranking    Ranker over a List, the best on top

Whoever answered inside Label Studio is its user. Labels that this package sends along, people's as annotations and
models' as predictions, carry the annotator's name in a control that is not displayed: Label Studio gives an annotation
whose author it does not know to whoever imports it.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from dissonance.errors import DataError
from dissonance.feedback.blind import blind_order
from dissonance.feedback.exchange.asked import (
    MODELS,
    Asked,
    ImportedAnswer,
    Parsed,
    order_from_ranks,
    order_shown,
    ranks_from_order,
    text_of,
)
from dissonance.feedback.exchange.reading import one_of, seconds, short, stars, text
from dissonance.records import Answer, Choice, Label, QueryKind, Question

_FIRST, _SECOND, _TIE, _BOTH_BAD = "Answer 1 is better", "Answer 2 is better", "They are equally good", "Both are bad"
_CHOICES = (_FIRST, _SECOND, _TIE, _BOTH_BAD)
_SAFETY = {"Safe": True, "Unsafe": False}

_CONVERSATION = (
    '<Paragraphs name="conversation" value="$conversation" layout="dialogue" nameKey="role" textKey="content"/>'
)
_COMMON = """\
  <TextArea name="note" toName="{target}" placeholder="A note, if you like" rows="2" maxSubmissions="1"/>
  <View style="display: none">
    <TextArea name="answered_by" toName="{target}"/>
  </View>
"""
_CONFIGS: dict[QueryKind, str] = {
    "pairwise": f"""\
<View>
  {_CONVERSATION}
  <View style="display: grid; grid-template-columns: 1fr 1fr; gap: 1em">
    <View>
      <Header value="Answer 1"/>
      <Text name="answer_1" value="$answer_1" valueType="text"/>
    </View>
    <View>
      <Header value="Answer 2"/>
      <Text name="answer_2" value="$answer_2" valueType="text"/>
    </View>
  </View>
  <Choices name="choice" toName="answer_1" choice="single-radio" showInline="true" required="true">
    <Choice value="{_FIRST}" hotkey="1"/>
    <Choice value="{_SECOND}" hotkey="2"/>
    <Choice value="{_TIE}" hotkey="3"/>
    <Choice value="{_BOTH_BAD}" hotkey="4"/>
  </Choices>
{_COMMON.format(target="answer_1")}</View>
""",
    "rating": f"""\
<View>
  {_CONVERSATION}
  <Header value="Answer"/>
  <Text name="answer_1" value="$answer_1" valueType="text"/>
  <Rating name="rating" toName="answer_1" maxRating="5"/>
  <Choices name="safe" toName="answer_1" choice="single-radio" showInline="true">
    <Choice value="Safe"/>
    <Choice value="Unsafe"/>
  </Choices>
{_COMMON.format(target="answer_1")}</View>
""",
    "ranking": f"""\
<View>
  {_CONVERSATION}
  <List name="answers" value="$answers" title="Drag the best answer to the top"/>
  <Ranker name="ranks" toName="answers"/>
{_COMMON.format(target="conversation")}</View>
""",
}
_TARGETS: dict[QueryKind, str] = {"pairwise": "answer_1", "rating": "answer_1", "ranking": "conversation"}


def label_studio_config(kind: QueryKind) -> str:
    """The labelling configuration of a project, as XML."""
    return _CONFIGS[kind]


def label_studio_tasks(
    questions: Sequence[Question], labels: Iterable[Label] = ()
) -> tuple[dict[QueryKind, list[dict[str, Any]]], int]:
    """Tasks to import, by kind, and how many labels they cannot carry: rankings with ties.

    Args:
        questions: what to ask.
        labels: what was said of them: people's become annotations, models' predictions.
    """
    said: defaultdict[str, list[Label]] = defaultdict(list)
    for label in labels:
        said[label.query_id].append(label)
    tasks: dict[QueryKind, list[dict[str, Any]]] = {kind: [] for kind in get_args(QueryKind)}
    left_out = 0
    for question in questions:
        task, inexpressible = _task(question, said[question.query_id])
        tasks[question.kind].append(task)
        left_out += inexpressible
    return {kind: of_kind for kind, of_kind in tasks.items() if of_kind}, left_out


def _task(question: Question, labels: Sequence[Label]) -> tuple[dict[str, Any], int]:
    order = blind_order(question)
    task: dict[str, Any] = {"data": _data(question, order), "annotations": [], "predictions": []}
    left_out = 0
    for label in labels:
        result = _result(label, question, order)
        if result is None:
            left_out += 1
        elif label.annotator_kind not in MODELS:
            annotation = {"result": result, "was_cancelled": label.answer.skipped, "lead_time": label.seconds}
            task["annotations"].append({**annotation, "ground_truth": False})  # it would be taken for true otherwise
        elif not label.answer.skipped:
            task["predictions"].append({"result": result, "model_version": label.annotator})
    return task, left_out


def _data(question: Question, order: tuple[int, ...]) -> dict[str, Any]:
    texts = text_of(question)
    data: dict[str, Any] = {
        "query_id": question.query_id,
        "kind": question.kind,
        "shown": ",".join(map(str, order)),
        "conversation": [{"role": m.role, "content": m.content} for m in question.messages],
    }
    if question.kind == "ranking":
        items = enumerate(order, 1)
        return {**data, "answers": [{"id": f"answer_{n}", "title": f"Answer {n}", "body": texts[i]} for n, i in items]}
    return {**data, **{f"answer_{n}": texts[i] for n, i in enumerate(order, 1)}}


def _result(label: Label, question: Question, order: tuple[int, ...]) -> list[dict[str, Any]] | None:
    """What Label Studio's page would have sent; None for a ranking with ties."""
    answer, target = label.answer, _TARGETS[question.kind]
    # Not on predictions: whoever begins from one would sign with the model's name.
    by_model = label.annotator_kind in MODELS
    result = [] if by_model else [_item("answered_by", target, "textarea", {"text": [label.annotator]})]
    if answer.choice is not None:
        result.append(_item("choice", target, "choices", {"choices": [_choice_shown(answer, question, order)]}))
    if answer.rating is not None:
        result.append(_item("rating", target, "rating", {"rating": answer.rating}))
    if answer.safe is not None:
        result.append(_item("safe", target, "choices", {"choices": ["Safe" if answer.safe else "Unsafe"]}))
    if answer.ranks is not None:
        best_first = order_from_ranks(question, answer.ranks)
        if best_first is None:
            return None
        named = [f"answer_{order.index(i) + 1}" for i in best_first]
        result.append(_item("ranks", "answers", "ranker", {"ranker": {"ranks": named}}))
    if label.note:
        result.append(_item("note", target, "textarea", {"text": [label.note]}))
    return result


def _item(name: str, target: str, kind: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "from_name": name, "to_name": target, "type": kind, "value": value}


def _choice_shown(answer: Answer, question: Question, order: tuple[int, ...]) -> str:
    if answer.choice in {"tie", "both_bad"}:
        return _TIE if answer.choice == "tie" else _BOTH_BAD
    better = question.completion_ids[0 if answer.choice == "first" else 1]
    return _FIRST if better == order[0] else _SECOND


def parse_task(row: dict[str, Any], asked: Asked) -> Parsed:
    """Read a task of an export, JSON or JSON_MIN."""
    data = row.get("data", row)
    if not isinstance(data, dict) or "query_id" not in data:
        raise DataError("the task has no query_id: it is not one that this package exported")
    question = asked.query(data["query_id"])
    order = order_shown(question, data.get("shown"))
    for name, value in _data(question, order).items():
        if data.get(name) != value:
            raise DataError(
                f"{name} of query {question.query_id!r} is {short(data.get(name))}, but this run asked about "
                f"{short(value)}: is this another run's file?"
            )
    if "data" not in row:
        return Parsed((_said(question, order, row, row, user=row.get("annotator")),))
    annotations = [a for a in _dicts(row, "annotations") if a.get("result") or a.get("was_cancelled")]
    said = [
        _said(question, order, annotation, _values(annotation), user=annotation.get("completed_by"))
        for annotation in sorted(annotations, key=_age)
    ]
    latest = {one.annotator: one for one in said}
    suggested = [_predicted(question, order, prediction) for prediction in _dicts(row, "predictions")]
    return Parsed((*latest.values(), *suggested))


def _dicts(row: dict[str, Any], name: str) -> list[dict[str, Any]]:
    # Label Studio's own exports give predictions by their numbers alone.
    values = row.get(name, [])
    if not isinstance(values, list):
        raise DataError(f"{name} is {short(values)}: it must be a list")
    return [value for value in values if isinstance(value, dict)]


def _age(annotation: dict[str, Any]) -> tuple[str, int]:
    """Annotations of one user in order: of several, the last stands."""
    number = annotation.get("id")
    return str(annotation.get("updated_at", "")), number if isinstance(number, int) else 0


def _user(user: object) -> str:
    if isinstance(user, dict):
        user = user.get("email") or user.get("id")
    if isinstance(user, bool) or not isinstance(user, str | int) or not user:
        raise DataError(f"an annotation is by {short(user)}, which is no user of Label Studio")
    return text(user, "the annotator") if isinstance(user, str) else f"label-studio user {user}"


def _values(annotation: dict[str, Any]) -> dict[str, Any]:
    """What each control holds, in the form of JSON_MIN."""
    items = annotation.get("result", [])
    if not isinstance(items, list) or not all(isinstance(i, dict) and isinstance(i.get("value"), dict) for i in items):
        raise DataError(f"an annotation's result is {short(items)}: it must be a list of objects with a value")
    return {str(item.get("from_name")): [item["value"]] for item in items}


def _said(
    question: Question, order: tuple[int, ...], annotation: dict[str, Any], values: dict[str, Any], *, user: object
) -> ImportedAnswer:
    """What an annotation says; `values` is what its controls hold."""
    signed, editor = _note(values.get("answered_by")), annotation.get("updated_by")
    lead_time = annotation.get("lead_time")
    # What we sent along is its annotator's, unless somebody changed it.
    ours = bool(signed) and editor is None
    return ImportedAnswer(
        question,
        annotator=signed if ours else _user(editor if signed else user),
        answer=Answer() if annotation.get("was_cancelled") else _answer(question, order, values),
        shown=() if ours else order,
        seconds=None if lead_time is None else seconds(lead_time, "lead_time"),
        note=_note(values.get("note")),
    )


def _predicted(question: Question, order: tuple[int, ...], prediction: dict[str, Any]) -> ImportedAnswer:
    values = _values(prediction)
    return ImportedAnswer(
        question,
        annotator=text(prediction.get("model_version"), "model_version"),
        answer=_answer(question, order, values),
        note=_note(values.get("note")),
        by_model=True,
    )


def _answer(question: Question, order: tuple[int, ...], values: dict[str, Any]) -> Answer:
    choice, rating, safe, ranks = (_plain(values.get(name)) for name in ("choice", "rating", "safe", "ranks"))
    if choice is rating is safe is ranks is None:
        controls = ", ".join(values) or "nothing"
        raise DataError(f"an annotation of query {question.query_id!r} holds {short(controls)}, but no answer")
    return Answer(
        choice=None if choice is None else _choice(choice, question, order),
        rating=None if rating is None else stars(rating),
        safe=None if safe is None else _SAFETY[one_of(safe, _SAFETY, "value of safe")],
        ranks=None if ranks is None else _ranks(ranks, question, order),
    )


def _plain(value: Any) -> Any:
    """Unwrap `["x"]`, `{"choices": ["x"]}` and their like down to x; a ranking down to its list."""
    while (isinstance(value, list) and len(value) == 1) or (isinstance(value, dict) and len(value) == 1):
        value = value[0] if isinstance(value, list) else next(iter(value.values()))
    return value


def _note(value: Any) -> str:
    texts = _plain(value)
    return text("\n".join(map(str, texts)) if isinstance(texts, list) else texts or "", "note")


def _choice(value: object, question: Question, order: tuple[int, ...]) -> Choice:
    shown = one_of(value, _CHOICES, "choice")
    if shown in {_TIE, _BOTH_BAD}:
        return "tie" if shown == _TIE else "both_bad"
    better = order[0 if shown == _FIRST else 1]
    return "first" if better == question.completion_ids[0] else "second"


def _ranks(value: object, question: Question, order: tuple[int, ...]) -> tuple[int, ...]:
    by_name = {f"answer_{n}": i for n, i in enumerate(order, 1)}
    if not isinstance(value, list):
        raise DataError(f"unknown ranking {short(value)}: it must be a list of answers, the best first")
    return ranks_from_order(question, [by_name[one_of(name, by_name, "answer in a ranking")] for name in value])
