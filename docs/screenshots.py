"""Takes the README's pictures of a finished default run: `.venv/bin/python docs/screenshots.py reports/RUN`.

Needs Chromium and the packages of requirements-dev.txt. The run's own page, and the app with the scan of the test
patient whose lesion is the largest.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent
ROOT = HERE.parent
METHOD, COLOURS = "sided_ensemble", 128
REPORT = {"width": 800, "height": 2300}
PAGE = {"width": 800, "height": 600}
APP = {"width": 1200, "height": 1800}


def main(run: Path) -> None:
    with sync_playwright() as playwright, served() as address:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=REPORT)
        page.goto((run.resolve() / "index.html").as_uri())
        keep("report", page.screenshot())
        page.set_viewport_size(PAGE)
        page.goto((run.resolve() / "scrubber.html").as_uri())
        keep("scrubber", page.screenshot(full_page=True))
        page.set_viewport_size(APP)
        page.goto(address)
        detect(page, run)
        keep("app", page.screenshot(full_page=True))
        keep("viewer", page.get_by_role("img").last.screenshot())
        browser.close()


@contextmanager
def served():
    """The address of the app."""
    with subprocess.Popen([ROOT / "explore.sh"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as app:
        try:
            yield next(found[0] for line in app.stdout if (found := re.search(r"http://\S+", line)))
        finally:
            app.terminate()


def detect(page: Page, run: Path) -> None:
    """Find anomalies in one scan, as a person does."""
    page.get_by_label("Run").select_option(run.name)
    page.get_by_label("Method").select_option(METHOD)
    page.get_by_label("or path of FLAIR scan").fill(str(largest(run)))
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Find anomalies").click()
    page.get_by_text("On the grid of the scan").first.wait_for(timeout=120_000)
    time.sleep(2)


def largest(run: Path) -> Path:
    """The FLAIR scan of the test patient with the largest lesion."""
    cohort = ROOT / json.loads((run / "cohort.json").read_bytes())["path"]
    subjects = json.loads((cohort / "manifest.json").read_bytes())["subjects"]
    chosen = max((s for s in subjects if s["split"] == "test"), key=lambda s: s["lesion_ml"])["id"]
    return next((ROOT / "data" / "embedded").glob(f"*-healthy-*/{chosen}/{chosen}_flair.nii.gz"))


def keep(name: str, content: bytes) -> None:
    picture = Image.open(BytesIO(content)).convert("RGB").quantize(COLOURS)
    picture.save(HERE / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
