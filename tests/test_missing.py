"""Subjects that lack some of the modalities: what they have is used, and what they lack counts for nothing."""

from dataclasses import replace

import made_cohort
import numpy as np
import pytest
import torch

from lib import cohort, intake, lesions, models, preparation, training
from lib.errors import CourseError
from lib.models.detector import residual
from lib.preprocessing import Recipe

BOTH = ("FLAIR", "T2")


@pytest.fixture
def without_t2(tmp_path):
    """A cohort of two modalities whose last subject, a patient, lacks the second one."""
    prepared = made_cohort.write(tmp_path, modalities=BOTH)
    *others, last = prepared.subjects
    image = np.array(last.image)
    image[1] = 0
    np.save(last.folder / "image.npy", image)
    cohort._mapped.cache_clear()
    return replace(prepared, subjects=(*others, replace(last, facts=last.facts | {"missing": ["T2"]})))


def test_a_subject_with_one_of_two_modalities_is_used_if_asked_for(brats, write_subject, course_root):
    folder = brats(modalities=BOTH)
    write_subject(folder / "t2only", seed=50, modalities=("T2",))
    asked = {"modalities": "FLAIR,T2"}
    assert "t2only" not in {s.id for s in intake.gather(str(folder), **asked).subjects}
    gathered = intake.gather(str(folder), incomplete=True, **asked)
    assert not gathered.left_out
    assert "1 of 5 subjects have no FLAIR: its channel is 0 in them." in gathered.notes
    opened = cohort.open_cohort(preparation.prepare_cohort(gathered, Recipe(BOTH, pixel_mm=4.0, size=64)))
    lacking = next(s for s in opened.subjects if s.id == "t2only")
    assert opened.incomplete
    assert lacking.facts["missing"] == ["FLAIR"]
    assert not lacking.image[0].any()
    assert (lacking.image[1] > 0).mean() == pytest.approx(lacking.brain.mean(), rel=0.05)


def test_a_folder_with_neither_modality_is_refused(brats, course_root):
    folder = str(brats(modalities=("T1",)))
    with pytest.raises(CourseError, match="No subject has FLAIR or T2"):
        intake.gather(folder, modalities="FLAIR,T2", incomplete=True)


def test_training_leaves_out_some_modalities_but_never_all():
    image = torch.rand(200, 4, 8, 8) + 0.1
    image[:20, 1] = 0
    left = training.leave_out({"image": image}, 2, torch.Generator().manual_seed(0))["image"]
    there = training.present(left)[..., 0, 0]
    assert there[:, :2].any(dim=1).all()
    assert 0.15 < 1 - there[20:, :2].float().mean() < 0.3
    assert torch.equal(there[20:, :2], there[20:, 2:])  # further channels go with their own
    assert torch.equal(left[there], image[there])
    volumes = training.leave_out({"image": image[..., None].repeat(1, 1, 1, 1, 3)}, 2, torch.Generator().manual_seed(0))
    assert torch.equal(volumes["image"][..., 1], left)


@pytest.mark.parametrize("kind", ["signed", "absolute"])
def test_a_missing_modality_has_no_residual(kind):
    image, expected = torch.rand(2, 2, 4, 4) + 0.1, torch.rand(2, 2, 4, 4)
    image[:, 1] = 0
    assert torch.equal(residual(image, expected, BOTH, kind), residual(image[:, :1], expected[:, :1], BOTH[:1], kind))


@pytest.mark.parametrize("families", [lesions.TAUGHT, lesions.KEPT_OUT])
def test_nothing_is_painted_on_a_missing_modality(families):
    image, brain = torch.rand(8, 2, 32, 32), torch.ones(8, 32, 32, dtype=torch.bool)
    image[:4, 1] = 0
    random = torch.Generator().manual_seed(0)
    painted, _ = lesions.paint(image, brain, BOTH, families, random)
    assert not painted[:4, 1].any()
    for name in ("dae", "diffusion"):
        shown = models.create(name, BOTH).corrupt({"image": image, "brain": brain}, random, "train")["shown"]
        assert not shown[:4, 1].any()
    assert (painted != image)[:4, 0].any()


@pytest.mark.parametrize(
    "name", ["intensity", "intensity_median", "blur", "mirror", "single_masked", "single_ensemble"]
)
def test_a_map_is_that_of_the_modality_that_is_there(without_t2, tmp_path, name):
    last = without_t2.subjects[-1]
    both = models.create(name, BOTH).maps(last)
    np.save(last.folder / "image.npy", np.array(last.image[:1]))
    cohort._mapped.cache_clear()
    alone = models.create(name, BOTH[:1]).maps(last)
    assert alone.any()
    np.testing.assert_allclose(both, alone, atol=1e-5)


@pytest.mark.parametrize("name", ["atlas_z", "dae", "synthetic_lesions"])
def test_detectors_learn_from_and_judge_what_is_there(without_t2, tmp_path, name):
    short = {} if name == "atlas_z" else {"epochs": 1, "steps": 2, "width": 8}
    detector = models.create(name, BOTH, **short)
    detector.fit(without_t2, out=tmp_path / "out")
    for subject in without_t2.split("test"):
        found = detector.maps(subject)
        assert np.isfinite(found).all()
        assert found[subject.brain].any()
