"""Steps on maps, beside SciPy's and by their known answers."""

import numpy as np
import pytest
from scipy import ndimage

from lib import metrics, postprocessing


@pytest.fixture
def scan():
    """A map, as codes, and the mask of an ellipsoid that touches the edge of the volume."""
    random = np.random.default_rng(0)
    place = np.indices((12, 20, 18)) - np.array([6, 8, 9])[:, None, None, None]
    brain = ((place / np.array([7, 9, 7])[:, None, None, None]) ** 2).sum(axis=0) < 1
    values = (random.normal(size=brain.shape) * brain).astype(np.float16)
    return values, metrics.codes(values), brain


def test_the_median_is_that_of_scipy_inside_the_brain(scan):
    values, code, brain = scan
    expected = ndimage.median_filter(values.astype(np.float32), 5, mode="constant") * brain
    np.testing.assert_array_equal(
        postprocessing.scores(code, brain, "median"), metrics.codes(expected.astype(np.float16))
    )


@pytest.mark.parametrize("edges", [(5, 5, 5), (1, 5, 5), (3, 1, 7)])
@pytest.mark.parametrize("lowest", [None, 0.3])  # None: values of both signs; 0.3: most windows have their middle at 0
def test_medians_of_any_window_are_those_of_scipy(scan, edges, lowest):
    values, _, brain = scan
    values = values if lowest is None else np.where(values > lowest, values, 0)
    expected = ndimage.median_filter(values.astype(np.float32), edges, mode="constant") * brain
    found = postprocessing.median(metrics.codes(values), brain, edges)
    np.testing.assert_array_equal(found, metrics.codes(expected.astype(np.float16)))


def test_erosion_is_that_of_scipy(scan):
    _, _, brain = scan
    cross = ndimage.generate_binary_structure(2, 1)[None]
    np.testing.assert_array_equal(postprocessing.eroded(brain), ndimage.binary_erosion(brain, cross, iterations=2))


def test_erosion_takes_two_pixels_from_every_edge_within_the_slice():
    brain = np.zeros((3, 9, 9), bool)
    brain[:, 1:8, 1:8] = True
    code = metrics.codes(np.ones(brain.shape, np.float16))
    kept = postprocessing.scores(code, brain, "eroded") == code
    expected = np.zeros_like(brain)
    expected[:, 3:6, 3:6] = True
    np.testing.assert_array_equal(kept, expected)
    assert set(np.unique(postprocessing.scores(code, brain, "eroded")[~kept])) == {postprocessing.ZERO}
    assert metrics.value_of(postprocessing.ZERO) == 0


def test_components_keeps_twenty_voxels_and_drops_nineteen():
    brain = np.ones((5, 5, 20), bool)
    mask = np.zeros_like(brain)
    mask[0, 0, :19] = True
    mask[2, :2, :10] = True
    code = metrics.codes(mask.astype(np.float16))
    threshold = int(metrics.codes(np.ones(1, np.float16))[0])
    found = postprocessing.detected(code, brain, threshold, "components", 20)
    assert found.sum() == 20
    assert not found[0].any()
    assert postprocessing.detected(code, brain, threshold, "none", 20).sum() == 39


def test_none_and_components_leave_the_map_alone(scan):
    _, code, brain = scan
    for step in ("none", "components"):
        np.testing.assert_array_equal(postprocessing.scores(code, brain, step), code)


def test_nothing_outside_the_brain_is_detected(scan):
    _, code, brain = scan
    for step in postprocessing.STEPS:
        assert not (postprocessing.detected(code, brain, 0, step, 20) & ~brain).any()
