"""Judging a run from its maps: the table, its intervals, what is refused."""

import os
import shutil
from dataclasses import replace
from itertools import count

import made_cohort
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score

import lib
from lib import evaluation, judging, metrics, postprocessing, scoring, workers
from lib.errors import CourseError
from lib.intake import LESION_FREE
from lib.models.detector import Detector


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


class Given(Detector):
    """A detector with the maps that a test gives it, by subject."""

    def __init__(self, maps):
        super().__init__("intensity", ("FLAIR",))
        self.given = maps

    def maps(self, subject):
        return self.given(subject).astype(np.float32) * subject.brain


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """`judge(map of a subject, **cohort)`: the cohort, and the table of a detector with those maps."""
    monkeypatch.setattr(lib, "ROOT", tmp_path)
    numbers = count()

    def evaluated(maps, **options):
        prepared = made_cohort.write(tmp_path / f"cohort{next(numbers)}", **options)
        detector = Given(maps)
        shutil.rmtree(lib.run_folder("run"), ignore_errors=True)
        detector.save(lib.run_folder("run") / "models" / "intensity.safetensors")
        scoring.write_maps(detector, prepared, "run")
        return prepared, evaluation.evaluate("run", prepared)

    return evaluated


def found(table, metric, level="voxel", postprocess="none", stratum="all"):
    kept = {"metric": metric, "level": level, "postprocess": postprocess, "stratum": stratum}
    (row,) = table[(table[list(kept)] == pd.Series(kept)).all(axis=1)].itertuples()
    return row


def test_the_perfect_map_scores_1_everywhere_and_raises_no_false_alarm(judge):
    _, table = judge(lambda s: s.lesion)
    for level, metric in [("voxel", m) for m in ("ap", "ap_pooled", "dice", "dice_oracle", "dice_conformal",
                          "sensitivity_at_fpr1", "sensitivity_at_fpr5")] + [("lesion", "lesion_recall"),
                          ("lesion", "froc"), ("slice", "auroc"), ("slice", "ap"), ("scan", "auroc"),
                          ("scan", "ap")]:  # fmt: skip
        row = found(table, metric, level)
        assert (row.value, row.low, row.high) == (1, 1, 1), (level, metric)
    for level, metric in (
        ("voxel", "fpr_seen"),
        ("lesion", "false_positives_per_volume"),
        ("scan", "false_alarms_seen"),
    ):
        assert found(table, metric, level).value == 0


def test_the_empty_map_has_its_known_value_everywhere(judge):
    prepared, table = judge(lambda s: np.zeros(s.brain.shape))
    shares = [s.lesion.sum() / s.brain.sum() for s in prepared.split("test") if s.lesion.any()]
    assert found(table, "ap").value == pytest.approx(np.mean(shares))
    assert found(table, "dice_oracle").value == pytest.approx(np.mean([2 * p / (1 + p) for p in shares]))
    for metric in ("dice", "dice_conformal", "sensitivity_at_fpr1", "fpr_seen"):
        assert found(table, metric).value == 0
    for metric in ("lesion_recall", "false_positives_per_volume", "froc"):
        assert found(table, metric, "lesion").value == 0
    assert found(table, "auroc", "scan").value == found(table, "auroc", "slice").value == 0.5
    assert found(table, "ap", "scan").value == pytest.approx(3 / 5)


def graded(subject):
    random = np.random.default_rng(int(subject.id[1:]))
    return np.round(4 * (random.random(subject.brain.shape) + 0.5 * subject.lesion), 2)


def test_a_monotone_transform_of_the_maps_leaves_every_figure_that_ranks(judge):
    _, one = judge(graded)
    _, two = judge(lambda s: graded(s) ** 2)
    for level, metric in (("voxel", "ap"), ("voxel", "dice"), ("voxel", "dice_oracle"), ("lesion", "froc"),
                          ("lesion", "lesion_recall")):  # fmt: skip
        assert found(one, metric, level)[-6:] == found(two, metric, level)[-6:]


