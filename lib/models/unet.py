"""A small U-Net for slices, and how detectors that are taught by corrupting healthy slices train it.

After Ronneberger et al., MICCAI 2015. Pixels are folded two by two into channels before the first stage (Shi et al.,
CVPR 2016), so that no convolution works at full size: four times fewer operations, and no pixel is lost. What goes
around the middle is added rather than stacked (LinkNet; Chaurasia and Culurciello, VCIP 2017), which costs less too.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from lib.cohort import Cohort
from lib.errors import check_multiple
from lib.models.detector import SliceDetector
from lib.training import Batch, Forward, History, Plan, choose_device, derived_seed, train

GROUPS = 8  # of channels that are normalised together


@dataclass(frozen=True)
class Settings:
    """`width`: channels of the first stage, a multiple of 8; the rest as in training.Plan. Epochs are short, so that a
    large cohort takes no longer than a small one."""

    width: int = 16
    epochs: int = 20
    steps: int = 32
    batch_size: int = 8
    learning_rate: float = 2e-3
    patience: int = 8

    def __post_init__(self):
        check_multiple("width", self.width, GROUPS)


class UNet(nn.Module):
    """Slices [batch, incoming, row, column] to [batch, outgoing, row, column]; sides must be multiples of 16. Before it
    is trained, `first` is its answer everywhere."""

    def __init__(self, incoming: int, outgoing: int, width: int, first: float = 0.0):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.fold, self.unfold = nn.PixelUnshuffle(2), nn.PixelShuffle(2)
        self.down = nn.ModuleList([_stage(4 * incoming, width), *map(_halving, widths[:-1], widths[1:])])
        self.widen = nn.ModuleList(map(_doubling, widths[:0:-1], widths[-2::-1]))
        self.up = nn.ModuleList([_stage(b, b) for b in widths[-2::-1]])
        self.last = nn.Conv2d(width, 4 * outgoing, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.constant_(self.last.bias, first)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x, kept = self.fold(image), []
        for stage in self.down:
            x = stage(x)
            kept.append(x)
        for widen, stage, beside in zip(self.widen, self.up, kept[-2::-1], strict=True):
            x = stage(widen(x) + beside)
        return self.unfold(self.last(x))


class UNetDetector(SliceDetector):
    """Corrupts healthy slices, and teaches a U-Net what was done to them."""

    family = "corruption"
    averaging = 0.0  # as in training.Plan
    each = None  # as in training.train

    def fit(self, cohort: Cohort, *, out: Path, device: str = "auto", resume: bool = True, seed: int = 0) -> History:
        torch.manual_seed(derived_seed(seed, self.training, "weights"))
        self.network = self.build()
        self.device = choose_device(device)
        s = self.settings
        how = {"cosine": True, "averaging": self.averaging, "steps": s.steps}
        plan = Plan(s.epochs, s.batch_size, s.learning_rate, s.patience, **how)
        return train(
            self.network, self.loss, cohort, plan, corrupt=self.corrupt, checkpoint=out / f"{self.training}.checkpoint",
            seed=derived_seed(seed, self.training, asdict(s)), device=self.device, resume=resume, each=self.each,
        )  # fmt: skip

    def corrupt(self, batch: Batch, random: torch.Generator, split: str) -> Batch:
        """A batch with what the network is to see and to tell; as training.Corrupt."""
        raise NotImplementedError

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The mean loss of a batch that `corrupt` returned."""
        raise NotImplementedError


def _stage(incoming: int, outgoing: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(incoming, outgoing, 3, stride, padding=1), nn.GroupNorm(GROUPS, outgoing), nn.SiLU(),
        nn.Conv2d(outgoing, outgoing, 3, padding=1), nn.GroupNorm(GROUPS, outgoing), nn.SiLU(),
    )  # fmt: skip


def _halving(incoming: int, outgoing: int) -> nn.Sequential:
    return _stage(incoming, outgoing, stride=2)


def _doubling(incoming: int, outgoing: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(incoming, outgoing, 1), nn.Upsample(scale_factor=2))
