"""Registration and shading: a known turn is found, a known field is taken off, and maps come back to their place."""

import sys
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import simulate
from scipy import ndimage
from scipy.spatial.transform import Rotation

from lib import registration
from lib.cohort import PreparedSubject
from lib.detection import _on_scan
from lib.errors import CourseError
from lib.judging import _on_own_grid
from lib.preprocessing import Recipe, brain_mask, canonical, prepare, resampled
from lib.volumes import Volume, read

pytest.importorskip("SimpleITK", reason="SimpleITK is not installed: pip install -r requirements-extra.txt")
HEALTHY = Path(__file__).resolve().parents[2] / "shared" / "data" / "healthy_t1_bids"
KNOWN = {"rotation": (12.0, -8.0, 20.0), "shift": (15.0, -10.0, 25.0)}  # degrees about the axes, mm


def rigid(rotation, shift):
    turn = Rotation.from_euler("xyz", rotation, degrees=True).as_matrix()
    return nibabel.affines.from_matvec(turn, shift)


@cache
def template_scan(voxel_mm=4):
    """The template's own brain with a bright ball in it, its mask, and the mask of the ball."""
    from nilearn import datasets

    image = datasets.load_mni152_template(resolution=voxel_mm)
    brain = datasets.load_mni152_brain_mask(resolution=voxel_mm).get_fdata() > 0
    mm = nibabel.affines.apply_affine(image.affine, np.moveaxis(np.indices(brain.shape), 0, -1))
    ball = brain & (np.linalg.norm(mm - (30, 10, 30), axis=-1) <= 14)
    voxels = (100 + 900 * image.get_fdata() + 900 * ball) * brain
    return Volume(voxels.astype(np.float32), image.affine), brain, ball


def turned_scan():
    """The same head, lying otherwise in the scanner: the true transform to the template is the inverse of its turn."""
    scan, brain, ball = template_scan()
    turn = rigid(**KNOWN)
    return Volume(scan.voxels, turn @ scan.affine), Volume(ball.astype(np.float32), turn @ scan.affine), brain, turn


@cache
def prepared(kind):
    scan, lesion, _, _ = turned_scan()
    return prepare({"T1": scan}, lesion, Recipe(("T1",), pixel_mm=4.0, slice_mm=4.0, size=64, register=kind))


def apart_mm(found, truth, volume, brain):
    places = nibabel.affines.apply_affine(volume.affine, np.argwhere(brain))
    difference = nibabel.affines.apply_affine(found, places) - nibabel.affines.apply_affine(truth, places)
    return np.linalg.norm(difference, axis=1).max()


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_a_known_turn_is_found(kind):
    scan, _, brain, turn = turned_scan()
    found = registration.to_template(scan, brain, kind)
    assert apart_mm(found, np.linalg.inv(turn), scan, brain) < 4
    if kind == "rigid":
        np.testing.assert_allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-9)
    assert registration.template_dice(scan, brain, np.eye(4)) < 0.75
    assert registration.template_dice(scan, brain, found) > 0.95
    assert registration.doubt(found, registration.template_dice(scan, brain, found)) == ""


