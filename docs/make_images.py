"""Make the pictures of the documentation from reports.

    .venv/bin/python docs/make_images.py                                audit the built-in world; the README's picture
    .venv/bin/python docs/make_images.py real/run smollm2-distance.png  K against the null, from a run of one's own

Needs Chromium, which `make test` sets up.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from dissonance.cli import run

IMAGES = Path(__file__).parent / "images"
WIDTH, HEIGHT = 1100, 1010


def main() -> None:
    """Write docs/images/audit.png, or one picture of a given run."""
    if len(sys.argv) == 3:
        photograph(Path(sys.argv[1]) / "report.html", IMAGES / sys.argv[2], element="figure")
        return
    with tempfile.TemporaryDirectory() as folder:
        if run(["demo", "--out", folder, "--quiet"]) != 0:
            raise SystemExit("the demo failed")
        photograph(Path(folder) / "helpfulness" / "report.html", IMAGES / "audit.png")


def photograph(page: Path, picture: Path, element: str | None = None) -> None:
    """Take the top of a report, or the first element of a kind in it, as a browser shows it with its charts drawn."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser_path = next(filter(None, map(shutil.which, names)), None)  # else Playwright's own
    picture.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path)
        tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        tab.goto(page.resolve().as_uri())
        tab.wait_for_selector("svg")
        if element is None:
            tab.screenshot(path=picture)
        else:
            tab.locator(element).first.screenshot(path=picture)
        browser.close()
    print(picture)


if __name__ == "__main__":
    main()
