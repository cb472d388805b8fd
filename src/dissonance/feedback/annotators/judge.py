"""A model behind an OpenAI-compatible endpoint as annotator.

Comparisons and rankings are asked in both orders, so that a liking for the first place cancels. Every call is entered
in the store before it is sent and completed when its reply arrives: a run that was killed uses the replies it has, and
pays for none twice.
"""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from dissonance.errors import ModelError, SettingsError
from dissonance.feedback.annotators.budget import Budget, Purse, Usage
from dissonance.feedback.annotators.endpoint import (
    Endpoint,
    EndpointSettings,
    LostReplyError,
    RefusedError,
    worst_case,
)
from dissonance.feedback.annotators.judge_calls import JudgeCalls
from dissonance.feedback.annotators.judge_prompt import TEMPLATE, Prompt, reply_schema, variants
from dissonance.feedback.annotators.judge_reply import ReplyError, Verdict, combine, read_reply
from dissonance.feedback.annotators.run import Details
from dissonance.feedback.store import Store
from dissonance.records import AnnotatorKind, Answer, Question

_NOTE_LENGTH = 2000
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """Everything that a judge is told."""

    endpoint: EndpointSettings
    name: str = "judge"
    """What its answers stand under; other models, guidelines or templates need other names."""
    concurrency: int = 8
    """Questions at once."""
    attempts: int = 3
    """Replies per question and order, over all runs, before it is given up; lost calls count in the run they are of."""
    give_up_after: int = 25
    """Questions without a valid answer in a row after which the run stops rather than go on paying."""
    ask_safety: bool = False
    """Ratings say whether the answer is safe, too."""
    guidelines: str = ""
    template: str = TEMPLATE
    """Jinja2; see `judge_prompt`."""
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        for name in ("concurrency", "attempts", "give_up_after"):
            if getattr(self, name) < 1:
                raise SettingsError(f"the judge's {name} is {getattr(self, name)}: use at least 1")


@dataclass(frozen=True, slots=True)
class JudgeSummary:
    """What a judge has done in a store, over all runs."""

    answered: int
    """Questions with valid replies in every order."""
    compared: int
    """Of those, the ones asked in both orders."""
    inconsistent: int
    """Of those, the ones whose two orders disagree."""
    invalid: int
    """Questions given up after as many invalid replies as allowed."""
    calls: int
    lost: int
    """Calls without a reply (time-outs, 5xx, killed runs), which count with the most that they can have cost."""
    prompt_tokens: int
    completion_tokens: int
    cost: float
    problems: dict[str, int]
    """What went wrong in this process, with how often; the commonest first."""


