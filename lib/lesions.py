"""Synthetic lesions on batches of healthy slices: smooth shapes with soft edges, filled by one of several families.

After foreign patch interpolation (Tan et al., MELBA 2022): soft edges and many shapes matter more than realism (Naval
Marimont and Tarroni, 2023), and families that are kept out of training tell when a network over-fits those it is taught
with (Baugh et al., MICCAI 2023). The side on which a lesion lies is that of LESION_SIGN: a prior.
"""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from lib.models.detector import LESION_SIGN
from lib.training import present

RADIUS = (1 / 32, 0.23)  # of a slice's side, drawn log-uniformly
SOFTNESS = (0.3, 1.2)  # pixels; over twice as many an edge falls from 0.73 to 0.27
ROUGHNESS, ROUGH_GRID = 0.3, 8  # standard deviation of the outline in radii; grid of its noise
STRENGTH = (0.1, 0.5)  # what a lesion adds, in units of the prepared intensity
TEXTURE_GRID = 24
HIGHEST = 1.5  # of the prepared intensities
OFTEN = (0.75, 0.5)  # share of slices with a lesion; of these, with a second one


def paint(
    image: torch.Tensor, brain: torch.Tensor, modalities: Sequence[str], families: Sequence[str],
    random: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Slices with up to two lesions each, and how far each pixel belongs to one: [batch, row, column] in [0, 1].

    `image` float32 [batch, modality, row, column] in [0, 1.5], `brain` bool [batch, row, column]; `families`: names in
    FAMILIES, one of which fills each lesion; `random`: on the processor. Pixels outside the brain
    and modalities that are missing stay as they are.
    """
    covered = torch.zeros_like(image[:, 0])
    there = torch.ones(len(image), dtype=torch.bool)
    for often in OFTEN:
        there = there & (torch.rand(len(image), generator=random) < often)
        share, depth = shapes(brain, random)
        share = share * there.to(image.device)[:, None, None]
        push = pushes(len(image), modalities, random).to(image.device) * present(image)
        which = torch.randint(len(families), (len(image),), generator=random)
        fills = torch.stack([FAMILIES[name](image, share[:, None], depth[:, None], push, random) for name in families])
        fill = fills[which, torch.arange(len(image))].clamp(0, HIGHEST)
        image = image + share[:, None] * (fill - image)
        covered = torch.maximum(covered, share)
    return image, covered


def smooth_noise(count: int, channels: int, grid: int, side: int, random: torch.Generator) -> torch.Tensor:
    """Standard normal numbers on a coarse grid, drawn out bilinearly: [count, channels, side, side]."""
    coarse = torch.randn(count, channels, grid, grid, generator=random)
    return functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)


def shapes(brain: torch.Tensor, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A shape a slice anywhere in the brain [batch, row, column]: membership in [0, 1], 0 outside the brain, and the
    distance from its centre in radii, 1 at the outline."""
    count, side = len(brain), brain.shape[-1]
    centre = torch.multinomial(brain.flatten(1).cpu().float() + 1e-9, 1, generator=random)[..., None]
    size, turn, long, soft = torch.rand(4, count, 1, 1, generator=random)
    radius, angle, long = side * RADIUS[0] * (RADIUS[1] / RADIUS[0]) ** size, math.pi * turn, (1 + long).sqrt()
    row, column = torch.arange(side)[:, None] - centre // side, torch.arange(side) - centre % side
    along, across = row * angle.cos() + column * angle.sin(), column * angle.cos() - row * angle.sin()
    rough = 1 + ROUGHNESS * smooth_noise(count, 1, ROUGH_GRID, side, random)[:, 0]
    depth = torch.hypot(along / long, across * long) / radius / rough.clamp(min=0.3)
    softness = SOFTNESS[0] + (SOFTNESS[1] - SOFTNESS[0]) * soft
    share = torch.sigmoid((1 - depth) * radius / softness)
    return share.to(brain.device) * brain, depth.to(brain.device)


def pushes(count: int, modalities: Sequence[str], random: torch.Generator) -> torch.Tensor:
    """How much a lesion adds [count, modality, 1, 1]: above 0 where lesions are bright in a modality, below where they
    are dark, either by chance where they are both."""
    strength = STRENGTH[0] + (STRENGTH[1] - STRENGTH[0]) * torch.rand(count, len(modalities), generator=random)
    either = torch.randint(2, strength.shape, generator=random) * 2 - 1
    known = torch.tensor([LESION_SIGN.get(m, 0) for m in modalities])
    return (strength * torch.where(known == 0, either, known))[..., None, None]


def textured(image, share, depth, push, random):
    """The slice, and something grained on top."""
    grain = smooth_noise(len(image), 1, TEXTURE_GRID, image.shape[-1], random).to(image.device)
    return image + push * (1 + 0.6 * grain).clamp(min=0)


def flat(image, share, depth, push, random):
    """Close to one value: the mean of what was there, and something on top."""
    level = (image * share).sum(dim=(2, 3), keepdim=True) / share.sum(dim=(2, 3), keepdim=True).clamp(min=1e-6)
    return 0.3 * image + 0.7 * level + push


def ring(image, share, depth, push, random):
    """A rim around a core that stands out less."""
    core = torch.rand(len(image), 1, 1, 1, generator=random).to(image.device)
    return image + push * (core + (1 - core) * torch.sigmoid((depth - 0.6) * 10))


def foreign(image, share, depth, push, random):
    """Half of what differs in another slice of the batch, on the lesion's side."""
    return image + push / 2 + push.sign() * (image.roll(1, dims=0) - image).abs() / 2


def gain(image, share, depth, push, random):
    """The slice itself, with its contrast raised or lowered."""
    return image * (1 + 2 * push)


FAMILIES = {function.__name__: function for function in (textured, flat, ring, foreign, gain)}
TAUGHT = ("textured", "flat", "ring")
KEPT_OUT = ("foreign", "gain")
