"""The viewer without a browser: what each control changes in the picture and in the numbers, and what it refuses."""

import base64
import io
import re

import made_cohort
import nbformat
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

import lib
from lib import cases, evaluation, judging, metrics, models, pages, scoring, slice_views, viewer
from lib.cases import Case, Promise
from lib.errors import CourseError
from lib.plots import FOUND, TRUTH
from lib.viewer import SliceViewer

SHAPE = (6, 8, 10)  # slices, rows, columns
EDGES = (3.0, 2.0, 1.0)  # mm: a voxel is 0.006 ml
PROMISES = {("ae", "none"): Promise([0.25, 0.5], [0.05, 0.01]), ("blur", "none"): Promise([1.0, 4.0], [0.05, 0.01])}


def volumes():
    """Brain in all but the outermost voxels; a lesion of 2 × 2 × 2; maps that hold it and one voxel far from it."""
    brain, lesion = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    brain[1:-1, 1:-1, 1:-1] = True
    lesion[2:4, 4:6, 6:8] = True
    anomaly = 0.1 * brain + 0.5 * lesion
    anomaly[4, 1, 1] = 0.3
    return brain, lesion, anomaly.astype(np.float32)


def made(name="one", **others):
    brain, lesion, anomaly = volumes()
    image = np.stack([0.4 * brain + 0.5 * lesion, 0.8 * brain]).astype(np.float16)
    parts = {
        "modalities": ("FLAIR", "T2"), "image": image, "brain": brain, "voxel_mm": EDGES, "lesion": lesion,
        "maps": {"ae": anomaly, "blur": 8 * anomaly},
    }  # fmt: skip
    return Case(name, **parts | others)


@pytest.fixture
def look():
    return SliceViewer([made(), made("two", lesion=np.zeros(SHAPE, bool))], PROMISES)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an autoencoder and a baseline on discs for brains."""
    root = tmp_path_factory.mktemp("course")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib, "ROOT", root)
        prepared = made_cohort.write(root / "cohort")
        scoring.run_detector("ae", prepared, "run", device="cpu", epochs=1, width=8, code=4)
        scoring.run_detector("intensity", prepared, "run")
        yield prepared


def shown(look):
    return np.asarray(Image.open(io.BytesIO(look.picture.content)))


def panel(look, number=0):
    """A panel's pixels, uint8 [y, x, 3]."""
    (left, top), (height, width) = look.view.corners[number], look.view.size
    return shown(look)[top : top + height, left : left + width]


def has(pixels, colour):
    return (pixels == (255 * np.array(to_rgb(colour))).round()).all(axis=-1).any()


@pytest.mark.parametrize(
    ("plane", "number", "up", "left"), [("axial", 2, 1, 2), ("coronal", 5, 0, 2), ("sagittal", 7, 0, 1)]
)
def test_planes_are_the_right_slices_with_left_on_the_left_and_front_or_top_up(plane, number, up, left):
    places = np.stack(np.indices(SHAPE), axis=-1)
    cut = np.stack([slice_views.plane(places[..., axis], plane, number) for axis in range(3)])
    assert (cut[slice_views.PLANES[plane]] == number).all()
    assert (np.diff(cut[up], axis=0) == -1).all()  # front or top first
    assert (np.diff(cut[left], axis=1) == 1).all()  # the patient's left, or back, on the left
    for row, column in ((0, 0), (3, 2), (cut.shape[1] - 1, cut.shape[2] - 1)):
        assert slice_views.place(plane, number, row, column, SHAPE) == tuple(cut[:, row, column])


