"""The symmetry plane of a tilted phantom comes back, reflection undoes itself, a lesion is marked on its side only."""

import made_cohort
import numpy as np
import pytest
from scipy import ndimage

from lib import models
from lib.errors import CourseError
from lib.models import mirror
from lib.models.mirror import Plane, Scan, reflect, sided, smoother, symmetry_plane

SHAPE, EDGES = (48, 64, 56), np.array([3.0, 2.5, 2.5])  # slices, rows, columns; mm


def symmetric_head(plane, seed=0):
    """An ellipsoid with a texture that is the same on both sides of a plane, and its brain mask."""
    random = np.random.default_rng(seed)
    texture = ndimage.gaussian_filter(random.standard_normal(SHAPE), 2.5)
    places = np.moveaxis(np.indices(SHAPE), 0, -1) * EDGES
    across = plane.distance_mm(places)
    away = places - plane.centre - across[..., None] * plane.normal
    brain = (across / 52) ** 2 + (away[..., 0] / 55) ** 2 + (away[..., 1] / 65) ** 2 <= 1
    both = texture + reflect(texture, plane, EDGES)
    return ((0.5 + 0.1 * both / both.std()) * brain).clip(0).astype(np.float32), brain


@pytest.mark.parametrize(("yaw", "roll", "offset"), [(0, 0, 0), (6, -4, 3), (-9, 5, -6), (2, 10, 8)])
def test_the_plane_of_a_tilted_and_shifted_head_comes_back(yaw, roll, offset):
    centre = tuple((np.array(SHAPE) - 1) / 2 * EDGES)
    true = Plane(yaw, roll, offset, centre)
    image, brain = symmetric_head(true)
    found = symmetry_plane(image, brain, EDGES)
    assert np.degrees(np.arccos(min(1, found.normal @ true.normal))) < 1
    middle = centre + offset * true.normal
    assert abs(found.distance_mm(middle)) < 1
    assert found.agreement > 0.95


def test_reflecting_twice_gives_the_scan_back():
    plane = Plane(5, -3, 2, tuple((np.array(SHAPE) - 1) / 2 * EDGES))
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(SHAPE), 4)
    twice = reflect(reflect(smooth, plane, EDGES), plane, EDGES)
    inner = (slice(14, -14),) * 3
    np.testing.assert_allclose(twice[inner], smooth[inner], atol=0.15 * smooth.std())
    flat = Plane(0, 0, 0, plane.centre)
    np.testing.assert_allclose(reflect(smooth, flat, EDGES), smooth[:, :, ::-1], atol=1e-6)


def test_a_reflected_point_lies_as_far_behind_the_plane():
    plane = Plane(7, -5, 4, tuple((np.array(SHAPE) - 1) / 2 * EDGES))
    points = np.argwhere(reflect(_dot((20, 30, 12)), plane, EDGES) > 0.05) * EDGES
    assert plane.distance_mm(points).mean() == pytest.approx(
        -plane.distance_mm(np.array((20, 30, 12)) * EDGES), abs=1.5
    )


def _dot(place):
    volume = np.zeros(SHAPE, np.float32)
    volume[place] = 1
    return ndimage.gaussian_filter(volume, 1) / ndimage.gaussian_filter(volume, 1).max()


@pytest.mark.parametrize(("modality", "bright", "marked"), [
    ("FLAIR", True, True), ("FLAIR", False, False), ("T1", False, True), ("T1", True, False), ("T1ce", False, True),
])  # fmt: skip
def test_a_lesion_of_the_modality_s_sign_is_marked_on_its_side_only(tmp_path, modality, bright, marked):
    subject = _patient(tmp_path, modality, 0.4 if bright else -0.4)
    maps = models.create("mirror", (modality,), smoothing_mm=3.0).maps(subject)
    lesion = np.asarray(subject.lesion)
    opposite = lesion[:, :, ::-1]
    assert (maps[lesion].mean() > 0.1) == marked
    if modality != "T1ce":
        assert (maps[opposite].mean() > 0.1) != marked


def _patient(folder, modality, contrast):
    """A made subject whose texture is symmetric, with a lesion right of the middle."""
    subject = made_cohort.write(folder / "c", modalities=(modality,)).split("test")[-1]
    image, lesion = np.array(subject.image, np.float32), np.zeros(subject.brain.shape, bool)
    lesion[3:8, 12:19, 20:25] = True
    image[:] = subject.brain * (0.6 + contrast * lesion)
    np.save(subject.folder / "image.npy", image.astype(np.float16))
    np.save(subject.folder / "lesion.npy", lesion)
    return type(subject)(subject.id, subject.split, False, subject.folder.rename(subject.folder.with_name("p")),
                         subject.facts)  # fmt: skip


def test_smoothing_inside_the_brain_sees_nothing_outside():
    random = np.random.default_rng(0)
    brain = np.zeros((12, 20, 20), bool)
    brain[2:10, 4:16, 4:16] = True
    smooth = smoother(brain, np.array([1.0, 2.0, 2.0]))
    np.testing.assert_allclose(smooth(np.full(brain.shape, 0.7))[brain], 0.7, rtol=1e-5)
    values = random.random(brain.shape)
    np.testing.assert_array_equal(smooth(values), smooth(np.where(brain, values, 99)))


def test_the_guided_filter_keeps_the_scan_s_edge():
    brain = np.ones((8, 24, 24), bool)
    image = np.zeros(brain.shape, np.float32)
    image[:, :, 12:] = 1
    smooth = smoother(brain, np.array([2.0, 3.0, 3.0]))
    blurred = smooth(image)
    sharp = mirror.guided(blurred, image, smooth, 0.1)
    assert sharp[4, 12, 12] - sharp[4, 12, 11] > 3 * (blurred[4, 12, 12] - blurred[4, 12, 11])
    np.testing.assert_allclose(mirror.guided(blurred, 0 * image, smooth, 0.1), smooth(smooth(blurred)), atol=1e-5)


def test_sides_follow_the_modality():
    gap = np.array([[0.3, -0.2]])
    np.testing.assert_allclose(sided(gap, ("T2",)), [0.3, 0], atol=1e-6)
    np.testing.assert_allclose(sided(gap, ("T1",)), [0, 0.2], atol=1e-6)
    np.testing.assert_allclose(sided(gap, ("T1ce",)), [0.3, 0.2], atol=1e-6)
    np.testing.assert_allclose(sided(np.stack([gap[0], gap[0]]), ("T2", "T1")), [0.15, 0.1], atol=1e-6)


def test_a_scan_s_box_goes_back_to_its_place(tmp_path):
    subject = made_cohort.write(tmp_path / "c").split("test")[-1]
    scan = Scan.of(subject)
    back = scan.back(scan.image[0])
    np.testing.assert_allclose(back, subject.image[0] * subject.brain, atol=1e-6)
    assert scan.brain.size < subject.brain.size


def test_impossible_settings_are_named():
    with pytest.raises(CourseError, match="smoothing_mm"):
        mirror.Settings(smoothing_mm=0)
    with pytest.raises(CourseError, match="edge"):
        mirror.Settings(edge=-1)
