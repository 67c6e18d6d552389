"""Preparation: every voxel lands where its millimetres say, and intensities are what the recipe promises."""

import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import simulate
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import average_precision_score

from lib import datasets, intensities, preprocessing, volumes
from lib.errors import CourseError
from lib.preprocessing import NORMALISATIONS, Recipe, brain_mask, canonical, prepare, signal
from lib.volumes import Volume

SMALL = {"pixel_mm": 4.0, "size": 48}
ORIENTATIONS = [
    np.array([*zip(axes, flips, strict=True)])
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]
BRATS = Path(__file__).resolve().parents[2] / "shared" / "data" / "brats"
MEDIAN_AP = {
    "BRATS_HG0015": 0.89,
    "BraTS-GLI-00000-000": 0.76,
    "BraTS19_2013_2_1": 0.70,
    "BraTS19_2013_3_1": 0.38,
    "BraTS2021_00006": 0.98,
    "Brats18_2013_24_1": 0.88,
    "VSD_54512": 0.94,
    "brats_2013_pat0002_1": 0.94,
    "brats_2013_pat0003_1": 0.96,
    "brats_2013_pat0004_1": 0.95,
    "brats_2013_pat0005_1": 0.54,
    "brats_2013_pat0006_1": 0.96,
}


def scans(modalities=("FLAIR",), **options):
    images, lesion, affine = simulate(**options)
    return {m: Volume(images[m].astype(np.float32), affine) for m in modalities}, Volume(lesion, affine)


def turned(volume, orientation):
    """The same scan with its axes in another order and direction."""
    affine = volume.affine @ nibabel.orientations.inv_ornt_aff(orientation, volume.voxels.shape)
    return Volume(nibabel.apply_orientation(volume.voxels, orientation), affine)


def place_mm(volume, index):
    return nibabel.affines.apply_affine(volume.affine, index)


@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=lambda o: "".join(nibabel.orientations.ornt2axcodes(o)))
def test_any_orientation_becomes_canonical_with_every_voxel_in_its_place(orientation):
    oblique = np.eye(4)
    oblique[:3, :3] = [[1.99, 0.1, 0], [-0.1, 2.99, 0.2], [0, -0.2, 3.99]]
    oblique[:3, 3] = (-30, 20, 7)
    voxels = np.random.default_rng(0).random((5, 6, 7))
    volume = turned(Volume(voxels, oblique), orientation)
    result = canonical(volume)
    assert nibabel.aff2axcodes(result.affine) == ("R", "A", "S")
    np.testing.assert_array_equal(result.voxels, voxels)
    np.testing.assert_allclose(result.affine, oblique, atol=1e-9)


def marked(shape, voxel_mm, origin, orientation):
    """A brain-sized block with one bright ball, its centre in mm, with the axes turned."""
    affine = np.diag([*voxel_mm, 1.0])
    affine[:3, 3] = origin
    voxels = np.zeros(shape, np.float32)
    voxels[2:-2, 2:-2, 2:-2] = 100
    centre = np.array(shape) // 2 + (3, -4, 2)
    mm = (np.stack(np.mgrid[tuple(map(slice, shape))], axis=-1) - centre) * voxel_mm
    voxels[(mm**2).sum(axis=-1) <= 9**2] = 1000
    volume = Volume(voxels, affine)
    return turned(volume, orientation), place_mm(volume, centre)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.tuples(*[st.floats(1.5, 4)] * 3),
    st.tuples(*[st.floats(-200, 200)] * 3),
    st.sampled_from(ORIENTATIONS),
    st.sampled_from([1.5, 2.0, 3.0]),
    st.sampled_from([0.0, 2.0, 3.5]),
)
def test_a_point_in_mm_lands_at_its_prepared_index(voxel_mm, origin, orientation, pixel_mm, slice_mm):
    volume, mm = marked((28, 30, 26), voxel_mm, origin, orientation)
    recipe = Recipe(pixel_mm=pixel_mm, slice_mm=slice_mm, size=96)
    prepared = prepare({"FLAIR": volume}, None, recipe)
    sizes = nibabel.affines.voxel_sizes(prepared.affine)
    np.testing.assert_allclose(sizes[:2], pixel_mm)
    image = prepared.image[0]
    bright = image > (image.max() + np.median(image[prepared.brain])) / 2
    column_row_slice = np.array(ndimage.center_of_mass(bright))[::-1]
    apart = nibabel.affines.apply_affine(prepared.affine, column_row_slice) - mm
    assert (abs(apart) <= 0.6 * np.maximum(sizes, voxel_mm)).all()


