"""What is unlike all that was seen near its place in healthy scans, whichever filters look."""

from dataclasses import replace

import made_cohort
import numpy as np
import pytest
import torch

from lib import models
from lib.errors import CourseError
from lib.models import features

SMALL = {"cells": 8}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return made_cohort.write(tmp_path_factory.mktemp("cohort") / "c", healthy=(6, 2, 2))


@pytest.fixture(scope="module")
def fitted(prepared, tmp_path_factory):
    detector = models.create("features", prepared.modalities, **SMALL)
    detector.fit(prepared, out=tmp_path_factory.mktemp("models"), device="cpu")
    return detector


def of(prepared, subject):
    image = torch.from_numpy(subject.image.swapaxes(0, 1).astype(np.float32))
    return image, torch.from_numpy(np.array(subject.brain)), features.places(subject)


@pytest.mark.parametrize("encoder", ["scales", "random", "dae"])
def test_it_marks_lesions_with_any_filters(encoder, prepared, tmp_path):
    if encoder == "dae":
        dae = models.create("dae", prepared.modalities, epochs=1, width=8)
        dae.fit(prepared, out=tmp_path, device="cpu")
        dae.save(tmp_path / "dae.safetensors")
    detector = models.create("features", prepared.modalities, encoder=encoder, **SMALL)
    detector.fit(prepared, out=tmp_path, device="cpu")
    assert detector.memory.shape[1] == {"scales": 4, "random": 16, "dae": 16}[encoder]
    for subject in prepared.split("test")[-3:]:
        maps = detector.maps(subject)
        assert maps[subject.lesion].mean() > 1.5 * maps[subject.brain & ~subject.lesion].mean()
    detector.save(tmp_path / "features.safetensors")
    (tmp_path / "dae.safetensors").unlink(missing_ok=True)  # what was saved is whole without it
    again = models.load(tmp_path / "features.safetensors")
    np.testing.assert_array_equal(again.maps(subject), maps)


def test_what_it_remembers_is_at_no_distance(fitted, prepared):
    known, new = (prepared.split(name)[0] for name in ("train", "test"))
    remembered, other = (fitted.maps(subject)[subject.brain] for subject in (known, new))
    assert remembered.max() < 0.003  # half precision
    assert other.mean() > 10 * remembered.mean()


def test_too_bright_and_too_dark_are_marked_alike(fitted, prepared):
    subject = prepared.split("test")[0]
    image, brain, place = of(prepared, subject)
    there = torch.zeros(32, 32, dtype=torch.bool)
    there[12:18, 12:18] = True
    before = fitted.distances(image, brain, place)[5][there].mean()
    for change in (0.5, -0.4):
        marked = fitted.distances(image + change * there, brain, place)[5]
        assert marked[there].mean() > 4 * before
        assert marked[there].mean() > 3 * marked[brain[5] & ~there].mean()


def test_only_slices_of_a_like_height_are_asked(prepared, tmp_path):
    detector = models.create("features", prepared.modalities, neighbours=6, **SMALL)
    detector.fit(prepared, out=tmp_path, device="cpu")
    place = features.places(prepared.split("train")[0])
    height = float(place[5, 0])
    near = (detector.heights - height).abs() < 0.01
    assert near.sum() == 6  # one slice of each subject that it learnt from
    seen = detector.memory[near][0].float()
    detector.memory = torch.where(near[:, None, None, None], seen + 1, seen).half()
    assert detector._nearest(seen, torch.tensor(height)).mean() > 0.3
    detector.settings = replace(detector.settings, neighbours=7)
    assert detector._nearest(seen, torch.tensor(height)).mean() < 0.01


def test_the_memory_is_bounded_and_repeats_by_its_seed(prepared, tmp_path):
    def remembered(seed):
        detector = models.create("features", prepared.modalities, memory=7, **SMALL)
        detector.fit(prepared, out=tmp_path, device="cpu", seed=seed)
        return detector.state()

    first, again, other = remembered(0), remembered(0), remembered(1)
    assert first["memory"].shape == (7, 4, 8, 8)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["heights"], other["heights"])


def test_places_tell_height_and_box_and_stretching_comes_back(prepared):
    subject = prepared.split("test")[0]
    place = features.places(subject)
    assert place[1, 0] == pytest.approx(0.05)  # the first and the last of 12 slices have no brain
    assert place[10, 0] == pytest.approx(0.95)
    row, half_row, column, half_column = place[0, 1:].tolist()
    assert (row, column) == pytest.approx((0, 0))
    assert (half_row, half_column) == pytest.approx((0.75, 0.75))  # 24 of 32 pixels
    ramp = torch.linspace(0, 1, 32).expand(1, 1, 32, 32)
    wide = features.stretched(ramp, place[:1], 64)
    assert float(wide[..., 0].mean()) == pytest.approx(4 / 31, abs=0.02)
    back = features.shrunk(wide, place[:1], 32)
    torch.testing.assert_close(back[..., 5:27, 5:27], ramp[..., 5:27, 5:27], atol=0.02, rtol=0)


def test_a_box_off_the_middle_is_found(tmp_path):
    cohort = made_cohort.write(tmp_path / "c")
    subject = cohort.subjects[0]
    brain = np.roll(np.load(subject.folder / "brain.npy"), (2, -3), axis=(1, 2))
    np.save(subject.folder / "brain.npy", brain)
    moved = features.places(made_cohort.cohort.open_cohort(tmp_path / "c").subjects[0])
    assert moved[0, 1:].tolist() == pytest.approx([2 / 16, 0.75, -3 / 16, 0.75])
    image = torch.from_numpy(brain[5][None, None].astype(np.float32))
    wide = features.stretched(image, moved[:1], 32)[0, 0] > 0.5
    assert torch.equal(wide, wide.flip(0))
    assert wide[:, 0].any()


def test_the_dae_it_asks_for_must_be_there_and_of_its_modalities(prepared, tmp_path):
    detector = models.create("features", ("FLAIR",), encoder="dae")
    with pytest.raises(CourseError, match=r"dae\.safetensors is not there"):
        detector.fit(prepared, out=tmp_path)
    both = models.create("dae", ("FLAIR", "T2"))
    both.network = both.build()
    both.save(tmp_path / "dae.safetensors")
    with pytest.raises(CourseError, match="other modalities"):
        detector.fit(prepared, out=tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"encoder": "resnet"}, {"features": 0}, {"width": 0}, {"cells": 0}, {"memory": 0}, {"neighbours": 0}]
)
def test_settings_that_cannot_be_are_named(wrong):
    with pytest.raises(CourseError, match=next(iter(wrong))):
        models.create("features", ("FLAIR",), **wrong)
