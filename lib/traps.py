"""Ways of measuring voxels that flatter, each with its number on a run's own maps.

Every function takes the run and its cohort and returns a table to print and to draw. Where a cohort has no patient
with a lesion in test, figures are NaN.
"""

from collections.abc import Sequence
from operator import attrgetter

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from lib import evaluation, metrics, postprocessing, scoring
from lib.cohort import LEAST_BRAIN, Cohort, PreparedSubject
from lib.components import bounding_box
from lib.metrics import SubjectCounts
from lib.training import derived_seed

MEDIAN_EDGES = (1, 5, 5)  # slices, rows, columns
CALLED_ILL = 0.05  # share of an image's pixels above its own threshold that makes it ill in the rule of mean + kσ


def pixel_accuracy(run: str, prepared: Cohort, methods: Sequence[str] = ("intensity_median", "ae")) -> pd.DataFrame:
    """Accuracy, specificity, Dice and average precision of all brain voxels of the patients, by mask.

    Masks: nothing, everything, as many voxels as the lesions have drawn at random, each method at its frozen threshold.
    The empty mask's accuracy is 1 − prevalence, the full one's Dice 2 p / (1 + p).
    """
    patients = {m: [s for s in evaluation.test_counts(run, m, prepared) if s.lesion.any()] for m in methods}
    lesion, other = _pooled(patients[methods[0]])
    size, rest = int(lesion.sum()), int(other.sum())
    prevalence = _share(size, size + rest)
    drawn = np.random.default_rng(derived_seed(0, "accuracy")).hypergeometric(size, rest, size)
    rows = {
        "nothing marked": _rates(0, 0, size, rest, prevalence),
        "everything marked": _rates(size, rest, size, rest, prevalence),
        "as many at random": _rates(drawn, size - drawn, size, rest, prevalence),
    }
    for method, subjects in patients.items():
        code = evaluation.frozen_threshold(run, method, prepared)
        lesion, other = _pooled(subjects)
        precision = float(metrics.average_precision(lesion, other))
        rows[method] = _rates(lesion[code:].sum(), other[code:].sum(), size, rest, precision)
    return pd.DataFrame.from_dict(rows, orient="index")


def mean_plus_sigma(
    run: str, prepared: Cohort, method: str = "ae", factors: Sequence[float] = (1, 1.5, 2)
) -> pd.DataFrame:
    """Share of an image's pixels above mean + kσ of that image's own map, the whole square counted.

    A row for each k and for slices without and with lesion of test: mean share, its 5th and 95th percentile, the
    share of images called ill (more than 5 % of the pixels above), and the AUROC of the share for the lesion.
    """
    images = [(one.astype(np.float32), truth) for one, truth in _images(run, prepared, method)]
    truth = np.array([t for _, t in images], bool)
    rows = []
    for k in factors:
        share = np.array([(image > image.mean() + k * image.std()).mean() for image, _ in images])
        auroc = roc_auc_score(truth, share) if truth.any() and not truth.all() else float("nan")
        rows += [_flagged(k, name, share[which], auroc) for name, which in (("no lesion", ~truth), ("lesion", truth))]
    return pd.DataFrame(rows)


def largest_slice(run: str, prepared: Cohort, method: str = "ae") -> pd.DataFrame:
    """The same maps judged on each patient's slice with most lesion, and on all slices.

    Prevalence, average precision with its 95 % interval, Dice at the frozen threshold, and Dice at the threshold that
    is best for the truth, each the mean over patients.
    """
    code = evaluation.frozen_threshold(run, method, prepared)
    whole, single = [], []
    for subject in _patients(prepared):
        anomaly_map, _ = scoring.read_map(run, method, subject, prepared)
        most = int(subject.lesion.sum(axis=(1, 2)).argmax())
        only = np.arange(len(anomaly_map)) == most
        whole.append(_counts(subject, anomaly_map, subject.brain))
        single.append(_counts(subject, anomaly_map, subject.brain & only[:, None, None]))
    rows = {"slice with most lesion": _judged(single, code), "all slices": _judged(whole, code)}
    return pd.DataFrame.from_dict(rows, orient="index")


def median_filter(run: str, prepared: Cohort, methods: Sequence[str] = ("intensity", "ae")) -> pd.DataFrame:
    """Mean average precision of each method as it is and after a median over 5 × 5 pixels of every slice, the outside
    being 0, and what the filter alone adds (`gain`), with 95 % intervals over patients."""
    maps = {m: [(s, scoring.read_map(run, m, s, prepared)[0]) for s in _patients(prepared)] for m in methods}
    rows = {}
    for method, pairs in maps.items():
        plain = np.array([_precision(s, one) for s, one in pairs])
        smooth = np.array([_precision(s, _smoothed(s, one)) for s, one in pairs])
        rows[method] = metrics.mean("average_precision", plain)
        rows[f"{method}, median"] = metrics.mean("average_precision", smooth) | metrics.mean("gain", smooth - plain)
    return pd.DataFrame.from_dict(rows, orient="index")


