"""Grids over volumes: proportions kept or not, values found again on the way back."""

import numpy as np
import pytest
from scipy import ndimage

from lib.boxes import Box


def ball(shape, centre, radius_mm, edges):
    place = np.indices(shape).transpose(1, 2, 3, 0)
    return (((place - centre) * edges) ** 2).sum(axis=-1) <= radius_mm**2


def smooth(shape, seed=0):
    return ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 3).astype(np.float32)


def spans(mask):
    return np.ptp(np.argwhere(mask > 0.5), axis=0) + 1


def test_a_cube_about_the_brain_keeps_a_sphere_round_whatever_the_voxels_are():
    edges = np.array([6.0, 2.0, 1.5])
    brain = np.ones((20, 60, 80), bool)
    sphere = ball(brain.shape, (10, 30, 40), 24, edges)
    found = Box.centred(brain, edges, (32, 32, 32), 4.0).cut(sphere)
    assert np.ptp(spans(found)) <= 1
    assert found.sum() * 4**3 == pytest.approx(sphere.sum() * edges.prod(), rel=0.03)


def test_squeezing_takes_all_of_the_volume_and_flattens_the_sphere():
    edges = np.array([6.0, 2.0, 1.5])
    sphere = ball((20, 60, 120), (10, 30, 60), 24, edges)
    low, *_, high = sorted(spans(Box.squeezed(sphere.shape, (32, 32, 32)).cut(sphere)))
    assert high >= 1.3 * low
    constant = Box.squeezed((20, 60, 120), (32, 32, 32))
    assert constant.cut(np.ones((20, 60, 120))) == pytest.approx(1)


@pytest.mark.parametrize("box", [
    Box.squeezed((24, 30, 26), (24, 30, 26)),
    Box.squeezed((24, 30, 26), (40, 44, 36)),
    Box.centred(np.ones((24, 30, 26), bool), (2, 2, 2), (32, 32, 32), 2.0),
])  # fmt: skip
def test_a_grid_that_is_fine_enough_gives_the_volume_back(box):
    image = smooth((24, 30, 26))
    assert np.abs(box.back(box.cut(image)) - image).max() < 0.03 * np.abs(image).max() + 0.02


def test_what_lies_beyond_the_cube_is_cut_off_and_what_is_missing_is_zero():
    brain = np.ones((40, 10, 40), bool)
    cube = Box.centred(brain, (1, 1, 1), (20, 20, 20), 1.0).cut(brain)
    assert cube.sum() == 20 * 10 * 20
    assert cube[:, :5].max() == 0
