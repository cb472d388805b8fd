"""What a run is told: one small frozen section per stage; unknown keys are errors."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dissonance.likelihood import Likelihood
from dissonance.sections import Section, ServerConfig

RewardKind = Literal["reward", "cost"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
PolicyMethod = Literal["rloo", "grpo", "dpo", "rso", "best_of_n"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DEFAULT_STRATEGY = "likelihood_gap"
"""What people are asked about if nothing else is said: the best of those tried on development worlds."""


class PromptsConfig(Section):
    """Where the prompts come from."""

    source: str = Field(min_length=1)
    """A .jsonl(.gz), .json, .parquet or .csv(.gz) file, a saved `datasets` folder, or a `datasets` id."""
    split: str = "train"
    """For a `datasets` id."""
    text_column: str | None = None
    id_column: str | None = None
    category_column: str | None = None
    limit: int | None = Field(None, ge=1)
    """Take the first so many."""
    sample: int | None = Field(None, ge=1)
    """Draw so many at random."""


class ModelConfig(Section):
    """What loading any Hugging Face model needs."""

    model: str = Field(min_length=1)
    """A hub id, a local folder, or a .gguf file."""
    adapter: str | None = None
    """A PEFT adapter on top of the model."""
    template: str = "auto"
    """`auto`: the tokenizer's chat template, or a plain one without it; `chat`; or a text with {prompt} in it. A reward
    model also takes `pair`: prompt and answer as an encoder's two segments."""
    device: str = "auto"
    dtype: Dtype = "auto"
    """`auto`: bfloat16 on a GPU that computes in it, else float32."""
    tokens_per_batch: int | None = Field(None, ge=1)
    """Bound on the tokens of one batch, by default 8,192 on a CPU and 131,072 on a GPU: rows x (prompt + new tokens).
    On a CPU a policy's prompt counts once, since its answers share its keys (those of models that can)."""
    trust_remote_code: bool = False
    server: ServerConfig | None = None
    """Serves this very model; tokenizer and template are still read from `model`. None runs it in this process."""

    named_templates: ClassVar[tuple[str, ...]] = ("auto", "chat")

    def trained(self, folder: Path) -> Self:
        """What was trained from this, in a folder: a server would go on with the old weights."""
        return self.model_copy(update={"model": str(folder), "adapter": None, "server": None})

    @model_validator(mode="after")
    def _template_names_the_prompt(self) -> Self:
        if self.template not in self.named_templates and self.template.count("{prompt}") != 1:
            names = ", ".join(self.named_templates)
            raise ValueError(f"template must be one of {names}, or a text with {{prompt}} in it once")
        return self


class PolicyConfig(ModelConfig):
    """The policy, and how it is sampled."""

    n: int = Field(8, ge=2)
    """Completions per prompt, N."""
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(256, ge=1)
    reference: str | None = None
    """The reference model of the `relative` likelihood, and of the strategy `apl`."""


class RewardConfig(ModelConfig):
    """The reward model, and how its output is read."""

    named_templates: ClassVar[tuple[str, ...]] = ("auto", "chat", "pair")

    kind: RewardKind = "reward"
    """`cost`: higher is worse, so the output is negated on loading."""
    index: int | None = Field(None, ge=0)
    """Which output is the reward, when there are several."""
    max_length: int | None = Field(None, ge=2)
    """Tokens of a conversation that the model reads; by default as many as it can."""

    @model_validator(mode="after")
    def _callables_run_here(self) -> Self:
        if self.server is not None and ":" in self.model:
            raise ValueError(f"server: {self.model} is a callable, which runs here: leave the server out")
        return self


