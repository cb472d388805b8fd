"""The benchmarks that time: in small, that they run and print their tables."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def printed(name: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-W", "ignore", f"benchmarks/{name}.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_scale(tmp_path: Path) -> None:
    assert "80 to 800 rows: peak memory grows by " in printed(
        "scale", "conflicts", "--rows", "80", "800", "--scratch", tmp_path
    )
    assert list(tmp_path.iterdir()) == []


def test_sampling(policy_folder: Path) -> None:
    table = printed(
        "sampling", "--model", policy_folder, "--prompts", "2", "--n", "2", "--max-new-tokens", "4", "--repeats", "1",
        "--methods", "ours", "recipe", "continuous",
    )  # fmt: skip
    for line in ("ours / recipe", "ours / continuous", "ours, share of the limit", "recipe     peak memory"):
        assert line in table


def test_rewards(policy_folder: Path) -> None:
    assert "shared / plain" in printed(
        "rewards", "--model", policy_folder, "--prompts", "2", "--prompt-tokens", "8", "--repeats", "1"
    )


def test_cost() -> None:
    assert "decode" in printed("cost", "--prompts", "1e6", "--n", "16", "--gpus", "8")
