"""One round's queries -> labels -> preference pairs: whoever answers, people or models."""

import time
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from dissonance import labelling
from dissonance.artifacts import Run, atomic_path, fingerprint
from dissonance.config import FeedbackConfig
from dissonance.errors import DataError, DissonanceError, LabelsDue, SettingsError, StoreError
from dissonance.feedback import exchange
from dissonance.feedback.annotators.gold import GoldSettings
from dissonance.feedback.annotators.simulated import SimulatedSettings
from dissonance.measuring import model_inputs
from dissonance.progress import ProgressFactory
from dissonance.run_labels import ask, labels_of, remember_store

PAIRS = "pairs.parquet"
_LOOK_EVERY = 2.0
"""Seconds between two looks at how many answers are there."""


def annotator_settings(config: FeedbackConfig, seed: int = 0) -> Any:
    """The annotator's own settings, checked; None for people. `seed` is a simulated person's, unless they have one.

    Raises:
        SettingsError: there is no such setting, or its value is wrong.
    """
    kinds: dict[str, Any] = {"gold": GoldSettings, "simulated": SimulatedSettings}
    if config.annotator == "people":
        return None
    if config.annotator == "judge":
        from dissonance.feedback.annotators.judge import JudgeSettings  # its client takes a second to load

        kinds["judge"] = JudgeSettings
    given = {**({"seed": seed} if config.annotator == "simulated" else {}), **config.settings}
    if config.reward_model is not None:
        given |= {"source": config.reward_model.model, "kind": config.reward_model.kind}
    _check_names(kinds[config.annotator], given, f"feedback.settings of {config.annotator}")
    try:
        return TypeAdapter(kinds[config.annotator]).validate_python(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise SettingsError(f"feedback.settings.{where} of {config.annotator}: {first['msg']}") from error


def answer_inputs(config: FeedbackConfig) -> dict[str, Any]:
    """What decides a round's answers, as far as settings do; how many are enough may change while they come in."""
    found = config.model_dump(mode="json", include={"annotator", "overlap", "settings"})
    found["settings"].pop("budget", None)
    behind = {} if config.reward_model is None else model_inputs("reward_model", config.reward_model)
    return {**found, **behind}


def labels_fingerprint(run: Path, number: int, config: FeedbackConfig) -> str:
    """Tells whether a round's labels are those of before."""
    with labels_of(run, config.store, reading=True) as store:
        of_round = {question.query_id for question in store.questions(retired=True) if question.round == number}
        return fingerprint([label.label_id for label in store.labels() if label.query_id in of_round])


def _check_names(kind: Any, given: Mapping[str, Any], where: str) -> None:
    """Refuse what a record does not have, in the records that it holds too."""
    known = {field.name: field.type for field in fields(kind)}
    for name, value in given.items():
        if name not in known:
            raise SettingsError(f"{where}: there is no {name!r}; there are {', '.join(known)}")
        inner = get_type_hints(kind)[name]
        if is_dataclass(inner) and isinstance(value, Mapping):
            _check_names(inner, value, f"{where}, {name}")


def answer_round(run: Run, number: int, config: FeedbackConfig, seed: int, progress: ProgressFactory) -> dict[str, Any]:
    """Have a round's queries answered.

    Returns:
        annotator, answered and wanted; for a judge, what it has done and cost in all.

    Raises:
        LabelsDue: people have not answered enough yet.
        DissonanceError: a model gave up.
    """
    remember_store(run, config.store)
    common: dict[str, Any] = {"overlap": config.overlap, "store": config.store}
    with labels_of(run.path, config.store) as store:
        ask(run.path, store, overlap=config.overlap)
    settings = annotator_settings(config, seed)
    done: dict[str, Any] = {}
    if config.annotator == "judge":
        settings = replace(settings, ask_safety=settings.ask_safety or labelling.asks_safety(run.path))
        done = labelling.label_by_judge(run.path, settings, progress=progress, **common)
    elif config.reward_model is not None:
        done = labelling.label_by_rewards(run.path, config.reward_model, settings, progress=progress, **common)
    if done.get("stopped") == "interrupted":
        raise KeyboardInterrupt
    if done.get("stopped"):
        raise DissonanceError(f"feedback: {config.annotator} stopped: {done['reason']}; the same command goes on")
    answered, wanted = count_answers(run.path, number, config)
    if config.annotator == "people" and answered < ceil(config.enough * wanted):
        due = ceil(config.enough * wanted) - answered
        raise LabelsDue(
            f"{due:,} answers are due in round {number} ({answered:,} of {wanted:,} are there). Ask people with\n"
            f"    dissonance label {run.path}\nand run the same command again when they are done, or with --wait now",
            round_number=number,
            answered=answered,
            wanted=wanted,
        )
    judge = {"judge": done["judge"]} if "judge" in done else {}
    return {"annotator": config.annotator, "answered": answered, "wanted": wanted, **judge}


def count_answers(run: Path, number: int, config: FeedbackConfig) -> tuple[int, int]:
    """How many answers of a round are there, and how many are wanted."""
    with labels_of(run, config.store, reading=True) as store:
        found = store.progress(number)
    return found.answered, found.wanted


def wait_for_answers(run: Path, due: LabelsDue, config: FeedbackConfig, progress: ProgressFactory) -> None:
    """Return when there are enough answers; the run folder is free for the labelling server meanwhile."""
    enough = ceil(config.enough * due.wanted)
    answered = due.answered
    with progress(f"round {due.round_number}: waiting for people", enough, "answers") as advance:
        advance(answered)
        while answered < enough:
            time.sleep(_LOOK_EVERY)
            try:
                now, _ = count_answers(run, due.round_number, config)
            except StoreError:  # a server that is being restarted; it is looked at again
                continue
            advance(now - answered)
            answered = now


def write_round_pairs(run: Run, number: int, config: FeedbackConfig) -> dict[str, Any]:
    """What the labels of a round come to, as `pairs.parquet` in its folder.

    Raises:
        DataError: too few preferences.
    """
    found, questions = labelling.aggregated(run.path, config.method, round_number=number, store=config.store)
    decided = sum(not pair.tie for pair in found.pairs)
    if decided < config.min_pairs:
        raise DataError(
            f"the labels of round {number} come to {decided} preferences, and feedback.min_pairs is "
            f"{config.min_pairs}: ask more people, or lower it ({'; '.join(found.explanation)})"
        )
    with atomic_path(run.round(number) / PAIRS) as temporary:
        exchange.write_preferences(temporary, found.pairs, questions, suffix=".parquet", ties=True)
    return {
        "method": config.method,
        "pairs": len(found.pairs),
        "ties": len(found.pairs) - decided,
        "labels": found.labels,
        "used": found.used,
        "left_out": dict(found.left_out),
        "explanation": list(found.explanation),
    }
