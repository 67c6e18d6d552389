"""Noise up to a step and the way back: what is added, where, and what the restoration takes away."""

import made_cohort
import numpy as np
import pytest
import torch

from lib import models
from lib.errors import CourseError
from lib.models import diffusion

NAMES = ("diffusion", "diffusion_patched")
QUICK = {"width": 8, "epochs": 8, "shrink": 1, "learning_rate": 5e-3}


def slices(count=2, side=32, channels=1):
    brain = torch.zeros(count, side, side, dtype=torch.bool)
    brain[:, 4:-4, 4:-4] = True
    image = torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0))
    return image * brain[:, None], brain


def knowing(detector, image):
    """A network that tells the healthy slice from whatever it is shown."""
    return lambda shown: image - shown[:, : image.shape[1]]


def alike(kind, distance):
    noise = drawn(kind)
    return float((noise * noise.roll(distance, dims=-1)).mean() / noise.square().mean())


def drawn(kind, seed=0):
    return diffusion.value_noise(kind, torch.zeros(200, 1, 64, 64), torch.Generator().manual_seed(seed))


def test_pixel_noise_is_white_and_the_others_are_coarse():
    assert drawn("pixel").std() == pytest.approx(diffusion.SPREAD, rel=0.01)
    assert abs(alike("pixel", 1)) < 0.02
    assert alike("coarse", 1) > 0.7
    assert abs(alike("coarse", 8)) < 0.05  # two cells of the only grid
    assert alike("octaves", 8) > 0.2  # the coarsest octave has cells of 16 pixels
    assert alike("octaves", 1) < alike("coarse", 1)  # the finest is one of pixels


@pytest.mark.parametrize("kind", diffusion.NOISES)
def test_noise_repeats_by_its_generator_has_mean_zero_and_no_more_than_its_spread(kind):
    assert torch.equal(drawn(kind, 1), drawn(kind, 1))
    assert not torch.equal(drawn(kind, 1), drawn(kind, 2))
    assert abs(float(drawn(kind).mean())) < 0.02
    assert 0.5 * diffusion.SPREAD < drawn(kind).std() < 1.02 * diffusion.SPREAD


def test_a_step_of_noise_keeps_the_share_of_the_slice_that_the_schedule_says():
    detector = models.create("diffusion", ("FLAIR",), noise="pixel")
    image, brain = torch.ones(200, 1, 32, 32), torch.ones(200, 32, 32, dtype=torch.bool)
    brain[:, :8] = False
    noise = diffusion.value_noise("pixel", image, torch.Generator().manual_seed(0))
    for step in (0, 249, 999):
        shown = detector.noised(image, brain, torch.full((200,), step), noise)
        kept = float(np.prod(1 - np.linspace(1e-4, 2e-2, 1000)[: step + 1]))
        inside = shown[brain[:, None]]
        assert float(inside.mean()) == pytest.approx(kept**0.5, abs=0.01)
        assert float(inside.std()) == pytest.approx(diffusion.SPREAD * (1 - kept) ** 0.5, rel=0.02)
        assert (shown[~brain[:, None]] == 1).all()


@pytest.mark.parametrize(
    ("step", "steps", "times"), [(250, 5, [249, 199, 149, 99, 49]), (250, 1, [249]), (1000, 2, [999, 499])]
)
def test_the_way_back_starts_at_the_step_in_equal_strides(step, steps, times):
    detector = models.create("diffusion", ("FLAIR",), step=step, denoising_steps=steps)
    assert list(detector.times) == times


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("noise", diffusion.NOISES)
def test_a_network_that_knows_the_slice_restores_it_exactly(name, noise, monkeypatch):
    detector = models.create(name, ("FLAIR", "T2"), noise=noise, shrink=1, restorations=2)
    image, brain = slices(channels=2)
    monkeypatch.setattr(type(detector), "forward", property(lambda self: knowing(self, image)))
    torch.testing.assert_close(detector.restored(image, brain), image, atol=1e-5, rtol=0)
    batch = detector.corrupt({"image": image, "brain": brain}, torch.Generator().manual_seed(0), "train")
    assert float(detector.loss(knowing(detector, image), batch)) == pytest.approx(0, abs=1e-6)
    assert float(detector.loss(lambda shown: 1 + image - shown[:, :2], batch)) == pytest.approx(1, abs=1e-6)


