"""The noise that a denoising autoencoder is taught with, and that it learns to take lesions away."""

import made_cohort
import numpy as np
import pytest
import torch

from lib import models
from lib.errors import CourseError
from lib.lesions import KEPT_OUT, TAUGHT
from lib.models import dae, unet


def noise(grid=8, sigma=0.2, side=32, count=400, seed=0, channels=1):
    image, brain = torch.ones(count, channels, side, side), torch.ones(count, side, side, dtype=torch.bool)
    return dae.coarse_noise(image, brain, grid, sigma, torch.Generator().manual_seed(seed))


def test_noise_is_zero_outside_the_brain_and_of_mean_zero_over_draws():
    brain = torch.zeros(400, 32, 32, dtype=torch.bool)
    brain[:, 8:24, 8:24] = True
    drawn = dae.coarse_noise(torch.ones(400, 2, 32, 32), brain, 8, 0.2, torch.Generator().manual_seed(0))
    assert drawn.shape == (400, 2, 32, 32)
    assert (drawn[~brain[:, None].expand_as(drawn)] == 0).all()
    assert drawn.mean(dim=0).abs().max() < 0.04  # four standard errors of 400 draws
    assert 0.1 < drawn[:, :, 8:24, 8:24].std() < 0.2  # bilinear interpolation takes some of it away


def test_noise_has_the_scale_of_its_grid():
    def alike(grid, distance):
        drawn = noise(grid=grid)
        return float((drawn * drawn.roll(distance, dims=-1)).mean() / drawn.square().mean())

    assert alike(4, 4) > 0.4  # half a cell of 8 pixels
    assert alike(16, 4) < 0.1  # two cells of 2 pixels
    assert noise(grid=32).std() == pytest.approx(0.2, rel=0.02)  # pixel by pixel nothing is lost


def test_noise_lies_elsewhere_every_time_and_repeats_by_its_generator():
    first, again, other = noise(seed=1), noise(seed=1), noise(seed=2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    corners = noise(grid=2, count=64, side=32).square().mean(dim=(0, 1))
    assert corners.max() < 3 * corners.min()  # no place is always between the points of the grid
    two = noise(channels=2)
    assert abs(float((two[:, 0] * two[:, 1]).mean())) < 0.1 * float(two.square().mean())


def test_the_loss_looks_inside_the_brain_only_and_is_zero_where_all_noise_is_taken_away():
    detector = models.create("dae", ("FLAIR",), width=8)
    brain = torch.zeros(2, 32, 32, dtype=torch.bool)
    brain[:, 4:20, 4:20] = True
    batch = detector.corrupt({"image": torch.rand(2, 1, 32, 32), "brain": brain}, torch.Generator(), "train")
    perfect = batch["image"] - batch["shown"] + 5.0 * ~brain[:, None]
    assert detector.loss(lambda shown: perfect, batch) == pytest.approx(0, abs=1e-12)
    nothing = detector.loss(torch.zeros_like, batch)
    assert nothing == pytest.approx(float((batch["shown"] - batch["image"])[brain[:, None]].square().mean()))


def test_the_u_net_keeps_the_side_and_passes_detail_around_its_middle():
    network = unet.UNet(2, 3, 8, first=0.5).eval()
    image = torch.rand(1, 2, 32, 48)
    assert torch.equal(network(image), torch.full((1, 3, 32, 48), 0.5))
    torch.nn.init.normal_(network.last.weight)
    moved = image.clone()
    moved[..., 16, 16] += 1
    changed = (network(moved) - network(image)).abs().amax(dim=(0, 1))
    assert changed[16, 16] > 0


def test_it_marks_nothing_before_it_learnt_and_lesions_after(tmp_path):
    cohort = made_cohort.write(tmp_path / "c", healthy=(6, 2, 2))
    subject, maps = cohort.split("test")[-1], []
    for epochs, rate in ((1, 1e-9), (8, 5e-3)):
        detector = models.create("dae", cohort.modalities, epochs=epochs, width=8, grid=8, learning_rate=rate)
        history = detector.fit(cohort, out=tmp_path / str(epochs), device="cpu")
        maps.append(detector.maps(subject))
    assert maps[0].max() < 1e-4
    assert history.rows[-1]["validation"] < history.rows[0]["validation"] * 0.9
    assert maps[1][subject.lesion].mean() > 2 * maps[1][subject.brain & ~subject.lesion].mean()


def test_redrawing_takes_the_lesion_away_and_leaves_the_background(tmp_path):
    cohort = made_cohort.write(tmp_path / "c", healthy=(6, 2, 2))
    detector = models.create("dae", cohort.modalities, epochs=8, width=8, grid=8, learning_rate=5e-3)
    detector.fit(cohort, out=tmp_path, device="cpu")
    subject = cohort.split("test")[-1]
    number = int(subject.lesion.sum(axis=(1, 2)).argmax())
    drawn, seen = detector.redraw(subject, number)[0], subject.image[0, number].astype(np.float32)
    lesion, other = subject.lesion[number], subject.brain[number] & ~subject.lesion[number]
    assert (seen - drawn)[lesion].mean() > 2 * np.abs(seen - drawn)[other].mean()
    assert (drawn[~subject.brain[number]] == 0).all()


def test_restoration_is_shown_lesions_it_is_taught_and_validates_with_others(monkeypatch):
    asked = []

    def watching(image, brain, modalities, families, random):
        asked.append(families)
        return image, brain.float()

    monkeypatch.setattr(dae, "paint", watching)
    detector = models.create("synthetic_restoration", ("FLAIR",))
    batch = {"image": torch.rand(2, 1, 32, 32), "brain": torch.ones(2, 32, 32, dtype=torch.bool)}
    for split in ("train", "validation"):
        detector.corrupt(batch, torch.Generator(), split)
    assert asked == [TAUGHT, KEPT_OUT]


@pytest.mark.parametrize(
    "wrong",
    [{"grid": 0}, {"sigma": -0.1}, {"sigma": float("nan")}, {"residual": "both"}, {"width": 12}, {"epochs": 0},
     {"steps": -1}, {"learning_rate": float("inf")}],
)  # fmt: skip
def test_settings_that_cannot_be_are_named(wrong, tmp_path):
    with pytest.raises(CourseError, match=next(iter(wrong))):
        models.create("dae", ("FLAIR",), **wrong).fit(made_cohort.write(tmp_path / "c"), out=tmp_path)
