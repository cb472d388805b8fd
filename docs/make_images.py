"""Make the picture of the README: audit the built-in world and photograph its report.

    .venv/bin/python docs/make_images.py

Needs Chromium, which `make test` sets up.
"""

import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from dissonance.cli import run

PICTURE = Path(__file__).parent / "images" / "audit.png"
WIDTH, HEIGHT = 1100, 1010


def main() -> None:
    """Write docs/images/audit.png."""
    with tempfile.TemporaryDirectory() as folder:
        if run(["demo", "--out", folder, "--quiet"]) != 0:
            raise SystemExit("the demo failed")
        photograph(Path(folder) / "helpfulness" / "report.html", PICTURE)
    print(PICTURE)


def photograph(page: Path, picture: Path) -> None:
    """Take the top of a report as a browser shows it, once its pictures are drawn."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser_path = next(filter(None, map(shutil.which, names)), None)  # else Playwright's own
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path)
        tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        tab.goto(page.resolve().as_uri())
        tab.wait_for_selector("svg")
        picture.parent.mkdir(parents=True, exist_ok=True)
        tab.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main()