@pytest.mark.parametrize(("plane", "number"), [("axial", 2), ("coronal", 5), ("sagittal", 7)])
def test_panels_show_the_plane_at_the_scale_of_the_head(look, plane, number):
    look.show(plane=plane, slice=number, truth=False, detection=False)
    rest = [axis for axis in range(3) if axis != slice_views.PLANES[plane]]
    expected = slice_views.plane(look.case.image[0].astype(np.float32), plane, number)
    pixels = panel(look)
    for (row, column), value in np.ndenumerate(expected):
        y, x = (int((at + 0.5) * n / m) for at, n, m in zip((row, column), look.view.size, expected.shape, strict=True))
        if 40 < y < look.view.size[0] - 40 and 40 < x < look.view.size[1] - 40:  # letters and the bar stand at the edge
            assert pixels[y, x, 0] == pytest.approx(255 * value / slice_views.TOP, abs=1.5)
    mm = [EDGES[axis] * SHAPE[axis] for axis in rest]
    assert look.view.size[0] / look.view.size[1] == pytest.approx(mm[0] / mm[1], rel=0.01)


def test_figures_are_those_of_known_arrays(look):
    assert look.figures["ml"] == pytest.approx(8 * 0.006)  # ae ≥ 0.5, the promise of 1 %
    assert look.figures["dice"] == 1
    look.show(threshold=0.3)
    assert look.figures["ml"] == pytest.approx(9 * 0.006)
    assert look.figures["components"] == 2
    assert look.figures["truth_ml"] == pytest.approx(8 * 0.006)
    assert look.figures["dice"] == pytest.approx(16 / 17)
    assert "0.1 ml in 2 components" in look.read_out.value
    assert "Dice 0.94" in look.read_out.value
    look.show(scan="two")
    assert look.figures["truth_ml"] == 0
    assert "dice" not in look.figures
    assert "truth: no lesion" in look.picture.alt


def test_without_truth_none_is_claimed():
    look = SliceViewer([made(lesion=None)])
    assert set(look.figures) == {"ml", "components"}
    assert "truth" not in look.picture.alt


@pytest.mark.parametrize(
    "change",
    [
        {"slice": 3}, {"plane": "coronal"}, {"plane": "sagittal"}, {"modality": "T2"}, {"method": "blur"},
        {"step": "eroded"}, {"step": "median"}, {"step": "components"}, {"threshold": 0.3}, {"truth": False},
        {"detection": False}, {"arrangement": "overlaid"}, {"scan": "two"},
    ],
    ids=str,
)  # fmt: skip
def test_every_control_changes_the_picture_and_back(look, change):
    look.show(slice=2)
    before = {name: look[name] for name in look.controls}
    first = look.picture.content
    look.show(**change)
    assert look.picture.content != first
    look.show(**before)
    assert look.picture.content == first


def test_outlines_are_drawn_where_and_only_where_they_are_asked_for(look):
    look.show(slice=2, threshold=0.3)
    assert has(panel(look), FOUND)
    look.show(detection=False)
    assert has(panel(look), TRUTH)
    assert not has(panel(look), FOUND)
    look.show(truth=False)
    assert not has(panel(look), TRUTH)
    look.show(truth=True, slice=1)
    assert not has(panel(look), TRUTH)  # no lesion there


def test_overlaid_is_one_panel_that_keeps_the_scan_where_the_map_is_0(look):
    look.show(slice=2, truth=False, detection=False, modality="T2")
    apart = panel(look)
    look.show(arrangement="overlaid")
    assert len(look.view.corners) == 1
    together = panel(look)
    background = apart.max(axis=-1) == 0
    assert (together[background] == apart[background]).all()
    assert (together[~background] != apart[~background]).any()


def test_a_promise_is_exact_for_counts():
    random = np.random.default_rng(0)
    values = np.round(random.normal(0, 1, 5000), 2).astype(np.float16)
    promise = Promise.of(np.bincount(metrics.codes(values), minlength=metrics.CODES))
    for at in (-9, -0.5, 0, 0.01, 0.015, 1.3, values.max(), 9):
        assert promise.rate(at) == pytest.approx(np.mean(values >= at))
    counts = np.bincount(metrics.codes(values), minlength=metrics.CODES)
    for rate in (0.001, 0.01, 0.05, 0.5):
        assert cases.code_of(promise.threshold(rate)) == metrics.threshold_code(counts, rate)
    assert promise.threshold(0) > values.max()


