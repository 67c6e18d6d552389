"""How far the mask of a brain can be trusted: what a brain of an adult never is, in words."""

import numpy as np
from scipy import ndimage

from lib.components import bounding_box

BRAIN_LITRES = (0.8, 2.0)  # of an adult, with the fluid around it
LEAST_PART = 0.02  # of the mask; smaller further parts are specks
MOST_ASYMMETRY = 0.15  # whole brains have less than 0.1
ROUNDNESS = (0.65, 1.0)  # width over length
MOST_ON_FACES = 0.05  # of the mask's largest slice
MOST_JUMP = 0.35  # of the largest slice


def measured(brain: np.ndarray, voxel_mm: np.ndarray) -> dict[str, float]:
    """Figures of a mask, bool [i, j, k] pointing right, anterior, superior.

    `litres`; `parts`: how many hold 2 % of it or more; `asymmetry`: the share that has nothing opposite when its box is
    mirrored left to right (0 to 1); `roundness`: its width over its length; `faces`: the most that lies on one of the
    picture's four upright faces, of the largest slice; `jump`: the largest difference between the areas of neighbouring
    slices, of the largest; `holes`: slices without brain between such with brain.
    """
    area = brain.sum(axis=(0, 1))
    found = {"litres": round(float(brain.sum() * np.prod(voxel_mm) / 1e6), 3)}
    if not area.any():
        return found | {"parts": 0, "asymmetry": 0.0, "roundness": 0.0, "faces": 0.0, "jump": 0.0, "holes": 0}
    parts = np.bincount(ndimage.label(brain)[0].ravel())[1:]
    low, high = np.flatnonzero(area)[[0, -1]]
    within = brain[bounding_box(brain)]
    beside = np.logical_xor(within, within[::-1]).sum() / (2 * within.sum())
    faces = [np.take(brain, at, axis).sum() for axis in (0, 1) for at in (0, -1)]
    jumps = np.abs(np.diff(area[low : high + 1]))
    return found | {
        "parts": int((parts >= LEAST_PART * parts.sum()).sum()),
        "asymmetry": round(float(beside), 3),
        "roundness": round(float(within.shape[0] * voxel_mm[0] / (within.shape[1] * voxel_mm[1])), 3),
        "faces": round(float(max(faces) / area.max()), 3),
        "jump": round(float(jumps.max(initial=0) / area.max()), 3),
        "holes": int((area[low : high + 1] == 0).sum()),
    }


def flags(found: dict[str, float], slices: int, sized: bool = True) -> list[str]:
    """What is unlike an adult's brain, each in a few words; neither litres nor jumps are known of a single slice, and
    no litres where voxels are not `sized`."""
    (least, most), (wide, widest) = BRAIN_LITRES, ROUNDNESS
    said = {
        f"{found['litres']:.2f} litres, and a brain has {least} to {most}": sized
        and slices > 1
        and not least <= found["litres"] <= most,
        f"{found['parts']} separate parts": found["parts"] > 1,
        f"{100 * found['asymmetry']:.0f} % of it has nothing on the other side": found["asymmetry"] > MOST_ASYMMETRY,
        f"its width is {found['roundness']:.2f} of its length": not wide <= found["roundness"] <= widest,
        "it touches the edge of the picture": found["faces"] > MOST_ON_FACES,
        f"it changes by {100 * found['jump']:.0f} % of its largest slice from one slice to the next": slices > 1
        and found["jump"] > MOST_JUMP,
        f"{found['holes']} empty slices inside": found["holes"] > 0,
    }
    return [words for words, holds in said.items() if holds]