class EvaluationConfig(Section):
    """Before and after, on held-out prompts."""

    prompts: PromptsConfig | None = None
    """Held-out prompts: none of them may be among those that were trained on."""
    cluster_column: str | None = None
    """A column of theirs that says which prompts are one question in other words, such as a sandbox's `gold_key`;
    intervals take those as one."""
    gold: RewardConfig | None = None
    """The gold reward that grades; without one, the figures that need it are null."""
    allow_annotator_as_grader: bool = False
    """Whether the gold reward that grades may also be behind an annotator: in worlds whose gold is exact."""
    n: int = Field(8, ge=2)
    """Answers of each policy to each prompt."""
    likelihood: Likelihood = "sum"
    """What conflict is measured with, as in an audit."""
    gold_tie: float = Field(0.0, ge=0)
    """Gold rewards that differ by no more are a tie."""
    bands: int = Field(10, ge=2)
    """Bands of equally many pairs to give error rates by: ten are deciles."""
    replicates: int = Field(4000, ge=200)
    """Of the bootstrap."""
    seed: int = Field(0, ge=0)
    """Of the bootstrap."""


class RewardTraining(Section):
    """How the reward model is refined."""

    base: str | None = None
    """Train from this model instead of going on from the current reward model: a causal LM gets a new head."""
    lora_rank: int | None = Field(None, ge=1)
    """Train a LoRA adapter of this rank on all linear layers, and the head; None trains every weight."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the original and the new pairs together; early stopping may end them before."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak, after a linear warm-up over a tenth of the steps; by default 1e-5, for LoRA 1e-4. It falls to zero."""
    batch_size: int = Field(16, ge=1)
    """Pairs in a step, on each device."""
    gradient_accumulation: int = Field(1, ge=1)
    """Steps that are added up before the weights change; the length penalty is taken within each."""
    gradient_checkpointing: bool = False
    """Compute activations twice, to save memory."""
    max_original: int | None = Field(None, ge=1)
    """Of more original pairs than this, so many drawn at random."""
    new_weight: float | None = Field(None, gt=0, lt=1)
    """The share of all weight that the new pairs carry; by default original and new weigh as the square roots of what
    they hold, so that 300 new pairs beside 2,000 carry 28 %."""
    margin: float = Field(0.0, ge=0)
    """By how much the better answer's reward is to lead."""
    center: float = Field(0.0, ge=0)
    """Coefficient that keeps rewards around 0; 0.01 is usual."""
    safe_sign: float = Field(1.0, ge=0)
    """Coefficient of a cost model's terms for the sign of its costs, above 0 unsafe, where safety is known."""
    length_penalty: float = Field(0.0, ge=0)
    """Coefficient that keeps rewards from telling the length of an answer."""
    length_bins: int = Field(4, ge=2)
    """Bins of equally many answers, by length, for the length penalty."""
    max_left_out: float = Field(0.05, ge=0, le=1)
    """Share of the pairs that may be left out for being longer than the model reads; more is an error."""
    may_overturn: bool = False
    """Whether the refined model may rank original pairs worse than chance: where people contradict many of them."""
    evaluations: int = Field(8, ge=1)
    """How often the held-out pairs are evaluated during training; the best of these models is kept."""
    patience: int = Field(3, ge=0)
    """Stop after so many evaluations without a better held-out loss; 0 trains to the end."""


