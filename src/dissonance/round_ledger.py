"""Which stages of a round are done, and with what: so that none is run twice, and none with other settings."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dissonance.artifacts import Run, differences, fingerprint
from dissonance.errors import RunError


class Stages:
    """The stages of one round, each with a fingerprint of its settings and of all that came before it."""

    def __init__(self, run: Run, number: int, before: object) -> None:
        self.run, self.number = run, number
        self.folder = run.round(number)
        self._mark = fingerprint(before)
        self.left = self._mark
        """What the next round begins with: of all stages but those that nothing is built on."""

    def done(
        self,
        stage: str,
        settings: Mapping[str, Any],
        make: Callable[[], Mapping[str, Any]],
        leaves: Sequence[str] = (),
        *,
        redo: bool = False,
    ) -> dict[str, Any]:
        """What a stage came to; it is only run if it was not before, or a file that it leaves is gone.

        Args:
            stage: its name.
            settings: JSON; whatever decides its result besides the stages before.
            make: runs it.
            leaves: files and folders of the round that it leaves. Of a killed run they may be there without an entry:
                they are removed then.
            redo: whether it may be run again with other settings, since no later round is built on it.

        Raises:
            RunError: the stage was run with other settings, and what it left is there.
        """
        name = stage_name(stage, self.number)
        self._mark = fingerprint([self._mark, stage, settings])
        if not redo:
            self.left = self._mark
        entry = self.run.finished(name)
        if entry is not None and all((self.folder / left).exists() for left in leaves):
            if entry.get("fingerprint") == self._mark:
                return dict(entry["summary"])
            if not redo:
                raise RunError(self._changed(stage, entry, settings, leaves))
        for left in leaves:
            if (self.folder / left).is_dir():
                shutil.rmtree(self.folder / left)
        start = time.perf_counter()
        found = dict(make())
        seconds = time.perf_counter() - start
        self.run.finish(name, fingerprint=self._mark, settings=settings, summary=found, seconds=seconds)
        return found

    def _changed(self, stage: str, entry: Mapping[str, Any], settings: Mapping[str, Any], leaves: Sequence[str]) -> str:
        changes = "; ".join(differences(entry.get("settings", {}), settings)) or "of a stage before it"
        again = f", or remove {self.folder / leaves[0]} to have it run again" if leaves else ""
        return (
            f"{self.run.path}: {stage} of round {self.number} was run with other settings ({changes}): take "
            f"those{again}, or choose another --out"
        )


def stage_name(stage: str, number: int) -> str:
    """How `run.json` names a stage of a round."""
    return f"{stage}-{number:03d}" if number else stage
