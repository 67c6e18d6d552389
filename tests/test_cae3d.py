"""The autoencoder of whole brains: what it learns from, that it resumes, that its maps lie on the scan's own grid."""

import made_cohort
import numpy as np
import pytest
import torch

from lib import models
from lib.errors import CourseError
from lib.intake import LESION_FREE
from lib.models import cae3d

SMALL = {"box": 32, "voxel_mm": 2.0, "width": 8, "code": 8, "epochs": 3}
SETTINGS = cae3d.Settings(**SMALL)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return made_cohort.write(tmp_path_factory.mktemp("cohort") / "c", modalities=("FLAIR", "T2"))


@pytest.fixture(scope="module")
def fitted(prepared, tmp_path_factory):
    detector = models.create("cae3d", prepared.modalities, **SMALL)
    detector.fit(prepared, out=tmp_path_factory.mktemp("models"), device="cpu")
    return detector


def test_a_brain_lies_in_the_middle_of_its_cube_and_nothing_outside_it(prepared):
    subject = prepared.split("train")[0]
    image, inside = cae3d.cut(subject, SETTINGS)
    assert image.shape == (2, 32, 32, 32)
    assert inside.sum() == pytest.approx(np.asarray(subject.brain).sum(), rel=0.02)  # voxels of 2 mm in both
    assert np.abs(np.argwhere(inside).mean(axis=0) - 15.5).max() <= 0.5
    assert (image[:, ~inside] == 0).all()


def test_of_patients_it_learns_from_the_lesion_free_slices_only(tmp_path):
    cohort = made_cohort.write(tmp_path / "c", healthy=(0, 0, 0), patients=1, training=LESION_FREE)
    for split in ("train", "validation"):
        for item, subject in zip(cae3d.Volumes(cohort, split, SETTINGS), cohort.split(split), strict=True):
            box = cae3d.box_of(subject, SETTINGS)
            near = box.cut(~subject.lesion_free[:, None, None] & np.asarray(subject.brain)) > 0.6
            assert near.any()
            assert item["image"][:, near].max() == 0
            assert not item["brain"][near].any()
            assert item["brain"].any()


def test_the_loss_does_not_look_outside_the_brain(prepared):
    detector = models.create("cae3d", prepared.modalities, **SMALL)
    inside = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    inside[:, 1:3] = True
    batch = {"image": torch.rand(1, 2, 4, 4, 4), "brain": inside}
    assert detector.loss(lambda image: image + 9.0 * ~inside[:, None], batch) == 0
    assert detector.loss(lambda image: image + 0.5, batch) == pytest.approx(0.25)


def test_it_learns_and_resumes_to_the_same_weights(prepared, fitted, tmp_path):
    class Killed(BaseException):
        pass

    dying, steps = models.create("cae3d", prepared.modalities, **SMALL), []
    honest = dying.loss

    def loss(forward, batch):
        steps.append(1)
        if len(steps) == 8:  # three volumes a training epoch, two of validation
            raise Killed
        return honest(forward, batch)

    dying.loss = loss
    with pytest.raises(Killed):
        dying.fit(prepared, out=tmp_path, device="cpu")
    again = models.create("cae3d", prepared.modalities, **SMALL)
    history = again.fit(prepared, out=tmp_path, device="cpu")
    assert history.rows[-1]["validation"] < history.rows[0]["validation"]
    for key, value in fitted.state().items():
        assert torch.equal(value, again.state()[key]), key


def test_maps_lie_on_the_subject_s_grid_and_mark_a_change_where_it_is(prepared, fitted):
    subject = prepared.split("test")[0]
    before = fitted.maps(subject)
    assert before.shape == subject.brain.shape
    assert before[~np.asarray(subject.brain)].max() == 0
    changed = changed_copy(subject, np.s_[:, 4:8, 18:24, 12:18])
    gain = fitted.maps(changed) - before
    marked = np.zeros(subject.brain.shape, bool)
    marked[4:8, 18:24, 12:18] = True
    assert gain[marked].mean() > 5 * np.abs(gain[~marked & np.asarray(subject.brain)]).mean()


def changed_copy(subject, place):
    """A subject that is brighter in a place."""

    class Changed:
        brain, voxel_mm = subject.brain, subject.voxel_mm
        image = np.array(subject.image)

    Changed.image[place] += 0.5
    return Changed


def test_what_it_expects_and_its_code_have_the_promised_shapes(prepared, fitted):
    subject = prepared.split("test")[-1]
    assert fitted.expected(subject).shape == (2, *subject.brain.shape)
    assert fitted.redraw(subject, 3).shape == subject.image[:, 3].shape
    code = fitted.code(subject)
    assert code.shape == (2 * (7 * 8 + 8),)
    assert np.isfinite(code).all()
    assert not np.array_equal(code, fitted.code(prepared.split("test")[0]))


def test_the_network_takes_any_sides_that_can_be_halved_four_times():
    network = cae3d.network(1, 8, 8)
    assert network(torch.rand(1, 1, 32, 48, 16)).shape == (1, 1, 32, 48, 16)
    assert sum(isinstance(part, torch.nn.GroupNorm) for part in network.modules()) >= 7


@pytest.mark.parametrize(
    "wrong", [{"box": 50}, {"box": 16}, {"width": 6}, {"code": 4}, {"voxel_mm": 0.1}, {"residual": "up"}]
)
def test_settings_that_cannot_be_are_named(wrong):
    with pytest.raises(CourseError, match=next(iter(wrong))):
        cae3d.Settings(**wrong)
