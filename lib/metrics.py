"""Counts → figures: every metric of the course, without a file or a model in sight.

A float16 map has at most 65 536 values, so the numbers of lesion and of other voxels at each value hold all that a
voxel metric needs, exactly. Counts add over patients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CODES = 2**16
PROMISED_FPR = 0.01  # share of healthy validation voxels above the frozen threshold
HIGHEST = 0.01  # share of the brain whose mean is the score of a scan
RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles
PART = 2**18  # voxels counted at a time
CHUNK = 50  # resamples held in memory at a time
GROUPS = 512  # steps of recall that a pooled curve has in its resamples
FROC_POINTS = (0.25, 0.5, 1, 2, 4, 8)  # false positives per volume


@dataclass(frozen=True)
class SubjectCounts:
    """One subject under one method: voxel counts, int32 [lesion, other, healthy material; code], of the codes that
    occur, uint16 [code], and scores and labels of its slices. Where lesions are not `outlined`, all are among the other
    voxels, and there are no slices."""

    id: str
    healthy: bool
    values: np.ndarray
    counts: np.ndarray
    slice_scores: np.ndarray
    slice_labels: np.ndarray
    outlined: bool = True

    @property
    def lesion(self) -> np.ndarray:
        """Lesion voxels by code, int32 [65 536]."""
        return self._dense(0)

    @property
    def other(self) -> np.ndarray:
        """The other voxels of the brain by code, int32 [65 536]."""
        return self._dense(1)

    @property
    def healthy_material(self) -> np.ndarray:
        """Voxels of slices that count as healthy by code, int32 [65 536]."""
        return self._dense(2)

    @property
    def lesion_voxels(self) -> int:
        return int(self.counts[0].sum())

    def _dense(self, kind: int) -> np.ndarray:
        result = np.zeros(CODES, np.int32)
        result[self.values] = self.counts[kind]
        return result


def codes(anomaly_map: np.ndarray) -> np.ndarray:
    """Order-preserving integers of float16 values: uint16, larger is more anomalous; −0 is 0."""
    bits = anomaly_map.astype(np.float16, order="C").view(np.uint16)
    bits[bits == 0x8000] = 0
    flips = bits >> 15
    np.negative(flips, out=flips)  # every bit of a negative value; of a positive one, below, the sign
    flips |= 0x8000
    bits ^= flips
    return bits


def values_of(code: np.ndarray) -> np.ndarray:
    """The float16 values of codes, uint16, of the same shape."""
    return np.where(code & 0x8000, code & 0x7FFF, ~code).astype(np.uint16).view(np.float16)


def value_of(code: int) -> float:
    """The float16 value of a code."""
    return float(values_of(np.array(code, np.uint16)))


def count(code: np.ndarray, *masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes that occur in any mask, uint16 [code], and how often in each, int32 [mask, code].

    Codes and masks [voxel]; a part at a time, so that no copy of them all is made.
    """
    dense = np.zeros((len(masks), CODES), np.int64)
    for start in range(0, len(code), PART):
        part = slice(start, start + PART)
        for total, mask in zip(dense, masks, strict=True):
            total += np.bincount(code[part][mask[part]], minlength=CODES)
    values = np.flatnonzero(dense.any(axis=0))
    return values.astype(np.uint16), dense[:, values].astype(np.int32)


