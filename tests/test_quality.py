"""Masks of known faults: half a brain, two parts, a cut one, an eye, a whole head."""

import numpy as np
import pytest

from lib import quality

MM = np.array([2.0, 2.0, 2.0])


def ellipsoid(semi=(65, 85, 62), centre=(0, 0, 0), shape=(90, 110, 90)):
    mm = (np.stack(np.indices(shape), axis=-1) - (np.array(shape) - 1) / 2) * MM
    return (((mm - centre) / semi) ** 2).sum(axis=-1) <= 1


def said(mask, mm=MM):
    return quality.flags(quality.measured(mask, mm), mask.shape[2])


def test_a_whole_brain_has_its_known_volume_and_no_flag():
    found = quality.measured(ellipsoid(), MM)
    assert found["litres"] == pytest.approx(4 / 3 * np.pi * 0.65 * 0.85 * 0.62, rel=0.01)
    assert found["roundness"] == pytest.approx(65 / 85, abs=0.02)
    assert (found["parts"], found["holes"], found["faces"]) == (1, 0, 0)
    assert found["asymmetry"] < 0.01
    assert said(ellipsoid()) == []


def halved():
    mask = ellipsoid()
    mask[:45] = False
    return mask


def lopsided():
    mask = ellipsoid()
    mask[:45, 55:] = False
    return mask


def gapped():
    mask = ellipsoid()
    mask[:, :, 40:43] = False
    return mask


def leaping():
    return np.where(np.arange(90) < 48, ellipsoid(), ellipsoid((30, 40, 62)))


FAULTS = {
    "half a brain": (halved, "its width is 0.3"),
    "no left front": (lopsided, "has nothing on the other side"),
    "two parts": (
        lambda: ellipsoid((40, 60, 50), (-44, 0, 0)) | ellipsoid((40, 60, 50), (44, 0, 0)),
        "2 separate parts",
    ),
    "an eye": (lambda: ellipsoid((15, 15, 15)), "0.01 litres"),
    "a head": (lambda: ellipsoid((80, 100, 85)), "2.85 litres"),
    "shifted out of the picture": (lambda: ellipsoid(centre=(50, 0, 0)), "touches the edge"),
    "empty slices": (gapped, "3 empty slices"),
    "a leap between slices": (leaping, "from one slice to the next"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_faulty_mask_is_flagged(kind):
    make, words = FAULTS[kind]
    assert any(words in one for one in said(make()))


def test_a_mask_of_nothing_and_a_single_slice_are_measured():
    nothing = quality.measured(np.zeros((9, 9, 9), bool), MM)
    assert nothing["litres"] == 0
    assert quality.flags(nothing, 9)
    assert said(ellipsoid()[:, :, 45:46]) == []


def test_figures_do_not_depend_on_the_voxels_edge():
    fine, coarse = ellipsoid(), ellipsoid()[:, :, ::3]
    one, other = quality.measured(fine, MM), quality.measured(coarse, MM * (1, 1, 3))
    assert one["litres"] == pytest.approx(other["litres"], rel=0.03)
    assert one["roundness"] == pytest.approx(other["roundness"], abs=0.03)
