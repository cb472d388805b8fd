"""A run of two rounds whose answers come from a person, through the page, in a real browser."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from dissonance import cli
from labelling_site import chromium
from loop_world import write_world


@contextmanager
def labelling(run: Path) -> Iterator[str]:
    """`dissonance label RUN` in a process of its own; yields where it answers."""
    command = [sys.executable, "-m", "dissonance", "label", str(run), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as server:
        assert server.stderr is not None
        said = server.stderr.readline()
        found = re.search(r"http://\S+?(?=;|\s)", said)
        assert found is not None, said + server.stderr.read()
        try:
            yield found[0]
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)
            assert server.returncode == 0


def test_two_rounds_are_answered_through_the_page(
    tmp_path: Path,
    make_policy: Callable[..., Path],
    make_reward_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    settings = write_world(tmp_path, make_policy, make_reward_model)
    settings |= {"feedback": {"annotator": "people", "min_pairs": 4}, "rounds": {"most": 2}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    command = ["run", "config.yaml", "--out", "run", "--quiet"]
    with chromium() as browser:
        for number in range(2):
            assert cli.run(command) == 3
            assert f"12 answers are due in round {number} (0 of 12 are there)" in capsys.readouterr().err
            with labelling(tmp_path / "run") as url:
                page = browser.new_page()
                page.goto(url)
                for place in range(12):
                    page.wait_for_selector("#question[data-state=ready]")
                    before = page.input_value("#question [name=question]")
                    page.keyboard.press("12"[place % 2])
                    page.wait_for_function(
                        "(before) => document.querySelector('#question [name=question]')?.value !== before", arg=before
                    )
                page.wait_for_selector("#done")
                page.close()
    assert cli.run([*command, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [one["judgements"] for one in summary["rounds"]] == [12, 12]
    for number in range(2):
        metrics = json.loads((tmp_path / "run" / f"round-00{number}" / "metrics.json").read_text())
        assert metrics["feedback"] == {"annotator": "people", "answered": 12, "wanted": 12}
        assert pq.read_metadata(tmp_path / "run" / f"round-00{number}" / "pairs.parquet").num_rows == 12
