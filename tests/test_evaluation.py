"""Figures with known answers, beside scikit-learn's, and their properties."""

import made_cohort
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import average_precision_score, roc_auc_score

import lib
from lib import evaluation, scoring
from lib.intake import LESION_FREE

half_floats = arrays.arrays(np.float16, 60, elements=st.floats(0, 100, width=16))
labels = arrays.arrays(bool, 60).filter(lambda y: 0 < y.sum() < 60)


def counted(values, truth):
    codes = evaluation.codes(values)
    return tuple(np.bincount(codes[where], minlength=evaluation.CODES) for where in (truth, ~truth))


@given(arrays.arrays(np.float16, 20, elements=st.floats(-1000, 1000, width=16)))
def test_codes_keep_the_order_and_come_back(values):
    codes = evaluation.codes(values).astype(int)
    assert (np.sign(codes[:, None] - codes) == np.sign(values[:, None].astype(float) - values)).all()
    assert [evaluation.value_of(int(c)) for c in codes] == [float(v) for v in values]


@given(half_floats, labels)
def test_average_precision_and_auroc_are_those_of_scikit_learn(values, truth):
    lesion, other = counted(values, truth)
    assert evaluation.average_precision(lesion, other) == pytest.approx(average_precision_score(truth, values))
    assert evaluation.auroc(lesion, other) == pytest.approx(roc_auc_score(truth, values))


@given(half_floats, labels)
def test_a_monotone_transform_changes_no_figure(values, truth):
    steeper = (np.unique(values, return_inverse=True)[1] / 16).astype(np.float16)
    one, two = counted(values, truth), counted(steeper, truth)
    assert evaluation.average_precision(*one) == pytest.approx(evaluation.average_precision(*two))
    assert np.nanmax(evaluation.dice_curve(*one)) == pytest.approx(np.nanmax(evaluation.dice_curve(*two)))


@given(half_floats, labels, st.floats(0, 100, width=16))
def test_dice_at_a_threshold_is_the_textbook_formula(values, truth, threshold):
    code = int(evaluation.codes(np.array([threshold], np.float16))[0])
    subject = subject_counts(*counted(values, truth))
    called = values >= np.float16(threshold)
    assert evaluation.dice_at(subject, code) == pytest.approx(2 * (called & truth).sum() / (called.sum() + truth.sum()))


def subject_counts(lesion, other):
    nothing = np.zeros(0)
    return evaluation.SubjectCounts("s", False, lesion, other, other, nothing, nothing.astype(bool))


def test_perfect_constant_and_inverted_maps():
    truth = np.arange(100) < 20
    perfect, constant = counted(truth.astype(np.float16), truth), counted(np.zeros(100, np.float16), truth)
    inverted = counted((~truth).astype(np.float16), truth)
    assert evaluation.average_precision(*perfect) == 1
    assert evaluation.average_precision(*constant) == pytest.approx(0.2)
    assert evaluation.average_precision(*inverted) == pytest.approx(0.2)
    assert np.nanmax(evaluation.dice_curve(*perfect)) == 1
    assert np.nanmax(evaluation.dice_curve(*constant)) == pytest.approx(2 * 0.2 / 1.2)
    assert evaluation.auroc(*constant) == 0.5
    assert evaluation.auroc(*inverted) == 0


def test_background_leaves_average_precision_and_raises_auroc_by_the_formula():
    random = np.random.default_rng(0)
    truth = random.random(500) < 0.2
    values = (random.random(500) + truth + 0.1).astype(np.float16)
    lesion, other = counted(values, truth)
    padded = other.copy()
    padded[evaluation.codes(np.zeros(1, np.float16))] += other.sum()
    inside = float(evaluation.auroc(lesion, other))
    assert evaluation.average_precision(lesion, padded) == pytest.approx(evaluation.average_precision(lesion, other))
    assert evaluation.auroc(lesion, padded) == pytest.approx(0.5 + 0.5 * inside)


def test_precision_and_recall_are_not_exchanged():
    lesion, other = np.array([3, 1]), np.array([1, 0])  # one of four lesion voxels above, no false positive
    assert evaluation.average_precision(lesion, other) == pytest.approx(0.25 * 1 + 0.75 * 0.8)


def test_without_lesion_the_figures_are_undefined():
    lesion, other = counted(np.ones(5, np.float16), np.zeros(5, bool))
    assert np.isnan(evaluation.average_precision(lesion, other))
    assert np.isnan(evaluation.dice_at(subject_counts(lesion, other), 0))