def test_a_threshold_between_two_values_is_the_higher_one():
    between = 0.1 + 1e-6
    assert metrics.value_of(cases.code_of(between)) > between
    assert metrics.value_of(cases.code_of(0.5)) == 0.5
    assert metrics.value_of(cases.code_of(1e9)) == np.inf


def test_thresholds_are_the_promised_ones_and_keep_their_promise_from_method_to_method(look):
    assert look["threshold"] == 0.5
    assert "at most 1 %" in look.promised.value
    look.show(method="blur")
    assert look["threshold"] == 4
    look.show(threshold=1.5)
    assert "at most 5 %" in look.promised.value
    look.show(method="ae")
    assert look["threshold"] == 0.25
    look.show(threshold=0.2)
    assert "nothing" in look.promised.value
    look.show(method="blur")
    assert look["threshold"] == 1


def test_a_promise_beyond_every_value_marks_nothing():
    look = SliceViewer([made()], {("ae", "none"): Promise([0.0], [0.5])})
    assert look.figures["ml"] == 0
    assert look["threshold"] > 0.6


def test_without_a_promise_a_step_leaves_the_threshold_alone():
    look = SliceViewer([made()]).show(threshold=0.3, step="median")
    assert look["threshold"] == 0.3


def test_small_components_are_dropped_by_their_size_in_mm():
    case = made(voxel_mm=(10.0, 4.0, 4.0))  # a voxel is 160 mm³
    look = SliceViewer([case]).show(threshold=0.3, step="components")
    assert look.figures["components"] == 2
    look = SliceViewer([made(voxel_mm=(9.0, 4.0, 4.0))]).show(step="components", threshold=0.3)
    assert look.figures["components"] == 1


def test_keys_step_through_slices_and_stay_within(look):
    look.show(slice=3)
    for key, expected in (("ArrowUp", 4), ("ArrowDown", 3), ("End", 5), ("ArrowRight", 5), ("PageDown", 0), ("x", 0)):
        look.picture._handle_custom_msg({"key": key}, [])
        assert look["slice"] == expected
    look.picture._handle_custom_msg({"key": "PageUp"}, [])
    assert look["slice"] == 5


def test_the_pointer_reads_out_what_lies_under_it_and_a_click_moves_the_other_planes(look):
    look.show(slice=2)
    (left, top), (height, width) = look.view.corners[1], look.view.size
    at = [left + (7 + 0.5) * width / SHAPE[2], top + (SHAPE[1] - 1 - 5 + 0.5) * height / SHAPE[1]]
    look.picture.pointer = at
    assert "slice 2, row 5, column 7" in look.under.value
    assert "FLAIR 0.900" in look.under.value
    assert "ae 0.6" in look.under.value
    look.picture._handle_custom_msg({"click": at}, [])
    look.show(plane="coronal")
    assert look["slice"] == 5
    look.show(plane="sagittal")
    assert look["slice"] == 7
    look.picture.pointer = []
    assert look.under.value == ""
    look.picture.pointer = [1.0, 1.0]  # a title
    assert look.under.value == ""


@pytest.mark.parametrize(("plane", "place"), [("axial", 4), ("coronal", 1), ("sagittal", 1)])
def test_the_jump_goes_to_the_most_anomalous_slice_of_the_plane(look, plane, place):
    anomaly = volumes()[2]
    anomaly[4, 1, 1] = 5
    look = SliceViewer([made(maps={"ae": anomaly})]).show(plane=plane)
    look.jump.click()
    assert look["slice"] == place


def test_the_view_is_saved_with_a_telling_name_or_offered_to_download(look, tmp_path):
    look.show(slice=2)
    path = look.export(tmp_path)
    assert path.name == "one_ae_axial_002.png"
    assert path.read_bytes() == look.picture.content
    look.save.click()
    link = re.search(r'download="one_ae_axial_002.png" href="data:image/png;base64,([^"]*)"', look.notice.value)
    assert base64.b64decode(link[1]) == look.picture.content
    saving = SliceViewer([made("a/../b")], folder=tmp_path / "views")
    saving.save.click()
    assert [p.name for p in (tmp_path / "views").iterdir()] == ["a_.._b_ae_axial_001.png"]
    assert "a_.._b_ae_axial_001.png" in saving.notice.value


