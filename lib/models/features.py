"""Features: how unlike what is seen at a place of the brain is to all that was seen near there in healthy scans.

After PatchCore (Roth et al., CVPR 2022): a memory of healthy features, and the distance to the nearest one; here only
those of a similar height and a neighbouring point in the brain's box are asked, for scans are not registered. No
weights are downloaded: the filters are Gaussian ones of several widths, random ones, or those of this run's `dae`. A
distance has no side, so what is too dark is marked as well; what is smaller than a cell is not seen, nor what is
healthy nearby.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from monai.networks.layers import GaussianFilter
from torch import nn
from torch.nn import functional

from lib.cohort import Cohort, PreparedSubject, Slices
from lib.errors import CourseError, check_choice, check_least
from lib.models import unet
from lib.models.detector import MAP_BATCH, Detector, read_file
from lib.training import History, batch_of, choose_device, derived_seed

ENCODERS = ("scales", "random", "dae")
CELL = 4  # pixels a side of the stretched slice that become one cell
SCALES = (1.0, 2.0, 4.0)  # cells, standard deviations of the Gaussian filters
REACH = 1  # cells; a cell is compared with those of the memory so near in a slice
SAMPLE = 8  # every so manieth slice of the memory tells the features' spreads


@dataclass(frozen=True)
class Settings:
    """`encoder`: "scales" (Gaussian filters), "random" (untrained convolutions), or "dae" (those of the `dae` that
    lies in the same folder); `features`: numbers a cell, to which more channels are mixed by chance; `width`: of random
    convolutions, taken from the `dae` otherwise; `cells`: a side of the brain's box; `memory`: healthy slices that are
    remembered at most; `neighbours`: those of them, nearest in height, that a slice is compared with."""

    encoder: str = "scales"
    features: int = 16
    width: int = 16
    cells: int = 24
    memory: int = 1024
    neighbours: int = 64

    def __post_init__(self):
        check_choice("encoder", self.encoder, ENCODERS)
        for name in ("features", "width", "cells", "memory", "neighbours"):
            check_least(name, getattr(self, name), 1)


class Stages(nn.Module):
    """What each of some stages makes of the one before, on one grid: slices [batch, modality, side, side] to features
    [batch, channel, side / CELL, side / CELL]."""

    def __init__(self, *stages: nn.Module):
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x, kept = image, []
        for stage in self.stages:
            x = stage(x)
            kept.append(functional.interpolate(x, image.shape[-1] // CELL, mode="area"))
        return torch.cat(kept, dim=1)


class Features(Detector):
    """A cell's anomaly is its distance to the nearest healthy cell of a like place."""

    Settings = Settings
    family = "features"
    device = torch.device("cpu")

    def build(self) -> Stages:
        """The filters; those of `dae` without their weights."""
        channels, width = len(self.modalities), self.settings.width
        if self.settings.encoder == "scales":
            steps = [math.sqrt(b**2 - a**2) for a, b in zip((0.0, *SCALES), SCALES, strict=False)]
            return Stages(nn.AvgPool2d(CELL), *(GaussianFilter(2, step) for step in steps))
        if self.settings.encoder == "random":
            return Stages(nn.Identity(), _random_stage(channels, width), _random_stage(width, 2 * width))
        return _downward(self._network())

    @torch.inference_mode()
    def fit(self, cohort: Cohort, *, out: Path, device: str = "auto", resume: bool = True, seed: int = 0) -> History:
        """Look at healthy slices once; nothing is trained. `out` holds the `dae` whose filters are used, if so."""
        torch.manual_seed(derived_seed(seed, self.name, "filters"))
        self.device = choose_device(device)
        self.encoder = self._filters(out).to(self.device).eval()
        slices = cohort.slices("train")
        random = torch.Generator().manual_seed(derived_seed(seed, self.name, "memory"))
        chosen = torch.randperm(len(slices), generator=random)[: self.settings.memory].sort().values.tolist()
        where = {subject.id: places(subject) for subject, _ in slices.index}
        place = torch.stack([where[subject.id][number] for subject, number in (slices.index[i] for i in chosen)])
        spread = torch.cat(list(self._seen(slices, chosen[::SAMPLE], place[::SAMPLE]))).std(dim=(0, 2, 3))
        self.mixing = _mixed(len(spread), self.settings.features, random).to(self.device) / spread.clamp(min=1e-6)
        self.memory = torch.cat([self._mix(seen).half() for seen in self._seen(slices, chosen, place)])
        self.heights = place[:, 0].to(self.device)
        return History()

    @torch.inference_mode()
    def distances(self, image: torch.Tensor, brain: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Anomaly of slices, [batch, row, column], 0 outside `brain`; `place` as `places` tells it, [batch, 5]."""
        seen = self._mix(self._look(image, place))
        far = torch.stack([self._nearest(one, height) for one, height in zip(seen, place[:, 0], strict=True)])
        return shrunk(far[:, None], place.to(self.device), image.shape[-1])[:, 0].cpu() * brain

    def maps(self, subject: PreparedSubject) -> np.ndarray:
        parts, where = torch.arange(len(subject.brain)).split(MAP_BATCH), places(subject)
        image, brain = torch.from_numpy(subject.image.swapaxes(0, 1).astype(np.float32)), np.array(subject.brain)
        return np.concatenate([self.distances(image[i], torch.from_numpy(brain[i]), where[i]).numpy() for i in parts])

    def state(self) -> dict[str, torch.Tensor]:
        own = {"memory": self.memory, "heights": self.heights, "mixing": self.mixing}
        own |= {f"encoder.{key}": value for key, value in self.encoder.state_dict().items()}
        return {key: value.detach().cpu() for key, value in own.items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.device = choose_device()
        self.encoder = self.build()
        weights = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
        self.encoder.load_state_dict(weights)
        self.encoder.to(self.device).eval()
        self.memory, self.heights, self.mixing = (state[key].to(self.device) for key in ("memory", "heights", "mixing"))

    def _filters(self, out: Path) -> Stages:
        if self.settings.encoder != "dae":
            return self.build()
        path = out / "dae.safetensors"
        if not path.exists():
            raise CourseError(f"encoder is 'dae', but {path} is not there.", "Train dae first, or take 'scales'.")
        about, weights = read_file(path)
        if tuple(about["modalities"]) != self.modalities:
            raise CourseError(f"{path} is of other modalities.", "Train dae on these, or take 'scales'.")
        self.settings = replace(self.settings, width=about["settings"]["width"])
        network = self._network()
        network.load_state_dict(weights)
        return _downward(network)

    def _network(self) -> unet.UNet:
        return unet.UNet(len(self.modalities), len(self.modalities), self.settings.width)

    def _look(self, image: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Channels of the cells of slices [batch, modality, row, column]: [batch, channel, cell, cell]."""
        return self.encoder(stretched(image.to(self.device), place.to(self.device), CELL * self.settings.cells))

    def _mix(self, channels: torch.Tensor) -> torch.Tensor:
        """Features [batch, feature, cell, cell] of channels, all of like weight."""
        return torch.einsum("fc,bcij->bfij", self.mixing, channels)

    def _seen(self, slices: Slices, numbers: list[int], place: torch.Tensor) -> Iterator[torch.Tensor]:
        """Channels of slices by their numbers, some slices at a time."""
        for part, where in zip(torch.tensor(numbers).split(MAP_BATCH), place.split(MAP_BATCH), strict=True):
            yield self._look(batch_of(slices, part.tolist(), self.device)["image"], where)

    def _nearest(self, seen: torch.Tensor, height: torch.Tensor) -> torch.Tensor:
        """Distance of each cell of a slice [feature, cell, cell] to the nearest one of the memory, [cell, cell]."""
        count = min(self.settings.neighbours, len(self.heights))
        near = (self.heights - height).abs().topk(count, largest=False).indices
        memory, found = self.memory[near].float(), []
        for row, column in product(range(-REACH, REACH + 1), repeat=2):
            squares = (memory - seen.roll((row, column), (1, 2))).square().mean(dim=1)
            found.append(squares.amin(dim=0).roll((-row, -column), (0, 1)))
        return torch.stack(found).amin(dim=0).sqrt()


def places(subject: PreparedSubject) -> torch.Tensor:
    """Where each slice of a subject lies, float32 [slice, 5]: its height in the brain, 0 to 1 from end to end, and the
    centre and half the size of the brain's box by row and by column, where −1 and 1 are the edges of a slice."""
    ends = [np.flatnonzero(subject.brain.any(axis=axes))[[0, -1]] + [0, 1] for axes in ((1, 2), (0, 2), (0, 1))]
    low, high = ends[0]
    height = (torch.arange(len(subject.brain)) + 0.5 - low) / (high - low)
    side = subject.brain.shape[-1]
    box = [v for start, stop in ends[1:] for v in ((start + stop) / side - 1, (stop - start) / side)]
    return torch.cat([height[:, None], torch.tensor(box).expand(len(height), 4)], dim=1).float()


def stretched(image: torch.Tensor, place: torch.Tensor, side: int) -> torch.Tensor:
    """Slices [batch, modality, row, column] of which the brain's box fills a square of `side` pixels."""
    return _moved(image, *place.T[1:], side)


def shrunk(values: torch.Tensor, place: torch.Tensor, side: int) -> torch.Tensor:
    """Back from the square of the brain's box to slices of `side` pixels."""
    row, half_row, column, half_column = place.T[1:]
    return _moved(values, -row / half_row, 1 / half_row, -column / half_column, 1 / half_column, side)


def _moved(image, row, half_row, column, half_column, side: int) -> torch.Tensor:
    none = torch.zeros_like(row)
    turn = torch.stack([torch.stack([half_column, none, column], 1), torch.stack([none, half_row, row], 1)], 1)
    grid = functional.affine_grid(turn, [len(image), 1, side, side], align_corners=False)
    return functional.grid_sample(image, grid, padding_mode="border", align_corners=False)


def _downward(network: unet.UNet) -> Stages:
    return Stages(nn.Identity(), nn.Sequential(network.fold, network.down[0]), *network.down[1:3])


def _random_stage(incoming: int, outgoing: int) -> nn.Sequential:
    """A halving convolution as it is before any training (He et al., ICCV 2015)."""
    convolution = nn.Conv2d(incoming, outgoing, 3, stride=2, padding=1)
    nn.init.kaiming_normal_(convolution.weight)
    return nn.Sequential(convolution, nn.LeakyReLU(0.1))


def _mixed(channels: int, features: int, random: torch.Generator) -> torch.Tensor:
    """Orthonormal combinations of channels by chance, which keep distances about; the channels where they are few."""
    if channels <= features:
        return torch.eye(channels)
    return torch.linalg.qr(torch.randn(channels, features, generator=random)).Q.T
