"""Baselines with known answers."""

import made_cohort
import numpy as np
import pytest
from scipy import ndimage

from lib import baselines, models


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return made_cohort.write(tmp_path_factory.mktemp("cohort") / "c", healthy=(8, 1, 1))


def fitted(name, prepared):
    detector = models.create(name, prepared.modalities)
    detector.fit(prepared, out=None)
    return detector


def test_empty_marks_nothing(prepared):
    assert not fitted("empty", prepared).maps(prepared.subjects[0]).any()


def test_random_is_the_same_for_the_same_subject_and_uniform(prepared):
    first, second = prepared.subjects[:2]
    detector = fitted("random", prepared)
    maps = detector.maps(first)
    np.testing.assert_array_equal(maps, detector.maps(first))
    assert (maps != detector.maps(second)).any()
    assert maps[first.brain].mean() == pytest.approx(0.5, abs=0.03)


def test_intensity_is_the_scan_and_its_median_is_scipy_s(prepared):
    subject = prepared.split("test")[-1]
    image = subject.image[0].astype(np.float32)
    np.testing.assert_array_equal(fitted("intensity", prepared).maps(subject), image)
    np.testing.assert_array_equal(
        fitted("intensity_median", prepared).maps(subject), ndimage.median_filter(image, 5) * subject.brain
    )


def test_atlas_z_is_higher_in_lesions_than_in_healthy_tissue(prepared):
    detector = fitted("atlas_z", prepared)
    for subject in prepared.split("test")[-3:]:
        maps = detector.maps(subject)
        assert maps[subject.lesion].mean() > 2 * maps[subject.brain & ~subject.lesion].mean()


def test_atlas_z_of_the_average_brain_is_small(prepared):
    detector = fitted("atlas_z", prepared)
    healthy = prepared.split("test")[0]
    assert detector.maps(healthy)[healthy.brain].mean() < 1.5


def test_blur_is_the_bright_side_of_what_the_scan_has_beyond_its_blur(prepared):
    subject = prepared.split("test")[-1]
    image = subject.image[0].astype(np.float32)
    expected = np.stack([np.clip(one - ndimage.gaussian_filter(one, 3), 0, None) for one in image]) * subject.brain
    np.testing.assert_allclose(fitted("blur", prepared).maps(subject), expected, atol=1e-6)


def test_blur_looks_for_dark_lesions_in_t1(tmp_path):
    cohort = made_cohort.write(tmp_path / "c", modalities=("T1",))
    subject = cohort.split("test")[-1]
    maps = fitted("blur", cohort).maps(subject)
    assert maps[subject.lesion].mean() < maps[subject.brain & ~subject.lesion].mean()


def test_brain_area_scores_slices_by_their_brain(prepared):
    subject = prepared.split("test")[-1]
    detector = fitted("brain_area", prepared)
    maps = detector.maps(subject)
    assert not maps.any()
    np.testing.assert_array_equal(detector.slice_scores(subject, maps), subject.brain.sum(axis=(1, 2)))


def test_slice_index_is_1_in_the_middle_and_0_at_the_ends(prepared):
    subject = prepared.split("test")[-1]
    detector = fitted("slice_index", prepared)
    scores = detector.slice_scores(subject, detector.maps(subject))
    np.testing.assert_allclose(scores, 1 - np.abs(np.arange(12) - 5.5).clip(max=4.5) / 4.5, atol=1e-6)


def test_the_slice_baselines_are_detectors_by_name():
    for name in baselines.SLICE_LABELS:
        assert models.family(name) == "baseline"
