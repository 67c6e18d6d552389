"""The denoising autoencoder: taught to take coarse noise away from healthy slices, it takes lesions away too.

After Kascenas et al., MIDL 2022 and Medical Image Analysis 2023: the noise must be as coarse as lesions are, so that
only knowledge of healthy anatomy can tell them apart. It cannot see a lesion that is as bright as what is around it.
"""

from dataclasses import dataclass

import torch

from lib.errors import check_choice, check_least
from lib.lesions import KEPT_OUT, TAUGHT, paint, smooth_noise
from lib.models import unet
from lib.models.detector import residual
from lib.training import Batch, Forward, present


@dataclass(frozen=True)
class Settings(unet.Settings):
    """`grid`: the noise is drawn on grid × grid points; `sigma`: its standard deviation there, in units of the prepared
    intensity; `residual`: "signed" or "absolute"."""

    grid: int = 16
    sigma: float = 0.2
    residual: str = "signed"

    def __post_init__(self):
        super().__post_init__()
        check_least("grid", self.grid, 1)
        check_least("sigma", self.sigma, 0)
        check_choice("residual", self.residual, ("signed", "absolute"))


class DenoisingAutoencoder(unet.UNetDetector):
    """The network tells what to add to a slice so that it becomes healthy; at test it is shown no noise."""

    Settings = Settings

    def build(self) -> unet.UNet:
        return unet.UNet(len(self.modalities), len(self.modalities), self.settings.width)

    def corrupt(self, batch: Batch, random: torch.Generator, split: str) -> Batch:
        s = self.settings
        return batch | {"shown": batch["image"] + coarse_noise(batch["image"], batch["brain"], s.grid, s.sigma, random)}

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Squared error inside the brain."""
        brain = batch["brain"][:, None].expand_as(batch["image"])
        wrong = batch["shown"] + forward(batch["shown"]) - batch["image"]
        return wrong.square()[brain].mean()

    def reconstruct(self, image: torch.Tensor) -> torch.Tensor:
        return image + self.forward(image)

    def anomaly(self, image: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
        return residual(image, self.reconstruct(image), self.modalities, self.settings.residual)


class SyntheticRestoration(DenoisingAutoencoder):
    """Shown synthetic lesions in place of noise, and taught to restore the slice (after Naval Marimont et al.,
    DISYRE, ISBI 2024, in one step); what it validates with are families of lesions that it is not taught."""

    def corrupt(self, batch: Batch, random: torch.Generator, split: str) -> Batch:
        families = TAUGHT if split == "train" else KEPT_OUT
        return batch | {"shown": paint(batch["image"], batch["brain"], self.modalities, families, random)[0]}


def coarse_noise(
    image: torch.Tensor, brain: torch.Tensor, grid: int, sigma: float, random: torch.Generator
) -> torch.Tensor:
    """Noise for slices [batch, modality, row, column], inside `brain` [batch, row, column] and where a modality is not
    missing: of mean 0 and standard deviation `sigma` at the points of a grid that lies elsewhere every time, bilinear
    in between."""
    count, channels, side, _ = image.shape
    cell = -(-side // grid)
    noise = sigma * smooth_noise(count, channels, grid + 2, cell * (grid + 1) + 1, random)
    starts = torch.randint(cell, (count, 2), generator=random).tolist()
    cut = torch.stack([n[:, r : r + side, c : c + side] for n, (r, c) in zip(noise, starts, strict=True)])
    return cut.to(image.device) * brain[:, None] * present(image)