def test_every_step_back_asks_the_network_at_less_noise(monkeypatch):
    detector, levels = models.create("diffusion", ("FLAIR",), shrink=1, restorations=2), []
    image, brain = slices()

    def watching(shown):
        levels.append(float(shown[:, 1].max()))
        assert torch.equal(shown[:, 1] > 0, brain)
        return image - shown[:, :1]

    monkeypatch.setattr(type(detector), "forward", property(lambda self: watching))
    detector.restored(image, brain)
    expected = (1 - detector.scheduler.alphas_cumprod[list(detector.times)]).sqrt()
    assert levels == pytest.approx(expected.tolist() * 2)
    assert levels[:3] == sorted(levels[:3], reverse=True)


def test_the_patches_tile_the_slice_and_the_rest_is_shown_as_it_is(monkeypatch):
    detector, noisy = models.create("diffusion_patched", ("FLAIR",), shrink=1, patches=3, restorations=2), []
    image, brain = slices()
    assert torch.equal(sum(patch.int() for patch in detector.grid(32)), torch.ones(32, 32, dtype=torch.int))

    def watching(shown):
        place = shown[:, 1] > 0
        noisy.append(place)
        assert torch.equal(shown[:, 0][~place], image[:, 0][~place])
        assert not torch.equal(shown[:, 0][place], image[:, 0][place])
        return torch.zeros_like(image)

    monkeypatch.setattr(type(detector), "forward", property(lambda self: watching))
    detector.restored(image, brain)
    assert len(noisy) == 2 * 9
    assert torch.equal(sum(place.int() for place in noisy), 2 * brain.int())


def test_patches_of_training_lie_in_the_brain_and_everywhere_in_it():
    detector = models.create("diffusion_patched", ("FLAIR",), patches=4)
    _, brain = slices(count=300)
    places = detector.place(brain, torch.Generator().manual_seed(0))
    assert not (places & ~brain).any()
    assert places.any(dim=(1, 2)).all()
    assert places.sum(dim=(1, 2)).max() <= 9**2
    assert (places.sum(dim=0)[brain[0]] > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_it_marks_lesions_after_it_learnt_the_same_way_every_time(name, tmp_path):
    cohort = made_cohort.write(tmp_path / "c", healthy=(6, 2, 2))
    subject = cohort.split("test")[-1]
    detector = models.create(name, cohort.modalities, step=100, **QUICK)
    history = detector.fit(cohort, out=tmp_path, device="cpu")
    maps = detector.maps(subject)
    assert history.rows[-1]["validation"] < history.rows[0]["validation"]
    assert maps[subject.lesion].mean() > 2 * maps[subject.brain & ~subject.lesion].mean()
    np.testing.assert_array_equal(maps, detector.maps(subject))
    number = int(subject.lesion.sum(axis=(1, 2)).argmax())
    left = (subject.image[0, number].astype(np.float32) - detector.redraw(subject, number)[0]).clip(0) * subject.brain[
        number
    ]
    np.testing.assert_allclose(left, maps[number], atol=1e-5)


def test_every_second_noise_is_the_opposite_of_the_one_before():
    detector, (image, _) = models.create("diffusion", ("FLAIR",)), slices(count=3)
    first, second, third = (detector.noise(i, image) for i in range(3))
    assert first.shape == (1, 1, 32, 32)
    assert torch.equal(first, -second)
    assert not torch.equal(first.abs(), third.abs())


def test_what_the_shrunken_network_does_not_see_stays(monkeypatch):
    detector = models.create("diffusion", ("FLAIR",), shrink=2)
    image, brain = slices()
    half = torch.nn.functional.avg_pool2d(image, 2)
    monkeypatch.setattr(type(detector), "forward", property(lambda self: knowing(self, half)))
    torch.testing.assert_close(detector.restored(image, brain), image, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("diffusion", {"noise": "simplex"}), ("diffusion", {"step": 0}), ("diffusion", {"step": 1001}),
     ("diffusion", {"step": 3, "denoising_steps": 5}), ("diffusion", {"denoising_steps": 0}),
     ("diffusion", {"restorations": 0}), ("diffusion", {"residual": "both"}), ("diffusion", {"shrink": 4}),
     ("diffusion_patched", {"patches": 0})],
)  # fmt: skip
def test_settings_that_cannot_be_are_named(name, wrong, tmp_path):
    with pytest.raises(CourseError, match=next(iter(wrong))):
        models.create(name, ("FLAIR",), **wrong).fit(made_cohort.write(tmp_path / "c"), out=tmp_path)
