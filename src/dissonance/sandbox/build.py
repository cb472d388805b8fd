"""Builds a sandbox once and keeps it: a folder with two models, prompts and pairs, named by its fingerprint."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from filelock import FileLock
from platformdirs import user_cache_path

from dissonance.sandbox.answers import Preference, gold_pairs, preferences
from dissonance.sandbox.world import Split, World, questions

CACHE_VARIABLE = "DISSONANCE_CACHE"

TRAINED_WITH = ("torch", "transformers", "tokenizers", "numpy")
"""Distributions whose version may change what is built: weights by the first three, gold and data by NumPy's draws."""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A built world: paths to be used like any other model or prompt file."""

    world: World
    folder: Path
    """Holds all that follows, and the dials in world.json."""

    @property
    def policy(self) -> Path:
        """Folder of the policy, for `AutoModelForCausalLM`."""
        return self.folder / "policy"

    @property
    def reward_model(self) -> Path:
        """Folder of the proxy, for `AutoModelForSequenceClassification`; see `reward_kind` for its sign."""
        return self.folder / "reward_model"

    @property
    def prompts(self) -> Path:
        """JSONL of training prompts: id, prompt (a list of role and content), category, gold_key."""
        return self.folder / "prompts.jsonl"

    @property
    def eval_prompts(self) -> Path:
        """The same for held-out prompts, none of whose gold keys is among those of `prompts`."""
        return self.folder / "eval_prompts.jsonl"

    @property
    def preferences(self) -> Path:
        """What the proxy learnt from, as TRL's preferences; in a safety world with chosen_safe and rejected_safe."""
        return self.folder / "preferences.jsonl"

    @property
    def gold_pairs(self) -> Path:
        """Pairs on held-out prompts whose order is exact, likewise."""
        return self.folder / "gold_pairs.jsonl"

    @property
    def reward_kind(self) -> Literal["reward", "cost"]:
        """`cost` (higher is worse) for safety, `reward` (higher is better) for helpfulness."""
        return "cost" if self.world.task == "safety" else "reward"


def build_sandbox(world: World, cache: Path | None = None) -> Sandbox:
    """Return the world's models and prompts, training them when the cache does not hold them yet.

    The cache is the folder given, else `DISSONANCE_CACHE`/sandbox, else the user's cache folder. Of several processes
    that want one world, the first builds it and the others wait; a killed build leaves nothing that looks finished.
    """
    root = cache or _default_cache()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / fingerprint(world)
    with FileLock(root / f"{folder.name}.lock"):
        if not folder.exists():
            unfinished = root / f"{folder.name}.building"
            # Only a killed build can have left this: a living one would hold the lock.
            shutil.rmtree(unfinished, ignore_errors=True)
            _build(Sandbox(world, unfinished))
            unfinished.rename(folder)
    return Sandbox(world, folder)


def fingerprint(world: World) -> str:
    """Name of the world in the cache: a hash of its dials, its code and the versions of `TRAINED_WITH`."""
    libraries = {name: version(name) for name in TRAINED_WITH}
    digest = hashlib.sha256(json.dumps([asdict(world), libraries], sort_keys=True).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _default_cache() -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    return (Path(named) if named else user_cache_path("dissonance")) / "sandbox"


def _build(sandbox: Sandbox) -> None:
    # Imported here, since torch takes seconds to load and a sandbox that is built already needs none of it.
    from dissonance.sandbox.train import train_policy, train_proxy

    sandbox.folder.mkdir()
    train_policy(sandbox.world, sandbox.policy)
    train_proxy(sandbox.world, sandbox.reward_model)
    _write_prompts(sandbox.prompts, sandbox.world, "train")
    _write_prompts(sandbox.eval_prompts, sandbox.world, "eval")
    _write_pairs(sandbox.preferences, sandbox.world, preferences(sandbox.world))
    _write_pairs(sandbox.gold_pairs, sandbox.world, gold_pairs(sandbox.world))
    dials = json.dumps(asdict(sandbox.world), indent=2)
    (sandbox.folder / "world.json").write_text(dials + "\n", encoding="utf-8")


def _write_prompts(path: Path, world: World, split: Split) -> None:
    lines = [
        json.dumps(
            {
                "id": f"{split}-{number:04d}",
                "prompt": [{"role": "user", "content": question.text}],
                "category": world.categories[question.category].name,
                "gold_key": question.gold_key,
            }
        )
        for number, question in enumerate(questions(world, split))
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_pairs(path: Path, world: World, pairs: Sequence[Preference]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            row = {
                "prompt": [{"role": "user", "content": pair.prompt}],
                "chosen": [{"role": "assistant", "content": pair.chosen}],
                "rejected": [{"role": "assistant", "content": pair.rejected}],
            }
            safe = {"chosen_safe": pair.chosen_safe, "rejected_safe": pair.rejected_safe}
            file.write(json.dumps(row | (safe if world.task == "safety" else {})) + "\n")
