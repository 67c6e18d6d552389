"""Baselines with known answers."""

import made_cohort
import numpy as np
import pytest
from scipy import ndimage

from lib import models


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