@given(half_floats, st.floats(0.01, 0.5))
def test_the_threshold_keeps_its_promise_and_is_the_lowest_that_does(values, rate):
    healthy = np.bincount(evaluation.codes(values), minlength=evaluation.CODES)
    code = evaluation.threshold_code(healthy, rate)
    assert healthy[code:].sum() <= rate * healthy.sum()
    assert code == 0 or healthy[code - 1 :].sum() > rate * healthy.sum()


def test_a_constant_map_has_no_threshold_that_lets_anything_through():
    healthy = np.bincount(evaluation.codes(np.zeros(10, np.float16)), minlength=evaluation.CODES)
    assert healthy[evaluation.threshold_code(healthy) :].sum() == 0


@pytest.fixture
def judged(tmp_path, monkeypatch):
    monkeypatch.setattr(lib, "ROOT", tmp_path)
    prepared = made_cohort.write(tmp_path / "cohort")
    for name in ("empty", "random", "intensity"):
        scoring.run_detector(name, prepared, "run")
    return prepared, evaluation.evaluate("run", prepared)


def figure(table, method, metric, level="voxel"):
    return table[(table.method == method) & (table.metric == metric) & (table.level == level)].iloc[0]


def test_the_table_has_the_contract_s_columns_and_known_figures(judged):
    prepared, table = judged
    patients = [s for s in prepared.split("test") if s.lesion.any()]
    prevalences = [s.lesion.sum() / s.brain.sum() for s in patients]
    assert list(table.columns) == evaluation.COLUMNS
    assert figure(table, "empty", "ap").value == pytest.approx(np.mean(prevalences))
    assert figure(table, "empty", "auroc", "slice").value == 0.5
    assert figure(table, "empty", "dice").value == 0
    expected = [average_precision_score(s.lesion[s.brain], s.image[0][s.brain]) for s in patients]
    assert figure(table, "intensity", "ap").value == pytest.approx(np.mean(expected), abs=1e-4)
    assert figure(table, "intensity", "ap").n == len(patients)
    assert figure(table, "intensity", "fpr_promised").value == evaluation.PROMISED_FPR


def test_every_interval_holds_its_figure(judged):
    _, table = judged
    bounded = table.dropna(subset=["low"])
    assert (bounded.low <= bounded.value + 1e-9).all()
    assert (bounded.value <= bounded.high + 1e-9).all()
    assert len(bounded) > 10


def test_the_oracle_is_never_below_the_frozen_threshold(judged):
    _, table = judged
    assert figure(table, "intensity", "dice_oracle").value >= figure(table, "intensity", "dice").value


def test_the_same_maps_give_the_same_file(judged):
    prepared, _ = judged
    first = (lib.run_folder("run") / "results.csv").read_bytes()
    evaluation.evaluate("run", prepared)
    assert (lib.run_folder("run") / "results.csv").read_bytes() == first
    assert b"\r" not in first


def test_one_patient_has_no_interval_narrower_than_its_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(lib, "ROOT", tmp_path)
    prepared = made_cohort.write(tmp_path / "cohort", patients=1)
    scoring.run_detector("intensity", prepared, "run")
    row = figure(evaluation.evaluate("run", prepared), "intensity", "ap")
    assert row.low == row.high == pytest.approx(row.value)


def test_lesion_free_slices_of_patients_are_said_in_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr(lib, "ROOT", tmp_path)
    prepared = made_cohort.write(tmp_path / "cohort", healthy=(0, 0, 0), training=LESION_FREE)
    scoring.run_detector("intensity", prepared, "run")
    table = evaluation.evaluate("run", prepared)
    assert table.note.str.contains("lesion-free slices of patients").all()


def test_a_model_that_a_baseline_matches_is_named(judged, monkeypatch):
    prepared, _ = judged
    monkeypatch.setattr("lib.models.family", lambda name: "autoencoder" if name == "random" else "baseline")
    table = evaluation.evaluate("run", prepared)
    assert "intensity does as well or better" in figure(table, "random", "ap").note
    assert figure(table, "intensity", "ap").note == ""


def test_slices_are_counted_by_truth_and_call(judged):
    prepared, _ = judged
    table = evaluation.slice_confusion("run", "intensity", prepared)
    tested = prepared.split("test")
    assert table.sum() == sum(s.brain.any(axis=(1, 2)).sum() for s in tested)
    assert table[1].sum() == sum(s.lesion.any(axis=(1, 2)).sum() for s in tested)
    assert table[1, 1] > table[0, 1]


def test_patients_come_in_order_of_precision(judged):
    prepared, _ = judged
    ranked = evaluation.patients_by_precision(evaluation.test_counts("run", "random", prepared))
    assert [ap for _, ap in ranked] == sorted(ap for _, ap in ranked)
    assert len(ranked) == 3
