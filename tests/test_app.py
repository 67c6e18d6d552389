"""The detection app without a browser: what can be chosen, what a scan gives, what it says when something is wrong."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import simulate
from PIL import Image

import lib
from lib import app, detection, exchange, uploads, volumes


@pytest.fixture
def course(finished, tmp_path, monkeypatch):
    """The finished run's folder as the course's; private folders land in one that the test can look into."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "lib" and hasattr(module, "ROOT"):
            monkeypatch.setattr(module, "ROOT", finished)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return finished


def send(upload, content, name="mine_flair.nii.gz", piece=5000, size=None):
    """A file as the browser's side sends it: pieces where the kernel asks for them."""
    asked = []
    upload.send = lambda message, buffers=None: asked.append(message)
    upload._heard(None, {"begin": 1, "name": name, "size": len(content) if size is None else size}, [])
    while asked:
        start = asked.pop()["next"]
        upload._heard(None, {"piece": 1}, [memoryview(content[start : start + piece])])


def scan_of(course, patient="p0"):
    return course / "scans" / patient / f"{patient}_flair.nii.gz"


def text(page):
    """What a page says, without tags."""
    return page.said.value.replace("<br>", "\n")


def downloaded(button):
    given = []
    button.send = lambda message, buffers=None: given.append((message, buffers))
    button._asked(None, {"wanted": True}, [])
    ((message, (content,)),) = given
    return message["name"], content


@pytest.fixture
def page(course):
    return app.App(device="cpu")


@pytest.fixture
def found(page, course):
    """The page after a scan was sent and looked at."""
    send(page.rows["FLAIR"][0], scan_of(course).read_bytes())
    page.start.click()
    return page


def result_of(page):
    (result,) = page.result.children
    return result


def test_finished_runs_and_their_methods_are_offered(page):
    assert [path.name for path in app.finished_runs()] == ["small"]
    assert page.method.options == ("blur", "intensity_median")
    assert list(app.methods(page.run.value)) == sorted(detection.methods(page.run.value))
    assert list(page.rows) == ["FLAIR"]


def test_unfinished_and_damaged_runs_are_not_offered(course, monkeypatch, tmp_path):
    monkeypatch.setattr(lib, "ROOT", tmp_path)
    for name, record in {"a": '{"status": "running"}', "b": "{", "c": "[]", "d": '{"status": "done"}'}.items():
        (tmp_path / "reports" / name / "models").mkdir(parents=True)
        (tmp_path / "reports" / name / "run.json").write_text(record)
    assert app.finished_runs() == []
    page = app.App()
    assert "There is no finished run yet" in text(page)
    assert page.start.disabled


def test_a_run_whose_cohort_is_gone_says_so(course, monkeypatch, tmp_path):
    monkeypatch.setattr(lib, "ROOT", tmp_path)
    shutil.copytree(course / "reports", tmp_path / "reports")
    page = app.App()
    assert "The cohort of the run small is not there" in text(page)
    assert page.rows == {}


def test_nothing_heavy_is_imported_before_the_first_scan(finished):
    code = "import sys; from lib import app; app.App(); print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(finished)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "lib.app" in loaded
    assert not loaded & {"torch", "monai", "sklearn", "matplotlib.pyplot", "lib.cohort", "lib.detection"}


def test_what_was_found_is_what_detection_finds(found, course):
    result, run = result_of(found), lib.run_folder("small")
    same = detection.detect({"FLAIR": scan_of(course)}, run, "blur", device="cpu")
    np.testing.assert_array_equal(result.found.anomaly, same.anomaly)
    assert result.limit == same.threshold
    assert f"<b>{same.summary()['found_ml']:.1f} ml</b>" in result.figures.value
    for stage in (*same.seconds, "picture"):
        assert f"{stage} " in text(found)


