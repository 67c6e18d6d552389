"""A generative adversarial network of healthy slices, and its discriminator alone as a detector.

Goodfellow et al., NIPS 2014, as a Wasserstein GAN with gradient penalty (Gulrajani et al., NIPS 2017). A discriminator
learns to tell real slices from generated ones, never healthy ones from ill ones: where the generator is good its score
says little of lesions. Its map is the score's input gradient times the intensity, so what is dark can hardly be marked.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lib import adversarial
from lib.adversarial import WATCHED, Players, in_parts, small
from lib.cohort import Cohort, PreparedSubject
from lib.errors import CourseError, check_choice, check_least, check_multiple
from lib.models.detector import SliceDetector
from lib.training import History, Plan, derived_seed

HALVINGS = 8  # sizes are multiples of this: three halvings
GROUPS = 8  # of channels that are normalised together
TOP = 1.5  # prepared intensities lie in [0, 1.5]
SLOPE = 0.2  # of the leaky rectifiers
DARK = -2.0  # before the sigmoid: most of a square is background
PENALTY = 10.0  # weight of the gradient penalty
PENALTY_EVERY = 4  # steps; the weight grows with it, after Karras et al. 2020, section 3.1
SAMPLES = 2048  # slices among which the nearest is sought


@dataclass(frozen=True)
class Settings:
    """`latent`: numbers that a slice is drawn from; `width`: channels of the finest hidden stage; `shrink`: pixels a
    side that are averaged into one before anything else; `residual`: "signed" or "absolute"; `size`: side of a slice in
    pixels, taken from the cohort; the rest as in training.Plan."""

    latent: int = 64
    width: int = 16
    shrink: int = 2
    residual: str = "signed"
    size: int = 96
    epochs: int = 20
    batch_size: int = 16
    learning_rate: float = 2e-3
    patience: int = 6

    def __post_init__(self):
        check_choice("residual", self.residual, ("signed", "absolute"))
        for name in ("latent", "shrink"):
            check_least(name, getattr(self, name), 1)
        check_multiple("width", self.width, GROUPS)
        if self.size % (HALVINGS * self.shrink):
            raise CourseError(f"shrink is {self.shrink}, slices have {self.size} pixels a side.", "Give 1 or 2.")

    @property
    def side(self) -> int:
        """Rows and columns of the coarsest stage."""
        return self.size // self.shrink // HALVINGS


class Generator(nn.Module):
    """From numbers [batch, latent] to slices [batch, modality, row, column] with intensities in [0, 1.5]."""

    def __init__(self, channels: int, settings: Settings):
        super().__init__()
        w, side = settings.width, settings.side
        self.start = nn.Sequential(
            nn.Linear(settings.latent, 4 * w * side**2), nn.Unflatten(1, (4 * w, side, side)), *_after(4 * w)
        )
        self.stages = nn.Sequential(_doubling(4 * w, 2 * w), _doubling(2 * w, w), _doubling(w, w))
        self.end = nn.Conv2d(w, channels, 3, padding=1)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return TOP * torch.sigmoid(self.end(self.stages(self.start(latent))) + DARK)


class Discriminator(nn.Module):
    """From slices to scores [batch], higher for what looks more real; `features` are its last maps. Nothing in it
    depends on the other slices of a batch."""

    def __init__(self, channels: int, settings: Settings):
        super().__init__()
        w = settings.width
        self.features = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, w, 3, padding=1), nn.LeakyReLU(SLOPE),
            nn.Conv2d(w, 2 * w, 4, 2, padding=1), nn.LeakyReLU(SLOPE),
            nn.Conv2d(2 * w, 4 * w, 4, 2, padding=1), nn.LeakyReLU(SLOPE),
        )  # fmt: skip
        self.score = nn.Sequential(nn.Flatten(), nn.Linear(4 * w * settings.side**2, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.score(self.features(image))[:, 0]


class Encoder(nn.Module):
    """From slices to numbers [batch, latent]."""

    def __init__(self, channels: int, settings: Settings):
        super().__init__()
        w = settings.width
        self.stages = nn.Sequential(_halving(channels, w), _halving(w, 2 * w), _halving(2 * w, 4 * w))
        self.end = nn.Sequential(nn.Flatten(), nn.Linear(4 * w * settings.side**2, settings.latent))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.end(self.stages(image))


class Network(Players):
    """Generator and critic of a Wasserstein GAN with gradient penalty."""

    def __init__(self, channels: int, settings: Settings):
        super().__init__()
        self.latent = settings.latent
        self.generator = Generator(channels, settings)
        self.discriminator = Discriminator(channels, settings)

    def draw(self, count: int, random: torch.Generator) -> torch.Tensor:
        """Numbers from the normal distribution that slices are drawn from, [count, latent]."""
        return torch.randn(count, self.latent, generator=random).to(self.generator.end.weight.device)

    def invent(self, images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        return self.generator(self.draw(len(images), random))

    def discriminator_loss(
        self, real: torch.Tensor, fake: torch.Tensor, step: int, random: torch.Generator
    ) -> torch.Tensor:
        loss = self.discriminator(fake).mean() - self.discriminator(real).mean()
        if step % PENALTY_EVERY:
            return loss
        return loss + PENALTY_EVERY * PENALTY * gradient_penalty(self.discriminator, real, fake, random)

    def generator_losses(self, real: torch.Tensor, random: torch.Generator) -> dict[str, torch.Tensor]:
        return {"adversarial": -self.discriminator(self.invent(real, random)).mean()}

    def validation(self, images: torch.Tensor) -> float:
        """Root mean squared difference between a slice and the most similar of many samples: high for poor samples, and
        for samples that leave out a part of the healthy slices."""
        return nearest(images, self.samples(WATCHED)[1])[0].mean().item()

    @torch.no_grad()
    def samples(self, count: int = SAMPLES) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [count, latent] and the slices drawn from them, always the same ones."""
        latents = self.draw(count, torch.Generator().manual_seed(0))
        return latents, in_parts(self.generator, latents)


