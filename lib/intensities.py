"""What makes intensities of one scanner mean those of another: each scan by itself, or to a standard that is learnt."""

from collections.abc import Callable, Sequence

import numpy as np
from skimage.exposure import match_histograms

CT_WINDOW = (0.0, 80.0)  # Hounsfield units; the usual window of the brain, centre 40 and width 80
HIGHEST = 1.5  # brighter voxels are cut there, in units of the 99th percentile
STANDARDS = {  # normalisations that training scans teach, by the percentiles of the brain that are looked at
    "nyul": (1, *range(10, 100, 10), 99),
    "matched": tuple((np.arange(1000) + 0.5) / 10),
}


def normalised(
    image: np.ndarray, brain: np.ndarray, modality: str, way: str, standard: Sequence[float] | None = None
) -> tuple[np.ndarray, float]:
    """One modality [slice, row, column] by a key of NORMALISATIONS or STANDARDS, with what it was divided by (of a
    standard, whose mapping is no division, the 99th percentile); CT by "p99" is seen through CT_WINDOW."""
    if way in STANDARDS:
        values, scale = (_to_landmarks if way == "nyul" else _matched)(image[brain], standard)
        result = np.zeros(image.shape, np.float32)
        result[brain] = np.clip(values, 0, HIGHEST)
        return result, scale
    return (_by_window if modality == "CT" and way == "p99" else NORMALISATIONS[way])(image, brain)


def percentiles(values: np.ndarray, way: str) -> np.ndarray:
    """What a training scan tells a standard: percentiles of the brain's voxels, its 99th being 1."""
    return np.percentile(values, STANDARDS[way]) / _scale(values)


def learnt(scans: Sequence[np.ndarray], way: str) -> list[float]:
    """The standard that `percentiles` of training scans make.

    "nyul" (Nyúl, Udupa and Zhang 2000): each scan's 1st and 99th percentile brought together on their mean, then the
    mean of each landmark. "matched": the mean of each percentile, which is the mean training histogram.
    """
    table = np.array(scans)
    if way == "nyul":
        low, high = table[:, :1], table[:, -1:]
        first, last = low.mean(), high.mean()
        table = first + (table - low) / np.maximum(high - low, 1e-6) * (last - first)
    return table.mean(axis=0).round(6).tolist()


def _scale(values: np.ndarray) -> float:
    return max(float(np.percentile(values, 99)), 1e-6)


def _to_landmarks(values: np.ndarray, standard: Sequence[float]) -> tuple[np.ndarray, float]:
    """Piecewise linear between the landmarks, beyond the outermost with the slope beside them."""
    from scipy.interpolate import make_interp_spline  # slow to import, and few need it

    scale = _scale(values)
    own = np.percentile(values, STANDARDS["nyul"]) / scale
    own += 1e-6 * np.arange(len(own))  # where landmarks coincide
    return make_interp_spline(own, standard, k=1)(values / scale), scale


def _matched(values: np.ndarray, standard: Sequence[float]) -> tuple[np.ndarray, float]:
    return match_histograms(values, np.array(standard)), _scale(values)


def _by_percentile(image: np.ndarray, brain: np.ndarray) -> tuple[np.ndarray, float]:
    scale = _scale(image[brain])
    return np.clip(image / scale, 0, HIGHEST), scale


def _by_maximum(image: np.ndarray, brain: np.ndarray) -> tuple[np.ndarray, float]:
    scale = max(float(image[brain].max()), 1e-6)
    return image / scale, scale


def _by_z_score(image: np.ndarray, brain: np.ndarray) -> tuple[np.ndarray, float]:
    scale = max(float(image[brain].std()), 1e-6)
    return np.clip((image - image[brain].mean()) / scale, -5, 5), scale


def _by_slice_range(image: np.ndarray, brain: np.ndarray) -> tuple[np.ndarray, float]:
    image = image * brain
    low, high = image.min(axis=(1, 2), keepdims=True), image.max(axis=(1, 2), keepdims=True)
    return (image - low) / np.maximum(high - low, 1e-6), 1.0


def _by_window(image: np.ndarray, brain: np.ndarray) -> tuple[np.ndarray, float]:
    low, high = CT_WINDOW
    return np.clip((image - low) / (high - low), 0, 1), high - low


NORMALISATIONS: dict[str, Callable] = {
    "p99": _by_percentile,
    "max": _by_maximum,
    "zscore": _by_z_score,
    "slice_range": _by_slice_range,
}
