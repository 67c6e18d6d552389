"""Slices on a page: every one is there as it was, nothing else is, and in a browser the slider moves them."""

import base64
import io
import json
import re
import shutil
import subprocess

import made_cohort
import matplotlib.pyplot as plt
import numpy as np
import pytest
from bs4 import BeautifulSoup
from PIL import Image
from scipy import ndimage

from lib import evaluation, metrics, models, report, scoring, scrubber
from lib.models.detector import Detector
from lib.slice_views import tiled

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Made(Detector):
    """Smooth noise, and the lesion on top."""

    def maps(self, subject):
        noise = np.random.default_rng(len(self.name)).random(subject.brain.shape, np.float32)
        return (ndimage.gaussian_filter(noise, 1) + 0.3 * np.asarray(subject.lesion)) * subject.brain


class Flat(Detector):
    """The same value in every brain, so that only a higher threshold keeps the promise."""

    def maps(self, subject):
        return 0.5 * np.asarray(subject.brain, np.float32)


class Diverged(Detector):
    """What a training that blew up leaves."""

    def maps(self, subject):
        return np.where(subject.brain, np.float32(np.nan), 0)


def write_run(folder, detectors, *, data="Embedded cohort (simulated)", status="done", **cohort):
    folder.mkdir(parents=True)
    prepared = made_cohort.write(folder.parent / "cohort", **cohort)
    said = {"path": str(prepared.folder), "hash": prepared.hash, "notes": [], "left_out": []}
    (folder / "cohort.json").write_text(json.dumps(said))
    record = {"run": folder.name, "status": status, "notebooks": {}, "data": [data]}
    (folder / "run.json").write_text(json.dumps(record))
    for name, kind in detectors.items():
        scoring.write_maps(kind(name, prepared.modalities), prepared, str(folder))
    return prepared


@pytest.fixture(scope="module", autouse=True)
def short_rows():
    """So few tiles in a row that the made cohort's ten slices fill three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scrubber, "COLUMNS", 4)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The cohort and the folder of a run with its report."""
    folder = tmp_path_factory.mktemp("course") / "one run"
    prepared = write_run(folder, {"ae": Made, "dae": Made, "intensity_median": Made, "cae3d": Flat, "random": Made})
    report.write(folder)
    return prepared, folder


def soup_of(folder):
    return BeautifulSoup((folder / "scrubber.html").read_text(), "html.parser")