def gradient_penalty(critic, real: torch.Tensor, fake: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """How far the critic's slope is from 1 between real and generated slices (Gulrajani et al. 2017, equation 3)."""
    share = torch.rand(len(real), 1, 1, 1, generator=random).to(real.device)
    between = (share * real + (1 - share) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()


def nearest(images: torch.Tensor, samples: torch.Tensor, count: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Root mean squared difference to the `count` most similar samples and their numbers, both [count, image]."""
    distance = torch.cdist(images.flatten(1), samples.flatten(1)) / math.sqrt(images[0].numel())
    found = distance.topk(count, largest=False)
    return found.values.T, found.indices.T


def principal_axes(latents: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """Orthonormal directions of the latent [latent, axis], from those along which slices change most to the least.

    Left singular vectors of the covariance of latents and the samples drawn from them: for normal latents, the
    generator's mean slope (Stein's lemma).
    """
    slope = latents.T @ (samples - samples.mean(dim=0)).flatten(1)
    return torch.linalg.svd(slope.cpu(), full_matrices=False).U.to(latents.device)


class AdversarialDetector(SliceDetector):
    """A detector on slices averaged over squares of pixels, whose slice scores come from its networks, not its maps."""

    Settings = Settings
    family = "adversarial"

    def __init__(self, *given):
        super().__init__(*given)
        self._seen: tuple[str, list[torch.Tensor]] = ("", [])

    def judge(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Anomaly maps [batch, row, column] and scores [batch] of averaged slices [batch, modality, row, column]."""
        raise NotImplementedError

    def to(self, device: str) -> None:
        super().to(device)
        self.network.to(memory_format=torch.channels_last)  # faster, and the same sums before and after saving

    def anomaly(self, image: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False):
            found, scores = self.judge(small(image.clone(), self.settings.shrink))
        self._seen[1].append(scores)
        return functional.interpolate(found[:, None], image.shape[-2:], mode="bilinear")[:, 0]

    def reconstruct(self, image: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False):
            expected = self.expect(small(image.clone(), self.settings.shrink))
        return functional.interpolate(expected, image.shape[-2:], mode="bilinear")

    def expect(self, image: torch.Tensor) -> torch.Tensor:
        """The healthy slices that the networks put in place of averaged ones, same shape."""
        raise NotImplementedError

    def maps(self, subject: PreparedSubject) -> np.ndarray:
        self._seen = (subject.id, [])
        return super().maps(subject)

    def slice_scores(self, subject: PreparedSubject, maps: np.ndarray) -> np.ndarray:
        """The networks' own scores, 0 without brain; the subject is mapped again unless it was the last one."""
        if self._seen[0] != subject.id:
            self.maps(subject)
        return torch.cat(self._seen[1]).cpu().numpy() * subject.brain.any(axis=(1, 2))

    def prepare(self, cohort: Cohort, device: str, seed: int) -> None:
        """New networks for the cohort on the device; those of one training and equal settings start equal."""
        torch.manual_seed(derived_seed(seed, self.training, "weights"))
        self.settings = replace(self.settings, size=cohort.size)
        self.network = self.build()
        self.to(device)

    def play(self, players: Players, cohort: Cohort, out: Path, resume: bool, seed: int) -> History:
        """Train the players."""
        s, name = self.settings, self.training
        return adversarial.train(
            players, cohort, Plan(s.epochs, s.batch_size, s.learning_rate, s.patience), shrink=s.shrink,
            checkpoint=out / f"{name}.checkpoint", seed=derived_seed(seed, name), device=self.device, resume=resume,
        )  # fmt: skip


class Gan(AdversarialDetector):
    """The discriminator alone."""

    learns_as = "gan"

    def build(self) -> Network:
        return Network(len(self.modalities), self.settings)

    def fit(self, cohort: Cohort, *, out: Path, device: str = "auto", resume: bool = True, seed: int = 0) -> History:
        """Train both players; detectors of one run that share their settings share the training as well."""
        self.prepare(cohort, device, seed)
        return self.play(self.network, cohort, out, resume, seed)

    def judge(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """To first order, what each pixel takes from the discriminator's score (gradient × input, Shrikumar et al.,
        2016), and that score with its sign turned."""
        with torch.enable_grad():
            image.requires_grad_()
            score = self.network.discriminator(image)
            (slope,) = torch.autograd.grad(score.sum(), image)
        return (-slope * image.detach()).clamp(min=0).mean(dim=1), -score.detach()


def _after(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.GroupNorm(GROUPS, channels), nn.LeakyReLU(SLOPE)


def _doubling(incoming: int, outgoing: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(incoming, outgoing, 3, padding=1), *_after(outgoing), nn.Upsample(scale_factor=2))


def _halving(incoming: int, outgoing: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(incoming, outgoing, 3, 2, padding=1), *_after(outgoing))
