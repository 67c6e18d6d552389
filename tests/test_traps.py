"""Each trap on maps whose answer is known beforehand."""

import made_cohort
import numpy as np
import pandas as pd
import pytest

import lib
from lib import approaches, cohort, evaluation, scoring, slice_traps, traps
from lib.intake import LESION_FREE

RUN, METHODS = "run", ("empty", "random", "intensity")


def scored(folder, **options):
    prepared = made_cohort.write(folder, **options)
    for method in METHODS:
        scoring.run_detector(method, prepared, RUN)
    return prepared


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(lib, "ROOT", tmp_path)
    return scored(tmp_path / "cohort", healthy=(3, 2, 4), patients=6)


@pytest.fixture
def planted(monkeypatch):
    """`planted(map of a subject)`: every method's maps are this, and a slice's score is the highest in it."""

    def plant(of):
        def read(run, method, subject, prepared):
            anomaly_map = of(subject).astype(np.float16)
            return anomaly_map, anomaly_map.max(axis=(1, 2)).astype(np.float32)

        monkeypatch.setattr(scoring, "read_map", read)

    return plant


def rounded(prepared):
    """Make every brain a ball, so that its area changes with the level."""
    for subject in prepared.subjects:
        level, row, column = np.mgrid[:12, :32, :32] - np.array([5.5, 15.5, 15.5])[:, None, None, None]
        brain = (2.3 * level) ** 2 + row**2 + column**2 < 13.5**2
        np.save(subject.folder / "brain.npy", brain)
        np.save(subject.folder / "lesion.npy", subject.lesion & brain)
    cohort._mapped.cache_clear()


def shares(prepared):
    patients = [s for s in prepared.split("test") if s.lesion.any()]
    return sum(s.lesion.sum() for s in patients) / sum(s.brain.sum() for s in patients)


def test_the_empty_mask_is_as_accurate_as_lesions_are_rare(prepared):
    p, table = shares(prepared), traps.pixel_accuracy(RUN, prepared, ("intensity",))
    assert table.accuracy["nothing marked"] == pytest.approx(1 - p)
    assert table.dice["nothing marked"] == 0
    assert table.dice["everything marked"] == pytest.approx(2 * p / (1 + p))
    assert table.average_precision["nothing marked"] == pytest.approx(p)
    assert table.dice["as many at random"] == pytest.approx(p, abs=0.05)
    assert table.average_precision["intensity"] > 0.5


@pytest.mark.parametrize(("marked", "called"), [(0.01, 0), (0.10, 1)])
def test_mean_plus_sigma_calls_every_image_the_same(prepared, planted, marked, called):
    every = np.arange(32 * 32).reshape(32, 32) < marked * 32 * 32
    planted(lambda subject: np.repeat(every[None], len(subject.brain), axis=0))
    table = traps.mean_plus_sigma(RUN, prepared, "intensity")
    assert table.share.to_numpy() == pytest.approx(every.mean())
    assert (table.called_ill == called).all()
    assert (table.auroc == 0.5).all()


def test_no_image_has_more_above_than_chebyshev_allows(prepared):
    table = traps.mean_plus_sigma(RUN, prepared, "intensity", (0.5, 1, 2, 3))
    assert (table.high <= 1 / (1 + table.k**2)).all()
    assert (table.groupby("truth").share.diff().dropna() <= 0).all()
    assert set(table.truth) == {"lesion", "no lesion"}


@pytest.mark.parametrize("method", METHODS)
def test_background_raises_auroc_by_the_formula(prepared, method):
    table = traps.background(RUN, prepared, method)
    assert table.auroc.to_numpy() == pytest.approx(table.formula.to_numpy())
    assert table.background["inside the brain"] == 0
    assert 0.3 < table.background["whole square"] < 0.8


def test_background_leaves_average_precision_where_it_scores_lowest(prepared):
    table = traps.background(RUN, prepared, "random")
    assert table.average_precision["whole square"] == pytest.approx(table.average_precision["inside the brain"])
    assert table.auroc["whole square"] > table.auroc["inside the brain"] + 0.1
    assert (table.above == 1).all()


def test_the_slice_with_most_lesion_flatters_noise_but_not_the_truth(prepared, planted):
    noise = traps.largest_slice(RUN, prepared, "random")
    assert noise.prevalence["slice with most lesion"] > 2 * noise.prevalence["all slices"]
    assert noise.average_precision["slice with most lesion"] > noise.average_precision["all slices"]
    planted(lambda subject: np.asarray(subject.lesion))
    perfect = traps.largest_slice(RUN, prepared, "random")
    assert perfect[["average_precision", "dice", "dice_oracle"]].to_numpy() == pytest.approx(1)