def test_the_order_of_the_subjects_changes_no_byte(judge):
    prepared, _ = judge(graded)
    written = {name: (lib.run_folder("run") / name).read_bytes() for name in ("results.csv", "patients.csv")}
    evaluation.evaluate("run", replace(prepared, subjects=prepared.subjects[::-1]))
    assert written == {name: (lib.run_folder("run") / name).read_bytes() for name in written}


def test_sensitivities_are_those_at_the_healthy_validation_s_quantiles(judge):
    prepared, table = judge(graded)
    healthy = np.concatenate([graded(s)[s.lesion_free[:, None, None] & s.brain] for s in prepared.split("validation")])
    patients = [s for s in prepared.split("test") if s.lesion.any()]
    for metric, rate in (("sensitivity_at_fpr1", 0.01), ("sensitivity_at_fpr5", 0.05)):
        limit = min(v for v in np.unique(healthy) if np.mean(healthy >= v) <= rate)
        between = max(v for v in np.unique(healthy) if v < limit)  # nothing lies between the two
        expected = [np.mean(graded(s)[s.lesion] > between) for s in patients]
        assert found(table, metric).value == pytest.approx(np.mean(expected), abs=1e-4)


def test_too_few_healthy_scans_are_said_with_the_promise_they_support(judge):
    _, table = judge(graded)
    row = found(table, "false_alarms_promised", "scan")
    assert row.value == pytest.approx(1 / 3)
    assert "2 healthy validation scans cannot promise 5 %" in row.note
    assert "33.3 %" in row.note


def test_enough_healthy_scans_promise_what_was_asked(judge):
    _, table = judge(graded, healthy=(1, 19, 1))
    row = found(table, "false_alarms_promised", "scan")
    assert (row.value, row.note) == (judging.PROMISED_ALARMS, "")


def test_strata_by_load_kind_and_site_where_two_patients_share_them(judge, monkeypatch):
    original = made_cohort._subject

    def labelled(folder, *rest):
        number = int(folder.name[1:])
        kind = ("ms" if number % 2 else "glioma") if number < 12 else "rare"
        return original(folder, *rest) | {"site": "a", "kind": kind}

    monkeypatch.setattr(made_cohort, "_subject", labelled)
    _, table = judge(graded, patients=6)
    assert set(table.stratum) == {"all", "load:small", "load:medium", "load:large", "kind:ms", "kind:glioma", "site:a"}
    assert found(table, "ap", stratum="site:a")[-6:-3] == found(table, "ap")[-6:-3]
    thirds = [found(table, "ap", stratum=f"load:{size}") for size in ("small", "medium", "large")]
    assert np.mean([row.value for row in thirds]) == pytest.approx(found(table, "ap").value)
    assert [row.n for row in thirds] == [2, 2, 2]


def test_post_processing_steps_have_rows_and_thresholds_of_their_own(judge):
    def specked(subject):  # the lesion and some voxels around it, and brighter single voxels
        specks = np.zeros(subject.brain.shape)
        specks[1:-1:2, 6:26:5, 6:26:5] = 2
        return specks + ndimage.binary_dilation(subject.lesion, iterations=2)

    _, table = judge(specked)
    assert set(table.postprocess) == set(postprocessing.STEPS)
    assert found(table, "ap", postprocess="median").value > found(table, "ap").value
    assert found(table, "fpr_seen", postprocess="components").value <= found(table, "fpr_seen").value
    lost = table[table.metric == "lesion_lost"]
    assert set(lost.postprocess) == set(postprocessing.STEPS) - {"none"}
    assert ((lost.value >= 0) & (lost.value <= 1)).all()


def test_the_lesion_that_a_step_throws_away_is_counted(judge):
    _, table = judge(lambda s: s.lesion & (np.cumsum(s.lesion, axis=0) == 1))  # one slice of each lesion
    kept = found(table, "dice", postprocess="components")
    assert found(table, "lesion_lost", postprocess="median").value > 0.2
    assert kept.value == found(table, "dice").value


