"""Components beside those of SciPy on whole volumes, and lesions found by their known answers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from lib import components

shapes = st.tuples(*[st.integers(1, 7)] * 3)


def noise(shape, seed, coarse=0.0):
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), coarse)


def plainly(mask, lesion, smallest):
    """Found, found strictly and false of one mask, by labels of the whole volume."""
    labels, number = ndimage.label(mask, components.TOUCHING)
    large = [i for i in range(1, number + 1) if (labels == i).sum() >= smallest]
    kept = np.isin(labels, large)
    truth, lesions = ndimage.label(lesion, components.TOUCHING)
    hits = [((truth == i) & kept).sum() for i in range(1, lesions + 1)]
    needed = [max(0.1 * (truth == i).sum(), 1) for i in range(1, lesions + 1)]
    near = set(labels[ndimage.binary_dilation(lesion, components.TOUCHING) & kept])
    strict = sum(hit >= least for hit, least in zip(hits, needed, strict=True))
    return [sum(hit > 0 for hit in hits), strict, len(large) - len(near)]


@given(shapes, st.integers(0, 1000), st.sampled_from((0, 0.7)), st.integers(1, 4))
def test_masks_that_grow_are_judged_as_each_is_alone(shape, seed, coarse, smallest):
    scores, lesion = np.round(20 + 5 * noise(shape, seed, coarse)).astype(int), noise(shape, seed + 1, 0.7) > 0.3
    thresholds = np.unique(scores)[::-1]
    together = components.lesion_counts(scores, thresholds, components.lesions(lesion), smallest)
    assert together.tolist() == [plainly(scores >= t, lesion, smallest) for t in thresholds]


@given(shapes, st.integers(0, 1000), st.integers(1, 5))
def test_what_is_not_small_stays_as_in_a_labelled_volume(shape, seed, smallest):
    mask = noise(shape, seed, 0.5) > 0.2
    labels, _ = ndimage.label(mask, components.TOUCHING)
    expected = mask & (np.bincount(labels.ravel()) >= smallest)[labels]
    np.testing.assert_array_equal(components.drop_small(mask, smallest), expected)


@given(shapes, st.integers(0, 1000))
def test_lesions_are_those_of_a_labelled_volume(shape, seed):
    mask = noise(shape, seed, 0.7) > 0.3
    found = components.lesions(mask)
    label, number = ndimage.label(mask, components.TOUCHING)
    np.testing.assert_array_equal(found.label, label)
    np.testing.assert_array_equal(found.near, ndimage.binary_dilation(mask, components.TOUCHING))
    assert found.sizes.tolist() == [(label == i).sum() for i in range(1, number + 1)]
    if mask.any():
        assert components.bounding_box(mask) == ndimage.find_objects(mask.astype(np.int8))[0]


def test_a_long_way_round_is_one_component():
    spiral = np.zeros((1, 9, 9), bool)
    for row in range(0, 9, 2):
        spiral[0, row] = True
        spiral[0, row + 1 : row + 2, 8 if row % 4 == 0 else 0] = True
    assert len(components.lesions(spiral).sizes) == 1
    np.testing.assert_array_equal(components.drop_small(spiral, int(spiral.sum())), spiral)
    assert not components.drop_small(spiral, int(spiral.sum()) + 1).any()


@pytest.fixture
def two_lesions():
    lesion = np.zeros((9, 9, 20), bool)
    lesion[3:6, 3:6, 2:5] = lesion[3:6, 3:6, 14:17] = True
    return lesion


def found(mask, lesion, **options):
    """Lesions found, and false components."""
    counts = components.lesion_counts(mask, [1], components.lesions(lesion), **options)
    any_voxel, strict, false = counts[0].tolist()
    assert strict <= any_voxel
    return any_voxel, false


def test_a_tenth_of_a_lesion_finds_it_strictly(two_lesions):
    scores = np.ones(two_lesions.shape, int) * two_lesions
    scores[3, 3, 2:4], scores[3, 3, 4] = 3, 2  # two voxels, then three, of 27
    counts = components.lesion_counts(scores, [3, 2, 1], components.lesions(two_lesions))
    assert counts[:, :2].tolist() == [[1, 0], [1, 1], [2, 2]]


def test_lesions_found_and_false_components(two_lesions):
    half, bridge, apart = (np.zeros_like(two_lesions) for _ in range(3))
    half[3, 3, 2] = True
    bridge[4, 4, 1:18] = True
    apart[0, 0, 9:11] = apart[8, 8, 9:11] = True
    assert len(components.lesions(two_lesions).sizes) == 2
    assert found(two_lesions, two_lesions) == (2, 0)
    assert found(half, two_lesions) == (1, 0)
    assert found(bridge, two_lesions) == (2, 0)
    assert found(half | apart, two_lesions) == (1, 2)
    assert found(np.zeros_like(half), two_lesions) == (0, 0)
    assert found(apart, np.zeros_like(apart)) == (0, 2)


def test_small_components_are_no_detections(two_lesions):
    mask = np.zeros_like(two_lesions)
    mask[3, 3, 2] = True
    mask[0, 0, 8:12] = True
    assert found(mask, two_lesions, smallest=4) == (0, 1)
    assert found(mask, two_lesions, smallest=5) == (0, 0)


def test_a_component_beside_a_lesion_is_neither_hit_nor_false(two_lesions):
    beside, diagonal, away = (np.zeros_like(two_lesions) for _ in range(3))
    beside[4, 4, 5] = diagonal[6, 6, 5] = away[4, 4, 6] = True
    assert found(beside, two_lesions) == found(diagonal, two_lesions) == (0, 0)
    assert found(away, two_lesions) == (0, 1)


def test_lesions_that_touch_at_a_corner_are_one():
    lesion = np.zeros((4, 4, 4), bool)
    lesion[1, 1, 1] = lesion[2, 2, 2] = True
    assert len(components.lesions(lesion).sizes) == 1
