"""A convolutional autoencoder of whole brains: it must draw a volume from a small code, so that what is ill must fit
into the anatomy of all slices at once.

After Baur et al., Medical Image Analysis 69 (2021), in three dimensions. The brain is cut out in cubic voxels and never
squeezed: a lesion keeps its proportions. Group normalisation, since a batch of volumes is small (Wu and He, ECCV 2018).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.networks.nets import AutoEncoder
from torch.nn import functional

from lib.boxes import Box
from lib.cohort import Cohort, PreparedSubject
from lib.errors import CourseError, check_choice, check_least, check_multiple
from lib.models.detector import NetworkDetector, residual
from lib.preprocessing import HALVINGS
from lib.training import Batch, Forward, History, Plan, choose_device, derived_seed, train

GROUPS = 8  # of channels that are normalised together


@dataclass(frozen=True)
class Settings:
    """`box`: voxels along each side of the cube; `voxel_mm`: their edge; `width`: channels of the first stage; `code`:
    channels of the code, at 1/16 of the side; `residual`: "signed" or "absolute"; the rest as in training.Plan."""

    box: int = 64
    voxel_mm: float = 3.0
    width: int = 16
    code: int = 64
    residual: str = "signed"
    epochs: int = 40
    batch_size: int = 1
    learning_rate: float = 5e-3
    patience: int = 10

    def __post_init__(self):
        check_choice("residual", self.residual, ("signed", "absolute"))
        check_least("voxel_mm", self.voxel_mm, 0.5)
        check_least("box", self.box, 2 * HALVINGS)  # a code of one place cannot be normalised
        for name, unit in (("box", HALVINGS), ("width", GROUPS), ("code", GROUPS)):
            check_multiple(name, getattr(self, name), unit)


def network(channels: int, width: int, code: int) -> AutoEncoder:
    """Four halvings to the code and four doublings back, for volumes [batch, channel, slice, row, column] whose sides
    are multiples of 16; nothing bypasses the code."""
    norm = ("group", {"num_groups": GROUPS})
    return AutoEncoder(3, channels, channels, (width, 2 * width, 4 * width, code), (2, 2, 2, 2), norm=norm, act="swish")


def squared_error(forward: Forward, batch: Batch) -> torch.Tensor:
    """Mean squared error inside the brain: where that ends is known, so no code is spent on it."""
    error = (forward(batch["image"]) - batch["image"]) ** 2
    return (error * batch["brain"][:, None]).sum() / (batch["brain"].sum() * error.shape[1]).clamp(min=1)


class Volumes:
    """The healthy material of a split as boxes; an item is a dict of `image` float32 [modality, slice, row, column] and
    `brain` bool [slice, row, column]. Where a slice does not count as healthy, nothing is left of it."""

    def __init__(self, cohort: Cohort, split: str, settings: Settings):
        self.items = [cut(subject, settings, keep) for subject, keep in cohort.healthy_material(split) if keep.any()]
        if not self.items:
            raise CourseError(
                f"The split {split} has no healthy slice.", "Give more healthy subjects, or other splits."
            )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict:
        image, brain = self.items[number]
        return {"image": image.astype(np.float32), "brain": brain}


def box_of(subject: PreparedSubject, settings: Settings) -> Box:
    """The cube about the middle of a subject's brain."""
    return Box.centred(subject.brain, subject.voxel_mm[::-1], (settings.box,) * 3, settings.voxel_mm)


def cut(subject: PreparedSubject, settings: Settings, keep: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The image, float16 [modality, slice, row, column], and brain, bool, of a subject in its cube; of slices that are
    not to `keep` [slice], nothing is left."""
    box = box_of(subject, settings)
    brain = np.asarray(subject.brain) & (True if keep is None else keep[:, None, None])
    inside = box.cut(brain) > 0.5
    return np.stack([box.cut(one * brain) for one in subject.image]).astype(np.float16) * inside, inside


class VolumeAutoencoder(NetworkDetector):
    """Trained to return whole healthy brains; the anomaly is what a brain has beyond what comes back."""

    Settings = Settings
    family = "autoencoder"

    def build(self) -> AutoEncoder:
        return network(len(self.modalities), self.settings.width, self.settings.code)

    def fit(self, cohort: Cohort, *, out: Path, device: str = "auto", resume: bool = True, seed: int = 0) -> History:
        s = self.settings
        torch.manual_seed(derived_seed(seed, self.training, "weights"))
        self.network = self.build()
        self.device = choose_device(device)
        return train(
            self.network, self.loss, cohort, Plan(s.epochs, s.batch_size, s.learning_rate, s.patience, cosine=True),
            items=lambda split: Volumes(cohort, split, s), checkpoint=out / f"{self.training}.checkpoint",
            seed=derived_seed(seed, self.training, s.box, s.voxel_mm), device=self.device, resume=resume,
        )  # fmt: skip

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        return squared_error(forward, batch)

    def expected(self, subject: PreparedSubject) -> np.ndarray:
        """The healthy brain that the network expects, on the subject's own grid: float32 [modality, slice, row,
        column]."""
        image, inside = cut(subject, self.settings)
        drawn = self._look(image)[0] * inside
        return np.stack([box_of(subject, self.settings).back(one) for one in drawn]) * subject.brain

    def redraw(self, subject: PreparedSubject, number: int) -> np.ndarray:
        """One slice of what it expects, float32 [modality, row, column]."""
        return self.expected(subject)[:, number]

    def maps(self, subject: PreparedSubject) -> np.ndarray:
        image, inside = cut(subject, self.settings)
        drawn = torch.from_numpy(self._look(image) * inside)
        found = residual(
            torch.from_numpy(image[None].astype(np.float32)), drawn, self.modalities, self.settings.residual
        )
        return box_of(subject, self.settings).back(found[0].numpy()) * subject.brain

    @torch.inference_mode()
    def code(self, subject: PreparedSubject) -> np.ndarray:
        """What the encoder says of a brain: mean and standard deviation inside it of each stage's channels, float32
        [2 × (7 × width + code)]."""
        self.network.eval()
        image, inside = cut(subject, self.settings)
        x, brain = (torch.from_numpy(v.astype(np.float32)).to(self.device)[None] for v in (image, inside[None]))
        found = []
        for stage in self.network.encode:
            x = stage(x)
            share = functional.adaptive_avg_pool3d(brain, x.shape[2:])
            weight = share / share.sum()
            mean = (x * weight).sum(dim=(2, 3, 4), keepdim=True)
            found += [mean.flatten(), ((x - mean) ** 2 * weight).sum(dim=(2, 3, 4)).sqrt().flatten()]
        return torch.cat(found).cpu().numpy()

    @torch.inference_mode()
    def _look(self, image: np.ndarray) -> np.ndarray:
        """What the network makes of one box, float32 [1, modality, slice, row, column]."""
        self.network.eval()
        return self.forward(torch.from_numpy(image[None].astype(np.float32)).to(self.device)).cpu().numpy()
