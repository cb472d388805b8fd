"""Exports of several files: a folder for Argilla, a folder for Label Studio.

The folder is made here and must not be there yet; whoever calls names a temporary one beside the one it is to be, and
renames it when all stands.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dissonance.feedback.exchange.argilla import argilla_dataset_name, argilla_records, argilla_settings
from dissonance.feedback.exchange.label_studio import label_studio_config, label_studio_tasks
from dissonance.records import Label, Question


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export came to."""

    files: dict[str, int]
    """Questions by the name of the dataset or project."""
    left_out: int
    """Labels that the format cannot carry."""


def write_label_studio(folder: Path, questions: Sequence[Question], labels: Iterable[Label] = ()) -> Exported:
    """Write `KIND.json`, the tasks, and `KIND.xml`, the labelling configuration, for each kind of question there is."""
    tasks, left_out = label_studio_tasks(questions, labels)
    folder.mkdir()
    for kind, of_kind in tasks.items():
        _write_json(folder / f"{kind}.json", of_kind)
        (folder / f"{kind}.xml").write_text(label_studio_config(kind), encoding="utf-8")
    return Exported({kind: len(of_kind) for kind, of_kind in tasks.items()}, left_out)


def write_argilla(folder: Path, questions: Sequence[Question], labels: Iterable[Label] = ()) -> Exported:
    """Write a folder for each dataset, such as `Dataset.from_disk` loads."""
    records, left_out = argilla_records(questions, labels)
    folder.mkdir()
    like = {argilla_dataset_name(question): question for question in questions}
    for name, of_name in records.items():
        (folder / name / ".argilla").mkdir(parents=True)
        _write_json(folder / name / ".argilla" / "settings.json", argilla_settings(like[name]))
        _write_json(folder / name / ".argilla" / "dataset.json", {"name": name, "guidelines": None})
        _write_json(folder / name / "records.json", of_name)
    return Exported({name: len(of_name) for name, of_name in records.items()}, left_out)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) + "\n", encoding="utf-8")