def test_a_median_helps_noise_on_the_truth_and_nothing_else(prepared, planted):
    random = np.random.default_rng(0)
    planted(lambda subject: subject.lesion + 2 * random.random(subject.brain.shape))
    table = traps.median_filter(RUN, prepared, ("intensity",))
    plain, smooth = table.average_precision
    assert table.gain["intensity, median"] == pytest.approx(smooth - plain)
    assert table.gain_low["intensity, median"] > 0
    planted(lambda subject: np.ones(subject.brain.shape))
    assert traps.median_filter(RUN, prepared, ("intensity",)).gain["intensity, median"] == pytest.approx(0)


def test_prevalence_moves_average_precision_and_not_auroc(prepared):
    table = traps.prevalence(RUN, prepared, "random")
    assert table.auroc.to_numpy() == pytest.approx(table.auroc[0])
    assert table.average_precision.is_monotonic_increasing
    (own,) = table[table.this_cohort].itertuples()
    assert own.prevalence == pytest.approx(shares(prepared))
    counts = [s for s in evaluation.test_counts(RUN, "random", prepared) if s.lesion.any()]
    pooled = evaluation.average_precision(sum(s.lesion for s in counts), sum(s.other for s in counts))
    assert own.average_precision == pytest.approx(float(pooled))


def test_chance_is_the_prevalence_at_every_prevalence(prepared):
    table = traps.prevalence(RUN, prepared, "empty")
    assert table.average_precision.to_numpy() == pytest.approx(table.prevalence.to_numpy())


def test_the_mean_over_an_even_map_is_brain_area_and_matching_ends_it(prepared, planted):
    rounded(prepared)
    planted(lambda subject: np.asarray(subject.brain))
    table = slice_traps.brain_area(RUN, prepared, "intensity")
    assert table.auroc["mean over the whole image"] == pytest.approx(table.auroc["brain area alone"])
    assert table.auroc["brain area alone"] > 0.6
    assert table.matched["brain area alone"] == pytest.approx(0.5)
    assert table.pairs.iloc[0] > 5


def test_matching_spares_what_finds_the_lesion(prepared, planted):
    rounded(prepared)
    planted(lambda subject: np.asarray(subject.lesion))
    table = slice_traps.brain_area(RUN, prepared, "intensity")
    assert table.matched["the method's slice score"] == 1
    assert table.auroc["the method's slice score"] == 1


def test_slices_are_paired_once_and_within_tolerance():
    one = pd.DataFrame({"level": [0.5, 0.51, 0.9], "area": [100, 100, 100]})
    two = pd.DataFrame({"level": [0.5, 0.2, 0.52], "area": [102, 100, 120]})
    rows, columns = slice_traps.matched(one, two)
    assert (rows.tolist(), columns.tolist()) == ([0], [0])


def test_a_perfect_score_has_no_optimism_and_a_random_one_has_nothing_else(prepared, planted):
    planted(lambda subject: np.asarray(subject.lesion))
    table = slice_traps.youden(RUN, prepared, "intensity", splits=60).set_index(["score", "level"])
    assert table.loc["intensity", ["tuned", "elsewhere"]].to_numpy() == pytest.approx(1)
    assert table.optimism["intensity"].to_numpy() == pytest.approx(0)
    assert (table.tuned["random score"] > 0.1).all()
    assert (table.elsewhere["random score"].abs() < 0.1).all()


def test_slices_of_patients_that_look_different_are_told_apart(prepared):
    for subject in prepared.subjects:
        if not subject.healthy:
            np.save(subject.folder / "image.npy", np.array(subject.image) * np.float16(1.2))
    cohort._mapped.cache_clear()
    table = slice_traps.lesion_free_slices(prepared)
    assert table.auroc["histogram and asymmetry"] > 0.9
    assert table.auroc["level and area alone"] == pytest.approx(0.5, abs=0.15)


def test_a_coin_is_learned_by_slice_and_not_by_subject(prepared):
    for place, subject in enumerate(prepared.subjects):
        np.save(subject.folder / "image.npy", np.array(subject.image) * np.float16(1 + 0.1 * place))
    cohort._mapped.cache_clear()
    table = slice_traps.split_leak(prepared, repeats=6).groupby("split")[["accuracy", "auroc"]].mean()
    assert (table.loc["by slice"] > 0.95).all()
    assert (table.loc["by subject"] < 0.65).all()


