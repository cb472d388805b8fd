"""A run folder -> one HTML file that needs nothing else: no network, no other file, nothing executed but its own code.

tables.py      Parquet -> numbers; text only for the rows that are shown
statistics.py  numbers -> conflicts, histograms, intervals, bands, chosen rows
reading.py     what the log-likelihood is called
examples.py    the prompts and answers spelled out
headline.py    what it means, in words
charts.py      Vega-Lite specifications
story.py       what the rounds of a run left, as rounds.py draws it
comparison.py  the arms of a demo, side by side
page.py        all of it -> HTML
"""

from pathlib import Path

from dissonance.artifacts import atomic_path
from dissonance.report.comparison import write_comparison
from dissonance.report.page import render_report

__all__ = ["render_report", "write_comparison", "write_report"]


def write_report(run: Path) -> Path:
    """Write `report.html` into a finished run folder, atomically, and return its path.

    Raises:
        RunError: the folder is no run, or the run is not finished.
    """
    html = render_report(run)
    path = run / "report.html"
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8", newline="\n")
    return path