def average_precision(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Σ (Rₖ − Rₖ₋₁) Pₖ over distinct values, without interpolation, as scikit-learn has it.

    Counts or weights by ascending value, [..., value]; a figure in [0, 1] for each leading index, NaN for no positive.
    """
    hits, alarms = _above(positive), _above(negative)
    precision = np.divide(hits, hits + alarms, out=np.zeros_like(hits), where=hits + alarms > 0)
    return _ratio((positive * precision).sum(axis=-1), positive.sum(axis=-1))


def auroc(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Chance that a positive has the higher value, ties counted half: [..., value] → [...], NaN for an empty class."""
    below = np.cumsum(negative, axis=-1) - negative / 2
    return _ratio((positive * below).sum(axis=-1), positive.sum(axis=-1) * negative.sum(axis=-1))


def dice_curve(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Dice of `value ≥ threshold` at each value as the threshold, [..., value]; NaN without positives."""
    hits = _above(positive)
    size = positive.sum(axis=-1, keepdims=True)
    return np.where(size > 0, _ratio(2 * hits, hits + _above(negative) + size), np.nan)


def threshold_code(healthy: np.ndarray, rate: float = PROMISED_FPR) -> int:
    """The lowest code that at most `rate` of the healthy voxels reach; 65 536 where none is so low."""
    above = np.cumsum(healthy[::-1])[::-1]
    allowed = np.flatnonzero(above <= rate * healthy.sum())
    return int(allowed[0]) if len(allowed) else CODES


def conformal(scans: Sequence[float], rate: float) -> tuple[float, float]:
    """The ⌈(n + 1)(1 − rate)⌉-th smallest of n healthy scans' statistics, and the rate that it promises: a new
    healthy scan exceeds it with at most that chance (split conformal prediction; Vovk et al., 2005). No n below
    1 / rate − 1 can promise `rate`: then the highest statistic and 1 / (n + 1)."""
    n = len(scans)
    rank = min(n, int(np.ceil(np.round((n + 1) * (1 - rate), 9))))
    return sorted(scans)[rank - 1], max(rate, 1 / (n + 1))


def dice_at(subject: SubjectCounts, code: int) -> float:
    """Dice of the voxels that reach a frozen threshold; NaN without lesion."""
    hits, alarms = called(subject, code)
    size = subject.lesion_voxels
    return float(2 * hits / (hits + alarms + size)) if size else float("nan")


def own_threshold(subject: SubjectCounts, sigmas: float) -> int:
    """The code of mean + `sigmas` standard deviations of the subject's own map inside the brain."""
    voxels, values = subject.counts[:2].sum(axis=0), values_of(subject.values).astype(float)
    mean = voxels @ values / voxels.sum()
    spread = np.sqrt(voxels @ (values - mean) ** 2 / voxels.sum())
    return int(codes(np.array([mean + sigmas * spread]))[0])


def called(subject: SubjectCounts, code: int) -> tuple[int, int]:
    """How many lesion and how many other voxels reach a threshold."""
    reached = subject.counts[:2, np.searchsorted(subject.values, code) :].sum(axis=1)
    return int(reached[0]), int(reached[1])


def scan_score(subject: SubjectCounts) -> float:
    """The mean of the highest 1 % of the brain's voxels (at least one)."""
    voxels = subject.counts[:2].sum(axis=0)[::-1]
    wanted = max(1, round(HIGHEST * int(voxels.sum())))
    taken = np.diff(np.minimum(np.cumsum(voxels), wanted), prepend=0)
    highest = values_of(subject.values[::-1][taken > 0]).astype(float)
    return float(taken[taken > 0] @ highest / wanted)


def froc(recall: np.ndarray, false: np.ndarray) -> np.ndarray:
    """Mean recall at ¼, ½, 1, 2, 4 and 8 false positives per volume, between the points of a curve linearly; the
    summary of CAMELYON16 (Ehteshami Bejnordi et al., JAMA 2017).

    Points by falling threshold, [..., threshold] → [...]. Low thresholds melt false components into one, so a point
    never counts fewer than the points before it; the curve starts at 0, 0.
    """
    recall, false = (np.insert(one, 0, 0, axis=-1) for one in (recall, np.maximum.accumulate(false, axis=-1)))
    curves = zip(false.reshape(-1, false.shape[-1]), recall.reshape(-1, false.shape[-1]), strict=True)
    return np.array([np.interp(FROC_POINTS, *curve).mean() for curve in curves]).reshape(false.shape[:-1])


def pooled_precision(subjects: Sequence[SubjectCounts], weights: np.ndarray) -> tuple[float, float, float]:
    """Average precision of all voxels together; exact, its interval from curves of GROUPS steps."""
    lesion, other = coarse(subjects)
    exact = average_precision(sum(s.lesion for s in subjects), sum(s.other for s in subjects))
    return _around(float(exact), bootstrap(lambda w: average_precision(w @ lesion, w @ other), weights))


def oracle_dice(subjects: Sequence[SubjectCounts], weights: np.ndarray) -> tuple[float, float, float]:
    """The best mean Dice that any single threshold reaches on these very subjects; interval as above."""
    curves = dice_curve(*coarse(subjects))
    exact = sum(dice_curve(s.lesion, s.other) for s in subjects).max() / len(subjects)
    return _around(float(exact), bootstrap(lambda w: (w @ curves).max(axis=-1) / len(subjects), weights))


def coarse(subjects: Sequence[SubjectCounts], groups: int = GROUPS) -> tuple[np.ndarray, np.ndarray]:
    """Lesion and other counts, [subject, group], of neighbouring values that share 1 / groups of the lesion voxels."""
    total = sum(s.lesion for s in subjects)
    edges = (np.cumsum(total) * groups) // (total.sum() + 1)
    starts = np.unique(edges, return_index=True)[1]
    lesion, other = (np.stack([np.add.reduceat(getattr(s, name), starts) for s in subjects]).astype(float)
                     for name in ("lesion", "other"))  # fmt: skip
    return lesion, other


def bootstrap(
    figure: Callable[[np.ndarray], np.ndarray], weights: np.ndarray, chunk: int = CHUNK
) -> tuple[float, float, float]:
    """The figure with every subject once, and the 95 % percentile interval over resampled subjects.

    `figure` takes weights [resample, subject] to [resample], so many resamples at a time; the interval is NaN where no
    resample has a figure.
    """
    value = float(figure(np.ones((1, weights.shape[1])))[0])
    drawn = np.concatenate([figure(weights[i : i + chunk]) for i in range(0, len(weights), chunk)])
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn, INTERVAL) if len(drawn) else (np.nan, np.nan)
    return value, float(low), float(high)


@lru_cache(maxsize=64)
def resampled(subjects: int, seed: int) -> np.ndarray:
    """How often each of `subjects` is drawn, [resample, subject]; the same for the same number and seed."""
    random = np.random.default_rng([seed, subjects])
    return random.multinomial(subjects, np.full(subjects, 1 / subjects), RESAMPLES).astype(float)


def _around(exact: float, figures: tuple[float, float, float]) -> tuple[float, float, float]:
    value, low, high = figures
    return exact, low + exact - value, high + exact - value


def _above(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts[..., ::-1], axis=-1)[..., ::-1].astype(float)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    part, whole = np.broadcast_arrays(np.asarray(part, float), np.asarray(whole, float))
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def mean(name: str, values: np.ndarray) -> dict[str, float]:
    """The mean of figures, one a subject, and its 95 % interval over resampled subjects, as `name`, `name_low` and
    `name_high`; NaN for none."""
    value, low, high = (float("nan"),) * 3
    if len(values):
        value, low, high = bootstrap(lambda w: w @ values / len(values), resampled(len(values), 0))
    return {name: value, f"{name}_low": low, f"{name}_high": high}
