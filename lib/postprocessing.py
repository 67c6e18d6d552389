"""What is often done to an anomaly map before it is judged, declared, so that baselines get it as well.

Steps work on the codes of a map (see lib.metrics); a detection is a mask.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy import ndimage

from lib.metrics import codes, drop_small

STEPS = ("none", "median", "eroded", "components")
MEDIAN_EDGE = 5  # voxels
ERODED = 2  # pixels within the slice
SMALLEST_MM3 = 160.0  # of a component that stays: 20 voxels of 2 mm
ZERO = int(codes(np.zeros(1, np.float16))[0])
CROSS = ndimage.generate_binary_structure(2, 1)[None]  # the four neighbours within a slice


def scores(code: np.ndarray, brain: np.ndarray, step: str) -> np.ndarray:
    """A map after a step, codes uint16 [slice, row, column].

    "median": over 5 × 5 × 5 voxels, the outside being 0. "eroded": 0 within two pixels of the edge of the brain.
    "none" and "components" leave the map alone.
    """
    if step == "median":
        return median(code, brain)
    if step == "eroded":
        inner = ndimage.binary_erosion(brain, CROSS, iterations=ERODED)
        return np.where(inner, code, np.uint16(ZERO))
    return code


def detected(code: np.ndarray, brain: np.ndarray, threshold: int, step: str, smallest: int) -> np.ndarray:
    """Voxels of the brain that reach a threshold, bool; "components" drops what has fewer than `smallest` voxels
    together."""
    mask = (code >= threshold) & brain
    return drop_small(mask, smallest) if step == "components" else mask


def median(code: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """The median of codes over 5 × 5 × 5 voxels, the outside being 0; exact, and only where there is brain, a slice's
    windows at a time."""
    edge, middle = MEDIAN_EDGE // 2, MEDIAN_EDGE**3 // 2
    padded = np.pad(code, edge, constant_values=ZERO).astype(np.int32)  # NumPy selects 32 bits fastest
    result = np.full(code.shape, ZERO, np.uint16)
    for i in np.flatnonzero(brain.any(axis=(1, 2))):
        windows = sliding_window_view(padded[i : i + MEDIAN_EDGE], [MEDIAN_EDGE] * 3)[0][brain[i]]
        windows = windows.reshape(len(windows), -1)
        windows.partition(middle, axis=1)
        result[i][brain[i]] = windows[:, middle]
    return result