def test_labels_by_lot_give_a_half(prepared):
    found = slice_traps.mislabelled(RUN, prepared, "intensity", draws=400)
    assert found["mean"] == pytest.approx(0.5, abs=0.05)
    assert found["low"] < 0.2
    assert found["high"] > 0.8
    assert found["truth"][0] == 1  # lesions of this cohort are the brightest there is
    assert found["n"] == 6


def test_scan_scores_stand_beside_the_classifier_that_sees_no_lesion(prepared):
    table = slice_traps.scanner(RUN, prepared, "intensity")
    assert table.auroc["intensity, highest 1 %"] == 1
    assert table.auroc["brain size"] == 0.5
    assert 0 < table.p_value["domain classifier"] <= 1
    assert table.n["domain classifier"] == 10


def test_the_traps_repeat_themselves(prepared):
    for trap in (slice_traps.youden, slice_traps.brain_area, slice_traps.scanner, traps.pixel_accuracy):
        options = (("random",),) if trap is traps.pixel_accuracy else ("random",)
        pd.testing.assert_frame_equal(trap(RUN, prepared, *options), trap(RUN, prepared, *options))


@pytest.mark.filterwarnings("error")
def test_without_healthy_subjects_what_needs_them_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(lib, "ROOT", tmp_path)
    prepared = scored(tmp_path / "cohort", healthy=(0, 0, 0), training=LESION_FREE)
    assert slice_traps.lesion_free_slices(prepared) is None
    assert slice_traps.scanner(RUN, prepared, "intensity") is None
    assert set(slice_traps.youden(RUN, prepared, "intensity", splits=10).level) == {"slice"}
    assert np.isnan(slice_traps.mislabelled(RUN, prepared, "intensity")["truth"]).all()
    table = approaches.five_approaches(
        RUN, prepared, evaluation.evaluate(RUN, prepared), slice_traps.scanner(RUN, prepared, "intensity"), "intensity"
    )
    assert "Patients against healthy: not run here" in table["honest figure"].iloc[3]


@pytest.mark.filterwarnings("error")
def test_a_single_patient_breaks_no_trap(tmp_path, monkeypatch):
    monkeypatch.setattr(lib, "ROOT", tmp_path)
    prepared = scored(tmp_path / "cohort", healthy=(3, 1, 1), patients=1)
    assert slice_traps.mislabelled(RUN, prepared, "intensity") is None
    assert slice_traps.lesion_free_slices(prepared) is None
    assert np.isnan(slice_traps.youden(RUN, prepared, "intensity", splits=5).tuned).all()
    for trap in (traps.mean_plus_sigma, traps.largest_slice, traps.background, traps.prevalence):
        assert len(trap(RUN, prepared, "intensity"))


@pytest.mark.filterwarnings("error")
def test_without_patients_the_figures_are_undefined(tmp_path, monkeypatch):
    monkeypatch.setattr(lib, "ROOT", tmp_path)
    prepared = scored(tmp_path / "cohort", patients=0)
    assert np.isnan(traps.pixel_accuracy(RUN, prepared, ("intensity",)).average_precision).all()
    assert np.isnan(traps.largest_slice(RUN, prepared, "intensity").to_numpy()).all()
    assert np.isnan(traps.median_filter(RUN, prepared, ("intensity",)).to_numpy()).all()
    assert np.isnan(traps.background(RUN, prepared, "intensity").auroc).all()
    assert np.isnan(slice_traps.brain_area(RUN, prepared, "intensity").auroc).all()
    assert slice_traps.mislabelled(RUN, prepared, "intensity") is None


def test_three_subjects_are_too_few_to_toss_coins_for(tmp_path):
    assert slice_traps.split_leak(made_cohort.write(tmp_path, healthy=(1, 0, 1), patients=1)) is None


def test_the_five_approaches_say_what_was_not_run(prepared):
    results = evaluation.evaluate(RUN, prepared)
    table = approaches.five_approaches(RUN, prepared, results, None, "intensity")
    assert table.shape == (5, 4)
    dice = results.query("method == 'intensity' and metric == 'dice' and stratum == 'all' and postprocess == 'none'")
    assert f"{dice.value.iloc[0]:.2f} (" in table["honest figure"].iloc[0]
    assert all("not run here" in text for text in table["honest figure"].iloc[[0, 1, 2, 3]])
    assert f"empty mask {100 * (1 - shares(prepared)):.3g} %" in table["measured the same way here"].iloc[2]
