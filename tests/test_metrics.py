"""Figures with known answers, beside scikit-learn's and MONAI's, and their properties."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from monai.metrics import DiceMetric, compute_average_precision, compute_froc_score
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from lib import ROOT, datasets, metrics, volumes

BRATS = ROOT.parent / "shared" / "data" / "brats"

half_floats = arrays.arrays(np.float16, 60, elements=st.floats(0, 100, width=16))
labels = arrays.arrays(bool, 60).filter(lambda y: 0 < y.sum() < 60)


def counted(values, truth):
    codes = metrics.codes(values)
    return tuple(np.bincount(codes[where], minlength=metrics.CODES) for where in (truth, ~truth))


@given(arrays.arrays(np.float16, 20, elements=st.floats(-1000, 1000, width=16)))
def test_codes_keep_the_order_and_come_back(values):
    codes = metrics.codes(values).astype(int)
    assert (np.sign(codes[:, None] - codes) == np.sign(values[:, None].astype(float) - values)).all()
    assert [metrics.value_of(int(c)) for c in codes] == [float(v) for v in values]


@given(half_floats, labels)
def test_average_precision_and_auroc_are_those_of_scikit_learn(values, truth):
    lesion, other = counted(values, truth)
    assert metrics.average_precision(lesion, other) == pytest.approx(average_precision_score(truth, values))
    assert metrics.auroc(lesion, other) == pytest.approx(roc_auc_score(truth, values))


@given(half_floats, labels)
def test_a_monotone_transform_changes_no_figure(values, truth):
    steeper = (np.unique(values, return_inverse=True)[1] / 16).astype(np.float16)
    one, two = counted(values, truth), counted(steeper, truth)
    assert metrics.average_precision(*one) == pytest.approx(metrics.average_precision(*two))
    assert np.nanmax(metrics.dice_curve(*one)) == pytest.approx(np.nanmax(metrics.dice_curve(*two)))


@given(half_floats, labels, st.floats(0, 100, width=16))
def test_dice_at_a_threshold_is_the_textbook_formula(values, truth, threshold):
    code = int(metrics.codes(np.array([threshold], np.float16))[0])
    subject = subject_counts(*counted(values, truth))
    called = values >= np.float16(threshold)
    assert metrics.dice_at(subject, code) == pytest.approx(2 * (called & truth).sum() / (called.sum() + truth.sum()))


def subject_counts(lesion, other, name="s", healthy=False):
    nothing = np.zeros(0)
    values = np.arange(len(lesion), dtype=np.uint16)
    return metrics.SubjectCounts(name, healthy, values, np.stack([lesion, other, other]), nothing, nothing.astype(bool))


def test_perfect_constant_and_inverted_maps():
    truth = np.arange(100) < 20
    perfect, constant = counted(truth.astype(np.float16), truth), counted(np.zeros(100, np.float16), truth)
    inverted = counted((~truth).astype(np.float16), truth)
    assert metrics.average_precision(*perfect) == 1
    assert metrics.average_precision(*constant) == pytest.approx(0.2)
    assert metrics.average_precision(*inverted) == pytest.approx(0.2)
    assert np.nanmax(metrics.dice_curve(*perfect)) == 1
    assert np.nanmax(metrics.dice_curve(*constant)) == pytest.approx(2 * 0.2 / 1.2)
    assert metrics.auroc(*constant) == 0.5
    assert metrics.auroc(*inverted) == 0


def test_background_leaves_average_precision_and_raises_auroc_by_the_formula():
    random = np.random.default_rng(0)
    truth = random.random(500) < 0.2
    values = (random.random(500) + truth + 0.1).astype(np.float16)
    lesion, other = counted(values, truth)
    padded = other.copy()
    padded[metrics.codes(np.zeros(1, np.float16))] += other.sum()
    inside = float(metrics.auroc(lesion, other))
    assert metrics.average_precision(lesion, padded) == pytest.approx(metrics.average_precision(lesion, other))
    assert metrics.auroc(lesion, padded) == pytest.approx(0.5 + 0.5 * inside)


def test_precision_and_recall_are_not_exchanged():
    lesion, other = np.array([3, 1]), np.array([1, 0])  # one of four lesion voxels above, no false positive
    assert metrics.average_precision(lesion, other) == pytest.approx(0.25 * 1 + 0.75 * 0.8)


def test_without_lesion_the_figures_are_undefined():
    lesion, other = counted(np.ones(5, np.float16), np.zeros(5, bool))
    assert np.isnan(metrics.average_precision(lesion, other))
    assert np.isnan(metrics.dice_at(subject_counts(lesion, other), 0))


@given(half_floats, st.floats(0.01, 0.5))
def test_the_threshold_keeps_its_promise_and_is_the_lowest_that_does(values, rate):
    healthy = np.bincount(metrics.codes(values), minlength=metrics.CODES)
    code = metrics.threshold_code(healthy, rate)
    assert healthy[code:].sum() <= rate * healthy.sum()
    assert code == 0 or healthy[code - 1 :].sum() > rate * healthy.sum()


def test_a_constant_map_has_no_threshold_that_lets_anything_through():
    healthy = np.bincount(metrics.codes(np.zeros(10, np.float16)), minlength=metrics.CODES)
    assert healthy[metrics.threshold_code(healthy) :].sum() == 0


@given(half_floats, labels)
def test_average_precision_is_that_of_monai(values, truth):
    lesion, other = counted(values, truth)
    theirs = compute_average_precision(torch.from_numpy(values.astype(np.float32)), torch.from_numpy(truth))
    assert metrics.average_precision(lesion, other) == pytest.approx(float(theirs), abs=1e-6)


@given(half_floats, labels, st.floats(0, 100, width=16))
def test_dice_is_that_of_monai(values, truth, threshold):
    masks = [torch.from_numpy(m.astype(np.float32)).reshape(1, 1, 3, 4, 5) for m in (values >= threshold, truth)]
    theirs = float(DiceMetric()(*masks))
    code = int(metrics.codes(np.array([threshold], np.float16))[0])
    assert metrics.dice_at(subject_counts(*counted(values, truth)), code) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.skipif(not BRATS.is_dir(), reason=f"{BRATS} is not there")
def test_a_real_map_gives_the_figures_of_scikit_learn():
    subject = next(s for s in datasets.find_subjects(BRATS).subjects if "FLAIR" in s.scans and s.lesion_mask)
    scan = volumes.read(subject.scans["FLAIR"]).voxels
    truth = volumes.read(subject.lesion_mask, constant_allowed=True).voxels > 0
    brain, values = scan > 0, (scan / scan.max()).astype(np.float16)
    lesion, other = counted(values[brain], truth[brain])
    precision, recall, _ = precision_recall_curve(truth[brain], values[brain])
    score = average_precision_score(truth[brain], values[brain])
    assert metrics.average_precision(lesion, other) == pytest.approx(score, abs=1e-6)
    best = np.nanmax(2 * precision * recall / np.maximum(precision + recall, 1e-12))
    assert np.nanmax(metrics.dice_curve(lesion, other)) == pytest.approx(best, abs=1e-6)


def test_counts_come_back_whole_from_their_compact_form():
    random = np.random.default_rng(0)
    values, truth = random.random(1000).astype(np.float16), random.random(1000) < 0.3
    kept, counts = metrics.count(metrics.codes(values), truth, ~truth, np.ones(1000, bool))
    subject = metrics.SubjectCounts("s", False, kept, counts, None, None)
    lesion, other = counted(values, truth)
    np.testing.assert_array_equal(subject.lesion, lesion)
    np.testing.assert_array_equal(subject.other, other)
    np.testing.assert_array_equal(subject.healthy_material, lesion + other)


@pytest.mark.parametrize(("n", "rate", "rank", "promised"), [
    (19, 0.05, 19, 0.05), (99, 0.05, 95, 0.05), (20, 0.05, 20, 0.05), (10, 0.05, 10, 1 / 11), (4, 0.2, 4, 0.2),
])  # fmt: skip
def test_the_conformal_threshold_has_its_rank_and_promises_what_n_supports(n, rate, rank, promised):
    scans = list(np.random.default_rng(0).permutation(n) + 1)
    assert metrics.conformal(scans, rate) == (rank, pytest.approx(promised))


def test_the_conformal_promise_holds_for_new_healthy_scans():
    random = np.random.default_rng(0)
    scans = random.normal(size=(4000, 25))
    alarms = [scan[-1] > metrics.conformal(scan[:-1], 0.1)[0] for scan in scans]
    assert 0.07 < np.mean(alarms) <= 0.1 + 0.01


def test_a_scan_s_score_is_the_mean_of_its_highest_hundredth():
    values = np.random.default_rng(0).random(2000).astype(np.float16)
    kept, counts = metrics.count(metrics.codes(values), values > 2, values < 2, values > 2)
    subject = metrics.SubjectCounts("s", True, kept, counts, None, None)
    assert metrics.scan_score(subject) == pytest.approx(np.sort(values.astype(float))[-20:].mean())


def test_a_scan_s_own_threshold_is_its_mean_and_deviations():
    random = np.random.default_rng(0)
    values, truth = random.gamma(2, size=5000).astype(np.float16), random.random(5000) < 0.1
    counted = metrics.count(metrics.codes(values), truth, ~truth, ~truth)
    subject = metrics.SubjectCounts("s", False, *counted, np.zeros(0), np.zeros(0, bool))
    limit = metrics.value_of(metrics.own_threshold(subject, 2))
    assert limit == pytest.approx(values.astype(float).mean() + 2 * values.astype(float).std(), rel=1e-3)


@given(arrays.arrays(float, 12, elements=st.floats(0, 1)), arrays.arrays(float, 12, elements=st.floats(0, 5)))
def test_froc_is_that_of_monai_on_a_curve_that_only_rises(recall, steps):
    recall, false = np.append(0, np.sort(recall)), np.append(0, np.cumsum(steps + 0.01))
    theirs = compute_froc_score(false[::-1], recall[::-1], metrics.FROC_POINTS)  # by rising threshold
    assert metrics.froc(recall, false) == pytest.approx(theirs)


def test_froc_of_the_perfect_and_of_the_empty_map_and_of_one_that_melts_together():
    assert metrics.froc(np.ones(5), np.zeros(5)) == 1
    assert metrics.froc(np.zeros(5), np.zeros(5)) == 0
    assert metrics.froc(np.array([0, 1]), np.array([100, 0])) < 0.05


@pytest.fixture
def subjects():
    random = np.random.default_rng(0)
    made = []
    for i in range(12):
        truth = random.random(4000) < 0.02 + 0.01 * i
        values = np.abs(random.normal(1.5 * truth, 1)).astype(np.float16)
        kept, counts = metrics.count(metrics.codes(values), truth, ~truth, ~truth)
        made.append(metrics.SubjectCounts(f"s{i}", False, kept, counts, None, None))
    return made


def test_pooled_figures_are_exact_and_their_intervals_those_of_all_values(subjects):
    weights = metrics.resampled(len(subjects), 0)
    lesion, other = (np.stack([getattr(s, name) for s in subjects]) for name in ("lesion", "other"))
    used = (lesion + other).any(axis=0)
    lesion, other = lesion[:, used].astype(float), other[:, used].astype(float)
    pooled = metrics.bootstrap(lambda w: metrics.average_precision(w @ lesion, w @ other), weights)
    curves = metrics.dice_curve(lesion, other)
    oracle = metrics.bootstrap(lambda w: (w @ curves).max(axis=-1) / len(subjects), weights)
    assert metrics.pooled_precision(subjects, weights) == pytest.approx(pooled, abs=2e-3)
    assert metrics.oracle_dice(subjects, weights) == pytest.approx(oracle, abs=2e-3)
    assert metrics.pooled_precision(subjects, weights)[0] == pytest.approx(pooled[0], abs=1e-12)
    assert metrics.oracle_dice(subjects, weights)[0] == pytest.approx(oracle[0], abs=1e-12)


def test_the_best_dice_is_that_of_scikit_learn_s_curve():
    random = np.random.default_rng(1)
    truth = random.random(3000) < 0.1
    values = np.abs(random.normal(truth, 1)).astype(np.float16)
    precision, recall, _ = precision_recall_curve(truth, values)
    best = np.nanmax(2 * precision * recall / np.maximum(precision + recall, 1e-12))
    assert np.nanmax(metrics.dice_curve(*counted(values, truth))) == pytest.approx(best, abs=1e-6)


def test_an_interval_is_that_of_the_normal_for_a_mean_of_many():
    values = np.random.default_rng(0).normal(size=400)
    value, low, high = metrics.bootstrap(lambda w: w @ values / 400, metrics.resampled(400, 0))
    half = 1.96 * values.std() / 20
    assert value == pytest.approx(values.mean())
    assert (low, high) == (pytest.approx(value - half, abs=0.02), pytest.approx(value + half, abs=0.02))