def test_slice_baselines_have_slice_figures_only(judged):
    prepared, _ = judged
    for name in ("brain_area", "slice_index"):
        scoring.run_detector(name, prepared, "run")
    table = evaluation.evaluate("run", prepared)
    rows = table[table.method.isin(["brain_area", "slice_index"])]
    assert set(rows.level) == {"slice"}
    assert {"auroc", "ap", "balanced_accuracy"} <= set(rows.metric)
    assert not set(evaluation.patients("run", prepared).method) & {"brain_area", "slice_index"}
    tested = prepared.split("test")
    seen = [s.brain.any(axis=(1, 2)) for s in tested]
    area = np.concatenate([s.brain.sum(axis=(1, 2))[b] for s, b in zip(tested, seen, strict=True)])
    truth = np.concatenate([s.lesion.any(axis=(1, 2))[b] for s, b in zip(tested, seen, strict=True)])
    assert figure(table, "brain_area", "auroc", "slice").value == pytest.approx(roc_auc_score(truth, area))


def test_scans_are_ranked_by_their_highest_hundredth(judge):
    prepared, table = judge(graded)
    scores, truth = [], []
    for subject in prepared.split("test"):
        values = np.sort(graded(subject).astype(np.float16).astype(float)[subject.brain])
        scores.append(values[-round(0.01 * len(values)) :].mean())
        truth.append(not subject.healthy)
    assert found(table, "auroc", "scan").value == pytest.approx(roc_auc_score(truth, scores), abs=1e-4)
    assert found(table, "ap", "scan").value == pytest.approx(average_precision_score(truth, scores), abs=1e-4)


def blurred(subject):
    return ndimage.gaussian_filter(np.asarray(subject.image[0], np.float32), 1)


def test_lesions_that_are_not_outlined_change_no_figure_but_those_of_scans(judge):
    def by_level(**options):
        prepared, table = judge(blurred, **options)
        return prepared, table[table.level != "scan"].drop(columns="note").reset_index(drop=True), table

    _, expected, _ = by_level()
    prepared, figures, table = by_level(bare=2)
    pd.testing.assert_frame_equal(figures, expected)
    scores = [metrics.scan_score(judging.count(s, s.code)) for s in judging.tested("run", "intensity", prepared)]
    ill = [not s.healthy for s in prepared.split("test")]
    assert found(table, "auroc", "scan").value == pytest.approx(roc_auc_score(ill, scores))
    assert found(table, "auroc", "scan").n == len(ill) == 7
    assert table.note.str.endswith("2 of 5 patients have no lesion mask and count at the level of scans alone").all()
    rows = evaluation.patients("run", prepared).set_index("patient")
    assert rows[rows.postprocess == "none"].lesions.isna().sum() == 2
    assert len(evaluation.test_counts("run", "intensity", prepared)) == 5
    assert evaluation.slice_confusion("run", "intensity", prepared).sum() == 5 * 10


def test_where_no_lesion_is_outlined_scans_alone_are_judged(judge):
    prepared, table = judge(blurred, patients=0, bare=3)
    assert set(table.metric[table.level == "voxel"]) == {"fpr_promised", "fpr_seen"}
    assert set(table.level[table.metric.isin(["auroc", "ap"])]) == {"scan"}
    assert set(evaluation.leading(table).metric) == {"auroc"}
    assert table.note.str.contains("no subject has a lesion mask").all()
    assert [name for name, _ in evaluation.scans_by_score("run", "intensity", prepared)][-1] in ("s07", "s08", "s09")
    assert evaluation.paired_differences("run", prepared).empty


