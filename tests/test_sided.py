"""The sided ensemble: the order of three maps, the values of one, and one training for two detectors."""

import made_cohort
import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr

from lib import models
from lib.models.mirror import Mirror, smoother
from lib.models.sided import SMOOTHING_MM, WEIGHTS, SidedEnsemble
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


def log_odds(detector, subject):
    brain = np.asarray(subject.brain)
    raw = super(SidedEnsemble, detector).maps(subject)
    return smoother(brain, SMOOTHING_MM / subject.voxel_mm[::-1])(raw)[brain]


def test_voxels_are_in_the_order_of_the_mean_rank(fitted, prepared):
    subject = prepared.split("test")[-1]
    brain = np.asarray(subject.brain)
    others = [kind("x", prepared.modalities).maps(subject)[brain] for kind in (SidedMedian, Mirror)]
    ranks = [w * rankdata(one) for w, one in zip(WEIGHTS, (log_odds(fitted, subject), *others), strict=True)]
    assert spearmanr(fitted.maps(subject)[brain], np.sum(ranks, axis=0)).statistic > 0.9999


def test_values_are_those_of_the_network(fitted, prepared):
    subject = prepared.split("test")[-1]
    values = np.sort(fitted.maps(subject)[subject.brain])
    chance = 1 / (1 + np.exp(-np.sort(log_odds(fitted, subject)).astype(float)))
    np.testing.assert_allclose(values, -np.log1p(-chance), rtol=1e-4, atol=1e-6)


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