def decoded(image):
    kind, content = image["src"].split(";base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("1" if "png" in kind else "L"))


def slices_of(image, shape, count):
    """The slices [slice, row, column] that a sprite holds, in the orientation of the cohort."""
    sprite, columns = decoded(image), scrubber.COLUMNS
    height, width = sprite.shape[0] // -(-count // columns), sprite.shape[1] // columns
    tiles = [
        sprite[i // columns * height :, i % columns * width :][1 : 1 + shape[0], 1 : 1 + shape[1]] for i in range(count)
    ]
    return np.stack(tiles)[:, ::-1]


def box_of(subject):
    return tuple(slice(int(i.min()), int(i.max()) + 1) for i in np.nonzero(np.asarray(subject.brain)))


def shown(subject, figure, outline=None):
    box = box_of(subject)
    layer = f".layer.{outline} img" if outline else ".layer.scan img, .layer.map img"
    shape = [s.stop - s.start for s in box]
    return slices_of(figure.select_one(layer), shape[1:], shape[0])


def sections(folder):
    return {section["aria-label"]: section for section in soup_of(folder).select("section")}


def test_the_page_holds_every_slice_of_every_subject_that_it_shows(made):
    prepared, folder = made
    found = {s.id: s for s in scrubber.chosen(prepared)}
    assert len(found) == 4
    assert list(sections(folder)) == list(found)
    choices = soup_of(folder).select_one("fieldset").text
    for name, section in sections(folder).items():
        subject, figures = found[name], section.select("figure")
        inside = np.asarray(subject.image[0][box_of(subject)])
        scan = shown(subject, figures[0])
        assert abs(scan / 255 - np.clip(inside / 1.2, 0, 1)).mean() < 0.03
        assert len({one.tobytes() for one in scan}) == len(scan)
        assert ("healthy" if subject.healthy else f"lesion {0.008 * subject.lesion.sum():.1f} ml") in choices
        assert np.array_equal(shown(subject, figures[0], "truth"), subject.lesion[box_of(subject)])


def test_maps_and_what_they_mark_are_those_of_the_run(made):
    prepared, folder = made
    for subject in scrubber.chosen(prepared):
        for figure in sections(folder)[subject.id].select("figure[data-method]"):
            name, box = figure["data-method"], box_of(subject)
            anomaly = scoring.read_map(str(folder), name, subject, prepared)[0][box]
            limit = evaluation.frozen_threshold(str(folder), name, prepared)
            top = float(figure.select(".ends span")[1].text)
            assert abs(shown(subject, figure) / 255 - np.clip(anomaly / top, 0, 1)).mean() < 0.03
            marked = (metrics.codes(anomaly) >= limit) & subject.brain[box]
            assert np.array_equal(shown(subject, figure, "found"), marked)
            assert np.array_equal(shown(subject, figure, "truth"), subject.lesion[box])


def test_areas_are_those_of_the_masks_in_square_millimetres(made):
    prepared, folder = made
    told = {one["id"]: one for one in json.loads(soup_of(folder).select_one("#areas").text)}
    for subject in scrubber.chosen(prepared):
        about, box = told[subject.id], box_of(subject)
        assert (about["first"], about["last"]) == (box[0].start, box[0].stop - 1)
        assert about["truth"] == [4 * int(one.sum()) for one in subject.lesion[box]]
        limit = evaluation.frozen_threshold(str(folder), "ae", prepared)
        marked = metrics.codes(scoring.read_map(str(folder), "ae", subject, prepared)[0]) >= limit
        assert about["marked"]["ae"] == [4 * int(one.sum()) for one in (marked & subject.brain)[box]]
        assert about["hits"]["ae"] == [4 * int(one.sum()) for one in (marked & subject.lesion)[box]]


def test_the_page_loads_nothing_and_says_what_it_shows(made):
    prepared, folder = made
    page, html = soup_of(folder), (folder / "scrubber.html").read_text()
    assert all(tag["src"].startswith("data:image/") for tag in page.select("[src]"))
    assert not page.select("link, iframe, object, script[src]")
    assert set(re.findall(r"url\([^)]*\)", html)) == {"url(#colours)", "url(#edge-truth)", "url(#edge-found)"}
    assert "http" not in html.replace(page.select_one("#areas").text, "")
    text = " ".join(page.text.split())
    for said in (
        "For research, not for diagnosis", "These brains are simulated", "residual, in intensity ÷ 99th percentile",
        "median of the scan", "promises a false-positive rate of 1 %", "FLAIR", "voxels of 2 × 2 × 2 mm",
        "validation set (healthy subjects)",
    ):  # fmt: skip
        assert said in text
    limit = metrics.value_of(evaluation.frozen_threshold(str(folder), "ae", prepared))
    assert f"Marked from {limit:.4g} up" in text
    assert all(label.find("input") or label.get("for") == "slice" for label in page.select("label"))
    assert page.select_one("input[type=range]#slice")
    assert all(window["aria-label"] for window in page.select(".window[role=img]"))
    assert "intensity_median" in text
    assert "random" not in text


def test_without_javascript_a_slice_with_lesion_stands_there_still(made):
    prepared, folder = made
    page, subject = soup_of(folder), scrubber.chosen(prepared)[0]
    there, *others = page.select("section")
    numbers = dict(re.findall(r"--(\w+): (\d+)", there["style"]))
    place = int(numbers["row"]) * int(numbers["columns"]) + int(numbers["column"])
    assert subject.lesion[box_of(subject)][place].any()
    assert not there.has_attr("hidden")
    assert all(other.has_attr("hidden") for other in others)
    assert there.select_one("[data-areas=truth]").text == f"Slice {place + 1}."
    assert page.select_one("form").has_attr("hidden")
    assert "Without JavaScript" in page.select_one("noscript").text


def test_a_flat_map_marks_nothing(made):
    _, folder = made
    for section in sections(folder).values():
        figure = section.select_one("figure[data-method=cae3d]")
        assert not decoded(figure.select_one(".found img")).any()
        assert "Marked from 0.5005 up" in figure.text


def test_pictures_carry_no_more_than_their_pixels(made):
    _, folder = made
    for image in soup_of(folder).select("img"):
        opened = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
        assert set(opened.info) <= {"transparency", "loop", "background", "timestamp", "duration"}
        assert not opened.getexif()


def test_the_index_leads_to_the_page_with_a_still_picture(made):
    _, folder = made
    index = BeautifulSoup((folder / "index.html").read_text(), "html.parser")
    picture = index.select_one('a[href="scrubber.html"] img')
    assert picture["src"].startswith("data:image/png;base64,")
    assert int(picture["width"]) > 2 * int(picture["height"])
    assert "truth" in picture["alt"]
    assert (folder / "scrubber.html").stat().st_size < 3e6


def test_the_same_run_gives_the_same_bytes_and_leaves_no_figure_open(made):
    _, folder = made
    first = (folder / "scrubber.html").read_bytes()
    before = plt.get_fignums()
    report.write(folder)
    assert (folder / "scrubber.html").read_bytes() == first
    assert plt.get_fignums() == before


@pytest.mark.parametrize(
    ("patients", "expected"), [(9, [7, 4, 1]), (4, [3, 1, 0]), (3, [2, 1, 0]), (2, [1, 0]), (1, [0]), (0, [])]
)
def test_patients_stand_for_large_medium_and_small_lesions(tmp_path, patients, expected):
    prepared = made_cohort.write(tmp_path, patients=patients)
    sick = [s for s in prepared.split("test") if not s.healthy]
    for i, subject in enumerate(sick):
        subject.facts["prepared_lesion_ml"] = i + 1.0
    names = [s.id for s in scrubber.chosen(prepared)]
    assert names == [sick[i].id for i in expected] + ["s05"]


def test_at_most_four_methods_in_the_order_of_the_list(tmp_path):
    folder = tmp_path / "run"
    write_run(folder, dict.fromkeys(["mirror", "vae", "cae3d", "intensity_median", "ae", "sided_ensemble"], Made))
    found = scrubber.read(folder)
    assert [m["name"] for m in found["methods"]] == ["sided_ensemble", "ae", "intensity_median", "cae3d"]


def test_the_list_names_detectors_there_are():
    assert scrubber.METHODS.keys() <= models.DETECTORS.keys()


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_maps_that_are_not_whole_are_left_out_and_named(tmp_path, status):
    folder = tmp_path / "run"
    prepared = write_run(folder, {"ae": Made, "dae": Made, "vae": Made, "diffusion": Diverged}, status=status)
    path = folder / "maps" / "dae" / f"{prepared.split('test')[0].id}.npz"
    path.write_bytes(path.read_bytes()[:-40])
    (folder / "maps" / "vae" / f"{prepared.split('validation')[0].id}.npz").unlink()
    report.write(folder)
    text = " ".join(soup_of(folder).text.split())
    assert "of another cohort or model: dae, vae, diffusion." in text
    assert not soup_of(folder).select("figure[data-method=dae]")


def test_maps_of_another_cohort_or_model_make_no_page(tmp_path):
    folder = tmp_path / "run"
    prepared = write_run(folder, {"ae": Made})
    (folder / "models").mkdir()
    report.write(folder)
    assert (folder / "scrubber.html").exists()
    (folder / "models" / "ae.safetensors").write_bytes(b"trained anew")
    assert "scrubber.html" not in report.write(folder).read_text()
    assert not (folder / "scrubber.html").exists()
    (folder / "models" / "ae.safetensors").unlink()
    assert "scrubber.html" in report.write(folder).read_text()
    shutil.rmtree(prepared.folder)
    assert "scrubber.html" not in report.write(folder).read_text()


@pytest.mark.parametrize("there", [{}, {"random": Made}])
def test_a_run_without_such_maps_has_no_page_and_no_dead_link(tmp_path, there):
    folder = tmp_path / "run"
    write_run(folder, there)
    assert "scrubber" not in report.write(folder).read_text()
    assert not (folder / "scrubber.html").exists()


def test_real_scans_carry_no_word_of_simulation(tmp_path):
    write_run(tmp_path / "run", {"ae": Made}, data="BraTS: 12 patients")
    report.write(tmp_path / "run")
    assert "simulated" not in soup_of(tmp_path / "run").text


def test_large_cohorts_get_coarser_pictures_and_a_page_below_the_limit(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    prepared = write_run(folder, {"ae": Made})
    fine = scrubber.read(folder)
    monkeypatch.setattr(scrubber, "MOST_BYTES", 1)
    poor = scrubber.read(folder)
    assert (fine["quality"], poor["quality"]) == (scrubber.QUALITIES[0], scrubber.QUALITIES[-1])
    assert len(str(poor["subjects"])) < 0.8 * len(str(fine["subjects"]))
    monkeypatch.setattr(scrubber, "MOST_PIXELS", 20_000)
    report.write(folder)
    subject = scrubber.chosen(prepared)[0]
    assert "one pixel of 2 × 2 shown" in sections(folder)[subject.id].text
    truth = decoded(sections(folder)[subject.id].select_one(".truth img"))
    assert truth.sum() == subject.lesion[box_of(subject)][:, ::-2, ::2].sum()


def test_a_modality_that_is_missing_is_not_shown(tmp_path):
    folder = tmp_path / "run"
    prepared = write_run(folder, {"ae": Made}, modalities=("FLAIR", "T2"))
    name = scrubber.chosen(prepared)[0].id
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    for one in manifest["subjects"]:
        one["missing"] = ["FLAIR"] if one["id"] == name else []
    (prepared.folder / "manifest.json").write_text(json.dumps(manifest))
    assert {s["id"]: s["modality"] for s in scrubber.read(folder)["subjects"]}[name] == "T2"


MOVES = """
const at = () => {
  const section = document.querySelector("section:not([hidden])"), said = {};
  for (const picture of section.querySelectorAll("figure:not([hidden]) .window")) {
    const window = picture.getBoundingClientRect(), of = picture.dataset.what;
    for (const image of picture.querySelectorAll("img")) {
      const sprite = image.getBoundingClientRect();
      const place = [(window.x - sprite.x) / window.width, (window.y - sprite.y) / window.height];
      said[`${of} ${image.parentElement.className}`] = place.map(Math.round);
    }
  }
  return {subject: section.ariaLabel, slice: slider.value, range: [slider.min, slider.max], places: said,
          told: slider.getAttribute("aria-valuetext"), label: section.querySelector(".window").ariaLabel,
          area: section.querySelector("[data-areas=ae]").textContent};
};
const move = value => { slider.value = value; slider.dispatchEvent(new Event("input", {bubbles: true})); return at(); };
const click = value => { document.querySelector(`[value="${value}"]`).click(); return at(); };
slider.focus();
const states = {form: !form.hidden, focus: document.activeElement === slider, start: at(), moved: move(9),
                end: move(99), healthy: click("3"), back: click("0"), one: click("dae"), bare: click("found")};
states.layers = [...document.querySelectorAll(".layer")].filter(one => one.offsetParent !== null).length;
document.body.textContent = JSON.stringify(states);
"""


def browse(page, script, place, *options):
    """What Chromium makes of a page with a script more, as text."""
    place.mkdir(exist_ok=True)
    (place / "page.html").write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    call = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--force-device-scale-factor=1",
    ]
    call += [f"--user-data-dir={place}", "--virtual-time-budget=3000", *options, (place / "page.html").as_uri()]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


@needs_browser
def test_in_a_browser_the_slider_moves_pictures_and_words(made, tmp_path):
    prepared, folder = made
    dumped = browse(folder / "scrubber.html", MOVES, tmp_path / "browser", "--dump-dom")
    states = json.loads(BeautifulSoup(dumped, "html.parser").body.text)
    first, *_, well = scrubber.chosen(prepared)
    start, moved, end, healthy, back = (states[name] for name in ("start", "moved", "end", "healthy", "back"))
    assert states["form"]
    assert states["focus"]
    assert (start["subject"], start["range"]) == (first.id, ["1", "10"])
    assert first.lesion[int(start["slice"])].any()
    assert start["told"].endswith("cm²") or start["told"].endswith("mm²")
    assert set(map(tuple, start["places"].values())) == {
        ((int(start["slice"]) - 1) % 4, (int(start["slice"]) - 1) // 4)
    }
    assert set(map(tuple, moved["places"].values())) == {(0, 2)}
    assert moved["told"] == "slice 9 of 1 to 10, no lesion"
    assert moved["label"] == f"FLAIR scan of {first.id}, axial slice 9"
    assert moved["area"] != start["area"]
    assert end["slice"] == "10"
    assert healthy["subject"] == well.id
    assert (back["subject"], back["slice"]) == (first.id, "10")
    assert {what.split()[0] for what in back["places"]} == {"FLAIR", "ae", "dae"}
    assert {what.split()[0] for what in states["one"]["places"]} == {"FLAIR", "ae"}
    assert states["layers"] == 4  # scan and map, each with the truth


@needs_browser
def test_the_screen_shows_the_voxels_of_the_chosen_slice(made, tmp_path):
    prepared, folder = made
    subject, number, edge = scrubber.chosen(prepared)[0], 6, 320
    script = f"""
    click = name => document.querySelector(`[name=outline][value=${{name}}]`).click();
    click("truth"); click("found");
    slider.value = {number}; slider.dispatchEvent(new Event("input"));
    const moved = document.querySelector("section:not([hidden])").style;
    for (const one of [...document.querySelectorAll("section:not([hidden]) .window")].slice(0, 2)) {{
      document.body.append(one);
      const place = ["--columns", "--row", "--column"].map(name => `${{name}}: ${{moved.getPropertyValue(name)}}`);
      one.style.cssText += `position: fixed; z-index: 9; top: 0; width: {edge}px; ${{place.join("; ")}};`
        + `left: ${{one.dataset.what.startsWith("FLAIR") ? 0 : {edge}}}px`;
    }}"""
    picture = tmp_path / "screen.png"
    browse(folder / "scrubber.html", script, tmp_path / "browser", f"--screenshot={picture}", "--window-size=1000,800")
    screen = np.asarray(Image.open(picture).convert("RGB")).astype(float) / 255
    box = box_of(subject)
    scans = tiled(np.asarray(subject.image[0][box]), scrubber.COLUMNS)
    side = scans.shape[1] // scrubber.COLUMNS
    centres = ((np.arange(side) + 0.5) * edge / side).astype(int)
    scan, found = (screen[np.ix_(centres, centres + left)] for left in (0, edge))
    method = scrubber.read(folder)["methods"][0]
    anomaly = scoring.read_map(str(folder), method["name"], subject, prepared)[0]
    maps = tiled(anomaly[box].astype(float) / method["top"], scrubber.COLUMNS)
    errors = np.zeros((2, len(anomaly[box])))
    for i in range(errors.shape[1]):
        row, column = (part * side for part in divmod(i, scrubber.COLUMNS))
        tile = np.s_[row : row + side, column : column + side]
        errors[0, i] = abs(scan[..., 0] - np.clip(scans[tile] / 1.2, 0, 1)).mean()
        errors[1, i] = abs(found - plt.get_cmap("inferno")(maps[tile])[..., :3]).mean()
    assert (errors.argmin(axis=1) == number - 1).all()
    assert (errors.min(axis=1) < 0.02).all()
