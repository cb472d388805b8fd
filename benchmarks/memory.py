"""The largest memory of this process, which Linux keeps itself; it imports nothing that would add to it."""

from collections.abc import Callable
from pathlib import Path


def restart_peak() -> None:
    """Let Linux keep the largest memory of this process anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The largest resident memory of this process since `restart_peak`, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def peak_mb(work: Callable[[], object]) -> float:
    """The largest memory of this process during the work above what it has before, MB."""
    restart_peak()
    before = peak()
    work()
    return (peak() - before) / 1e6
