"""What is often done to an anomaly map before it is judged, declared, so that baselines get it as well.

Steps work on the codes of a map (see lib.metrics); a detection is a mask.
"""

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from lib.components import drop_small
from lib.metrics import codes

STEPS = ("none", "median", "eroded", "components")
OF_DETECTIONS = ("components",)  # steps that leave the map alone
MEDIAN_EDGES = (5, 5, 5)  # voxels: slices, rows, columns
ERODED = 2  # pixels within the slice
SMALLEST_MM3 = 160.0  # of a component that stays: 20 voxels of 2 mm
ZERO = int(codes(np.zeros(1, np.float16))[0])


def scores(code: np.ndarray, brain: np.ndarray, step: str) -> np.ndarray:
    """A map after a step, codes uint16 [slice, row, column].

    "median": over 5 × 5 × 5 voxels, the outside being 0. "eroded": 0 within two pixels of the edge of the brain.
    "none" and "components" leave the map alone.
    """
    if step == "median":
        return median(code, brain)
    if step == "eroded":
        return np.where(eroded(brain), code, np.uint16(ZERO))
    return code


def detected(code: np.ndarray, brain: np.ndarray, threshold: int, step: str, smallest: int) -> np.ndarray:
    """Voxels of the brain that reach a threshold, bool; "components" drops what has fewer than `smallest` voxels
    together."""
    mask = (code >= threshold) & brain
    return drop_small(mask, smallest) if step == "components" else mask


def voxels(mm3: float, voxel_mm3: float) -> int:
    """The fewest voxels that make up a volume."""
    return math.ceil(round(mm3 / voxel_mm3, 6))


def eroded(brain: np.ndarray) -> np.ndarray:
    """A mask without what lies within two pixels of its edge, by steps to the four neighbours within a slice."""
    for _ in range(ERODED):
        wide = np.pad(brain, ((0, 0), (1, 1), (1, 1)))
        brain = brain & wide[:, 2:, 1:-1] & wide[:, :-2, 1:-1] & wide[:, 1:-1, 2:] & wide[:, 1:-1, :-2]
    return brain


def median(code: np.ndarray, brain: np.ndarray, edges: tuple[int, int, int] = MEDIAN_EDGES) -> np.ndarray:
    """The median of codes over windows of so many slices, rows and columns (odd, together under 256), the outside being
    0; exact, and only where there is brain and it is not 0, a slice's windows at a time."""
    deep, _, across = edges
    middle = math.prod(edges) // 2
    padded = np.pad(code, [(edge // 2, edge // 2) for edge in edges], constant_values=ZERO)
    wanted = brain & ((_counted(padded > ZERO, edges) > middle) | (_counted(padded < ZERO, edges) > middle))
    result = np.full(code.shape, ZERO, np.uint16)
    for i in np.flatnonzero(wanted.any(axis=(1, 2))):
        rows = padded[i : i + deep].transpose(1, 2, 0).astype(np.int32, order="C")  # NumPy selects 32 bits fastest
        rows = rows.reshape(len(rows), -1)  # slices innermost: a window is a run in each of its rows
        windows = sliding_window_view(rows, (edges[1], across * deep))[:, ::deep][wanted[i]]
        windows = windows.reshape(len(windows), -1)
        windows.partition(middle, axis=1)
        result[i][wanted[i]] = windows[:, middle]
    return result


def _counted(mask: np.ndarray, edges: tuple[int, int, int]) -> np.ndarray:
    """How many voxels of a mask lie in each window, uint8."""
    count = mask.astype(np.uint8)
    for axis, edge in enumerate(edges):
        parts = np.moveaxis(sliding_window_view(count, edge, axis), -1, 0)
        count = parts.sum(axis=0, dtype=np.uint8)
    return count