def test_rows_run_to_the_front_columns_to_the_right_and_slices_up():
    given, lesion = scans()
    prepared = prepare(given, lesion, Recipe(**SMALL))
    assert nibabel.aff2axcodes(prepared.affine) == ("R", "A", "S")
    assert prepared.image.shape == (1, *prepared.brain.shape)
    assert prepared.brain.shape[1:] == (48, 48)
    slices, rows, columns = (np.flatnonzero(prepared.brain.any(axis=a)) for a in [(1, 2), (0, 2), (0, 1)])
    assert [len(rows) * 4, len(columns) * 4, len(slices) * 5] == pytest.approx([160, 130, 120], abs=10)
    assert rows.mean() == pytest.approx(23.5, abs=1)
    assert columns.mean() == pytest.approx(23.5, abs=1)
    assert (slices[0], slices[-1]) == (0, len(prepared.brain) - 1)


@pytest.mark.parametrize("slice_mm", [0.0, 2.0, 3.0])
@pytest.mark.parametrize("pixel_mm", [2.0, 3.0, 4.0])
@pytest.mark.parametrize("radius_mm", [10.0, 20.0])
def test_volumes_of_brain_and_lesion_are_kept(pixel_mm, slice_mm, radius_mm):
    given, lesion = scans(voxel_mm=2.0, radius_mm=radius_mm)
    prepared = prepare(given, lesion, Recipe(pixel_mm=pixel_mm, slice_mm=slice_mm, size=96))
    voxel_ml = abs(np.linalg.det(prepared.affine[:3, :3])) / 1000
    assert prepared.lesion.sum() * voxel_ml == pytest.approx(lesion.voxels.sum() * lesion.millilitres, rel=0.05)
    assert prepared.brain.sum() * voxel_ml == pytest.approx(1307, rel=0.03)
    assert not (prepared.lesion & ~prepared.brain).any()


def test_a_lesion_ends_at_the_brain():
    given, lesion = scans()
    everywhere = Volume(np.ones_like(lesion.voxels), lesion.affine)
    prepared = prepare(given, everywhere, Recipe(**SMALL))
    np.testing.assert_array_equal(prepared.lesion, prepared.brain)


def test_no_mask_or_an_empty_one_is_no_lesion():
    given, lesion = scans(radius_mm=0.0)
    assert not prepare(given, lesion, Recipe(**SMALL)).lesion.any()
    assert not prepare(given, None, Recipe(**SMALL)).lesion.any()


def test_intensities_lie_in_their_range_and_0_outside_the_brain():
    given, lesion = scans(("T1", "FLAIR"))
    given["T1"].voxels[10:12, 10:12, 10:12] = 30_000
    prepared = prepare(given, lesion, Recipe(modalities=("FLAIR", "T1"), **SMALL))
    assert prepared.image.dtype == np.float32
    assert prepared.image.min() >= 0
    assert prepared.image.max() == 1.5
    assert not prepared.image[:, ~prepared.brain].any()
    assert [np.percentile(one[prepared.brain], 99) for one in prepared.image] == pytest.approx([1, 1])
    one = prepare({"T1": given["T1"]}, lesion, Recipe(modalities=("T1",), **SMALL))
    np.testing.assert_allclose(prepared.image[1], one.image[0])


