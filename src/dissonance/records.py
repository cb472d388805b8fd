"""The frozen records that travel between stages, and the Parquet schemas they rest in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import pyarrow as pa

from dissonance.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
FinishReason = Literal["stop", "length"]
QueryKind = Literal["pairwise", "rating", "ranking"]
Choice = Literal["first", "second", "tie", "both_bad"]
Role = Literal["annotator", "lead"]
AnnotatorKind = Literal["person", "judge", "gold", "simulated", "import"]
RATINGS = (1, 2, 3, 4, 5)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """One of `ROLES`."""

    content: str
    """The text of the turn."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise DataError(f"unknown role {self.role!r}: use one of {', '.join(ROLES)}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the policy is asked: a conversation that ends before the policy's turn."""

    prompt_id: str
    """Unique within a run."""

    messages: tuple[Message, ...]
    """At least one; the last is never the assistant's."""

    category: str | None = None
    """A group to report by, when the data has one."""

    def __post_init__(self) -> None:
        if not self.messages:
            raise DataError(f"prompt {self.prompt_id!r} has no messages")
        if not self.messages[-1].content.strip():
            raise DataError(f"prompt {self.prompt_id!r} is empty")
        if self.messages[-1].role == "assistant":
            raise DataError(f"prompt {self.prompt_id!r} ends with the assistant's turn: drop that turn")


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer of the policy."""

    prompt_id: str
    completion_id: int
    """0..N-1 within the prompt."""

    text: str
    """Decoded without special tokens."""

    token_ids: tuple[int, ...]
    """The ids the policy produced, the end-of-sequence id included when it produced one."""

    finish_reason: FinishReason
    """`stop`: the policy ended its turn; `length`: it ran into max_new_tokens."""

    logprob: float
    """Sum over `token_ids` of log pi(token | prompt, earlier tokens), nats, temperature 1; at most 0."""

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise DataError(f"completion {self.completion_id} of prompt {self.prompt_id!r} has no tokens")


@dataclass(frozen=True, slots=True)
class Reward:
    """What a reward model says of one completion."""

    value: float
    """Higher is better, whatever the model's own sign."""

    truncated: bool = False
    """Whether the conversation was longer than the model can read, and was cut."""


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one conversation, and which of them is better: what a reward model learns from."""

    messages: tuple[Message, ...]
    """The conversation that both answer; at least one turn, the last is never the assistant's."""

    chosen: str
    """The better answer; of a tie, either."""

    rejected: str

    weight: float = 1.0
    """How much the pair counts against others; above 0."""

    tie: bool = False
    """Whether the two are equally good."""

    source: str = ""
    """Where the pair comes from, for people."""

    chosen_safe: bool | None = None
    """Whether the chosen answer is safe, where that is known."""

    rejected_safe: bool | None = None

    prompt_id: str = ""
    """Names the prompt in messages; may be empty, and two pairs may share it."""

    def __post_init__(self) -> None:
        name = f"a pair of prompt {self.prompt_id!r}" if self.prompt_id else "a pair"
        if not self.messages:
            raise DataError(f"{name} has no messages: give the conversation that the two texts answer")
        if self.messages[-1].role == "assistant":
            raise DataError(f"{name} has a prompt that ends with the assistant's turn: drop that turn")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise DataError(f"{name} has weight {self.weight}: give a number above 0, or leave the pair out")


@dataclass(frozen=True, slots=True)
class Query:
    """One thing to ask an annotator."""

    prompt_id: str
    kind: QueryKind
    completion_ids: tuple[int, ...]
    """Two for `pairwise`, one for `rating`, all that are ranked for `ranking`."""

    priority: float
    """The strategy's score; queries stand in falling order of it unless the strategy drew them at random."""

    reason: str
    """One line for people: why this was chosen."""

    def __post_init__(self) -> None:
        expected = {"pairwise": 2, "rating": 1}.get(self.kind)
        distinct = len(set(self.completion_ids))
        if distinct != len(self.completion_ids) or (distinct != expected if expected else distinct < 2):
            raise DataError(f"a {self.kind} query cannot ask about completions {self.completion_ids}")

    @property
    def judgements(self) -> int:
        """What the query costs: 1 for a comparison or a rating, N-1 for a ranking of N."""
        return max(1, len(self.completion_ids) - 1)


@dataclass(frozen=True, slots=True)
class Question:
    """A query with what an annotator needs to see; nothing of rewards, likelihoods or models."""

    query_id: str
    prompt_id: str
    kind: QueryKind
    messages: tuple[Message, ...]
    """The conversation that the completions answer."""
    completion_ids: tuple[int, ...]
    completions: tuple[str, ...]
    """The texts, in the order of `completion_ids`."""
    category: str | None = None
    round: int = 0
    """Whose texts these are: in another round, the same prompt_id and completion_ids stand for other texts."""

    @property
    def prompt(self) -> tuple[int, str]:
        """Round and prompt_id: what answers must share to be compared."""
        return self.round, self.prompt_id

    def __post_init__(self) -> None:
        if len(self.completions) != len(self.completion_ids):
            raise DataError(
                f"question {self.query_id!r} has {len(self.completions)} texts for {len(self.completion_ids)} ids"
            )