def background(run: str, prepared: Cohort, method: str = "ae") -> pd.DataFrame:
    """What counting the background does: pooled AUROC and average precision inside the brain, and in the whole square.

    `formula` is b · a + (1 − b) · AUROC inside the brain: b (`background`) is the share of the negatives that lies
    outside, a (`above`) the share of lesion voxels above the background, which scores 0, ties counted half.
    """
    pairs = [(s, scoring.read_map(run, method, s, prepared)[0]) for s in _patients(prepared)]
    inside = _pooled([_counts(s, m, np.asarray(s.brain)) for s, m in pairs])
    whole = _pooled([_counts(s, m, np.ones_like(s.brain)) for s, m in pairs])
    outside = np.zeros(metrics.CODES)
    outside[metrics.codes(np.zeros(1, np.float16))] = 1
    within, above = float(metrics.auroc(*inside)), float(metrics.auroc(inside[0], outside))
    rows = {}
    for name, (lesion, other) in {"inside the brain": inside, "whole square": whole}.items():
        b = 1 - inside[1].sum() / max(other.sum(), 1)
        rows[name] = {
            "background": b,
            "above": above,
            "auroc": float(metrics.auroc(lesion, other)),
            "formula": b * above + (1 - b) * within,
            "average_precision": float(metrics.average_precision(lesion, other)),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def prevalence(
    run: str, prepared: Cohort, method: str = "ae", shares: Sequence[float] = (0.002, 0.01, 0.05, 0.1)
) -> pd.DataFrame:
    """The same detector where lesions are rarer or more common: pooled average precision and AUROC by prevalence.

    Lesion voxels are weighted to the share named, which is what drawing fewer of either kind gives on average. The
    cohort's own prevalence is the row that is marked so.
    """
    lesion, other = _pooled([s for s in evaluation.test_counts(run, method, prepared) if s.lesion.any()])
    own = _share(lesion.sum(), lesion.sum() + other.sum())
    rows = []
    for share in sorted([*shares, own]):
        weighted = lesion * (share / (1 - share) * other.sum() / max(lesion.sum(), 1))
        precision, auroc = metrics.average_precision(weighted, other), metrics.auroc(weighted, other)
        rows.append({"prevalence": share, "average_precision": float(precision), "auroc": float(auroc),
                     "this_cohort": share == own})  # fmt: skip
    return pd.DataFrame(rows)


def _patients(prepared: Cohort) -> list[PreparedSubject]:
    return [s for s in prepared.split("test") if s.lesion.any()]


def _images(run: str, prepared: Cohort, method: str):
    """Maps of the test slices with enough brain, each with whether it holds lesion."""
    for subject in filter(attrgetter("outlined"), prepared.split("test")):
        anomaly_map, _ = scoring.read_map(run, method, subject, prepared)
        for number in np.flatnonzero(subject.brain.mean(axis=(1, 2)) >= LEAST_BRAIN):
            yield anomaly_map[number], bool(subject.lesion[number].any())


def _counts(subject: PreparedSubject, anomaly_map: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of lesion voxels of the brain and of all others by code, among those looked at."""
    code, lesion = metrics.codes(anomaly_map), subject.lesion & subject.brain
    return tuple(np.bincount(code[where & kind], minlength=metrics.CODES) for kind in (lesion, ~lesion))


def _pooled(subjects: Sequence[SubjectCounts | tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(s.lesion, s.other) if isinstance(s, SubjectCounts) else s for s in subjects]
    nothing = np.zeros(metrics.CODES, np.int64)
    return sum((p for p, _ in pairs), nothing), sum((n for _, n in pairs), nothing)


def _rates(hits: int, alarms: int, size: int, rest: int, precision: float) -> dict[str, float]:
    return {
        "accuracy": _share(hits + rest - alarms, size + rest),
        "specificity": _share(rest - alarms, rest),
        "dice": _share(2 * hits, hits + alarms + size),
        "average_precision": precision,
    }


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else float("nan")


def _flagged(k: float, truth: str, share: np.ndarray, auroc: float) -> dict:
    mean, low, high, ill = np.nan, np.nan, np.nan, np.nan
    if len(share):
        mean, (low, high), ill = share.mean(), np.percentile(share, (5, 95)), (share > CALLED_ILL).mean()
    return {"k": k, "truth": truth, "share": mean, "low": low, "high": high, "called_ill": ill, "auroc": auroc,
            "n": len(share)}  # fmt: skip


def _judged(counts: list[tuple[np.ndarray, np.ndarray]], code: int) -> dict[str, float]:
    lesion, other = np.reshape(counts, (-1, 2, metrics.CODES)).swapaxes(0, 1)
    hits, alarms, size = lesion[:, code:].sum(axis=1), other[:, code:].sum(axis=1), lesion.sum(axis=1)
    curve = metrics.dice_curve(lesion, other).sum(axis=0) / max(len(lesion), 1)
    return {
        **metrics.mean("prevalence", size / (size + other.sum(axis=1))),
        **metrics.mean("average_precision", metrics.average_precision(lesion, other)),
        **metrics.mean("dice", 2 * hits / (hits + alarms + size)),
        "dice_oracle": curve.max() if len(lesion) else float("nan"),
    }


def _precision(subject: PreparedSubject, anomaly_map: np.ndarray) -> float:
    return float(metrics.average_precision(*_counts(subject, anomaly_map, np.asarray(subject.brain))))


def _smoothed(subject: PreparedSubject, anomaly_map: np.ndarray) -> np.ndarray:
    brain, smooth = np.asarray(subject.brain), np.zeros_like(anomaly_map)
    box = bounding_box(brain)
    smooth[box] = metrics.values_of(postprocessing.median(metrics.codes(anomaly_map[box]), brain[box], MEDIAN_EDGES))
    return smooth