@pytest.mark.parametrize("normalisation", ["p99", "max", "zscore", "slice_range"])
def test_a_gain_changes_nothing(normalisation):
    given, lesion = scans()
    louder = {m: Volume(v.voxels * 7, v.affine) for m, v in given.items()}
    recipe = Recipe(normalisation=normalisation, **SMALL)
    soft, loud = prepare(given, lesion, recipe), prepare(louder, lesion, recipe)
    np.testing.assert_allclose(loud.image, soft.image, atol=1e-4)
    assert loud.scales == pytest.approx(soft.scales if normalisation == "slice_range" else [7 * s for s in soft.scales])


RANGES = {"p99": (0, 1.5), "max": (0, 1), "zscore": (-5, 5), "slice_range": (0, 1)}


@pytest.mark.parametrize("equalised", [False, True])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_every_normalisation_runs_in_its_range(normalisation, equalised):
    given, lesion = scans()
    prepared = prepare(given, lesion, Recipe(normalisation=normalisation, clahe=equalised, **SMALL))
    low, high = RANGES[normalisation]
    assert np.isfinite(prepared.image).all()
    assert low <= prepared.image.min() < prepared.image.max() <= high + 1e-6
    assert not prepared.image[:, ~prepared.brain].any()
    assert prepared.image[0, prepared.brain].std() > 0.05


def test_clahe_keeps_shape_range_and_background():
    given, lesion = scans()
    image = prepare(given, lesion, Recipe(**SMALL)).image[0]
    image[0] = 0
    image[1] *= 0.3
    result = preprocessing.clahe(image)
    assert result.shape == image.shape
    np.testing.assert_allclose(result.max(axis=(1, 2)), image.max(axis=(1, 2)), rtol=1e-5)
    assert not result[0].any()
    assert result[:, 0, 0].max() < 1e-3
    assert not np.allclose(result, image)


@pytest.mark.parametrize("slice_mm", [0.0, 3.0])
def test_the_largest_slice_has_most_brain_and_its_place(slice_mm):
    given, lesion = scans()
    whole = prepare(given, lesion, Recipe(slice_mm=slice_mm, **SMALL))
    one = prepare(given, lesion, Recipe(slice_mm=slice_mm, slices="largest", **SMALL))
    number = int(whole.brain.sum(axis=(1, 2)).argmax())
    assert one.image.shape == (1, 1, 48, 48)
    np.testing.assert_array_equal(one.image[:, 0], whole.image[:, number])
    np.testing.assert_array_equal(one.lesion[0], whole.lesion[number])
    here, there = (nibabel.affines.apply_affine(p.affine, (5, 7, k)) for p, k in [(one, 0), (whole, number)])
    np.testing.assert_allclose(here, there)


def test_a_brain_too_large_for_the_square_is_refused():
    given, lesion = scans()
    with pytest.raises(CourseError, match="does not fit") as caught:
        prepare(given, lesion, Recipe(pixel_mm=2.0, size=64))
    assert caught.value.cure


def test_a_standard_brings_scanners_together_and_keeps_the_order_of_intensities():
    random = np.random.default_rng(0)
    brain = np.ones((8, 20, 20), bool)
    tissue = random.gamma(4, 1, brain.shape)
    scanners = [tissue * gain + offset for gain, offset in ((100, 50), (30, 200), (70, 0))]
    for way in intensities.STANDARDS:
        standard = intensities.learnt([intensities.percentiles(s[brain], way) for s in scanners], way)
        images = [intensities.normalised(s, brain, "FLAIR", way, standard)[0] for s in scanners]
        assert np.diff(standard).min() > 0
        np.testing.assert_allclose(images[0], images[1], atol=1e-3)
        np.testing.assert_allclose(images[0], images[2], atol=1e-3)
        order = np.argsort(tissue.ravel())
        assert (np.diff(images[0].ravel()[order]) >= -1e-6).all()
        assert np.percentile(images[0], 99) == pytest.approx(1, abs=0.02)


