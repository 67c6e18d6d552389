"""Probes alter what they say and nothing else; thresholds by height keep the rate of false alarms that they promise."""

import made_cohort
import numpy as np
import pytest
import torch

from lib import probes, thresholds
from lib.lesions import HIGHEST
from lib.metrics import PROMISED_FPR


@pytest.fixture(scope="module")
def slice_and_brain():
    random = np.random.default_rng(0)
    row, column = np.mgrid[:64, :64] - 31.5
    brain = np.hypot(row, column * 1.2) < 26
    image = (0.5 + 0.2 * random.random((2, 64, 64)) + 0.002 * row) * brain
    return image.astype(np.float16), brain


def test_probes_have_the_shape_of_a_slice_and_leave_it_alone(slice_and_brain):
    image, brain = slice_and_brain
    before = image.copy()
    made = probes.unseen(image, brain)
    assert len(made) == 6
    for probe in made.values():
        assert probe.shape == image.shape
        assert probe.dtype == np.float32
        assert not np.array_equal(probe, image)
        assert 0 <= probe.min() <= probe.max() <= 1.5
    np.testing.assert_array_equal(image, before)


def test_discs_change_a_disc_alone_and_keep_their_word(slice_and_brain):
    image, brain = slice_and_brain
    made = probes.unseen(image, brain)
    flat, bright, checks = (made[name] for name in ("flat colour", "bright disc", "checkerboard"))
    disc = bright[0] == probes.BRIGHT
    assert disc.sum() == pytest.approx(np.pi * (probes.RADIUS * 64) ** 2, rel=0.1)
    for probe in (flat, bright, checks):
        np.testing.assert_array_equal(probe[:, ~disc], image[:, ~disc].astype(np.float32))
    assert flat[0][disc].std() < 1e-6
    assert flat[1][disc].mean() == pytest.approx(image[1][disc].astype(np.float32).mean(), rel=1e-3)
    assert checks[0][disc].mean() == pytest.approx(flat[0][disc].mean(), rel=0.05)
    assert len(np.unique(checks[0][disc].round(5))) == 2


def test_whole_slices_are_altered_inside_the_brain(slice_and_brain):
    image, brain = slice_and_brain
    made = probes.unseen(image, brain)
    inverted, half = made["contrast inverted"], made["left half back to front"]
    assert (inverted[:, ~brain] == 0).all()
    np.testing.assert_allclose((inverted + image)[:, brain], probes.INVERTED, atol=1e-3)
    middle = np.flatnonzero(brain.any(axis=0)).mean() + 0.5
    right = np.arange(64) >= middle
    np.testing.assert_array_equal(half[..., right], image[..., right].astype(np.float32))
    np.testing.assert_allclose(np.sort(half, axis=1), np.sort(image.astype(np.float32), axis=1))  # healthy tissue moved
    assert np.abs(half - image)[:, :, ~right].mean() > 0.01


def noise(random, slices=40, steep=3.0):
    """A brain in the middle of a stack, and a map whose spread grows with height."""
    brain = np.zeros((slices, 30, 30), bool)
    brain[5:-5, 4:-4, 4:-4] = True
    spread = 1 + steep * thresholds.heights(brain)[:, None, None]
    return brain, np.abs(random.standard_normal(brain.shape)) * spread * brain


def test_heights_run_from_the_lowest_to_the_highest_slice_with_brain():
    brain, _ = noise(np.random.default_rng(0))
    height = thresholds.heights(brain)
    assert (height[:6] == 0).all()
    assert height[34] == height[39] == 1
    assert (np.diff(height[5:35]) > 0).all()
    assert set(thresholds.band(brain)) == set(range(thresholds.BANDS))


def test_a_threshold_by_height_keeps_its_promise_at_every_height():
    random = np.random.default_rng(0)
    scans = [noise(random) for _ in range(6)]
    usable = [np.ones(40, bool)] * 5
    learnt = thresholds.by_height([m for _, m in scans[:5]], [b for b, _ in scans[:5]], usable, PROMISED_FPR)
    assert (np.diff(learnt) > 0).all()
    brain, last = scans[5]
    above = last > thresholds.at(learnt, brain)[:, None, None]
    fixed = last > np.quantile(np.concatenate([m[b] for b, m in scans[:5]]), 1 - PROMISED_FPR)
    low, high = slice(5, 20), slice(20, 35)
    for part in (low, high):
        assert above[part][brain[part]].mean() == pytest.approx(PROMISED_FPR, abs=0.004)
    assert fixed[high][brain[high]].mean() > 3 * fixed[low][brain[low]].mean()


def test_slices_that_do_not_count_as_healthy_teach_no_threshold():
    brain, anomaly = noise(np.random.default_rng(0))
    ill = anomaly.copy()
    ill[20:30] += 100
    usable = np.ones(40, bool)
    usable[20:30] = False
    learnt = thresholds.by_height([ill], [brain], [usable], PROMISED_FPR)
    assert learnt.max() < 20
    assert np.isfinite(learnt).all()


def test_an_image_s_own_threshold_rises_with_its_lesion():
    brain, anomaly = noise(np.random.default_rng(0))
    ill = anomaly.copy()
    ill[15, 8:20, 8:20] += 10
    well, raised = (thresholds.own(one, brain, 2.0) for one in (anomaly, ill))
    inside = anomaly[15][brain[15]]
    assert well[15] == pytest.approx(inside.mean() + 2 * inside.std(), rel=1e-5)
    assert raised[15] > 2 * well[15]
    np.testing.assert_allclose(np.delete(raised, 15), np.delete(well, 15))
    assert np.isinf(well[0])


def test_held_out_slices_are_healthy_ones_of_validation_with_lesions(tmp_path):
    prepared = made_cohort.write(tmp_path, modalities=("FLAIR", "T2"))
    held, images, brains, painted, share = probes.held_out(prepared, 0)
    assert {one["subject"] for one in held} == {s.id for s in prepared.split("validation")}
    assert images.shape == painted.shape == (len(held), 2, *brains.shape[1:])
    untouched = (share == 0)[:, None].expand_as(images)
    assert torch.equal(images[untouched], painted[untouched])
    assert share.amax(dim=(1, 2)).max() > 0.9
    assert 0 <= painted.min() <= painted.max() <= HIGHEST
    assert torch.equal(painted, probes.held_out(prepared, 0)[3])