def test_the_same_scan_gives_the_same_transform_and_field_bit_for_bit():
    scan, _, brain, _ = turned_scan()
    again = registration.to_template(scan, brain, "affine")
    np.testing.assert_array_equal(again, prepared("affine").own.to_template)
    scan, brain, _ = template_scan(8)
    one, two = (registration.bias_corrected(scan, brain).voxels for _ in range(2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_prepared_slices_lie_along_the_template_s_axes(kind):
    result, (_, _, ball) = prepared(kind), template_scan()
    edges = nibabel.affines.voxel_sizes(result.affine)
    np.testing.assert_allclose(result.affine[:3, :3], np.diag(edges), atol=1e-6)
    np.testing.assert_allclose(edges, 4, atol=1e-6)
    assert result.affine[2, 3] % 4 == pytest.approx(0, abs=1e-6)
    middle = nibabel.affines.apply_affine(result.affine, np.argwhere(result.lesion)[:, ::-1].mean(axis=0))
    there = nibabel.affines.apply_affine(template_scan()[0].affine, np.argwhere(ball).mean(axis=0))
    np.testing.assert_allclose(middle, there, atol=4)
    assert result.template_dice > 0.95


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_the_scan_s_own_grid_keeps_its_millilitres_and_gets_the_map_back(kind):
    (scan, lesion, brain, _), result = turned_scan(), prepared(kind)
    own = result.own
    assert own.lesion.sum() == lesion.voxels.sum()
    assert own.brain.sum() == brain.sum()
    back = resampled(result.lesion, result.brain, *own.within(result.affine), own.brain.shape)
    placed = own.placed(back, scan.voxels.shape, scan.affine)
    truth = lesion.voxels > 0
    shift = np.subtract(ndimage.center_of_mass(placed), ndimage.center_of_mass(truth))
    assert np.abs(shift).max() < 0.5
    found = placed >= 0.5
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.85
    np.testing.assert_array_equal(own.placed(own.brain, scan.voxels.shape, scan.affine), brain_mask([scan.voxels]))


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_slices_with_lesion_are_known_on_the_turned_grid(kind):
    result = prepared(kind)
    drawn = np.flatnonzero(result.lesion.any(axis=(1, 2)))
    assert set(drawn) <= set(result.lesion_slices)
    assert len(result.lesion_slices) <= len(drawn) + 3
    usable = np.ones(len(result.brain), bool)
    usable[list(result.lesion_slices)] = False
    box = tuple(slice(0, n) for n in result.brain.shape)
    ground = _on_own_grid(result.own, result.affine, box, usable)
    assert not (ground.healthy & ground.lesion).any()
    assert ground.healthy.sum() > 0.5 * ground.brain.sum()
    assert ground.voxel_mm3 == pytest.approx(64, rel=1e-4)


def test_one_slice_of_a_registered_scan_keeps_its_place():
    scan, lesion, _, _ = turned_scan()
    recipe = Recipe(("T1",), pixel_mm=4.0, slice_mm=4.0, size=64, register="rigid", slices="largest")
    one, whole = prepare({"T1": scan}, lesion, recipe), prepared("rigid")
    number = int(whole.brain.sum(axis=(1, 2)).argmax())
    np.testing.assert_array_equal(one.image[:, 0], whole.image[:, number])
    places = [nibabel.affines.apply_affine(p.affine, (3, 4, k)) for p, k in ((one, 0), (whole, number))]
    np.testing.assert_allclose(*places, atol=1e-6)
    assert 0 < one.own.brain.sum() < whole.own.brain.sum() / 10


def test_a_square_makes_room_for_a_brain_that_lies_off_the_template_s_middle(monkeypatch):
    scan, lesion, _, _ = turned_scan()
    aside = nibabel.affines.from_matvec(np.eye(3), (0, 30, 0)) @ prepared("rigid").own.to_template
    monkeypatch.setattr(registration, "to_template", lambda *_: aside)
    result = prepare({"T1": scan}, lesion, Recipe(("T1",), pixel_mm=4.0, slice_mm=4.0, size=48, register="rigid"))
    assert result.brain.sum() == pytest.approx(prepared("rigid").brain.sum(), rel=0.01)
    assert not (result.brain[:, [0, -1]].any() and result.brain[:, :, [0, -1]].any())
    with pytest.raises(CourseError, match="does not fit"):
        prepare({"T1": scan}, lesion, Recipe(("T1",), pixel_mm=4.0, slice_mm=4.0, size=32, register="rigid"))


def field(shape, strength=0.4):
    """A smooth shading, mean 1, `strength` from its mean to its ends along a diagonal, with a hump."""
    x, y, z = (np.linspace(-1, 1, n) for n in shape)
    return np.exp(strength * (x[:, None, None] + y[:, None] - z) / 2 + strength * np.cos(2 * x)[:, None, None] / 2)


def residue(scan, corrected, brain):
    """Standard deviation of the logarithm of the remaining shading inside a brain."""
    return np.log(corrected.voxels[brain] / scan.voxels[brain]).std()


def test_a_known_field_is_taken_off():
    scan, brain, _ = template_scan(8)
    plain = registration.bias_corrected(scan, brain)
    shaded = Volume((scan.voxels * field(brain.shape)).astype(np.float32), scan.affine)
    corrected = registration.bias_corrected(shaded, brain)
    before, after = residue(scan, shaded, brain), residue(plain, corrected, brain)
    assert after < 0.3 * before
    assert not corrected.voxels[~brain].any()
    logs = [np.log(v.voxels[brain]).mean() for v in (shaded, corrected)]
    assert logs[0] == pytest.approx(logs[1], abs=1e-4)


def test_bias_is_a_step_of_the_recipe():
    scan, brain, _ = template_scan(8)
    shaded = Volume((scan.voxels * field(brain.shape)).astype(np.float32), scan.affine)
    apart = []
    for bias in (False, True):
        recipe = Recipe(("T1",), pixel_mm=8.0, slice_mm=8.0, size=32, bias=bias)
        one, other = (prepare({"T1": v}, None, recipe) for v in (scan, shaded))
        apart.append(np.abs(one.image[0] - other.image[0])[one.brain].mean())
    assert apart[1] < 0.3 * apart[0]


def test_thin_stacks_are_corrected_too():
    images, _, affine = simulate()
    thin = images["FLAIR"][:, :, 11:14].astype(np.float32)
    corrected = registration.bias_corrected(Volume(thin, affine), thin > 0)
    assert np.isfinite(corrected.voxels).all()
    assert (corrected.voxels > 0).sum() == (thin > 0).sum()


@pytest.mark.parametrize("given", [{"bias": True}, {"register": "rigid"}])
def test_without_the_package_the_recipe_says_how_to_get_it(given, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(CourseError, match="SimpleITK") as caught:
        Recipe(**given)
    assert "pip install -r requirements-extra.txt" in caught.value.cure
    Recipe()


def test_doubts_are_said_in_words():
    assert "overlaps" in registration.doubt(np.eye(4), 0.4)
    assert "scales" in registration.doubt(np.diag([2.0, 2.0, 2.0, 1.0]), 0.95)
    assert registration.doubt(np.eye(4), 0.9) == ""


def test_all_modalities_share_the_transform_of_the_first():
    scan, _, _, _ = turned_scan()
    inverted = Volume((1200 - scan.voxels) * (scan.voxels > 0), scan.affine)
    recipe = Recipe(("T1", "FLAIR"), pixel_mm=4.0, slice_mm=4.0, size=64, register="rigid")
    both = prepare({"FLAIR": inverted, "T1": scan}, None, recipe)
    np.testing.assert_array_equal(both.affine, prepared("rigid").affine)
    np.testing.assert_allclose(both.own.to_template, prepared("rigid").own.to_template)


def test_a_detection_on_a_registered_scan_lies_on_the_file_s_own_grid(tmp_path):
    """The bright ball's map, made on the template's axes, is where the ball is in the file, flipped axes and all."""
    scan, lesion, _, _ = turned_scan()
    flipped = Volume(np.ascontiguousarray(scan.voxels[::-1]), scan.affine @ np.diag([-1.0, 1, 1, 1]))
    flipped.affine[:3, 3] = (scan.affine @ [scan.voxels.shape[0] - 1, 0, 0, 1])[:3]
    result = prepare({"T1": flipped}, None, Recipe(("T1",), pixel_mm=4.0, slice_mm=4.0, size=64, register="affine"))
    folder = tmp_path / "one"
    folder.mkdir()
    np.savez(folder / "own_grid.npz", **vars(result.own))
    np.save(folder / "brain.npy", result.brain)
    facts = {"scan_shape": flipped.voxels.shape, "scan_affine": flipped.affine, "affine": result.affine}
    found, _ = _on_scan(PreparedSubject("one", "", False, folder, facts), prepared("affine").lesion.astype(np.float32))
    truth = lesion.voxels[::-1]
    apart = np.subtract(ndimage.center_of_mass(found), ndimage.center_of_mass(truth))
    assert np.abs(apart).max() < 0.7


@pytest.mark.skipif(not HEALTHY.is_dir(), reason=f"no real scans in {HEALTHY}")
def test_a_real_brain_comes_to_lie_on_the_template():
    scan = canonical(read(next(HEALTHY.glob("sub-64/anat/*T1w.nii.gz"))))
    brain = brain_mask([scan.voxels])
    found = registration.to_template(scan, brain, "affine")
    assert registration.template_dice(scan, brain, np.eye(4)) < 0.6
    assert registration.template_dice(scan, brain, found) > 0.93


def test_a_scan_that_cannot_be_corrected_is_said_in_words():
    brain = np.zeros((12, 12, 12), bool)
    brain[5:7, 5, 5] = True
    with pytest.raises(CourseError, match="N4") as caught:
        registration.bias_corrected(Volume(100.0 * brain, np.diag([4.0, 4.0, 4.0, 1.0])), brain)
    assert "bias off" in caught.value.cure