def test_a_picture_is_counted_as_a_share_of_its_brain(page, course):
    voxels = volumes.read(scan_of(course)).voxels
    middle = voxels[:, :, voxels.shape[2] // 2].T / voxels.max() * 255
    content = io.BytesIO()
    Image.fromarray(middle.astype(np.uint8)).resize((260, 320), Image.Resampling.NEAREST).save(content, "PNG")
    send(page.rows["FLAIR"][0], content.getvalue(), "slice.png")
    page.start.click()
    result = result_of(page)
    share = result.found.mask().sum() / result.found.brain.sum()
    assert f"{100 * share:.2f} % of the brain" in result.figures.value
    assert " ml" not in result.figures.value
    assert downloaded(result.downloads[2])[1]


def test_the_threshold_moves_the_figures_and_the_picture(found):
    result = result_of(found)
    before, picture = result.figures.value, result.viewer.picture.content
    result.viewer.to_most_anomalous()
    picture = result.viewer.picture.content
    result.threshold.value = result.threshold.max / 4
    limit = result.threshold.value
    voxels = (result.found.brain & (result.found.anomaly >= limit)).sum()
    assert f"<b>{voxels * result.found.voxel_ml:.1f} ml</b>" in result.figures.value
    assert result.figures.value != before
    assert "healthy voxels" in before
    assert "healthy voxels" not in result.figures.value
    assert result.viewer.picture.content != picture


def test_a_browser_that_puts_the_slider_on_a_step_moves_nothing(found):
    result = result_of(found)
    said, step = result.figures.value, result.threshold.step
    result.threshold.value += 0.4 * step
    assert result.figures.value == said
    assert result.limit == result.found.threshold
    result.threshold.value += 0.4 * step
    assert result.limit == result.threshold.value


def test_downloads_lie_on_the_grid_of_the_scan_and_follow_the_threshold(found, course, tmp_path):
    result = result_of(found)
    scan = nibabel.load(scan_of(course))
    for moved in (False, True):
        if moved:
            result.threshold.value = result.threshold.max / 4
        images = {}
        for button in result.downloads[:2]:
            name, content = downloaded(button)
            images[name] = nibabel.Nifti1Image.from_bytes(gzip.decompress(content))
        mask, anomaly = images["scan_blur_mask.nii.gz"], images["scan_blur_anomaly.nii.gz"]
        for image in (mask, anomaly):
            assert image.shape == scan.shape
            np.testing.assert_allclose(image.affine, scan.affine, atol=1e-5)
        np.testing.assert_array_equal(anomaly.get_fdata(), result.found.anomaly)
        np.testing.assert_array_equal(mask.get_fdata() > 0, result.found.mask(result.limit))
    name, content = downloaded(result.downloads[2])
    assert name == "scan_blur.html"
    assert b"not for diagnosis" in content


def test_a_scan_with_more_than_the_brain_is_taken_with_a_mask_of_it(page, course, tmp_path):
    scan = volumes.read(scan_of(course))
    head = np.where(scan.voxels > 0, scan.voxels, 300)
    volumes.write(tmp_path / "head_flair.nii.gz", head, scan.affine)
    volumes.write(tmp_path / "mask.nii.gz", (scan.voxels > 0).astype(np.uint8), scan.affine)
    send(page.rows["FLAIR"][0], (tmp_path / "head_flair.nii.gz").read_bytes())
    page.start.click()
    assert "shows more than a brain" in text(page)
    assert "--" not in text(page)
    send(page.brain[0], (tmp_path / "mask.nii.gz").read_bytes(), "mask.nii.gz")
    page.start.click()
    np.testing.assert_array_equal(result_of(page).found.brain, scan.voxels > 0)


def test_a_scan_on_the_disk_is_taken_by_its_path(page, course):
    page.rows["FLAIR"][1].value = str(scan_of(course, "p1"))
    page.method.value = "intensity_median"
    page.start.click()
    assert result_of(page).found.subject.id == "p1_flair"
    assert result_of(page).found.method == "intensity_median"


def test_what_is_sent_stays_in_the_visit_s_folder_and_goes_with_it(page, course):
    before = set((course / "data").rglob("*"))
    send(page.rows["FLAIR"][0], scan_of(course).read_bytes())
    page.start.click()
    kept = Path(page.kept.name)
    assert result_of(page).found.subject.folder.is_relative_to(kept)
    assert {path for path in (course / "data").rglob("*") if path.is_file()} <= before
    page.kept.cleanup()
    assert not kept.exists()


BROKEN = {
    "mine.txt": (b"hello", "is of no kind"),
    "a.nii.gz": (gzip.compress(b"\0" * 500), "without a NIfTI"),
    "none.nii": (b"", "none.nii is empty"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_upload_gets_a_sentence_and_the_next_one_is_taken(page, course, name):
    content, said = BROKEN[name]
    upload = page.rows["FLAIR"][0]
    send(upload, content, name)
    assert said in upload.said
    assert upload.received is None
    send(upload, scan_of(course).read_bytes())
    assert "NIfTI" in upload.said
    assert upload.name == "mine_flair.nii.gz"


def test_a_file_that_is_not_wholly_there_is_refused(page, course):
    content = scan_of(course).read_bytes()
    upload = page.rows["FLAIR"][0]
    send(upload, content, size=len(content) + 1)
    assert f"{len(content)} of {len(content) + 1} bytes" in upload.said
    send(upload, content, size=uploads.LIMIT + 1)
    assert "more than the 200 MB" in upload.said


def test_pieces_of_an_earlier_file_are_not_mixed_into_the_next(page):
    upload = page.rows["FLAIR"][0]
    upload.send = lambda message, buffers=None: None
    upload._heard(None, {"begin": 1, "name": "a", "size": 10}, [])
    upload._heard(None, {"begin": 2, "name": "b", "size": 10}, [])
    upload._heard(None, {"piece": 1}, [b"12345"])
    assert upload.upload.received == 0
    upload._heard(None, {"unreadable": 2}, [])
    assert "cannot read b" in upload.said


def test_without_a_scan_and_with_a_bad_one_the_page_says_so_and_lives_on(page, course, tmp_path):
    page.start.click()
    assert "There is no FLAIR scan yet" in text(page)
    images, _, affine = simulate(3)
    constant = np.full_like(images["FLAIR"], 7)
    volumes.write(tmp_path / "constant.nii.gz", constant, affine)
    send(page.rows["FLAIR"][0], (tmp_path / "constant.nii.gz").read_bytes(), "my name.nii.gz")
    page.start.click()
    assert "my name.nii.gz is constant" in text(page)
    assert str(tmp_path) not in text(page)
    assert not page.start.disabled
    page.rows["FLAIR"][1].value = str(tmp_path / "nowhere.nii")
    page.start.click()
    assert "nowhere.nii is not a file" in text(page)
    page.rows["FLAIR"][1].value = str(scan_of(course))
    page.start.click()
    assert result_of(page).found.brain.any()


def test_whatever_breaks_inside_the_page_lives_on(page, course, monkeypatch):
    monkeypatch.setattr(detection, "detect", lambda *_, **__: 1 / 0)
    page.rows["FLAIR"][1].value = str(scan_of(course))
    page.start.click()
    assert "could not be examined: ZeroDivisionError" in text(page)
    assert not page.start.disabled


def test_a_scan_of_another_modality_is_said_to_be_one(page, course):
    send(page.rows["FLAIR"][0], scan_of(course).read_bytes(), "mine_t1.nii.gz")
    page.start.click()
    assert "seems to be T1" in text(page)


def test_names_with_markup_are_shown_as_text(page):
    send(page.rows["FLAIR"][0], b"hello", "<b>x")
    page.rows["FLAIR"][1].value = "<img src=x>"
    page.start.click()
    assert "<img" not in page.said.value
    assert "&lt;img" in page.said.value


def test_every_page_says_what_it_is_not_for(found):
    said = [widget.value for widget in (*found.children, *result_of(found).children) if hasattr(widget, "value")]
    assert sum("not for diagnosis" in str(one) for one in said) == 2


def test_a_download_that_cannot_be_made_says_so(course):
    button = exchange.FileDownload("x", lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    given = []
    button.send = lambda message, buffers=None: given.append(message)
    button._asked(None, {}, [])
    assert "could not be made: OSError" in given[0]["said"]
    assert json.dumps(given)


def test_a_run_that_took_incomplete_subjects_takes_an_incomplete_scan(course, monkeypatch):
    monkeypatch.setattr(app, "modalities", lambda run: (("FLAIR", "T2"), False))
    page = app.App(device="cpu")
    page.start.click()
    assert "There is no FLAIR and no T2 scan yet" in text(page)
    page.rows["FLAIR"][1].value = "a.nii.gz"
    assert page._given() == ({"FLAIR": Path("a.nii.gz")}, None, {})
    monkeypatch.setattr(app, "modalities", lambda run: (("FLAIR", "T2"), True))
    page._run_chosen()
    page.start.click()
    assert "There is no T2 scan yet" in text(page)


def test_of_a_run_it_is_known_whether_all_modalities_are_needed(course):
    run = lib.run_folder("small")
    assert app.modalities(run) == (("FLAIR",), True)
    place = course / json.loads((run / "cohort.json").read_bytes())["path"] / "manifest.json"
    before = place.read_text()
    manifest = json.loads(before)
    manifest["subjects"][0]["missing"] = ["FLAIR"]
    place.write_text(json.dumps(manifest))
    assert app.modalities(run) == (("FLAIR",), False)
    place.write_text(before)
