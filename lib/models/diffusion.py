"""Diffusion: a healthy slice sunk in noise up to a step, and drawn again by a network that knows healthy slices only.

`diffusion` is partial diffusion after AnoDDPM (Wyatt et al., CVPR Workshops 2022), with a few of DDIM's steps back
(Song et al., ICLR 2021). `diffusion_patched` follows pDDPM (Behrendt et al., MIDL 2023): noise in one patch at a time
and one step back, which is in effect a denoising autoencoder that sees what surrounds the patch. The network is the
U-Net of `dae`, a fifteenth of the time of MONAI's; it is told the noise by a further channel (as in FFDNet; Zhang et
al., IEEE Transactions on Image Processing 27, 2018) in place of an embedding of the step. Neither sees a lesion that
shows through the noise, nor one as bright as what is around it.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from monai.networks.schedulers import DDIMScheduler
from torch.nn import functional

from lib.adversarial import small
from lib.cohort import Cohort
from lib.errors import CourseError, check_choice, check_least
from lib.models import unet
from lib.models.dae import coarse_noise
from lib.models.detector import residual
from lib.preprocessing import HALVINGS
from lib.training import Batch, Forward, History

NOISES = ("coarse", "octaves", "pixel")
STEPS = 1000  # of the whole diffusion, after the last of which nothing of the slice is left
SPREAD = 0.5  # of the noise there, in units of the prepared intensity: 1 where [0, 1] is stretched to [−1, 1]
COARSE = 16  # points a side of the coarse noise
OCTAVES, PERSISTENCE = (4, 8, 16, 32, 64), 0.8  # points a side, and how much weaker each octave is than the last


@dataclass(frozen=True)
class Settings(unet.Settings):
    """`noise`: "coarse" (one grid), "octaves" (a sum of ever finer ones: value noise, a substitute for simplex noise)
    or "pixel"; `step`: how far the noise goes, of 1000; `restorations`: how many the mean is taken of, every second one
    from the opposite of the noise before; `residual`: "signed" or "absolute"; `shrink`: pixels a side that become one
    for the network."""

    noise: str = "octaves"
    step: int = 250
    restorations: int = 2
    residual: str = "signed"
    shrink: int = 2

    def __post_init__(self):
        super().__post_init__()
        check_choice("noise", self.noise, NOISES)
        check_choice("residual", self.residual, ("signed", "absolute"))
        for name in ("step", "restorations", "shrink"):
            check_least(name, getattr(self, name), 1)
        if self.step > STEPS:
            raise CourseError(f"step is {self.step}.", f"Give at most {STEPS}.")


@dataclass(frozen=True)
class PartialSettings(Settings):
    """`denoising_steps`: steps from the noise back to a slice; `step` is rounded so that they are of one length."""

    denoising_steps: int = 3

    def __post_init__(self):
        super().__post_init__()
        check_least("denoising_steps", self.denoising_steps, 1)
        check_least("step", self.step, self.denoising_steps)


@dataclass(frozen=True)
class PatchedSettings(Settings):
    """`patches`: how many a side of the slice, each restored with the rest of the slice as it is."""

    step: int = 350
    patches: int = 2

    def __post_init__(self):
        super().__post_init__()
        check_least("patches", self.patches, 1)


class Diffusion(unet.UNetDetector):
    """The network tells the healthy slice from a noisy one, at any step of noise up to the one that is used.

    At test the noise is the same for every slice, so that a map does not depend on what was mapped before; what is left
    of it in a restoration is mostly taken away by the mean with the restoration from its opposite (antithetic variates;
    Hammersley and Morton, 1956).
    """

    Settings = PartialSettings

    def build(self) -> unet.UNet:
        return unet.UNet(len(self.modalities) + 1, len(self.modalities), self.settings.width)

    def fit(self, cohort: Cohort, *, out: Path, device: str = "auto", resume: bool = True, seed: int = 0) -> History:
        if cohort.size % (HALVINGS * self.settings.shrink):
            what = f"shrink is {self.settings.shrink}, slices have {cohort.size} pixels a side."
            raise CourseError(what, f"Give a number that divides {cohort.size // HALVINGS}, 1 for instance.")
        return super().fit(cohort, out=out, device=device, resume=resume, seed=seed)

    @cached_property
    def scheduler(self) -> DDIMScheduler:
        """How much noise each step holds, and the way back."""
        scheduler = DDIMScheduler(STEPS, prediction_type="sample", clip_sample=False)
        scheduler.set_timesteps(self._steps_of_all())
        return scheduler

    @property
    def times(self) -> range:
        """The steps of noise at which the network is asked, falling."""
        stride = STEPS // self._steps_of_all()
        return range(stride * self.settings.denoising_steps - 1, -1, -stride)

    def corrupt(self, batch: Batch, random: torch.Generator, split: str) -> Batch:
        image, brain = (small(batch[key].float(), self.settings.shrink) for key in ("image", "brain"))
        step = torch.randint(self.times[0] + 1, (len(image),), generator=random)
        place = self.place(brain > 0, random)
        noise = value_noise(self.settings.noise, image, random)
        return {"image": image, "place": place, "step": step, "shown": self.noised(image, place, step, noise)}

    def place(self, brain: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        """Where noise goes in training, bool [batch, row, column]: all over the brain."""
        return brain

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Absolute error where the noise is."""
        wrong = self.predict(forward, batch["shown"], batch["place"], batch["step"]) - batch["image"]
        return wrong.abs()[batch["place"][:, None].expand_as(wrong)].mean()

    def noised(self, image: torch.Tensor, place: torch.Tensor, step: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Slices [batch, modality, row, column] at a step [batch] of noise, which is inside `place` only."""
        return torch.where(place[:, None], self.scheduler.add_noise(image, noise, step), image)

    def predict(self, forward: Forward, shown: torch.Tensor, place: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """The healthy slices that the network sees in noisy ones, all [batch, modality, row, column]."""
        level = (1 - self.scheduler.alphas_cumprod[step]).sqrt().to(shown.device)[:, None, None] * place
        return shown + forward(torch.cat([shown, level[:, None]], dim=1))

    def reconstruct(self, image: torch.Tensor) -> torch.Tensor:
        return self.restored(image, (image > 0).any(dim=1))

    def restored(self, image: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
        """Slices as they would be if they were healthy; what the network does not see at its size stays as it is."""
        s = self.settings
        seen, place = small(image, s.shrink), small(brain.float(), s.shrink) > 0
        drawn = [self.redrawn(seen, place, self.noise(i, seen)) for i in range(s.restorations)]
        change = torch.stack(drawn).mean(dim=0) - seen
        return image + functional.interpolate(change, image.shape[-2:], mode="bilinear")

    def noise(self, number: int, image: torch.Tensor) -> torch.Tensor:
        """The noise of a restoration by its number, one for all slices [batch, modality, row, column]."""
        random = torch.Generator().manual_seed(number // 2)
        return (-1) ** number * value_noise(self.settings.noise, image[:1], random)

    def redrawn(self, image: torch.Tensor, brain: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """One restoration of slices at the network's size: noise up to the step, and the way back."""
        shown = self.noised(image, brain, torch.full((len(image),), self.times[0]), noise)
        for time in self.times:
            expected = self.predict(self.forward, shown, brain, torch.full((len(image),), time))
            shown, _ = self.scheduler.step(expected, time, shown)
        return shown

    def anomaly(self, image: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
        return residual(image, self.restored(image, brain), self.modalities, self.settings.residual)

    def _steps_of_all(self) -> int:
        """Steps that the way back would have from the last step of noise."""
        return round(STEPS * self.settings.denoising_steps / self.settings.step)


class PatchedDiffusion(Diffusion):
    """Noise in one patch at a time, one step back, and the patches stitched: a denoising autoencoder of patches."""

    Settings = PatchedSettings

    @property
    def times(self) -> range:
        return range(self.settings.step - 1, self.settings.step)

    def place(self, brain: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        """A patch around some place in the brain."""
        side = brain.shape[-1]
        half = -(-side // self.settings.patches) / 2
        centre = torch.multinomial(brain.flatten(1).cpu().float() + 1e-9, 1, generator=random)[..., None]
        along = torch.arange(side)
        near = ((along[:, None] - centre // side).abs() < half) & ((along - centre % side).abs() < half)
        return near.to(brain.device) & brain

    def redrawn(self, image: torch.Tensor, brain: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        step, result = torch.full((len(image),), self.times[0]), image
        for patch in self.grid(image.shape[-1]):
            place = brain & patch.to(brain.device)
            expected = self.predict(self.forward, self.noised(image, place, step, noise), place, step)
            result = torch.where(place[:, None], expected, result)
        return result

    def grid(self, side: int) -> list[torch.Tensor]:
        """The patches that tile a slice, bool [row, column]."""
        number = torch.arange(side) * self.settings.patches // side
        which = number[:, None] * self.settings.patches + number
        return [which == i for i in range(self.settings.patches**2)]

    def _steps_of_all(self) -> int:
        return STEPS


def value_noise(kind: str, image: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Noise of the shape of slices [batch, modality, row, column]: random values at the points of grids, bilinear in
    between; of standard deviation SPREAD at the points where all grids meet, less elsewhere."""
    side = image.shape[-1]
    grids = {"coarse": (min(COARSE, side),), "octaves": [n for n in OCTAVES if n <= side], "pixel": (side,)}[kind]
    weights = [PERSISTENCE**octave for octave in range(len(grids))]
    everywhere = torch.ones_like(image[:, 0], dtype=torch.bool)
    layers = [w * coarse_noise(image, everywhere, grid, 1.0, random) for w, grid in zip(weights, grids, strict=True)]
    return SPREAD / math.hypot(*weights) * torch.stack(layers).sum(dim=0)
