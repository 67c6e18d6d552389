"""Thresholds that move with the image: by the height of a slice in the head, or by the image's own mean and spread.

The first kind promises a rate of false alarms, learnt from healthy scans at each height; the second kind, mean + kσ of
the image that it judges, promises nothing, for a lesion raises it.
"""

from collections.abc import Sequence

import numpy as np

BANDS = 8  # of equal height, from the lowest slice of a brain to its highest


def heights(brain: np.ndarray) -> np.ndarray:
    """Where each slice of a brain [slice, row, column] lies, [slice]: 0 its lowest slice, 1 its highest, clipped."""
    inside = np.flatnonzero(brain.any(axis=(1, 2)))
    return np.clip((np.arange(len(brain)) - inside[0]) / max(inside[-1] - inside[0], 1), 0, 1)


def band(brain: np.ndarray) -> np.ndarray:
    """The band of height of each slice, 0 to BANDS − 1."""
    return np.minimum((heights(brain) * BANDS).astype(int), BANDS - 1)


def by_height(maps: Sequence[np.ndarray], brains: Sequence[np.ndarray], usable: Sequence[np.ndarray],
              promised: float) -> np.ndarray:  # fmt: skip
    """The value that a share `promised` of healthy voxels exceeds, in each band of height [band].

    Maps and brains [slice, row, column] and healthy slices [slice] of healthy validation scans. A band without healthy
    voxels gets the value of all bands together.
    """
    found = [[] for _ in range(BANDS)]
    for anomaly, brain, well in zip(maps, brains, usable, strict=True):
        for i in np.flatnonzero(well & brain.any(axis=(1, 2))):
            found[band(brain)[i]].append(anomaly[i][brain[i]].astype(np.float32))
    every = np.concatenate([values for one in found for values in one])
    return np.array([np.quantile(np.concatenate(one) if one else every, 1 - promised) for one in found])


def at(by_band: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """The threshold of each slice of a brain, between the middles of bands linearly: [slice]."""
    return np.interp(heights(brain) * BANDS - 0.5, np.arange(BANDS), by_band)


def own(anomaly: np.ndarray, brain: np.ndarray, sigmas: float) -> np.ndarray:
    """Mean + `sigmas` standard deviations of each slice's own map inside the brain [slice]; infinite without brain."""
    inside = [one[mask].astype(np.float32) for one, mask in zip(anomaly, brain, strict=True)]
    return np.array([v.mean() + sigmas * v.std() if v.size else np.inf for v in inside])
