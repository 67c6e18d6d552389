"""The detection app as a person meets it: served by its command, in a real browser."""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nibabel
import numpy as np
import psutil
import pytest

from lib import volumes

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
ROOT = Path(__file__).parents[1]
IDLE, VISITS = 10, 20
FIND, FIGURES = "Find anomalies", "On the grid of the scan"

pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="the app's command is tested on Linux"),
]


class Server:
    """The app as explore.sh serves it, its temporary files in `visits`."""

    def __init__(self, course, visits):
        for name in ("explore.sh", "setup.sh", "requirements.txt"):
            shutil.copy(ROOT / name, course)
        environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "TMPDIR": str(visits), "EXPLORE_IDLE": str(IDLE)}
        self.course, self.visits, self.log = course, visits, visits / "log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen([course / "explore.sh"], stdout=log, stderr=log, cwd="/", env=environment)
        self.address = wait_for(lambda: re.search(r"http://\S+", self.log.read_text()))[0]

    def kernels(self):
        return psutil.Process(self.process.pid).children()

    def left(self):
        """What of visits is still there."""
        return [*self.kernels(), *self.visits.glob("anomaly-visit-*")]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def server(finished, tmp_path_factory):
    server = Server(finished, tmp_path_factory.mktemp("visits"))
    yield server
    server.process.terminate()
    server.process.wait(30)


@pytest.fixture(scope="module")
def browser(server):
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(server, browser):
    """The app in a tab of its own, once it has shown itself."""
    tab = browser.new_page()
    tab.set_default_timeout(60_000)
    tab.requested = []
    tab.on("request", lambda request: tab.requested.append(request.url))
    tab.goto(server.address)
    tab.get_by_role("button", name=FIND).wait_for()
    yield tab
    tab.close()


def send(page, path):
    page.get_by_label("Send a FLAIR scan").set_input_files(path)


def said(page, words):
    return page.get_by_text(words).first


def test_the_page_shows_itself_at_first_view_and_asks_nobody_else(page, server):
    assert page.get_by_label("Run").input_value() == "small"
    assert page.get_by_label("Method").input_value() == "blur"
    for label in ("Send a FLAIR scan (at most 200 MB)", "or path of FLAIR scan", "or path of brain mask"):
        assert page.get_by_label(label).is_enabled()
    assert said(page, "For research, not for diagnosis").is_visible()
    elsewhere = [url for url in page.requested if not url.startswith((server.address.split("?")[0], "data:", "blob:"))]
    assert elsewhere == []


def test_it_is_served_to_this_machine_and_to_whoever_has_the_address(server, page):
    listening = [c for c in psutil.Process(server.process.pid).net_connections("inet") if c.status == "LISTEN"]
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}
    with urllib.request.urlopen(server.address.split("?")[0], timeout=20) as answer:
        assert "/login" in answer.url
        assert b"not for diagnosis" not in answer.read()


def test_a_file_larger_than_a_server_s_messages_arrives_whole(page, tmp_path):
    noise = np.random.default_rng(0).integers(0, 3000, (256, 256, 130), dtype=np.int16)
    nibabel.Nifti1Image(noise, np.eye(4)).to_filename(tmp_path / "large.nii")
    size = (tmp_path / "large.nii").stat().st_size
    assert size > 15e6
    send(page, tmp_path / "large.nii")
    said(page, f"large.nii: NIfTI, {size / 1e6:.1f} MB received").wait_for()


def test_from_a_broken_file_to_a_mask_in_hand(page, server, tmp_path):
    (tmp_path / "broken.nii.gz").write_bytes(b"\x1f\x8b broken")
    send(page, tmp_path / "broken.nii.gz")
    said(page, "broken.nii.gz is damaged").wait_for()
    page.get_by_role("button", name=FIND).click()
    said(page, "There is no FLAIR scan yet").wait_for()

    scan = server.course / "scans" / "p3" / "p3_flair.nii.gz"
    send(page, scan)
    said(page, "p3_flair.nii.gz: NIfTI").wait_for()
    page.get_by_role("button", name=FIND).press("Enter")
    said(page, FIGURES).wait_for()
    assert said(page, "preparation").is_visible()
    before, picture = said(page, FIGURES).inner_text(), page.locator("img").last.get_attribute("src")

    slider = page.get_by_role("slider", name="Threshold")
    slider.focus()
    for _ in range(20):
        slider.press("ArrowLeft")
    wait_for(lambda: said(page, FIGURES).inner_text() != before)
    wait_for(lambda: page.locator("img").last.get_attribute("src") != picture)
    assert float(re.search(r"([\d.]+) ml", said(page, FIGURES).inner_text())[1]) > float(
        re.search(r"([\d.]+) ml", before)[1]
    )

    original = nibabel.load(scan)
    for label, kind in (("Mask (NIfTI)", "mask"), ("Anomaly map (NIfTI)", "anomaly")):
        with page.expect_download() as coming:
            page.get_by_role("button", name=label).click()
        assert coming.value.suggested_filename == f"scan_blur_{kind}.nii.gz"
        coming.value.save_as(tmp_path / f"{kind}.nii.gz")
        got = volumes.read(tmp_path / f"{kind}.nii.gz")
        assert got.voxels.shape == original.shape
        np.testing.assert_allclose(got.affine, original.affine, atol=1e-5)
        assert got.voxels.max() > 0
    with page.expect_download() as coming:
        page.get_by_role("button", name="Report (one page)").click()
    coming.value.save_as(tmp_path / "report.html")
    report = page.context.browser.new_page()
    report.goto((tmp_path / "report.html").as_uri())
    assert said(report, "not for diagnosis").is_visible()
    panel = report.get_by_role("img", name="The scan", exact=True)
    slider = report.get_by_role("slider", name="Axial slice")
    place, number = panel.get_attribute("style"), int(report.locator("output").inner_text())
    slider.press("ArrowRight")
    assert int(report.locator("output").inner_text()) == number + 1
    assert panel.get_attribute("style") != place


def test_visits_leave_no_kernel_and_no_file(server):
    for _ in range(VISITS):
        with urllib.request.urlopen(server.address, timeout=60) as answer:
            assert b"not for diagnosis" in answer.read()
    assert server.log.read_text().count("Kernel started") >= VISITS
    wait_for(lambda: not server.left(), 6 * IDLE)
