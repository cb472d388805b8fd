"""A simulated person: a gold reward, seen through stated faults.

Each completion has a utility, u = r + T (g + b s): its reward r, Gumbel noise g scaled by the temperature T, and a
liking b for what stands further left (s runs from 1/2 at the left to -1/2 at the right). What has the greater utility
is preferred, which for two completions is Bradley-Terry,

    P(left is preferred) = sigma((r_left - r_right) / T + b),

and for more Plackett-Luce (Luce 1959; Yellott 1977). A rating is the fifth of all rewards that the utility falls in.
Then, with probability `flip`, the answer is turned round; and instead of all this, with probability `lapse`, it is
drawn uniformly. Whatever is drawn is keyed by seed, name and query: it does not depend on the order of asking.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from dissonance.errors import SettingsError
from dissonance.feedback.annotators.rewards import RewardedAnnotator, RewardedSettings, ranks_by
from dissonance.feedback.annotators.run import Details
from dissonance.records import RATINGS, AnnotatorKind, Answer, Question


@dataclass(frozen=True, slots=True)
class SimulatedSettings(RewardedSettings):
    """One simulated person. Where rewards are costs, an answer is safe where its utility is not negative."""

    name: str = "simulated"
    seed: int = 0
    temperature: float = 1.0
    """In units of the reward; 0 never errs."""
    flip: float = 0.0
    """Probability of the opposite answer; 1/2 is chance."""
    lapse: float = 0.0
    """Probability of an answer that has nothing to do with the question."""
    position_bias: float = 0.0
    """Added to the log-odds of what stands left."""
    tie_band: float = 0.0
    """Rewards that differ by less are a tie; 0: there are no ties."""

    def __post_init__(self) -> None:
        for name, most in {"temperature": math.inf, "tie_band": math.inf, "flip": 1.0, "lapse": 1.0}.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= most):
                limits = "from 0 to 1" if most == 1 else "from 0 up"
                raise SettingsError(f"{name} of a simulated annotator is {value}: use a number {limits}")
        if not math.isfinite(self.position_bias):
            raise SettingsError(f"position_bias of a simulated annotator is {self.position_bias}: use a finite number")
        if self.position_bias and not self.temperature:
            raise SettingsError("a simulated annotator with temperature 0 has no position_bias: raise the temperature")


class SimulatedAnnotator(RewardedAnnotator[SimulatedSettings]):
    """Answers as its settings say; a `models.Annotator`."""

    kind: AnnotatorKind = "simulated"

    def details(self, question: Question) -> Details:
        """The order in which the completions were shown."""
        order = self._order(question, self._rng(question))
        return Details(shown=tuple(question.completion_ids[place] for place in order))

    def answer(self, question: Question) -> Answer:
        """What this person says.

        Raises:
            DataError: the question was not there when the rewards were computed.
        """
        rewards, rng = self._rewards[question], self._rng(question)
        order = self._order(question, rng)
        lapses, flips = rng.random(2) < (self.settings.lapse, self.settings.flip)
        if lapses:
            return self._any(question, rng)
        utilities = self._utilities(rewards, order, rng)
        if question.kind == "rating":
            return self._rate(utilities[0], flips=bool(flips))
        values = [-u for u in utilities] if flips else utilities
        if question.kind == "ranking":
            return Answer(ranks=ranks_by(values, rewards, self._margin, order))
        if abs(rewards[0] - rewards[1]) <= self._margin:
            return Answer(choice="tie")
        if values[0] == values[1]:
            return self._any(question, rng)
        return Answer(choice="first" if values[0] > values[1] else "second")

    @property
    def _margin(self) -> float:
        """The largest difference that is a tie; below every difference where there are no ties."""
        return math.nextafter(self.settings.tie_band, -math.inf)

    def _rng(self, question: Question) -> np.random.Generator:
        said = f"{self.settings.seed}\0{self.name}\0{question.query_id}"
        key = hashlib.blake2b(said.encode(), digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))

    def _order(self, question: Question, rng: np.random.Generator) -> list[int]:
        """Places in `question.completions`, left to right; always the first draw."""
        order: list[int] = rng.permutation(len(question.completions)).tolist()
        return order

    def _utilities(self, rewards: tuple[float, ...], order: list[int], rng: np.random.Generator) -> list[float]:
        noise = rng.gumbel(size=len(rewards))
        if len(rewards) > 1:
            noise[order] += self.settings.position_bias * np.linspace(0.5, -0.5, len(order))
        else:
            noise -= np.euler_gamma  # the mean, so that ratings are not biased upwards
        utilities: list[float] = (np.asarray(rewards) + self.settings.temperature * noise).tolist()
        return utilities

    def _rate(self, utility: float, *, flips: bool) -> Answer:
        rating, safe = self._rewards.rating(utility), utility >= 0
        if flips:
            rating, safe = 6 - rating, not safe
        return Answer(rating=rating, safe=safe if self.settings.kind == "cost" else None)

    def _any(self, question: Question, rng: np.random.Generator) -> Answer:
        if question.kind == "rating":
            safe = bool(rng.integers(2)) if self.settings.kind == "cost" else None
            return Answer(rating=int(rng.choice(RATINGS)), safe=safe)
        if question.kind == "ranking":
            return Answer(ranks=tuple((1 + rng.permutation(len(question.completions))).tolist()))
        return Answer(choice="first" if rng.random() < 0.5 else "second")