def test_nyul_s_landmarks_are_those_of_the_paper():
    """Two scans by hand: 1st and 99th percentile on their mean, the median where the mean of the mapped medians is."""
    table = np.array([np.linspace(0.2, 1, 11), np.linspace(0.4, 1, 11) ** 2])
    standard = np.array(intensities.learnt(table, "nyul"))
    first = (0.2 + 0.16) / 2
    middle = np.mean([first + (row[5] - row[0]) / (1 - row[0]) * (1 - first) for row in table])
    assert intensities.STANDARDS["nyul"] == (1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 99)
    assert standard[[0, 5, 10]] == pytest.approx([first, middle, 1], abs=1e-6)


def test_nyul_goes_on_in_a_line_beyond_its_landmarks():
    brain = np.ones((1, 1, 10_001), bool)
    image = np.linspace(0.0, 1.0, 10_001)[None, None]
    standard = np.linspace(0.1, 1, 11)
    result, scale = intensities.normalised(image, brain, "T1", "nyul", standard)
    assert scale == pytest.approx(0.99)
    slope = (standard[10] - standard[9]) / 0.09
    assert result[0, 0, -1] == pytest.approx(1 + 0.01 * slope, abs=1e-4)


def test_a_scan_of_few_values_is_mapped_too():
    brain = np.ones((2, 10, 10), bool)
    image = np.repeat([[[0.0] * 10], [[1.0] * 10]], 10, axis=1)
    for way, levels in intensities.STANDARDS.items():
        result, _ = intensities.normalised(image, brain, "T1", way, np.linspace(0.1, 1, len(levels)))
        assert np.isfinite(result).all()
        assert result[1].min() > result[0].max()


BAD_RECIPES = {
    "size": [100, 0, -16],
    "pixel_mm": [0, -1.0, float("nan"), float("inf")],
    "slice_mm": [-1.0, float("nan"), float("inf")],
    "normalisation": ["p98", ""],
    "slices": ["middle"],
    "register": ["mni", "similarity"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD_RECIPES.items() for v in values])
def test_a_bad_recipe_is_refused_by_name(name, value):
    with pytest.raises(CourseError) as caught:
        Recipe(**{name: value})
    assert name in caught.value.what
    assert caught.value.cure


def test_the_brain_mask_fills_holes_and_drops_specks():
    ball = (np.stack(np.mgrid[:20, :20, :20] - 10) ** 2).sum(axis=0) <= 49
    image = ball.astype(np.float32)
    image[10, 10, 10:13] = 0
    image[0, 0, 0] = image[19, 18, 17] = 5
    np.testing.assert_array_equal(brain_mask([image]), ball)


def test_the_brain_is_what_any_modality_has():
    halves = np.zeros((2, 8, 8, 8), np.float32)
    halves[0, 1:4, 1:7, 1:7] = halves[1, 4:7, 1:7, 1:7] = 1
    assert brain_mask(list(halves)).sum() == 6**3
    assert not brain_mask([halves[0] * 0]).any()


@pytest.mark.skipif(not BRATS.is_dir(), reason=f"no real scans in {BRATS}")
def test_real_patients_are_recognised_and_as_bright_as_known():
    dataset = datasets.find_subjects(BRATS)
    have = [s.scans.keys() for s in dataset.subjects]
    assert sorted(MEDIAN_AP) == sorted(s.id for s in dataset.subjects)
    assert all("FLAIR" in scans for scans in have)
    assert all(s.lesion_mask for s in dataset.subjects)
    assert sum({"T1", "T2"} <= scans for scans in have) == 7
    assert sum(not {"T1", "T2"} & scans for scans in have) == 5
    assert {s.id: median_ap(s) for s in dataset.subjects} == pytest.approx(MEDIAN_AP, abs=0.05)


