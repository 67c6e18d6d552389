"""Things to show a detector that it never saw, made from a healthy slice: what it marks there tells what it learnt."""

import numpy as np
import torch
from scipy import ndimage

from lib.cohort import Cohort
from lib.lesions import KEPT_OUT, paint

RADIUS = 0.1  # of the discs, in sides of a slice
CELL = 3  # pixels, of the checkerboard
BRIGHT = 1.0  # prepared intensity of the bright disc
INVERTED = 1.1  # prepared intensity that becomes 0
DEGREES = 30
HELD = 48  # healthy validation slices with synthetic lesions


def unseen(image: np.ndarray, brain: np.ndarray) -> dict[str, np.ndarray]:
    """Altered copies by name of a slice [modality, row, column] with its brain [row, column]; float32, same shape.

    Discs in the middle of the brain: of one flat colour, bright, and a checkerboard, the first and the last with the
    mean of what was there. Then the whole slice: turned by 30°, the brain's left half back to front (all tissue is
    healthy, half of it in the wrong place), and another modality, for which the contrast is inverted.
    """
    image = np.asarray(image, np.float32)
    row, column = np.indices(brain.shape)
    middle = ndimage.center_of_mass(brain)
    disc = (np.hypot(row - middle[0], column - middle[1]) < RADIUS * len(brain)) & brain
    level = image[:, disc].mean(axis=1)[:, None, None]
    checks = np.where((row // CELL + column // CELL) % 2, 1.4, 0.6)
    probes = {
        "flat colour": np.where(disc, level, image),
        "bright disc": np.where(disc, BRIGHT, image),
        "checkerboard": np.where(disc, checks * level, image),
        f"turned by {DEGREES}°": ndimage.rotate(image, DEGREES, axes=(1, 2), reshape=False, order=1),
        "left half back to front": _half_turned(image, brain),
        "contrast inverted": np.where(brain, (INVERTED - image).clip(0), 0),
    }
    return {name: probe.astype(np.float32) for name, probe in probes.items()}


def held_out(cohort: Cohort, seed: int) -> tuple[list[dict], torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Healthy validation slices, evenly taken, with lesions of families that no network is taught.

    The slices as `cohort.slices` has them; as tensors [slice, …] their images [modality, row, column], brains bool
    [row, column], the images with the lesions, and how far each pixel belongs to one, in [0, 1].
    """
    watched = cohort.slices("validation")
    held = [watched[i] for i in range(0, len(watched), max(1, len(watched) // HELD))]
    images, brains = (torch.from_numpy(np.stack([one[key] for one in held])) for key in ("image", "brain"))
    random = torch.Generator().manual_seed(seed)
    return held, images, brains, *paint(images, brains, cohort.modalities, KEPT_OUT, random)


def _half_turned(image: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """The left half of the brain's box with its rows in the opposite order."""
    rows, columns = ndimage.find_objects(brain.astype(np.int8))[0]
    left = slice(columns.start, (columns.start + columns.stop) // 2)
    turned = image.copy()
    turned[:, rows, left] = image[:, rows, left][:, ::-1]
    return turned