def test_where_nobody_is_ill_false_alarms_alone_are_judged(judge):
    _, table = judge(blurred, patients=0)
    assert set(table.metric) == {
        "fpr_promised", "fpr_seen", "false_alarms_promised", "false_alarms_seen", "false_positives_per_volume"
    }  # fmt: skip
    assert set(evaluation.leading(table).metric) == {"fpr_seen"}
    assert table.note.str.contains("nobody is ill").all()


def test_a_test_split_that_can_tell_nothing_is_refused(judge):
    with pytest.raises(CourseError, match=r"nobody is healthy, and no lesion is outlined(.|\n)*Add lesion masks"):
        judge(blurred, healthy=(3, 2, 0), patients=0, bare=2)


def test_slices_of_a_patient_without_a_mask_are_no_healthy_material(judge):
    prepared, _ = judge(blurred, training=LESION_FREE, healthy=(0, 0, 0), bare=1)
    bare = prepared.subjects[-1]
    assert not bare.outlined
    assert not bare.lesion_free.any()
    assert sum(usable.sum() for s, usable in prepared.healthy_material("test") if s.id == bare.id) == 0


def test_paired_differences_are_those_of_the_patients(judged):
    prepared, _ = judged
    differences = evaluation.paired_differences("run", prepared)
    aps = {m: dict(evaluation.patients_by_precision(evaluation.test_counts("run", m, prepared)))
           for m in ("empty", "random", "intensity")}  # fmt: skip
    assert list(differences.method_a.head(2)) == ["intensity", "intensity"]
    for row in differences.itertuples():
        gaps = np.array([aps[row.method_a][name] - aps[row.method_b][name] for name in aps["empty"]])
        assert row.difference == pytest.approx(gaps.mean(), abs=1e-5)
        assert (row.wins, row.losses) == ((gaps > evaluation.TIE).sum(), (gaps < -evaluation.TIE).sum())
        assert row.wins + row.ties + row.losses == row.n == 3
        assert row.low <= row.difference <= row.high


def test_only_an_interval_without_0_says_who_beats_whom(judged):
    prepared, _ = judged
    matrix = evaluation.who_beats_whom(evaluation.paired_differences("run", prepared))
    assert matrix.loc["intensity", "empty"] == 1
    assert matrix.loc["empty", "intensity"] == -1
    assert (matrix.to_numpy() == -matrix.to_numpy().T).all()


def test_differences_of_a_run_that_was_not_judged_are_refused(judged, tmp_path):
    prepared, _ = judged
    with pytest.raises(CourseError, match=r"patients\.csv"):
        evaluation.paired_differences("elsewhere", prepared)
    with pytest.raises(CourseError, match="another cohort"):
        evaluation.paired_differences("run", made_cohort.write(tmp_path / "other", patients=5))


def test_a_subject_in_two_splits_is_refused(judged):
    prepared, _ = judged
    patient = prepared.split("test")[-1]
    leaked = replace(prepared, subjects=(*prepared.subjects, replace(patient, split="train")))
    with pytest.raises(CourseError, match=f"{patient.id} in test and {patient.id} in train"):
        evaluation.evaluate("run", leaked)


def test_the_same_scan_in_train_and_test_is_refused_under_any_name(judged):
    prepared, _ = judged
    marked = [replace(s, facts=s.facts | {"checksums": {"FLAIR": s.id}}) for s in prepared.subjects]
    evaluation.evaluate("run", replace(prepared, subjects=tuple(marked)))
    marked[0] = replace(marked[0], facts=marked[0].facts | {"checksums": {"FLAIR": marked[-1].id}})
    with pytest.raises(CourseError, match="two splits"):
        evaluation.evaluate("run", replace(prepared, subjects=tuple(marked)))


