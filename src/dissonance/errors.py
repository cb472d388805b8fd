"""Every error this package raises on purpose.

    DissonanceError           exit 1: something failed that the user's input does not explain
    ├── LabelsDue             exit 3: a run waits for people
    └── InputError            exit 2: the user's input is wrong
        ├── DataError         a file or a value in it: prompts, scores, rewards
        ├── ModelError        a policy or reward model that cannot be used as asked
        ├── SettingsError     an option or a configuration value
        ├── RunError          a run folder that does not fit the command
        └── StoreError        a label store that cannot be used: locked, read-only, full, another run's

A message says what is wrong, which value, and what to do, in one line.
"""


class DissonanceError(Exception):
    """Root of the tree; `exit_code` is what the command line exits with."""

    exit_code = 1


class LabelsDue(DissonanceError):  # noqa: N818 - nothing is wrong
    """A run waits for people's answers; everything before is done and stays."""

    exit_code = 3

    def __init__(self, message: str, *, round_number: int, answered: int, wanted: int) -> None:
        super().__init__(message)
        self.round_number, self.answered, self.wanted = round_number, answered, wanted


class InputError(DissonanceError):
    """The user's input is wrong; nothing was changed."""

    exit_code = 2


class DataError(InputError):
    """A file, or a value in a file, cannot be used."""


class ModelError(InputError):
    """A policy or a reward model cannot be used as asked."""


class SettingsError(InputError):
    """An option or a configuration value is wrong."""


class RunError(InputError):
    """A run folder does not fit the command: missing, incomplete, locked, or made with other settings."""


class StoreError(InputError):
    """A label store cannot be opened, read or written; what it acknowledged before is safe."""