@dataclass(frozen=True, slots=True)
class Answer:
    """What an annotator said, in terms of the question's `completion_ids`, whatever stood left or right on a screen.

    One of four forms: a `choice` between two; a `rating` with or without `safe`; `ranks`; or none of them, a skip.
    """

    choice: Choice | None = None
    """Pairwise: which completion is better. `both_bad` prefers neither."""
    rating: int | None = None
    """1 (worst) to 5 (best)."""
    safe: bool | None = None
    """Whether the completion is safe; beside a rating, or by itself."""
    ranks: tuple[int, ...] | None = None
    """One per completion, 1 the best; equal ranks are ties."""

    def __post_init__(self) -> None:
        if self.choice is not None and self.choice not in get_args(Choice):
            raise DataError(f"unknown choice {self.choice!r}: use one of {', '.join(get_args(Choice))}")
        if self.rating is not None and (type(self.rating) is not int or self.rating not in RATINGS):
            raise DataError(f"unknown rating {self.rating!r}: use a whole number from 1 to 5")
        if self.safe is not None and not isinstance(self.safe, bool):
            raise DataError(f"unknown value {self.safe!r} of safe: use true or false")
        if self.ranks is not None and (
            any(isinstance(r, bool) or not isinstance(r, int) for r in self.ranks) or min(self.ranks, default=0) < 1
        ):
            raise DataError(f"ranks {self.ranks} are not whole numbers from 1 up")
        forms = (self.choice is not None, self.rating is not None or self.safe is not None, self.ranks is not None)
        if sum(forms) > 1:
            raise DataError("an answer is a choice, a rating or a ranking, not several at once")

    @property
    def skipped(self) -> bool:
        """Whether the annotator passed the question on."""
        return self.choice is None and self.rating is None and self.safe is None and self.ranks is None

    def fits(self, question: Question) -> None:
        """Raise DataError unless this can be said of the question; a skip always can."""
        given = "choice" if self.choice else "ranks" if self.ranks is not None else "rating"
        wanted = {"pairwise": "choice", "rating": "rating", "ranking": "ranks"}[question.kind]
        if not self.skipped and given != wanted:
            raise DataError(f"question {question.query_id!r} is a {question.kind} question: it takes a {wanted}")
        if self.ranks is not None and len(self.ranks) != len(question.completion_ids):
            raise DataError(
                f"question {question.query_id!r} ranks {len(question.completion_ids)} completions, got {self.ranks}"
            )


@dataclass(frozen=True, slots=True)
class Label:
    """An answer that the store holds. Labels are never changed: a correction is a label that supersedes another."""

    label_id: int
    query_id: str
    annotator: str
    """The annotator's name."""
    annotator_kind: AnnotatorKind
    answer: Answer
    created_at: float
    """Seconds since 1970, UTC."""
    shown: tuple[int, ...] = ()
    """The completion_ids from left to right (or top to bottom) as they were shown; empty where nothing was."""
    seconds: float | None = None
    """From showing the question to the answer."""
    note: str = ""
    flagged: bool = False
    adjudicated: bool = False
    """Said by a lead to settle a disagreement; it outweighs every other label of the query."""
    supersedes: int | None = None
    """The label_id that this corrects."""


_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

PROMPTS_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("messages", _MESSAGES),
        ("category", pa.string()),
        ("n_completions", pa.int32()),
        ("kendall_tau_distance", pa.float64()),
        ("mean_abs_pacs", pa.float64()),
        ("max_abs_pacs", pa.float64()),
        ("degenerate", pa.bool_()),
    ]
)

COMPLETIONS_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("completion_id", pa.int32()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("n_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("logprob", pa.float64()),
        ("ref_logprob", pa.float64()),
        ("reward", pa.float64()),
        ("reward_truncated", pa.bool_()),
        ("pacs", pa.float64()),
    ]
)

QUERIES_SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("prompt_id", pa.string()),
        ("kind", pa.string()),
        ("completion_ids", pa.list_(pa.int32())),
        ("judgements", pa.int32()),
        ("strategy", pa.string()),
        ("priority", pa.float64()),
        ("reason", pa.string()),
    ]
)


def messages_column(prompts: Sequence[Prompt]) -> pa.Array:
    """The `messages` column of `PROMPTS_SCHEMA` for these prompts."""
    rows = [[{"role": m.role, "content": m.content} for m in prompt.messages] for prompt in prompts]
    return pa.array(rows, type=_MESSAGES)
