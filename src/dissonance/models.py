"""The protocols in front of every model; nothing heavy is imported here.

A policy samples, a reward model scores, a reference model gives likelihoods. The shipped implementations are in
`dissonance.sampling` and `dissonance.rewards`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dissonance.config import AuditConfig, ModelConfig
from dissonance.progress import ProgressFactory
from dissonance.records import AnnotatorKind, Answer, Completion, Message, Prompt, Question, Reward


class Planner(Protocol):
    """Knows how a policy's prompts are batched, without its weights."""

    def plan(self, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
        """Split prompts into batches.

        The batches depend on the prompts and on the policy's settings alone, so that a run which was killed can leave
        out those it has, and ends with what it would have had.
        """
        ...


class Policy(Planner, Protocol):
    """Draws completions with their log-likelihoods."""

    def sample(self, batch: Sequence[Prompt]) -> list[Completion]:
        """Every completion of one batch, ordered by prompt and completion_id."""
        ...


class ReferenceModel(Protocol):
    """Gives the log-likelihood of the policy's token ids."""

    def logprobs(self, prompts: Sequence[Prompt], token_ids: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """Sums of log pi_ref(token | prompt, earlier tokens) over token_ids[i][j], nats.

        token_ids[i] holds the completions of prompts[i]; every prompt has equally many.
        """
        ...


class RewardModel(Protocol):
    """Scores completions; always oriented so that higher is better."""

    def score(self, conversations: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[Reward]:
        """One reward per pair conversations[i], completions[i]."""
        ...


class Engine(Protocol):
    """Where rounds are measured: `dissonance.engine.local.LocalEngine`, `dissonance.engine.ray.RayEngine`."""

    def resolved(self, section: ModelConfig) -> dict[str, Any]:
        """What a model's `auto` settings stand for where it would run."""
        ...

    def prepare(self, config: AuditConfig, prompts: Sequence[Prompt]) -> "PreparedRound":
        """Find out what can be wrong before anything is written."""
        ...

    def forget(self, folder: Path) -> None:
        """Remove what is in flight of a round whose tables stand."""
        ...


class PreparedRound(Protocol):
    """A round whose models were tried and whose batches are planned."""

    def measure(self, folder: Path, progress: ProgressFactory) -> dict[str, Any]:
        """Sample, score and measure; leaves the round's two tables in its folder and gives their summary."""
        ...


@runtime_checkable
class Concurrent(Protocol):
    """What a policy or a reward model may be besides: able to take several batches at once, from as many threads."""

    @property
    def concurrency(self) -> int:
        """How many batches keep it busy, over the end of each."""
        ...

    def cancel(self) -> None:
        """End the calls that are in progress, soon and with an error: the work is given up."""
        ...


class Annotator(Protocol):
    """Answers questions: a judge model, a gold reward, a simulated person. People answer through the labelling page.

    It may offer two things more, and then both (`dissonance.feedback.annotators.run.DetailedAnnotator`):

        fingerprint        a property: a text that another model, prompt or setting would change. An annotator that has
                           answered under one fingerprint is refused under another, so that one name is one annotator.
        details(question)  called after `answer` gave an answer to this question: a `run.Details` with the order in
                           which it saw the completions (`shown`) and its reasons (`note`), stored beside the answer.
    """

    @property
    def name(self) -> str:
        """The name its labels stand under; the same name goes on where it stopped."""
        ...

    @property
    def kind(self) -> AnnotatorKind:
        """What it is."""
        ...

    @property
    def concurrency(self) -> int:
        """How many questions it can take at once."""
        ...

    def answer(self, question: Question) -> Answer | None:
        """What it says of one question, called from `concurrency` threads; None where it has no answer to give."""
        ...
