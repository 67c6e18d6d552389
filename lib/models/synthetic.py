"""Synthetic lesions: a U-Net taught on healthy slices to find lesions that were painted on them.

After foreign patch interpolation (Tan et al., MELBA 2022); beside each slice the network sees how much it differs from
the scan's reflection in its symmetry plane, so that it can tell a lesion from what is bright on both sides. It assumes
that lesions are bright in FLAIR, T2 and PD and dark in T1, and cannot see what differs in shape or place alone.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from monai.losses import DiceLoss
from monai.networks.layers import GaussianFilter
from torch.nn import functional

from lib.cohort import Cohort, PreparedSubject
from lib.lesions import HIGHEST, KEPT_OUT, TAUGHT, paint
from lib.models import unet
from lib.models.mirror import Scan, reflect
from lib.training import Batch, Forward, History

GAIN, GAMMA = 0.1, 0.2  # a slice's brightness and its gamma vary by factors of exp(± this)
SMOOTHING = 4.0  # pixels, of the difference between both sides, which never agree to the pixel
RARE = -3.0  # log-odds of a lesion pixel before anything is learnt


@dataclass(frozen=True)
class Settings(unet.Settings):
    """`mirror`: whether the network sees how a slice differs from the scan's reflection, too."""

    mirror: bool = True


class Mirrored(PreparedSubject):
    """A subject with the reflections of its modalities in its symmetry plane as further ones."""

    @classmethod
    def of(cls, subject: PreparedSubject) -> "Mirrored":
        return cls(subject.id, subject.split, subject.healthy, subject.folder, subject.facts)

    @cached_property
    def image(self) -> np.ndarray:
        """float16 [2 × modality, slice, row, column]; reflections are 0 outside the brain."""
        scan = Scan.of(self)
        reflections = [scan.back(reflect(one, scan.plane, scan.edges)) for one in scan.image]
        return np.concatenate([super().image, np.array(reflections, np.float16)])


class SyntheticLesions(unet.UNetDetector):
    """A pixel's anomaly is the probability that it belongs to a lesion.

    Training stops by families of lesions that are not taught, painted on healthy validation slices: no real lesion is
    looked at. The weights that are kept are means over training, which follow the lesions' own look less closely.
    """

    Settings = Settings
    averaging = 0.98
    redraw = None  # it marks, and draws nothing

    def build(self) -> unet.UNet:
        channels = len(self.modalities) * (2 if self.settings.mirror else 1)
        return unet.UNet(channels, 1, self.settings.width, first=RARE)

    def fit(self, cohort: Cohort, *, out: Path, device: str = "auto", resume: bool = True, seed: int = 0) -> History:
        if self.settings.mirror:
            cohort = replace(cohort, subjects=tuple(Mirrored.of(s) for s in cohort.subjects))
        return super().fit(cohort, out=out, device=device, resume=resume, seed=seed)

    def maps(self, subject: PreparedSubject) -> np.ndarray:
        return super().maps(Mirrored.of(subject) if self.settings.mirror else subject)

    def corrupt(self, batch: Batch, random: torch.Generator, split: str) -> Batch:
        """Lesions on the slices; what they add is flipped and added to the reflections, where it is nothing to find."""
        families = TAUGHT if split == "train" else KEPT_OUT
        image = varied(batch["image"], random) if split == "train" else batch["image"]
        own, reflected = image.tensor_split([len(self.modalities)], dim=1)
        painted, lesion = paint(own, batch["brain"], self.modalities, families, random)
        if self.settings.mirror:
            reflected = (reflected + (painted - own).flip(-1)).clamp(0, HIGHEST) * batch["brain"][:, None]
        return batch | {"shown": torch.cat([painted, reflected], dim=1), "lesion": lesion}

    def seen(self, image: torch.Tensor) -> torch.Tensor:
        """What the network sees of slices and their reflections: the slices, and the smoothed difference of the two."""
        own, reflected = image.tensor_split([len(self.modalities)], dim=1)
        if not self.settings.mirror:
            return own
        return torch.cat([own, GaussianFilter(2, SMOOTHING)((own - reflected) * (reflected > 0))], dim=1)

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Cross-entropy and half of a Dice loss over the batch."""
        result, lesion = forward(self.seen(batch["shown"])), batch["lesion"][:, None]
        overlap = DiceLoss(sigmoid=True, batch=True)(result, lesion)
        return functional.binary_cross_entropy_with_logits(result, lesion) + overlap / 2

    def anomaly(self, image: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.forward(self.seen(image))[:, 0])


def varied(image: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Slices as another scanner might show them: each [channel, row, column] with a gain and a gamma of its own."""
    gain, gamma = (2 * torch.rand(2, len(image), 1, 1, 1, generator=random) - 1).to(image.device)
    return (image ** torch.exp(GAMMA * gamma) * torch.exp(GAIN * gain)).clamp(0, HIGHEST)
