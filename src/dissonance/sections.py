"""What every section of the settings is, and the section about servers, which every model may have."""

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dissonance.addresses import checked_address
from dissonance.errors import SettingsError

Settings = TypeVar("Settings", bound=BaseModel)


class Section(BaseModel):
    """A frozen part of the settings; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ServerConfig(Section):
    """A server that answers in the model's place. Whatever it is asked again for, it is asked for as a whole."""

    url: str
    """Its root, such as http://127.0.0.1:8000; a /v1 at the end is dropped. An address that ends in /get_reward speaks
    OpenRLHF's protocol."""
    served_name: str | None = None
    """What the server calls the model; by default the only one it lists, or the one that it lists as `model`."""
    requests: int = Field(64, ge=1)
    """In flight at once, at most."""
    timeout: float = Field(1800.0, gt=0)
    """Seconds to wait for one reply, which is all answers to a prompt."""
    patience: float = Field(300.0, ge=0)
    """Seconds that a server may fail or be out of reach, with no reply in between, before the command gives up."""
    api_key_env: str | None = None
    """The environment variable that holds the key; the key itself is kept nowhere."""

    @field_validator("url")
    @classmethod
    def _root(cls, url: str) -> str:
        if "?" in url or "#" in url:
            raise ValueError(
                "holds more than an address: name the variable that holds a key as api_key_env (--server-key-env)"
            )
        return checked_address(url, "http://127.0.0.1:8000").rstrip("/").removesuffix("/v1").rstrip("/")

    @property
    def protocol(self) -> Literal["openai", "openrlhf"]:
        """What it is asked in: `openrlhf` where its address ends in /get_reward."""
        return "openrlhf" if self.url.endswith("/get_reward") else "openai"

    @property
    def asked(self) -> str:
        """The protocol, and the model's name there if one is given."""
        return self.protocol if self.served_name is None else f"{self.protocol} {self.served_name}"


def parse_section(section: type[Settings], values: dict[str, Any]) -> Settings:
    """Validate settings; the first thing that is wrong becomes a SettingsError of one line."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        # A key that there is not comes first: it may be what is missing, misspelt.
        first = min(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
        where = ".".join(str(part) for part in first["loc"]) or "settings"
        if first["type"] == "extra_forbidden":
            raise SettingsError(f"{where}: there is no such setting{_meant(section, first['loc'])}") from error
        secret = first["loc"][-1:] == ("url",)  # which may hold a key
        given = "" if secret or isinstance(first["input"], dict | BaseModel) else f" (got {first['input']!r})"
        raise SettingsError(f"{where}: {first['msg'].removeprefix('Value error, ')}{given}") from error


def _meant(section: type[BaseModel], where: tuple[int | str, ...]) -> str:
    """The setting that was probably meant, for the error."""
    for part in where[:-1]:
        field = section.model_fields.get(str(part))
        inner = [] if field is None else [field.annotation, *get_args(field.annotation)]
        section = next((one for one in inner if isinstance(one, type) and issubclass(one, BaseModel)), section)
    close = get_close_matches(str(where[-1]), section.model_fields, n=1)
    return f": did you mean {close[0]}?" if close else f"; there are {', '.join(section.model_fields)}"


def deciding(settings: Any) -> Any:
    """Settings as JSON, less what decides no number: of a server, only what it speaks and the model's name there.

    So a run goes on when its server has moved to another port.
    """
    return _with_servers(settings, lambda server: ServerConfig(**server).asked)


def without_servers(settings: Any) -> Any:
    """Settings as JSON, `deciding` or whole, in which every model runs in this process."""
    return _with_servers(settings, lambda _: None)


def _with_servers(settings: Any, told: Callable[[Any], Any]) -> Any:
    if not isinstance(settings, dict):
        return settings
    changed = {name: _with_servers(value, told) for name, value in settings.items()}
    if "model" in settings and (server := changed.pop("server", None)) and (kept := told(server)) is not None:
        changed["server"] = kept
    return changed
