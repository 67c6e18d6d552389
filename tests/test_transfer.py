"""What is there is found, what is not is not, and nothing of whom is judged reaches what judges."""

from dataclasses import replace
from pathlib import Path

import made_cohort
import numpy as np
import pandas as pd
import pytest
from imblearn.over_sampling import RandomOverSampler
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC

from lib import cohort, domain, intake, preparation, transfer
from lib.errors import CourseError
from lib.preprocessing import Recipe
from lib.transfer import Plan

QUICK = Plan(outer=3, inner=2, trials=2)
DATA = Path(__file__).parents[2] / "shared" / "data"
PATIENTS = ("BraTS-GLI-00000-000", "BraTS19_2013_2_1", "BraTS19_2013_3_1", "BraTS2021_00006", "Brats18_2013_24_1")
HEALTHY = ("sub-52", "sub-53", "sub-54", "sub-55", "sub-56", "sub-57", "sub-58", "sub-59")
SITES = np.repeat(["a", "b", "c"], 10)
CONFOUNDED = np.concatenate([np.arange(10) < ill for ill in (1, 9, 5)])


def noise(seed, n=30, features=8):
    return np.random.default_rng(seed).normal(size=(n, features))


def half(n=30):
    return np.arange(n) % 2 == 0


def of_site(seed=0):
    """Features that know the site and nothing else."""
    return noise(seed, features=3) + 6 * (SITES[:, None] == ["a", "b", "c"])


def named(table):
    return pd.DataFrame(table, index=[f"s{i:02d}" for i in range(len(table))])


def by_name(values):
    return {f"s{i:02d}": value for i, value in enumerate(values)}


@pytest.mark.parametrize("classifier", [*transfer.CLASSIFIERS, transfer.ANY])
def test_what_is_there_is_found(classifier):
    found = transfer.held_out(noise(0) + 6 * half()[:, None], half(), classifier, plan=QUICK)
    assert found.auroc()[0] > 0.95
    assert np.isfinite(found.scores).all()


def test_what_is_not_there_is_not_found():
    figures = np.array([transfer.held_out(noise(seed), half(), "svm", plan=QUICK).auroc() for seed in range(100, 130)])
    assert 0.4 < figures[:, 0].mean() < 0.6
    assert ((figures[:, 1] <= 0.5) & (figures[:, 2] >= 0.5)).mean() >= 0.8


@pytest.mark.parametrize("classifier", transfer.CLASSIFIERS)
def test_the_labels_of_a_site_have_no_part_in_its_scores(classifier):
    def ask(labels):
        return transfer.held_out(table, labels, classifier, sites=SITES, site_out=True, plan=QUICK).scores

    table, other = noise(1), np.where(SITES == "b", ~CONFOUNDED, CONFOUNDED)
    before, after = ask(CONFOUNDED), ask(other)
    assert before[SITES == "b"].tobytes() == after[SITES == "b"].tobytes()
    assert before[SITES == "a"].tobytes() != after[SITES == "a"].tobytes()


def test_a_subject_s_features_have_no_part_in_the_scores_of_those_held_out_with_it():
    table = noise(2)
    changed = table.copy()
    changed[0] *= 100
    before, after = (
        transfer.held_out(one, CONFOUNDED, sites=SITES, site_out=True, plan=QUICK).scores for one in (table, changed)
    )
    assert before[1:10].tobytes() == after[1:10].tobytes()
    assert before[0] != after[0]


def test_copies_of_the_rare_class_stay_on_one_side():
    rare = np.arange(30) < 5
    ours, theirs = [], []
    for seed in range(6):
        table = noise(seed, features=30)
        copied = RandomOverSampler(random_state=0).fit_resample(table, rare)
        ours.append(transfer.held_out(table, rare, plan=QUICK).auroc()[0])
        theirs.append(transfer.held_out(*copied, plan=QUICK).auroc()[0])
    assert np.mean(theirs) > 0.8
    assert 0.3 < np.mean(ours) < 0.7


