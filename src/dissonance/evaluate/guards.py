"""What may be evaluated on, and who may grade: checked where it is made, so that no evaluation goes without.

Two mistakes make an evaluation say what it should not. Prompts that were trained on flatter whatever was trained on
them; and a gold reward that answered the queries and then grades the outcome confirms itself.
"""

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from functools import lru_cache
from typing import Protocol

from dissonance.errors import DataError, SettingsError
from dissonance.models import RewardModel
from dissonance.records import Message, Preference, Prompt

_WORDS = re.compile(r"\w+")


class Conversation(Protocol):
    """What something was trained on: a `Prompt`, or a `Preference`."""

    @property
    def prompt_id(self) -> str:
        """Names it; may be empty."""
        ...

    @property
    def messages(self) -> tuple[Message, ...]:
        """What the answers follow on."""
        ...


def normalised(messages: Sequence[Message]) -> str:
    """What a conversation says, whatever its case, spaces, punctuation, form of Unicode and system prompt."""
    turns = [m for m in messages if m.role != "system"] or messages
    return "\n".join(f"{m.role} {_normalised(m.content)}" for m in turns)


@lru_cache(maxsize=1 << 16)  # the same prompts are compared with these, those and others
def _normalised(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(_WORDS.findall(folded)) or " ".join(folded.split())


def overlaps(asked: Sequence[Conversation], trained_on: Iterable[Conversation]) -> list[tuple[int, str]]:
    """Positions in `asked` of what was trained on, each with the prompt_id it had in training; for leaving them out."""
    trained = {normalised(other.messages): other.prompt_id for other in trained_on}
    found = ((place, trained.get(normalised(one.messages))) for place, one in enumerate(asked))
    return [(place, name) for place, name in found if name is not None]


@dataclass(frozen=True)
class HeldOut:
    """Prompts, and pairs of known order, that nothing was trained on.

    Raises:
        DataError: one of them was trained on, by its text (`normalised`) or its cluster; two prompts have one id, or an
            id stands for another prompt in training; a prompt has no cluster; there are no prompts.
    """

    prompts: tuple[Prompt, ...]

    trained_on: InitVar[Iterable[Conversation]]
    """All that the policies and the reward models were trained on, as far as it is known."""

    pairs: tuple[Preference, ...] = ()
    """Which of two answers is better, by gold or by people whose answers were not trained on; ties are left out."""

    clusters: Mapping[str, str] | None = None
    """By prompt_id, what makes prompts one question in other words, such as a sandbox's `gold_key`: intervals take
    them as one. By default, prompts of the same text are one."""

    trained_clusters: InitVar[Collection[str]] = ()
    """The clusters that were trained on, where they are known."""

    def __post_init__(self, trained_on: Iterable[Conversation], trained_clusters: Collection[str]) -> None:
        if not self.prompts:
            raise DataError("there are no held-out prompts: an evaluation needs some")
        trained = list(trained_on)
        self._check_ids(trained)
        self._check_texts(trained)
        asked: list[Conversation] = [*self.prompts, *self.pairs]
        for one, cluster in zip(asked, self.cluster_of(asked), strict=True):
            if cluster in trained_clusters:
                raise DataError(
                    f"held-out prompt {one.prompt_id!r} belongs to {cluster!r}, which was trained on: leave it out"
                )

    def _check_ids(self, trained: Sequence[Conversation]) -> None:
        texts = {other.prompt_id: normalised(other.messages) for other in trained if isinstance(other, Prompt)}
        seen: set[str] = set()
        for prompt in self.prompts:
            name = prompt.prompt_id
            if name in seen:
                raise DataError(f"two held-out prompts have the id {name!r}: make the ids unique")
            if texts.get(name, normalised(prompt.messages)) != normalised(prompt.messages):
                raise DataError(
                    f"held-out prompt {name!r} has the id of another prompt in training: make the ids unique"
                )
            seen.add(name)

    def _check_texts(self, trained: Sequence[Conversation]) -> None:
        for what, some in (("prompt", self.prompts), ("pair", self.pairs)):
            if found := overlaps(some, trained):
                place, name = found[0]
                said = " ".join(some[place].messages[-1].content.split())[:60]
                one = some[place].prompt_id or place
                raise DataError(
                    f"{len(found)} held-out {what}s were trained on (the first, {one!r}, is {name!r} of the training"
                    f" data: {said!r}): evaluate on others"
                )

    def cluster_of(self, asked: Sequence[Conversation]) -> list[str]:
        """Name the cluster of each; a pair goes with the held-out prompt of its text, or else by its own prompt_id.

        Raises:
            DataError: a held-out prompt has none.
        """
        names = {normalised(prompt.messages): prompt.prompt_id for prompt in reversed(self.prompts)}
        clusters = self.clusters or {}
        found = []
        for one in asked:
            text = normalised(one.messages)
            name = one.prompt_id if isinstance(one, Prompt) else names.get(text, one.prompt_id)
            if self.clusters is not None and text in names and name not in clusters:
                raise DataError(f"held-out prompt {name!r} has no cluster: give one for each, or none at all")
            found.append(clusters.get(name, text))
        return found


@dataclass(frozen=True)
class Grader:
    """The gold reward that judges the outcome.

    Raises:
        SettingsError: it is one of the annotators, and nobody has allowed that.
    """

    model: Callable[[], RewardModel]
    """Makes it when its turn comes."""

    fingerprint: str
    """What it is, as `artifacts.source_fingerprint` says of a model; the same for the model behind an annotator."""

    annotators: InitVar[Collection[str]]
    """Fingerprints of the models behind the answers that were trained on; people have none."""

    allow_annotator: InitVar[bool] = False
    """For worlds whose gold is exact, where annotators see it through noise."""

    annotated: bool = field(init=False)
    """Whether it also answered queries; metrics say so."""

    def __post_init__(self, annotators: Collection[str], allow_annotator: bool) -> None:
        annotated = self.fingerprint in annotators
        if annotated and not allow_annotator:
            raise SettingsError(
                "the gold reward that grades (evaluation.gold) also answered the queries: grade with another, or set "
                "evaluation.allow_annotator_as_grader where that is meant"
            )
        object.__setattr__(self, "annotated", annotated)
