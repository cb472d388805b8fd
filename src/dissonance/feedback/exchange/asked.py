"""What a run has asked, as files of labels speak of it; and what they say."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from dissonance.errors import DataError
from dissonance.feedback.exchange.reading import short
from dissonance.records import AnnotatorKind, Answer, Question

MODELS: frozenset[AnnotatorKind] = frozenset({"judge", "gold", "simulated"})
"""Annotators whose labels other tools hold as suggestions or predictions."""

Turns = tuple[tuple[str, str], ...]
"""A conversation: role and content of each turn."""


class UnknownQuestionError(DataError):
    """A row is about something that the run has not asked."""


@dataclass(frozen=True, slots=True)
class ImportedAnswer:
    """An answer that a file holds, in terms of a question of this run."""

    question: Question
    annotator: str | None
    """As the file names whoever answered; None where it does not."""
    answer: Answer
    shown: tuple[int, ...] = ()
    """The completion_ids in the order the annotator saw; empty where nobody knows."""
    seconds: float | None = None
    note: str = ""
    flagged: bool = False
    by_model: bool = False
    """A suggestion or prediction."""


@dataclass(frozen=True)
class Parsed:
    """What a row of a file comes to."""

    said: tuple[ImportedAnswer, ...] = ()
    unfinished: int = 0
    """Answers that were begun and not submitted: they are left out."""


@dataclass(frozen=True)
class Asked:
    """The questions of a run, by every name that a file may use."""

    questions: Sequence[Question]
    _by_id: dict[str, Question] = field(init=False, repr=False)
    _by_ids: dict[tuple[str, frozenset[int]], list[Question]] = field(init=False, repr=False)
    _by_texts: dict[tuple[Turns, frozenset[str]], list[Question]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        by_ids: defaultdict[tuple[str, frozenset[int]], list[Question]] = defaultdict(list)
        by_texts: defaultdict[tuple[Turns, frozenset[str]], list[Question]] = defaultdict(list)
        for question in self.questions:
            by_ids[question.prompt_id, frozenset(question.completion_ids)].append(question)
            if question.kind == "pairwise":
                by_texts[turns_of(question), frozenset(question.completions)].append(question)
        object.__setattr__(self, "_by_id", {q.query_id: q for q in self.questions})
        object.__setattr__(self, "_by_ids", dict(by_ids))
        object.__setattr__(self, "_by_texts", dict(by_texts))

    def query(self, query_id: object) -> Question:
        """The question of this id."""
        question = self._by_id.get(query_id) if isinstance(query_id, str) else None
        if question is None:
            raise UnknownQuestionError(f"this run asked no query {short(query_id)}: is this another run's file?")
        return question

    def about(self, prompt_id: str, completion_ids: tuple[int, ...], round_number: int | None = None) -> Question:
        """The one question about these completions, in whatever order; of this round, or of any."""
        found = self._by_ids.get((prompt_id, frozenset(completion_ids)), [])
        found = [question for question in found if round_number in (None, question.round)]
        shown = ",".join(map(str, completion_ids))
        if not found:
            where = "" if round_number is None else f" in round {round_number}"
            raise UnknownQuestionError(
                f"this run asked nothing about completions {shown} of prompt {prompt_id!r}{where}"
            )
        if len(found) > 1:
            raise DataError(
                f"completions {shown} of prompt {prompt_id!r} {_more_than_once(found)}: add query_id, or round"
            )
        return found[0]

    def pair(
        self,
        turns: Turns,
        texts: tuple[str, str],
        prompt_id: object,
        completion_ids: tuple[int | None, int | None],
        of_round: object = None,
    ) -> tuple[Question, bool]:
        """The pairwise question that shows these texts as answers to this conversation, and whether the ids name it.

        Ids and round need not be this run's, unless several questions show the same texts: then they tell which is
        meant.
        """
        found = self._by_texts.get((turns, frozenset(texts)), [])
        if not found:
            start = turns[-1][1][:40] if turns else ""
            raise UnknownQuestionError(f"this run asked for no comparison of these two answers to {start!r}")
        named = [q for q in found if q.prompt_id == prompt_id and set(q.completion_ids) == set(completion_ids)]
        meant = named or found
        if len(meant) > 1:
            meant = [q for q in meant if str(q.round) == str(of_round)] or meant
        if len(meant) > 1:
            raise DataError(
                f"the comparison of {short(texts[0])} and {short(texts[1])} {_more_than_once(meant)}: "
                "add prompt_id, chosen_id, rejected_id and round, or import CSV with query_id"
            )
        return meant[0], bool(named)


def _more_than_once(questions: Sequence[Question]) -> str:
    return f"was asked about more than once ({', '.join(q.query_id for q in questions[:3])})"


def turns_of(question: Question) -> Turns:
    """The conversation of a question."""
    return tuple((message.role, message.content) for message in question.messages)


def text_of(question: Question) -> dict[int, str]:
    """The texts of a question by completion_id."""
    return dict(zip(question.completion_ids, question.completions, strict=True))


def order_shown(question: Question, shown: object) -> tuple[int, ...]:
    """Read the order that an export wrote, such as `3,1`."""
    parts = shown.split(",") if isinstance(shown, str) else []
    order = tuple(int(part) for part in parts if part.isascii() and part.isdigit() and len(part) < 10)
    if sorted(order) != sorted(question.completion_ids):
        raise DataError(
            f"query {question.query_id!r} shows completions {', '.join(map(str, question.completion_ids))}, "
            f"not {short(shown)}: is this another run's file?"
        )
    return order


def ranks_from_order(question: Question, best_first: Sequence[int]) -> tuple[int, ...]:
    """Ranks in the question's order, of completion_ids from the best to the worst."""
    if sorted(best_first) != sorted(question.completion_ids):
        raise DataError(
            f"a ranking of query {question.query_id!r} names completions {list(best_first)}: "
            f"it must name each of {list(question.completion_ids)} once"
        )
    return tuple(best_first.index(completion_id) + 1 for completion_id in question.completion_ids)


def order_from_ranks(question: Question, ranks: Sequence[int]) -> list[int] | None:
    """The completion_ids from the best to the worst; None where ranks are tied."""
    if len(set(ranks)) < len(ranks):
        return None
    return [completion_id for _, completion_id in sorted(zip(ranks, question.completion_ids, strict=True))]