class Judge:
    """Answers through an endpoint; a `models.Annotator`.

    Raises:
        SettingsError: the template or the key cannot be used.
        DataError: the name is another kind of annotator's.
    """

    kind: AnnotatorKind = "judge"

    def __init__(self, store: Store, settings: JudgeSettings) -> None:
        self.settings = settings
        self.name, self.concurrency = settings.name, settings.concurrency
        self._prompt = Prompt(settings.template, settings.guidelines, ask_safety=settings.ask_safety)
        self._endpoint = Endpoint(settings.endpoint, settings.concurrency)
        self._store = store
        self._calls = JudgeCalls(store, store.annotator(self.name, self.kind).annotator_id)
        self._purse = Purse(settings.budget, self._calls.totals().spent)
        self._lock = threading.Lock()
        self._failures_in_a_row = 0
        self._problems: Counter[str] = Counter()

    def close(self) -> None:
        """Close every connection."""
        self._endpoint.close()

    @property
    def fingerprint(self) -> str:
        """Tells apart judges whose answers should not stand under one name."""
        said = asdict(self.settings)
        told = {name: said[name] for name in ("guidelines", "template", "ask_safety")}
        told |= {name: said["endpoint"][name] for name in ("model", "temperature", "seed")}
        return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()

    def answer(self, question: Question) -> Answer | None:
        """Ask in every order; None where one of them got no valid reply.

        Raises:
            BudgetSpentError: the next call could exceed the budget.
            ModelError: the endpoint cannot be used, or nothing valid has come for too long.
        """
        asked = [False]
        verdicts: list[Verdict] = []
        try:
            for variant in variants(question.kind):
                verdict = self._verdict(question, variant, asked)
                if verdict is None:
                    break
                verdicts.append(verdict)
        except RefusedError as error:
            self._note(str(error))
        if len(verdicts) < len(variants(question.kind)):
            self._count_failure(asked=asked[0])
            return None
        with self._lock:
            self._failures_in_a_row = 0
        return combine(question, verdicts)[0]

    def details(self, question: Question) -> Details:
        """The judge's reasons, as the note of its answer."""
        found = [self._first_valid(question, v, self._calls.replies(question.query_id, v)) for v in _orders(question)]
        reasons = [verdict.reason for verdict in found if verdict is not None]
        if len(reasons) == 2:
            note = f"In the order of the query: {reasons[0]}\nReversed: {reasons[1]}" if any(reasons) else ""
        else:
            note = "".join(reasons)
        return Details(note=note[:_NOTE_LENGTH])

    def summary(self) -> JudgeSummary:
        """Count over every reply in the store."""
        questions = {question.query_id: question for question in self._store.questions(retired=True)}
        answered = compared = inconsistent = invalid = 0
        for query_id, replies in self._calls.all_replies().items():
            question = questions[query_id]
            found = [self._first_valid(question, v, replies.get(v, ())) for v in _orders(question)]
            verdicts = [verdict for verdict in found if verdict is not None]
            if len(verdicts) == len(found):
                answered += 1
                compared += len(found) > 1
                inconsistent += not combine(question, verdicts)[1]
            else:
                used_up = [len(replies.get(v, ())) >= self.settings.attempts for v in _orders(question)]
                invalid += any(used and verdict is None for used, verdict in zip(used_up, found, strict=True))
        totals = self._calls.totals()
        return JudgeSummary(
            answered=answered,
            compared=compared,
            inconsistent=inconsistent,
            invalid=invalid,
            calls=totals.calls,
            lost=totals.lost,
            prompt_tokens=totals.spent.usage.prompt_tokens,
            completion_tokens=totals.spent.usage.completion_tokens,
            cost=totals.spent.cost,
            problems=dict(self._problems.most_common()),
        )

    def _verdict(self, question: Question, variant: int, asked: list[bool]) -> Verdict | None:
        """The first valid reply to one order: one that is there, or a new one."""
        replies = self._calls.replies(question.query_id, variant)
        if (verdict := self._first_valid(question, variant, replies)) is not None:
            return verdict
        for attempt in range(len(replies), self.settings.attempts):
            asked[0] = True
            try:
                reply = self._call(question, variant, replies[-1] if replies else None)
            except LostReplyError as error:
                self._note(f"no reply: {error}")
                if attempt + 1 < self.settings.attempts:
                    longer = min(_SHORTEST_PAUSE * 2**attempt, _LONGEST_PAUSE)
                    time.sleep(longer if error.pause is None else error.pause)
                continue
            replies.append(reply)
            try:
                return self._read(question, variant, reply)
            except ReplyError as error:
                self._note(f"invalid reply: {error}")
        return None

    def _call(self, question: Question, variant: int, refused: str | None) -> str:
        """One call, entered before it is sent; where its reply is lost, it stays as it was entered."""
        complaint = None if refused is None else (refused, self._problem(question, variant, refused))
        messages = self._prompt.messages(question, variant, complaint)
        schema = reply_schema(question, ask_safety=self.settings.ask_safety)
        worst = worst_case(messages, json.dumps(schema), self.settings.endpoint.max_tokens)
        cost = self.settings.budget.cost
        with self._purse.reserve(worst) as taken:
            call_id = self._calls.sent(question.query_id, variant, worst, cost(worst))
            try:
                reply = self._endpoint.ask(messages, schema)
            except (RefusedError, ModelError):
                self._calls.arrived(call_id, None, Usage(), 0.0)
                taken.append(Usage())
                raise
            used = worst if reply.usage is None else reply.usage
            self._calls.arrived(call_id, reply.text, used, cost(used))
            taken.append(used)
        return reply.text

    def _first_valid(self, question: Question, variant: int, replies: Sequence[str]) -> Verdict | None:
        for reply in replies:
            try:
                return self._read(question, variant, reply)
            except ReplyError:
                continue
        return None

    def _read(self, question: Question, variant: int, reply: str) -> Verdict:
        return read_reply(reply, question, variant, ask_safety=self.settings.ask_safety)

    def _problem(self, question: Question, variant: int, reply: str) -> str:
        try:
            self._read(question, variant, reply)
        except ReplyError as error:
            return str(error)
        return ""

    def _note(self, problem: str) -> None:
        with self._lock:
            self._problems[problem] += 1

    def _count_failure(self, *, asked: bool) -> None:
        """Count a question without an answer; those given up in an earlier run cost nothing and do not count."""
        if not asked:
            return
        with self._lock:
            self._failures_in_a_row += 1
            failures, (worst, _) = self._failures_in_a_row, self._problems.most_common(1)[0]
        if failures >= self.settings.give_up_after:
            raise ModelError(
                f"judge: no valid answer to {failures} questions in a row, most often for: {worst}; try another model"
                " or template, or run again to go on"
            )


def _orders(question: Question) -> tuple[int, ...]:
    return variants(question.kind)