def test_settings_are_not_chosen_by_whom_they_are_judged_on():
    settings = [SVC(C=c, kernel=kernel, gamma=g) for c in (0.1, 1, 10) for kernel in ("rbf", "poly", "sigmoid")
                for g in (0.01, 0.1, 1)]  # fmt: skip
    ours, theirs = [], []
    for seed in range(100, 108):
        table, folds = noise(seed), StratifiedKFold(3, shuffle=True, random_state=seed).split(noise(0), half())
        theirs += [max(roc_auc_score(half()[away], model.fit(table[near], half()[near]).decision_function(table[away]))
                       for model in settings) for near, away in folds]  # fmt: skip
        ours.append(transfer.held_out(table, half(), "svm", plan=replace(QUICK, trials=8)).auroc()[0])
    assert np.mean(theirs) > 0.65
    assert 0.4 < np.mean(ours) < 0.6


def test_every_subject_is_held_out_once_and_sites_are_folds():
    by_lot = transfer.held_out(noise(0), CONFOUNDED, plan=QUICK)
    by_site = transfer.held_out(noise(0), CONFOUNDED, sites=SITES, site_out=True, plan=QUICK)
    assert sorted(by_lot.settings) == sorted(by_site.settings) == [0, 1, 2]
    assert all(len(np.unique(SITES[by_site.folds == fold])) == 1 for fold in range(3))
    assert [CONFOUNDED[by_lot.folds == fold].sum() for fold in range(3)] == [5, 5, 5]
    assert np.isfinite([by_lot.scores, by_site.scores]).all()


def test_where_sites_are_balanced_knowing_the_site_is_worth_nothing():
    figures = [transfer.held_out(of_site(seed), half(), "svm", sites=SITES, plan=QUICK, seed=seed) for seed in range(8)]
    assert 0.4 < np.mean([found.auroc()[0] for found in figures]) < 0.6
    for found in figures:
        counts = pd.crosstab([found.folds, SITES], half())
        assert (abs(counts[True] - counts[False]) == 0).all()


def test_a_site_with_one_label_is_learnt_from_and_not_judged():
    labels = np.where(SITES == "a", False, CONFOUNDED)
    found = transfer.held_out(noise(0), labels, sites=SITES, site_out=True, plan=QUICK)
    assert sorted(found.settings) == [1, 2]
    assert np.isnan(found.scores[SITES == "a"]).all()
    assert np.isfinite(found.auroc()).all()
    assert transfer.held_out(noise(0), SITES == "b", sites=SITES, site_out=True, plan=QUICK) is None


def test_equal_seeds_give_equal_bytes():
    one, same, other = (
        transfer.held_out(noise(0), half(), transfer.ANY, plan=QUICK, seed=seed).scores.tobytes() for seed in (3, 3, 4)
    )
    assert one == same != other


def test_p_values_of_labels_by_lot_and_of_true_ones():
    plan = Plan(outer=3, inner=2, trials=1, permutations=9)
    by_lot = [transfer.permutation_p(noise(seed, 24, 3), half(24), "svm", plan=plan, seed=seed) for seed in range(8)]
    assert {round(10 * p, 6) for p in by_lot} <= set(range(1, 11))
    assert 0.3 < np.mean(by_lot) < 0.8
    assert transfer.permutation_p(noise(0) + 6 * half()[:, None], half(), plan=plan) == pytest.approx(0.1)
    assert np.isnan(transfer.permutation_p(noise(0), half(), plan=QUICK))


def test_a_site_that_passes_for_the_label_is_unmasked():
    tables = {"site": named(of_site()), "label": named(noise(1) + 6 * CONFOUNDED[:, None])}
    plan = Plan(outer=3, inner=2, trials=1, permutations=19)
    found = transfer.compare(tables, by_name(CONFOUNDED), sites=by_name(SITES), plan=plan).xs("logistic", level=1)
    site, label = found.loc["site"], found.loc["label"]
    assert site.auroc > 0.65
    assert site.site_out_low < 0.5 < site.site_out_high
    assert (site.p_value, label.p_within) == (pytest.approx(0.05), pytest.approx(0.05))
    assert site.p_within > 0.05
    assert label.site_out > 0.95
    assert set(found.n) == {30}


def test_without_sites_or_permutations_their_figures_are_missing():
    found = transfer.compare({"noise": named(noise(0))}, by_name(half()), classifiers=("logistic", "svm"), plan=QUICK)
    assert list(found.index) == [("noise", "logistic"), ("noise", "svm")]
    assert found[["site_out", "p_value", "p_within"]].isna().all(axis=None)
    assert ((found.auroc_low <= found.auroc) & (found.auroc <= found.auroc_high)).all()