def median_ap(subject):
    """Voxel average precision of the median-filtered FLAIR, inside the brain."""
    lesion = volumes.read(subject.lesion_mask)
    prepared = prepare({"FLAIR": volumes.read(subject.scans["FLAIR"])}, lesion, Recipe())
    smooth = ndimage.median_filter(prepared.image[0] * prepared.brain, 5)
    return average_precision_score(prepared.lesion[prepared.brain], smooth[prepared.brain])


@pytest.mark.parametrize("orientation", ORIENTATIONS[::11], ids=str)
def test_the_scan_s_own_masks_keep_every_voxel_in_its_place(orientation):
    found, lesion = scans()
    turned_scans, turned_lesion = {"FLAIR": turned(found["FLAIR"], orientation)}, turned(lesion, orientation)
    prepared = prepare(turned_scans, turned_lesion, Recipe(**SMALL))
    own = prepared.own
    assert own.brain.sum() == brain_mask([found["FLAIR"].voxels]).sum()
    assert own.lesion.sum() == (lesion.voxels > 0).sum()
    centre = np.mean(np.argwhere(own.lesion)[:, ::-1], axis=0)
    there = place_mm(lesion, np.mean(np.argwhere(lesion.voxels), axis=0))
    np.testing.assert_allclose(nibabel.affines.apply_affine(own.affine, centre), there, atol=1e-3)
    drawn = np.mean(np.argwhere(prepared.lesion)[:, ::-1], axis=0)
    np.testing.assert_allclose(nibabel.affines.apply_affine(prepared.affine, drawn), there, atol=3)


def test_of_one_slice_only_its_own_slices_are_kept():
    found, lesion = scans(voxel_mm=4.0)
    whole = prepare(found, lesion, Recipe(**SMALL))
    single = prepare(found, lesion, Recipe(**SMALL, slices="largest"))
    assert single.own.brain.shape[0] == 1
    assert len(whole.own.brain) == len(whole.brain)
    assert single.own.brain.sum() == max(whole.own.brain.sum(axis=(1, 2)))


@pytest.mark.parametrize("outside", [0, -1024, -2000])
@pytest.mark.parametrize("pixel_mm", [5.0, 7.0])
def test_ct_is_seen_through_the_window_of_the_brain(outside, pixel_mm):
    mm = np.stack(np.mgrid[-16:17, -19:20, -14:15], axis=-1) * 5.0
    brain = ((mm / (70, 85, 60)) ** 2).sum(axis=-1) <= 1
    hounsfield = 35 + 10 * np.sin(mm.sum(axis=-1) / 9)
    hounsfield[14:18, 18:22, 13:16] = -90  # fat
    hounsfield[14:18, 25:27, 13:16] = 70  # blood
    scan = Volume(np.where(brain, hounsfield, outside).astype(np.float32), np.diag([5.0, 5.0, 5.0, 1.0]))
    assert (brain_mask([signal("CT", scan.voxels)]) == brain).all()
    result = prepare({"CT": scan}, None, Recipe(("CT",), pixel_mm=pixel_mm, size=48))
    assert result.scales == (80,)
    assert result.image.min() >= 0
    assert result.image.max() <= 1
    assert not result.image[0][~result.brain].any()
    inside = result.image[0][result.brain]
    assert np.median(inside) == pytest.approx(35 / 80, abs=0.05)
    if pixel_mm == 5.0:  # no interpolation: every voxel is what its Hounsfield units say
        expected = np.clip(hounsfield[brain] / 80, 0, 1)
        np.testing.assert_allclose(np.sort(inside), np.sort(expected), atol=1e-6)


def test_another_normalisation_of_ct_is_what_it_says():
    voxels = np.pad(np.random.default_rng(0).uniform(10, 60, (20, 20, 20)), 3, constant_values=-1000)
    scan = Volume(voxels.astype(np.float32), np.eye(4))
    recipe = Recipe(("CT",), pixel_mm=1.0, size=32, normalisation="max")
    assert prepare({"CT": scan}, None, recipe).scales[0] == pytest.approx(voxels.max(), rel=1e-6)
