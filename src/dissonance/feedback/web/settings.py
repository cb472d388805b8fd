"""What the lead decides about the labelling page."""

from dataclasses import dataclass

from dissonance.errors import SettingsError


@dataclass(frozen=True, slots=True)
class LabelSettings:
    """How the server asks, and whom it lets in."""

    guidelines: str = ""
    """Markdown, shown beside the questions."""
    login_required: bool = False
    """Whether people need a personal link; without, everyone who reaches the server is the lead `local_name`."""
    local_name: str = "local"
    """The annotator's name where no login is required."""
    ask_safety: bool = False
    """Whether a rating also asks if the completion is safe."""
    gold_every: int = 10
    """Every how many questions one has a known answer; 0 for never."""
    lease_seconds: float = 900.0
    """For how long a question is kept for the one who was shown it."""
    secure_cookies: bool = False
    """Whether cookies travel over HTTPS only."""
    session_seconds: float = 12 * 3600.0
    """For how long one stays signed in."""

    def __post_init__(self) -> None:
        if self.gold_every < 0:
            raise SettingsError(f"gold_every is {self.gold_every}: use 0 for never, or a whole number above")
        for name in ("lease_seconds", "session_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise SettingsError(f"{name} is {getattr(self, name)}: use a positive number of seconds")
