"""A planted scanner is found, labels by lot are not, and intervals are scikit-learn's figures with a spread."""

import made_cohort
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from lib import cohort, datasets, domain
from lib.subjects import Subject


@pytest.fixture
def prepared(tmp_path):
    return made_cohort.write(tmp_path / "cohort", healthy=(8, 2, 2), patients=12)


def brighten(subjects, gain):
    """Multiply the scans on disk, as another scanner would."""
    for subject in subjects:
        image = np.array(subject.image) * np.float16(gain)
        np.save(subject.folder / "image.npy", image)
    cohort._mapped.cache_clear()


def by_lot(prepared, seed):
    order = np.random.default_rng(seed).permutation(len(prepared.subjects))
    return {s.id: bool(place % 2) for s, place in zip(prepared.subjects, order, strict=True)}


def test_a_planted_gain_is_found(prepared):
    half = by_lot(prepared, 0)
    brighten([s for s in prepared.subjects if half[s.id]], 1.2)
    found = domain.domain_classifier(prepared, half, permutations=39)
    assert found.auroc > 0.95
    assert found.low > 0.8
    assert found.p_value == pytest.approx(1 / 40)
    assert (found.n, found.n_positive) == (24, 12)
    assert "12 against 12 subjects" in str(found)


def test_labels_by_lot_are_not_found(prepared):
    found = [domain.domain_classifier(prepared, by_lot(prepared, seed), permutations=19) for seed in range(5)]
    assert 0.3 < np.mean([f.auroc for f in found]) < 0.7
    assert np.mean([f.p_value for f in found]) > 0.2


def test_the_same_call_gives_the_same_answer(prepared):
    labels = by_lot(prepared, 1)
    one, two = (domain.domain_classifier(prepared, labels, permutations=5) for _ in range(2))
    assert one == two


def test_too_few_subjects_give_no_answer(prepared):
    few = {s.id: i < domain.LEAST - 1 for i, s in enumerate(prepared.subjects)}
    assert domain.domain_classifier(prepared, few) is None


def test_the_lesion_itself_cannot_be_what_is_found(prepared):
    (subject,) = [s for s in prepared.split("test") if s.lesion.any()][:1]
    before = domain.features(subject)
    image = np.array(subject.image)
    image[:, np.asarray(subject.lesion)] = 1.5
    np.save(subject.folder / "image.npy", image)
    cohort._mapped.cache_clear()
    np.testing.assert_array_equal(domain.features(subject), before)


def test_features_are_histogram_size_and_header(prepared):
    subject = prepared.subjects[0]
    parts = [part(subject) for part in (domain.histogram, domain.size, domain.header)]
    assert [len(part) for part in parts] == [len(domain.QUANTILES) + 1, 4, 6]
    np.testing.assert_array_equal(np.concatenate(parts), domain.features(subject))
    assert parts[1][0] == pytest.approx(subject.brain.sum() * 8 / 1e6)


def test_labels_by_health(prepared):
    assert sum(domain.by_health(prepared).values()) == 12


def test_the_interval_holds_scikit_learn_s_figure_and_does_not_heed_the_order():
    random = np.random.default_rng(0)
    labels, subjects = random.random(200) < 0.3, np.repeat(np.arange(20), 10)
    scores = np.round(random.normal(labels, 1), 1)
    value, low, high = domain.auroc_interval(scores, labels, subjects)
    order = random.permutation(200)
    assert value == pytest.approx(roc_auc_score(labels, scores))
    assert low < value < high
    assert domain.auroc_interval(scores[order], labels[order], subjects[order]) == pytest.approx((value, low, high))


def test_one_kind_alone_has_no_auroc():
    assert np.isnan(domain.auroc_interval(np.arange(4), np.ones(4, bool), np.arange(4))).all()


def test_pairs_of_one_group_count_whatever_the_units_of_the_others():
    random = np.random.default_rng(0)
    labels, groups = random.random(60) < 0.4, random.integers(0, 3, 60)
    scores = np.round(random.normal(labels, 1), 1)
    value, low, high = domain.auroc_within(scores, labels, groups)
    inside = [groups == group for group in range(3)]
    pairs = [labels[one].sum() * (~labels[one]).sum() for one in inside]
    assert value == pytest.approx(np.average([roc_auc_score(labels[o], scores[o]) for o in inside], weights=pairs))
    assert low < value < high
    assert domain.auroc_within(np.exp(scores) + 9 * groups, labels, groups) == (value, low, high)
    assert domain.auroc_within(scores, labels, np.zeros(60))[0] == pytest.approx(roc_auc_score(labels, scores))


def test_groups_of_one_kind_each_have_no_auroc():
    labels = np.arange(8) < 4
    assert np.isnan(domain.auroc_within(np.arange(8), labels, labels)).all()


def found_in(prepared, **by_health):
    """The subjects as they were found, each with what `by_health` has first for the healthy, then for patients."""
    return [
        Subject(s.id, {}, **{name: pair[not s.healthy] for name, pair in by_health.items()}) for s in prepared.subjects
    ]


@pytest.mark.parametrize("kept", [{"origin": (datasets.HEALTHY_FOLDER, "")}, {"site": ("A", "B")}])
def test_the_gap_of_two_folders_or_sites_is_measured_and_said(prepared, kept):
    brighten([s for s in prepared.subjects if s.healthy], 1.3)
    (warning,) = domain.gap(prepared, found_in(prepared, **kept), permutations=9)
    measured = domain.domain_classifier(prepared, domain.by_health(prepared), permutations=9)
    assert measured.auroc > 0.95
    assert str(measured) in warning
    assert ("different folders" in warning) == ("origin" in kept)


def test_where_healthy_and_patients_share_a_place_no_gap_is_claimed(prepared):
    assert domain.gap(prepared, found_in(prepared, site=("A", "A"))) == ()
    assert domain.gap(prepared, found_in(prepared, site=("A", None))) == ()
    assert domain.gap(prepared, found_in(prepared)) == ()


def test_a_gap_of_too_few_subjects_is_said_to_be_unmeasured(tmp_path):
    few = made_cohort.write(tmp_path / "few", healthy=(1, 1, 1), patients=3)
    (warning,) = domain.gap(few, found_in(few, origin=(datasets.HEALTHY_FOLDER, "")))
    assert "not measured" in warning