def test_every_view_says_what_it_is_not_for(look):
    assert slice_views.RESEARCH in look.picture.alt
    wide = slice_views.compose(look._panels([]), "axial", EDGES, [("x" * 400, "")])
    assert wide.pixels.shape[1] > 400 * 4  # words are not cut


def test_an_executed_notebook_and_its_page_keep_a_still_picture(look, tmp_path):
    bundle = look._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == look.model_id
    assert base64.b64decode(bundle["image/png"]) == look.picture.content
    cell = new_code_cell("look", outputs=[new_output("execute_result", bundle, execution_count=1)])
    (tmp_path / "notebooks").mkdir()
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "notebooks" / "a.ipynb")
    (page,) = pages.read(tmp_path, {"notebooks": {"a": {"status": "done"}}})
    assert bundle["image/png"] in page["cells"]
    assert "widget" not in page["cells"]


def test_a_run_is_shown_with_its_methods_truth_and_frozen_thresholds(run):
    look = viewer.of_run("run", run)
    assert set(look.controls["method"].options) == {"ae", "intensity"}
    assert set(look.cases) == {s.id for s in run.subjects if s.split != "train"}
    patient = next(s for s in run.split("test") if not s.healthy)
    look.show(scan=patient.id)
    for method in ("ae", "intensity"):
        for step in ("none", "median", "eroded", "components"):
            look.show(method=method, step=step)
            frozen = judging.freeze("run", method, run, ("none", step))
            record = judging.judge(judging.read("run", method, patient, run), frozen)[step].record
            assert cases.code_of(look["threshold"]) == frozen[step].code
            assert look.figures["dice"] == pytest.approx(record["dice"])
            assert look.figures["truth_ml"] == pytest.approx(record["lesion_ml"])
    assert evaluation.frozen_threshold("run", "intensity", run) == cases.code_of(look.show(step="none")["threshold"])
    look.save.click()
    assert [p.suffix for p in (lib.run_folder("run") / "views").iterdir()] == [".png"]


def test_the_reconstruction_is_the_detector_s_own_loaded_when_it_is_asked_for(run, monkeypatch):
    loaded = []
    load = models.load
    monkeypatch.setattr(models, "load", lambda path: loaded.append(path) or load(path))
    patient = next(s for s in run.split("test") if not s.healthy)
    look = viewer.of_run("run", run).show(scan=patient.id, method="ae", slice=4)
    assert loaded == []
    assert len(look.view.corners) == 2
    look.show(reconstruction=True)
    assert len(look.view.corners) == 3
    detector = load(lib.run_folder("run") / "models" / "ae.safetensors")
    drawn = np.stack([detector.redraw(patient, i)[0] for i in range(len(patient.brain))])
    np.testing.assert_allclose(look._reconstruction(), drawn[4][::-1], atol=1e-3)
    look.show(plane="coronal", slice=16)
    np.testing.assert_allclose(look._reconstruction(), drawn[:, 16][::-1], atol=1e-3)
    assert len(loaded) == 1
    look.show(method="intensity")
    assert look.controls["reconstruction"].disabled
    assert len(look.view.corners) == 2


def test_a_detector_of_whole_volumes_looks_once_at_a_scan(run, monkeypatch):
    looks = []

    class Whole:
        def expected(self, subject):
            looks.append(subject.id)
            return subject.image / 2

    monkeypatch.setattr(models, "load", lambda path: Whole())
    look = viewer.of_run("run", run).show(method="ae", reconstruction=True, plane="coronal", slice=16)
    assert looks == [look["scan"]]
    whole = look.case.image[0].astype(np.float32)
    np.testing.assert_allclose(look._reconstruction(), whole[:, 16][::-1] / 2, atol=1e-3)


