"""Progress where there is no terminal: a line every ten seconds, with the time left."""

from types import SimpleNamespace

import pytest

from dissonance import progress


def test_the_time_left_is_by_the_rate_since_the_first_were_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before them, actors start and models are loaded, once."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with progress.console("sampling", 1000, "completions") as advance:
        advance(0)
        for seconds, done in ((40, 100), (5, 50), (10, 150), (35, 710)):
            clock.now += seconds
            advance(done)
    assert capsys.readouterr().err.splitlines() == [
        "sampling: 100/1,000 completions, 2.5/s, 40 s",
        "sampling: 300/1,000 completions, 13.3/s, 55 s, 53 s left",
        "sampling: 1,010/1,000 completions, 11.2/s, 90 s",
    ]


def test_without_a_total_there_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with progress.console("reading", None, "rows") as advance:
        for _ in range(2):
            clock.now += 10
            advance(5)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 5 rows, 0.5/s, 10 s",
        "reading: 10 rows, 0.5/s, 20 s",
        "reading: 10 rows, 0.5/s, 20 s",
    ]