def test_processes_judge_as_one_does_and_hand_on_what_is_wrong(judged, monkeypatch):
    prepared, _ = judged
    run = str(lib.run_folder("run"))  # the whole path: the root of a process is not that of this test
    names = ("results.csv", "patients.csv", "froc.csv")
    alone = [(lib.run_folder("run") / name).read_bytes() for name in names]
    monkeypatch.setattr(workers, "FEW", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    evaluation.evaluate(run, prepared)
    assert [(lib.run_folder("run") / name).read_bytes() for name in names] == alone
    (lib.run_folder("run") / "maps" / "random" / f"{prepared.split('test')[0].id}.npz").write_bytes(b"")
    with pytest.raises(CourseError, match=r"random.*npz is missing, damaged, .*\n.*--overwrite"):
        evaluation.evaluate(run, prepared)


def test_the_scan_s_own_grid_gives_the_same_figures_where_it_is_the_prepared_one(judge):
    prepared, table = judge(graded)
    own = evaluation.evaluate("run", replace(prepared, grid="scan"))
    numbers = ["method", "postprocess", "stratum", "level", "metric", "value", "low", "high", "n"]
    pd.testing.assert_frame_equal(own[numbers], table[numbers])
    assert own.note.str.contains("own grid").all()


def test_on_a_finer_grid_voxels_are_counted_there(judge):
    prepared, coarse = judge(lambda s: ndimage.gaussian_filter(s.lesion.astype(float), 1))
    for subject in prepared.subjects:
        own = subject.own_grid()
        twice = {k: np.repeat(getattr(own, k), 2, axis=2) for k in ("brain", "lesion")}
        affine = own.affine @ np.diag([0.5, 1, 1, 1])
        affine[0, 3] -= 0.5  # the first half voxel lies a quarter of 2 mm before the whole one's centre
        np.savez(subject.folder / "own_grid.npz", affine=affine, **twice)
    fine = evaluation.evaluate("run", replace(prepared, grid="scan"))
    records = evaluation.patients("run", prepared).query("postprocess == 'none'").set_index("patient")
    for subject in prepared.split("test"):
        assert records.lesion_voxels[subject.id] == 2 * subject.lesion.sum()
        assert records.lesion_ml[subject.id] == pytest.approx(subject.lesion.sum() * 8 / 1000)
    assert found(fine, "ap").value == pytest.approx(found(coarse, "ap").value, abs=0.05)
    assert found(fine, "ap").value != found(coarse, "ap").value
    assert found(fine, "prevalence").value == pytest.approx(found(coarse, "prevalence").value)


def test_maps_between_voxels_are_linear_and_the_edge_of_the_brain_stays_bright():
    ramp = np.broadcast_to(np.linspace(0, 1, 9), (3, 4, 9)).astype(np.float16)
    brain = np.ones(ramp.shape, bool)
    brain[..., 7:] = False
    fine = judging.Ground(np.ones((3, 4, 18), bool), *[np.zeros((3, 4, 18), bool)] * 2, 1.0,
                          np.array([1, 1, 0.5]), np.array([0, 0, -0.25]))  # fmt: skip
    values = metrics.values_of(judging._resampled(metrics.codes(ramp), brain, fine))
    places = -0.25 + 0.5 * np.arange(18)
    np.testing.assert_allclose(values[0, 0, 1:13], places[1:13] / 8, atol=1e-3)
    assert values[0, 0, 13] == pytest.approx(6 / 8, abs=1e-3)  # beyond the last voxel of the brain: as that voxel
    assert values[0, 0, 16] == 0


def test_every_seed_has_rows_and_the_spread_stands_apart_from_the_interval(judged, monkeypatch):
    prepared, _ = judged
    scoring.run_detector("random", prepared, "run", seeds=3)
    monkeypatch.setattr("lib.baselines.Random.maps", lambda self, s: s.brain * noise(s, self.name))
    shutil.rmtree(lib.run_folder("run") / "maps" / "random@1")
    shutil.rmtree(lib.run_folder("run") / "maps" / "random@2")
    scoring.run_detector("random", prepared, "run", seeds=3)
    table = evaluation.evaluate("run", prepared)
    rows = table[(table.method == "random") & (table.metric == "ap") & (table.level == "voxel")]
    rows = rows[(rows.postprocess == "none") & (rows.stratum == "all")]
    assert list(rows.seed) == [0, 1, 2]
    (spread,) = evaluation.seed_spread("run", prepared).itertuples()
    assert spread.method == "random"
    assert spread.mean == pytest.approx(rows.value.mean(), abs=1e-4)
    assert spread.seed_sd == pytest.approx(rows.value.std(), abs=1e-4)
    assert (spread.seeds, spread.n) == (3, 3)
    assert scoring.methods("run") == ["empty", "random", "intensity"]
    assert len(evaluation.paired_differences("run", prepared)) == 3


def noise(subject, name):
    return np.random.default_rng([int(subject.id[1:]), len(name), ord(name[-1])]).random(subject.brain.shape)


def test_acquisition_alone_stands_beside_every_claim_on_scans(judge, monkeypatch):
    original = made_cohort._subject

    def louder(folder, random, split, healthy, modalities):
        return original(folder, random, split, healthy, modalities) | {"scales": [1.0 if healthy else 3.0]}

    monkeypatch.setattr(made_cohort, "_subject", louder)
    monkeypatch.setattr("lib.models.family", lambda name: "autoencoder")
    prepared, table = judge(graded, healthy=(1, 2, 15), patients=15)
    row = table[(table.method == "domain_classifier") & (table.metric == "auroc")].iloc[0]
    assert (row.level, row.family) == ("scan", "baseline")
    assert row.value > 0.95
    weak = table.assign(value=table.value.where(table.method == row.method, 0.5))
    notes = evaluation._notes(weak, prepared, {})
    said = {
        key for key, note in zip(zip(table.level, table.metric, strict=True), notes, strict=True) if row.method in note
    }
    assert said == {("scan", "auroc"), ("scan", "ap")}


def test_rules_in_use_are_rows_that_say_what_they_are(judge):
    prepared, table = judge(graded)
    tested = prepared.split("test")
    seen = [s.brain.any(axis=(1, 2)) for s in tested]
    pairs = [scoring.read_map("run", "intensity", s, prepared) for s in tested]
    scores = np.concatenate([score[b] for (_, score), b in zip(pairs, seen, strict=True)])
    squares = np.concatenate(
        [(m.astype(float) ** 2).mean(axis=(1, 2))[b] for (m, _), b in zip(pairs, seen, strict=True)]
    )
    truth = np.concatenate([s.lesion.any(axis=(1, 2))[b] for s, b in zip(tested, seen, strict=True)])
    healthy = np.concatenate([scoring.read_map("run", "intensity", s, prepared)[1][s.lesion_free]
                              for s in prepared.split("validation")])  # fmt: skip
    frozen = balanced_accuracy_score(truth, scores > np.quantile(healthy, 0.95))
    assert found(table, "balanced_accuracy", "slice").value == pytest.approx(frozen, abs=1e-4)
    cutoff = balanced_accuracy_score(truth, squares > judging.SQUARES_CUTOFF)
    assert found(table, "balanced_accuracy_cutoff", "slice").value == pytest.approx(cutoff, abs=1e-4)
    tuned = max(balanced_accuracy_score(truth, scores >= t) for t in scores)
    assert found(table, "balanced_accuracy_youden", "slice").value == pytest.approx(tuned, abs=1e-4)
    assert "these very labels" in found(table, "balanced_accuracy_youden", "slice").note
    assert "tested scan itself" in found(table, "dice_mean_sigma").note


def test_what_went_wrong_in_training_is_said_in_every_row_of_the_method(judged):
    prepared, _ = judged
    history = lib.run_folder("run") / "models" / "random.history.json"
    history.write_text('{"warnings": ["the samples collapse"]}')
    table = evaluation.evaluate("run", prepared)
    assert table[table.method == "random"].note.str.contains("the samples collapse").all()
    assert not table[table.method == "intensity"].note.str.contains("collapse").any()
