"""What a benchmark is told: worlds, strategies, budgets, kinds of feedback, seeds."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dissonance.config import PolicyTraining, RewardTraining
from dissonance.errors import SettingsError
from dissonance.likelihood import Likelihood
from dissonance.sandbox import Task
from dissonance.sections import Section
from dissonance.selection import STRATEGIES, parse_threshold
from dissonance.selection.selection import check_option

SeedSet = Literal["development", "confirmation"]
TRAINING_PROMPTS, HELD_OUT_PROMPTS = 1_500, 500
"""Of a world with the default number of objects."""
BASELINE = "random_pairs"
"""What label efficiency is measured against."""


class WorldConfig(Section):
    """The dials of a world that a benchmark may turn, as in `sandbox.World`."""

    policy_competence: float = Field(0.7, ge=0, le=1)
    label_noise: float = Field(0.05, ge=0, le=0.5)
    bias: float = Field(0.0, ge=0, le=1)
    length_bonus: float = Field(0.0, ge=-1, le=1)
    n_demonstrations: int = Field(6_000, ge=1)
    n_pairs: int = Field(8_000, ge=1)


class SeedsConfig(Section):
    """A seed is a world of its own, with its own samples, annotators and trainings."""

    development: tuple[int, ...] = ()
    """To choose by."""
    confirmation: tuple[int, ...] = Field(min_length=1)
    """To report; nothing may have been chosen by them."""

    @model_validator(mode="after")
    def _are_apart(self) -> Self:
        for name in ("development", "confirmation"):
            given = getattr(self, name)
            if len(set(given)) < len(given) or min(given, default=0) < 0:
                raise ValueError(f"{name} must be different seeds from 0 up")
        if both := set(self.development) & set(self.confirmation):
            raise ValueError(f"seeds {sorted(both)} are for development and for confirmation: take others for one")
        return self


class PoolConfig(Section):
    """Prompts of a world and the policy's answers to them."""

    prompts: int = Field(400, ge=1)
    n: int = Field(8, ge=2)
    """Answers to each."""


class StrategyConfig(Section):
    """One way to choose what is asked."""

    strategy: str | None = None
    """Which: a built-in, or `module:callable`; by default what it is called here."""
    likelihood: Likelihood = "sum"
    """What conflict is measured with."""
    tau: float | str | None = None
    delta: float | str | None = None


class FeedbackKind(Section):
    """Who answers, in what form, and what becomes of it."""

    ask: Literal["own", "ratings"] = "own"
    """`own`: as the strategy asks; `ratings`: of every answer to the prompts that it asks about, in its order."""
    temperature: float = Field(0.2, ge=0)
    """Of the simulated annotators, in units of gold, which spans about 2."""
    flip: float = Field(0.0, ge=0, le=1)
    """Probability of the opposite answer."""
    overlap: int = Field(1, ge=1)
    """Annotators for each query; each answer costs a judgement."""
    method: Literal["majority", "dawid_skene", "dgr"] = "majority"
    strategies: tuple[str, ...] | None = None
    """Those that it is compared for; by default all."""
    budgets: tuple[int, ...] | None = None
    """Likewise."""


class PolicyCells(Section):
    """A policy trained against the refined reward model, at one budget."""

    budget: int = Field(ge=1)
    strategies: tuple[str, ...] | None = None
    """By default all."""
    training: PolicyTraining = PolicyTraining()


class BenchConfig(Section):
    """A whole benchmark."""

    tasks: tuple[Task, ...] = Field(("safety", "helpfulness"), min_length=1)
    worlds: dict[str, WorldConfig] = Field({"default": WorldConfig()}, min_length=1)
    """By name. Strategies are compared in the first; in all, whether conflict predicts the proxy's errors."""
    seeds: SeedsConfig
    pool: PoolConfig = PoolConfig()
    """What is chosen from: of the training prompts."""
    held_out: PoolConfig = PoolConfig(prompts=100, n=16)
    """What it is graded on: of the held-out prompts. The policy is best-of-n over these answers."""
    strategies: dict[str, StrategyConfig] = Field(default_factory=dict)
    budgets: tuple[int, ...] = ()
    """Judgements."""
    feedback: dict[str, FeedbackKind] = Field({"comparisons": FeedbackKind()}, min_length=1)
    """By name; label efficiency is of the first."""
    reward: RewardTraining = RewardTraining(
        learning_rate=1e-3, epochs=5, max_original=100, new_weight=0.7, may_overturn=True
    )
    """Refining a world's tiny proxy; the defaults of a run are for real models, and would change nothing here."""
    ensemble: int = Field(4, ge=2)
    """Members of the ensemble that the strategy `ensemble` and the detection of errors use."""
    policy: PolicyCells | None = None
    replicates: int = Field(4000, ge=200)
    """Of the bootstrap over seeds."""

    @property
    def asked(self) -> dict[str, str]:
        """Which strategy each name stands for: a built-in, or `module:callable`."""
        return {name: of.strategy or name for name, of in self.strategies.items()}

    @model_validator(mode="after")
    def _strategies_exist(self) -> Self:
        for name, named in self.asked.items():
            if named not in STRATEGIES and ":" not in named:
                known = ", ".join(STRATEGIES)
                raise ValueError(f"strategies.{name}: there is no strategy {named!r}: use {known}, or module:callable")
            of = self.strategies[name]
            try:
                check_option(named, "tau", None if of.tau is None else parse_threshold(str(of.tau), "tau"))
                check_option(named, "delta", None if of.delta is None else parse_threshold(str(of.delta), "delta"))
            except SettingsError as error:
                raise ValueError(f"strategies.{name}: {error}") from error
        if self.asked.get(BASELINE, BASELINE) != BASELINE:
            raise ValueError(f"strategies.{BASELINE} is what the others are compared with: it cannot be another")
        return self

    @model_validator(mode="after")
    def _worlds_have_as_many(self) -> Self:
        for name, of, most in (("pool", self.pool, TRAINING_PROMPTS), ("held_out", self.held_out, HELD_OUT_PROMPTS)):
            if of.prompts > most:
                raise ValueError(f"{name}.prompts is {of.prompts}: a world has {most}")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks must be different")
        return self

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if bool(self.strategies) != bool(self.budgets):
            raise ValueError("strategies and budgets go together: give both, or neither to look at errors alone")
        if any(budget < 1 for budget in self.budgets) or len(set(self.budgets)) < len(self.budgets):
            raise ValueError("budgets must be different numbers of judgements from 1 up")
        given = [(f"feedback.{name}", kind.strategies, kind.budgets) for name, kind in self.feedback.items()]
        if self.policy is not None:
            given.append(("policy", self.policy.strategies, (self.policy.budget,)))
        for where, strategies, budgets in given:
            for known, named in ((self.strategies, strategies), (self.budgets, budgets)):
                if named == ():
                    raise ValueError(f"{where} is for nothing: name some, or leave it out for all")
                if stray := [one for one in named or () if one not in known]:
                    raise ValueError(
                        f"{where} names {stray[0]!r}: it is none of {', '.join(map(str, known)) or 'none'}"
                    )
        return self
