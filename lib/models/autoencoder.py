"""The convolutional autoencoder: a network that can only draw healthy slices leaves a residual where a slice is not.

After Baur et al., Medical Image Analysis 69 (2021), sections 3 and 4. It cannot see lesions whose intensity lies within
the range of healthy tissue, and it marks every sharp edge that it blurs.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from monai.losses import SSIMLoss
from monai.metrics.regression import compute_ssim_and_cs
from torch import nn
from torch.nn import functional

from lib.cohort import Cohort
from lib.errors import check_choice, check_least, check_multiple
from lib.models.detector import SliceDetector, residual
from lib.preprocessing import HALVINGS
from lib.training import Batch, Forward, History, Plan, choose_device, derived_seed, train

DATA_RANGE = 1.5  # prepared intensities lie in [0, 1.5]
SSIM_WINDOW = 11
GROUPS = 8  # of channels that are normalised together
HEADS = 4  # of the attention, where there is one


@dataclass(frozen=True)
class Settings:
    """`bottleneck`: "spatial" keeps a map of `code` channels at 1/16 of the size, "dense" a vector of 8 × `code`
    numbers; `attention`: whether each place of the coarsest stage sees all others (after Vaswani et al., NIPS 2017);
    `loss`: "l2" or "ssim"; `residual`: "signed" or "absolute"; `width`: channels of the first stage; `size`: side of a
    slice in pixels, taken from the cohort; the rest as in training.Plan."""

    bottleneck: str = "spatial"
    attention: bool = False
    loss: str = "l2"
    residual: str = "signed"
    code: int = 16
    width: int = 16
    size: int = 96
    epochs: int = 30
    batch_size: int = 8
    learning_rate: float = 2e-3
    patience: int = 8

    def __post_init__(self):
        check_choice("bottleneck", self.bottleneck, ("spatial", "dense"))
        check_choice("loss", self.loss, ("l2", "ssim"))
        check_choice("residual", self.residual, ("signed", "absolute"))
        check_least("code", self.code, 1)
        check_multiple("width", self.width, GROUPS)


class Network(nn.Module):
    """Four halvings to the code, four doublings back; nothing bypasses the code, and only the last convolution works at
    full size, which halves the time of a step."""

    def __init__(self, channels: int, settings: Settings):
        super().__init__()
        w, side = settings.width, settings.size // HALVINGS
        widths = [w, 2 * w, 4 * w, 4 * w]
        down = [_stage(a, b, stride=2) for a, b in zip([channels, *widths], widths, strict=False)]
        up = [
            nn.Sequential(nn.Upsample(scale_factor=2), _stage(a, b))
            for a, b in zip(widths[::-1], widths[-2::-1], strict=False)
        ]
        attention = [Attention(widths[-1])] if settings.attention else []
        last = [nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(w, channels, 3, padding=1)]
        self.encoder = nn.Sequential(*down, *attention, squeeze(widths[-1], side, settings))
        self.decoder = nn.Sequential(_expand(widths[-1], side, settings), *up, *last)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(image))


class Attention(nn.Module):
    """Adds to each place of a map [batch, channel, row, column] what it takes from all places."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.heads = nn.MultiheadAttention(channels, HEADS, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        taken, _ = self.heads(tokens, tokens, tokens, need_weights=False)
        return x + taken.transpose(1, 2).unflatten(2, x.shape[2:])


class Autoencoder(SliceDetector):
    """Trained to return healthy slices; the anomaly is where it does not return what it was given."""

    Settings = Settings
    family = "autoencoder"

    def build(self) -> Network:
        return Network(len(self.modalities), self.settings)

    def fit(self, cohort: Cohort, *, out: Path, device: str = "auto", resume: bool = True, seed: int = 0) -> History:
        name = self.training
        torch.manual_seed(derived_seed(seed, name, "weights"))
        self.settings = replace(self.settings, size=cohort.size)
        self.network = self.build()
        self.device = choose_device(device)
        s = self.settings
        plan = Plan(s.epochs, s.batch_size, s.learning_rate, s.patience)
        return train(
            self.network, self.loss, cohort, plan, checkpoint=out / f"{name}.checkpoint",
            seed=derived_seed(seed, name, *self.task), device=self.device, resume=resume,
        )  # fmt: skip

    @property
    def task(self) -> tuple:
        """What the training depends on beside its plan and the network."""
        return (self.settings.loss,)

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Squared error over the whole square (background is 0 and easily learnt), or 1 − SSIM."""
        image, result = batch["image"], forward(batch["image"])
        if self.settings.loss == "l2":
            return functional.mse_loss(result, image)
        return SSIMLoss(spatial_dims=2, data_range=DATA_RANGE, win_size=SSIM_WINDOW)(result, image)

    def code_size(self) -> int:
        """How many numbers a slice becomes."""
        s = self.settings
        return 8 * s.code if s.bottleneck == "dense" else s.code * (s.size // HALVINGS) ** 2

    def anomaly(self, image: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
        expected = self.reconstruct(image) * brain[:, None]
        if self.settings.loss == "ssim":
            return 1 - ssim_map(image, expected)
        return residual(image, expected, self.modalities, self.settings.residual)


def ssim_map(image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Structural similarity around every pixel (Wang et al., 2004), mean over modalities: [batch, row, column].

    Both inputs [batch, modality, row, column] with intensities in [0, 1.5]; edges are mirrored; values in [−1, 1].
    """
    edge = SSIM_WINDOW // 2
    padded = [functional.pad(one.float(), [edge] * 4, mode="reflect") for one in (image, other)]
    window = {"kernel_size": [SSIM_WINDOW] * 2, "kernel_sigma": [1.5] * 2}
    similarity, _ = compute_ssim_and_cs(*padded, spatial_dims=2, data_range=DATA_RANGE, **window)
    return similarity.mean(dim=1)


def _stage(incoming: int, outgoing: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(incoming, outgoing, 3, stride, padding=1), nn.GroupNorm(GROUPS, outgoing), nn.SiLU())


def squeeze(width: int, side: int, settings: Settings) -> nn.Module:
    """From the coarsest stage, `width` channels of `side` × `side` pixels, to the code."""
    if settings.bottleneck == "spatial":
        return nn.Conv2d(width, settings.code, 1)
    return nn.Sequential(nn.Flatten(), nn.Linear(width * side**2, 8 * settings.code))


def _expand(width: int, side: int, settings: Settings) -> nn.Module:
    if settings.bottleneck == "spatial":
        return nn.Conv2d(settings.code, width, 1)
    return nn.Sequential(nn.Linear(8 * settings.code, width * side**2), nn.Unflatten(1, (width, side, side)))
