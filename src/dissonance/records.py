"""The frozen records that travel between stages, and the Parquet schemas they rest in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from dissonance.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
FinishReason = Literal["stop", "length"]
QueryKind = Literal["pairwise", "rating", "ranking"]


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