def test_only_the_labelled_are_used():
    table = named(noise(0, 40))
    some = {name: label for name, label in by_name(half(40)).items() if name < "s30"}
    pd.testing.assert_frame_equal(
        transfer.compare({"noise": table}, some, plan=QUICK),
        transfer.compare({"noise": table[:30]}, some, plan=QUICK),
    )


def test_too_few_of_a_label_give_no_answer():
    few = np.arange(30) < domain.LEAST - 1
    assert transfer.held_out(noise(0), few, plan=QUICK) is None
    assert transfer.compare({"noise": named(noise(0))}, by_name(few)) is None
    assert np.isnan(transfer.permutation_p(noise(0), few, plan=Plan(permutations=3)))


@pytest.mark.parametrize(
    ("attempt", "what"),
    [
        (lambda: transfer.held_out(noise(0), half(12)), r"\(30, 8\) for 12 labels"),
        (lambda: transfer.held_out(np.zeros(30), half()), r"\(30,\)"),
        (lambda: transfer.held_out(noise(0) + np.where(np.arange(30) < 2, np.nan, 0)[:, None], half()), "2 of 30"),
        (lambda: transfer.held_out(noise(0), half(), "oracle"), "oracle"),
        (lambda: transfer.compare({"T1": named(noise(0))}, by_name(half(31))), "1 labelled .* T1, such as s30"),
        (lambda: Plan(inner=1), "inner is 1"),
        (lambda: Plan(permutations=-1), "permutations is -1"),
    ],
)
def test_bad_input_is_refused(attempt, what):
    with pytest.raises(CourseError, match=what):
        attempt()


def test_unions_stand_side_by_side():
    tables = {name: named(noise(i, 5, 2)) for i, name in enumerate("abc")}
    assert list(transfer.unions(tables)) == ["a", "b", "c", "a+b", "a+c", "b+c", "a+b+c"]
    assert list(transfer.unions(tables, (1, 3))) == ["a", "b", "c", "a+b+c"]
    np.testing.assert_array_equal(transfer.unions(tables)["a+c"], np.hstack([tables["a"], tables["c"]]))


def test_headers_hold_numbers_words_and_what_is_missing(tmp_path):
    prepared = made_cohort.write(tmp_path / "cohort")
    stated = [{"vendor": "a", "tesla": 3.0}, {"vendor": "b"}, {}]
    facts = [{"acquisition": {"T1": of}} if of else {} for of in stated]
    subjects = [replace(s, facts=s.facts | of) for s, of in zip(prepared.subjects[:3], facts, strict=True)]
    table = transfer.headers(subjects)
    assert list(table.index) == [s.id for s in subjects]
    assert np.isfinite(table.to_numpy()).all()
    assert len(table.drop_duplicates()) == 3
    assert len(transfer.headers(prepared.subjects[:3]).drop_duplicates()) == 1


def test_tables_of_a_cohort_hold_the_subjects_that_all_have(tmp_path):
    one, two = (made_cohort.write(tmp_path / str(n), patients=n) for n in (3, 5))
    tables = transfer.by_acquisition([two, one])
    assert list(tables) == ["header and shape", "histogram"]
    assert all(list(table.index) == [s.id for s in one.subjects] for table in tables.values())
    brightness = transfer.coded(one.subjects, lambda s: np.array([s.image[0].max()]))
    assert brightness.loc[one.subjects[0].id, 0] == one.subjects[0].image[0].max()


@pytest.mark.skipif(not DATA.exists(), reason="the real scans are not beside this folder")
def test_healthy_and_ill_of_two_sources_are_told_apart_without_a_look_at_any_lesion(course_root):
    for folder, names in {"brats": PATIENTS, "healthy_t1_bids": HEALTHY}.items():
        (course_root / folder).mkdir(parents=True)
        for name in names:
            (course_root / folder / name).symlink_to(DATA / folder / name)
    gathered = intake.gather(
        str(course_root / "brats"),
        healthy_data=str(course_root / "healthy_t1_bids"),
        modalities="T1",
        pixel_mm=4,
        size=48,
    )
    recipe = Recipe(("T1",), pixel_mm=4, slice_mm=4, size=48)
    prepared = cohort.open_cohort(preparation.prepare_cohort(gathered, recipe))
    found = transfer.compare(transfer.by_acquisition([prepared]), domain.by_health(prepared))
    assert (found.auroc > 0.9).all()
    assert set(found.n) == {len(PATIENTS) + len(HEALTHY)}