class PolicyTraining(Section):
    """How the policy is trained against the reward model."""

    method: PolicyMethod = "rloo"
    """`rloo`, `grpo`: reinforcement learning; `dpo`: on the best and the worst of each prompt's answers; `rso`: on
    pairs that rejection sampling kept; `best_of_n`: supervised fine-tuning on each prompt's best answer."""
    steps: int = Field(100, ge=1)
    """Updates of the weights."""
    prompts_per_step: int = Field(16, ge=1)
    """Prompts in a step; pairs for dpo and rso, answers for best_of_n; over all devices."""
    n: int = Field(4, ge=2)
    """Answers that rloo and grpo draw to each prompt of a step."""
    micro_batch: int | None = Field(None, ge=1)
    """Rows in one forward pass on each device; by default all that a step has there."""
    max_new_tokens: int | None = Field(None, ge=1)
    """By default the start policy's."""
    temperature: float = Field(1.0, gt=0)
    """Of the answers that rloo and grpo draw."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak; by default 1e-6, for best_of_n 1e-5; ten times as much for LoRA."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """How the learning rate goes on after the warm-up; all but the last end at 0."""
    warmup: float = Field(0.1, ge=0, le=1)
    """Share of the steps over which the learning rate rises."""
    beta: float | None = Field(None, ge=0)
    """Weight of the KL from the start policy; by default 0.05, for dpo and rso 0.1. best_of_n has none."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Taken off the reward of an answer that ran into the limit of new tokens."""
    rso_keep: int = Field(4, ge=2, multiple_of=2)
    """Answers to each prompt that rejection sampling keeps."""
    rso_beta: float = Field(0.5, gt=0)
    """How soft rejection sampling is, in standard deviations of the reward within a prompt."""
    lora_rank: int | None = Field(None, ge=1)
    """Train a LoRA adapter of this rank on all linear layers; None trains every weight. A start policy that has an
    adapter goes on with it, whatever its rank."""
    gradient_checkpointing: bool = False
    """Compute activations twice, to save memory."""
    check_every: int = Field(20, ge=1)
    """Steps between checks: a check measures the policy, and keeps it if all is well. So is the last step."""
    check_prompts: int = Field(64, ge=1)
    """Prompts that a check asks, once each."""
    max_kl: float | None = Field(50.0, gt=0)
    """Stop when the KL from the start policy is above it, in nats per answer."""
    max_length_ratio: float | None = Field(2.0, gt=1)
    """Stop when answers are so many times as long as the start policy's, or as short."""
    gold_margin: float = Field(0.0, ge=0, lt=0.5)
    """How far above one half the reward model's accuracy on held-out gold pairs must be."""
    gold_confidence: float = Field(0.95, gt=0.5, lt=1)
    """Of the one-sided test that says so."""
    launcher: str | None = None
    """What starts the training in several processes, in a run: such as "accelerate launch --config_file fsdp.yaml"."""
    trl_arguments: dict[str, Any] = Field(default_factory=dict)
    """More of TRL's own settings for the method's trainer, such as {"use_vllm": true}."""

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate, or its default."""
        default = 1e-5 if self.method == "best_of_n" else 1e-6
        return self.learning_rate or (default if self.lora_rank is None else 10 * default)

    @property
    def kl_coefficient(self) -> float:
        """`beta`, or its default."""
        if self.beta is not None:
            return self.beta
        return 0.1 if self.method in {"dpo", "rso"} else 0.05

    @model_validator(mode="after")
    def _preferences_need_beta(self) -> Self:
        if self.method in {"dpo", "rso"} and self.beta == 0:
            raise ValueError(f"{self.method} needs a beta above 0")
        return self


class AuditConfig(Section):
    """Everything that decides an audit's numbers."""

    prompts: PromptsConfig
    policy: PolicyConfig
    reward_model: RewardConfig
    likelihood: Likelihood = "sum"
    """What l is: `sum`, as in the paper; `mean` per token; `relative` to the reference model."""
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _relative_needs_a_reference(self) -> Self:
        if self.likelihood == "relative" and self.policy.reference is None:
            raise ValueError("likelihood relative needs a reference model")
        return self


class SelectionConfig(Section):
    """What people are asked about in each round."""

    budget: int = Field(ge=1)
    """Judgements: 1 for a comparison or a rating, N - 1 for a ranking of N."""
    strategy: str = DEFAULT_STRATEGY
    tau: float | str | None = None
    """Least K of a prompt, or a quantile such as q0.9."""
    delta: float | str | None = None
    """Least |PACS| of a completion, likewise."""


