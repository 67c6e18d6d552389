"""The sided ensemble: the order of three maps, how it spreads, the values of one, one training for two detectors."""

import made_cohort
import numpy as np
import pytest
import torch

from lib import models
from lib.models.mirror import Mirror, smoother
from lib.models.sided import SCALES_MM, SidedEnsemble, agreed, ranks, spread
from lib.models.single import SidedMedian
from lib.models.synthetic import SyntheticLesions

SHORT = {"epochs": 2, "steps": 4, "width": 8}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return made_cohort.write(tmp_path_factory.mktemp("cohort") / "c")


@pytest.fixture(scope="module")
def fitted(prepared, tmp_path_factory):
    detector = models.create("sided_ensemble", prepared.modalities, **SHORT)
    detector.fit(prepared, out=tmp_path_factory.mktemp("out"))
    return detector


def log_odds(detector, subject, smoothing_mm):
    brain = np.asarray(subject.brain)
    raw = super(SidedEnsemble, detector).maps(subject)
    return smoother(brain, smoothing_mm / subject.voxel_mm[::-1])(raw)[brain]


def test_voxels_are_in_the_order_that_the_three_agree_on(fitted, prepared):
    subject = prepared.split("test")[-1]
    brain = np.asarray(subject.brain)
    found = [log_odds(fitted, subject, mm) for mm in SCALES_MM]
    found += [kind("x", prepared.modalities).maps(subject)[brain] for kind in (SidedMedian, Mirror)]
    result, order = fitted.maps(subject)[brain], agreed(*map(ranks, found), brain)
    assert (np.diff(result[order.argsort(kind="stable")]) >= 0).all()
    assert result.max() > result.min()


def test_values_are_those_of_the_network(fitted, prepared):
    subject = prepared.split("test")[-1]
    values = np.sort(fitted.maps(subject)[subject.brain])
    chance = 1 / (1 + np.exp(-np.sort(log_odds(fitted, subject, SCALES_MM[0])).astype(float)))
    np.testing.assert_allclose(values, -np.log1p(-chance), rtol=1e-4, atol=1e-6)


def test_nothing_outside_the_brain_and_a_saved_one_gives_the_same(fitted, prepared, tmp_path):
    subject = prepared.split("test")[-1]
    fitted.save(tmp_path / "sided.safetensors")
    result = fitted.maps(subject)
    assert not result[~np.asarray(subject.brain)].any()
    np.testing.assert_array_equal(models.load(tmp_path / "sided.safetensors").maps(subject), result)


def bar():
    """A brain of 9 × 9 × 9 with 3 voxels of margin, and levels: a bar of .8 across its middle with a bridge of .6, and
    a spot of .9 apart from it."""
    brain = np.pad(np.ones((9, 9, 9), bool), 3)
    level = np.full(brain.shape, 0.2)
    level[7, 7, 4:11], level[7, 7, 7], level[4, 4, 4] = 0.8, 0.6, 0.9
    return brain, level


def test_a_finding_spreads_over_the_bar_but_not_to_the_spot():
    brain, level = bar()
    seeds = np.zeros(brain.shape)
    seeds[7, 7, 4] = 1
    result = np.zeros(brain.shape)
    result[brain] = spread(seeds[brain], level[brain], brain)
    assert (result[7, 7, 4:7] == 0.8).all()
    assert (result[7, 7, 7:11] == 0.6).all()
    assert result[4, 4, 4] == 0.2


def test_what_spreads_lies_between_its_seeds_and_the_level():
    random = np.random.default_rng(0)
    brain = random.random((6, 10, 10)) < 0.7
    level, seeds = random.random((2, brain.sum()))
    result = spread(seeds, level, brain)
    assert (result >= np.minimum(seeds, level)).all()
    assert (result <= level).all()
    np.testing.assert_array_equal(spread(np.zeros_like(seeds), level, brain), 0)


def test_the_side_that_the_mirror_does_not_see_comes_before_an_equal_spot():
    brain, level = bar()
    level[4, 4, 4] = 0.8
    mirror = np.zeros(brain.shape)
    mirror[7, 7, 4:7] = 1
    order = np.zeros(brain.shape)
    found = ranks(level[brain])
    order[brain] = agreed(found, found, found, ranks(mirror[brain]), brain)
    assert order[7, 7, 4:7].min() > order[7, 7, 8:11].min() > order[4, 4, 4] > order[brain].min()


def test_ranks_are_shares_and_equal_values_share_one():
    np.testing.assert_allclose(ranks(np.array([3.0, 1.0, 1.0, 7.0])), [0.75, 0.375, 0.375, 1])


def test_the_network_is_trained_once_for_both(prepared, tmp_path, monkeypatch):
    network = models.create("synthetic_lesions", prepared.modalities, **SHORT)
    first = network.fit(prepared, out=tmp_path)
    monkeypatch.setattr(SyntheticLesions, "loss", None)
    ensemble = models.create("sided_ensemble", prepared.modalities, **SHORT)
    assert ensemble.fit(prepared, out=tmp_path).rows == first.rows
    for one, other in zip(network.state().values(), ensemble.state().values(), strict=True):
        assert torch.equal(one, other)


def test_further_seeds_train_under_the_network_s_name(prepared):
    assert models.create("sided_ensemble@2", prepared.modalities).training == "synthetic_lesions@2"
    assert models.create("dae@1", prepared.modalities).training == "dae@1"