def test_a_modality_that_is_missing_is_not_offered(look):
    image = made().image.copy()
    image[0] = 0
    both = SliceViewer([made(), made("without", image=image)]).show(scan="without")
    assert both.controls["modality"].options == ("T2",)
    both.show(scan="one")
    assert both.controls["modality"].options == ("FLAIR", "T2")
    assert both["modality"] == "T2"  # it stays where it was


def test_what_draws_is_known_without_loading_anything():
    assert models.draws("ae")
    assert models.draws("cae3d")
    assert not any(map(models.draws, ("synthetic_lesions", "sided_ensemble", "single_ae", "features", "intensity")))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"image": np.zeros((1, *SHAPE))}, "do not fit"),
        ({"brain": np.ones((8, 10), bool)}, "do not fit"),
        ({"lesion": np.zeros((6, 8, 9), bool)}, "do not fit"),
        ({"voxel_mm": (1.0, 0.0, 1.0)}, "edges"),
        ({"voxel_mm": (1.0, float("nan"), 1.0)}, "edges"),
        ({"voxel_mm": (1.0, 1.0)}, "edges"),
        ({"maps": {}}, "no map"),
        ({"brain": np.zeros(SHAPE, bool)}, "no brain"),
    ],
    ids=["image", "brain", "lesion", "edge of 0", "NaN", "edges", "maps", "no brain"],
)
def test_a_case_whose_parts_do_not_fit_is_refused_by_name(wrong, words):
    with pytest.raises(CourseError, match=f"one.*{words}"):
        made(**wrong)


@pytest.mark.parametrize(
    "anomaly", [np.zeros((6, 8, 9)), np.full(SHAPE, np.nan), np.full(SHAPE, 1e6)], ids=["shape", "NaN", "large"]
)
def test_a_map_that_cannot_be_shown_is_refused_by_name(anomaly):
    with pytest.raises(CourseError, match="one: the map of ae"):
        SliceViewer([made(maps={"ae": anomaly})])


def test_nothing_to_look_at_is_refused(run):
    for none in ([], [made(), made()]):
        with pytest.raises(CourseError, match="no scan"):
            SliceViewer(none)
    with pytest.raises(CourseError, match="'unknown' has no anomaly maps"):
        viewer.of_run("unknown", run)


@pytest.mark.parametrize("chosen", [{"scan": "three"}, {"plane": "oblique"}, {"slice": 6}, {"colour": "red"}], ids=str)
def test_controls_take_what_is_there_only(look, chosen):
    with pytest.raises(CourseError):
        look.show(**chosen)


def test_damage_met_while_looking_is_said_and_the_viewer_goes_on(run):
    path = lib.run_folder("run") / "maps" / "intensity" / f"{run.split('test')[0].id}.npz"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    look = viewer.of_run("run", run)
    look.controls["method"].value = "intensity"
    assert path.name in look.notice.value
    kept = look.picture.content
    look.controls["slice"].value = 3  # the picture of another method is not shown under this one's name
    look.save.click()
    look.picture.pointer = [100.0, 100.0]
    assert look.picture.content == kept
    assert path.name in look.notice.value
    assert look.under.value == ""
    with pytest.raises(CourseError, match=path.name):
        look.export(path.parent)
    with pytest.raises(CourseError, match=path.name):
        look.show(slice=4)
    path.write_bytes(content)
    look.show(slice=5)
    assert look.notice.value == ""
    assert "intensity" in look.picture.alt


def test_a_flat_map_and_a_healthy_run_without_maps_of_validation_are_shown(run):
    look = SliceViewer([made(maps={"empty": np.zeros(SHAPE)})], {("empty", "none"): Promise([0.0], [1.0])})
    assert look.figures["ml"] == 0
    missing = cases.Lazy([("ae", "none")], lambda _: (_ for _ in ()).throw(CourseError("x is missing.", "Make it.")))
    look = SliceViewer([made()], missing)
    assert "no healthy validation voxels" in look.promised.value