class FeedbackConfig(Section):
    """Who answers, and what becomes of the answers."""

    annotator: Literal["people", "judge", "gold", "simulated"] = "people"
    overlap: int = Field(1, ge=1)
    """Annotators per query."""
    enough: float = Field(1.0, gt=0, le=1)
    """Share of a round's wanted answers at which it goes on."""
    store: str | None = None
    """Where labels are: postgresql://user@host/database, or a file; by default RUN/labels.db."""
    method: Literal["majority", "dawid_skene", "dgr"] = "majority"
    """How labels become preference pairs."""
    min_pairs: int = Field(8, ge=1)
    """Fewer preferences in a round are an error: nothing is learnt from them."""
    reward_model: RewardConfig | None = None
    """What `gold` and `simulated` answer by."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """More of the annotator's own: fields of `JudgeSettings`, `GoldSettings` or `SimulatedSettings`."""

    @model_validator(mode="after")
    def _rewards_go_with_who_needs_them(self) -> Self:
        if (self.annotator in {"gold", "simulated"}) != (self.reward_model is not None):
            raise ValueError(
                "reward_model is what the annotators gold and simulated answer by, and goes with them alone"
            )
        if self.annotator == "people" and self.settings:
            raise ValueError("settings are for judge, gold and simulated; people get theirs from `dissonance label`")
        return self


class PreferencesConfig(Section):
    """Preference pairs besides what is asked, in TRL's format: .jsonl, .jsonl.gz or .parquet."""

    original: str | None = None
    """What the reward model was trained on."""
    held_out: str | None = None
    """Pairs that nothing is trained on; by default, the share below of `original`."""
    gold: str | None = None
    """Pairs whose better answer is certain, which the reward model must rank above chance before a policy is trained
    against it; by default, what is held out."""
    held_out_share: float = Field(0.1, ge=0, lt=1)
    """Share of the prompts whose pairs are held out: of those that people judged, and of `original`."""


class RefineConfig(Section):
    """What is retrained."""

    reward: RewardTraining = RewardTraining()
    policy: PolicyTraining | None = PolicyTraining()
    """null: the policy stays as it is."""


class RoundsConfig(Section):
    """How often, and when it is enough."""

    most: int = Field(1, ge=1)
    min_conflict: float | None = Field(None, ge=0, le=1)
    """End once this share of the prompts, or less, is in significant conflict."""
    min_gain: float | None = Field(None, ge=0)
    """End after a round in which a judgement raised the mean gold reward by less than this."""


class RefiningConfig(AuditConfig):
    """An audit, and what becomes of what was answered about it: the second half of a round."""

    feedback: FeedbackConfig = FeedbackConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    refine: RefineConfig = RefineConfig()
    evaluation: EvaluationConfig | None = None
    trackers: tuple[Tracker, ...] = ()
    """Where the trainings are logged to."""

    @property
    def audit(self) -> AuditConfig:
        """The audit alone."""
        return AuditConfig.model_validate({name: getattr(self, name) for name in AuditConfig.model_fields})

    @model_validator(mode="after")
    def _evaluation_has_prompts(self) -> Self:
        if self.evaluation is not None and self.evaluation.prompts is None:
            raise ValueError("evaluation needs prompts, which nothing is trained on: set evaluation.prompts.source")
        return self


class RunConfig(RefiningConfig):
    """A whole run of SHF-CAS: audit, ask, retrain, evaluate, round after round."""

    selection: SelectionConfig | None = None
    """null: nothing is asked, and the policy is trained against the reward model as it is."""
    rounds: RoundsConfig = RoundsConfig()

    @model_validator(mode="after")
    def _rounds_have_what_they_need(self) -> Self:
        graded = self.evaluation is not None and self.evaluation.gold is not None
        if self.rounds.min_gain is not None and not graded:
            raise ValueError("rounds.min_gain is a gain of gold reward: set evaluation.gold, or leave it out")
        if self.selection is None and (self.rounds.min_conflict is not None or self.rounds.min_gain is not None):
            raise ValueError("rounds.min_conflict and rounds.min_gain end the asking: set selection, or leave them out")
        if self.selection is None and self.refine.policy is None:
            raise ValueError(
                "without selection and without refine.policy there is nothing to do: use `dissonance audit`"
            )
        return self
