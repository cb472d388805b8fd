"""What a run is told: one small frozen section per stage; unknown keys are errors."""

from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dissonance.errors import SettingsError
from dissonance.likelihood import Likelihood

RewardKind = Literal["reward", "cost"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PromptsConfig(_Section):
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


class ModelConfig(_Section):
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
    """`auto`: bfloat16 where the hardware computes in it, else float32."""
    tokens_per_batch: int | None = Field(None, ge=1)
    """Bound on rows x (prompt + new tokens) in one batch; by default 8,192 on a CPU and 131,072 on a GPU."""
    trust_remote_code: bool = False

    named_templates: ClassVar[tuple[str, ...]] = ("auto", "chat")

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
    """The reference model of the `relative` likelihood."""


class RewardConfig(ModelConfig):
    """The reward model, and how its output is read."""

    named_templates: ClassVar[tuple[str, ...]] = ("auto", "chat", "pair")

    kind: RewardKind = "reward"
    """`cost`: higher is worse, so the output is negated on loading."""
    index: int | None = Field(None, ge=0)
    """Which output is the reward, when there are several."""
    max_length: int | None = Field(None, ge=2)
    """Tokens of a conversation that the model reads; by default as many as it can."""


class RunConfig(_Section):
    """Everything that decides an audit's numbers."""

    prompts: PromptsConfig
    policy: PolicyConfig
    reward_model: RewardConfig
    likelihood: Likelihood = "sum"
    """What l is: `sum`, as in the paper; `mean` per token; `relative` to the reference model."""
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _reference_goes_with_relative(self) -> Self:
        if (self.likelihood == "relative") != (self.policy.reference is not None):
            raise ValueError("likelihood relative and a reference model go together")
        return self


Section = TypeVar("Section", bound=BaseModel)


def parse_config(values: dict[str, Any]) -> RunConfig:
    """Validate settings; the first thing that is wrong becomes a SettingsError of one line."""
    return parse_section(RunConfig, values)


def parse_section(section: type[Section], values: dict[str, Any]) -> Section:
    """Validate one section's settings, likewise."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "settings"
        given = "" if isinstance(first["input"], dict | BaseModel) else f" (got {first['input']!r})"
        raise SettingsError(f"{where}: {first['msg'].removeprefix('Value error, ')}{given}") from error
