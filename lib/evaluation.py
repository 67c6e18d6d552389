"""Maps × truth → figures with intervals. Only maps are judged, and every figure comes from counts by score value.

A float16 map has at most 65 536 values, so the numbers of lesion and of other voxels at each value hold all that a
voxel metric needs, exactly. Counts add over patients.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lib import models, run_folder, scoring
from lib.cohort import Cohort, PreparedSubject
from lib.intake import LESION_FREE
from lib.training import derived_seed
from lib.volumes import write_bytes

CODES = 2**16
PROMISED_FPR = 0.01  # share of healthy validation voxels above the frozen threshold
PROMISED_SLICE_FPR = 0.05  # share of healthy validation slices above the slice threshold
RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles
CHUNK = 50  # resamples held in memory at a time
COLUMNS = [
    "method", "family", "modality", "postprocess", "stratum", "level", "metric",
    "value", "low", "high", "n", "seed", "note",
]  # fmt: skip


@dataclass(frozen=True)
class SubjectCounts:
    """One subject under one method: voxel counts by code, int32 [65 536], and scores and labels of its slices."""

    id: str
    healthy: bool
    lesion: np.ndarray
    other: np.ndarray
    healthy_material: np.ndarray
    slice_scores: np.ndarray
    slice_labels: np.ndarray


def codes(anomaly_map: np.ndarray) -> np.ndarray:
    """Order-preserving integers of float16 values: uint16, larger is more anomalous; −0 is 0."""
    bits = (anomaly_map.astype(np.float16) + np.float16(0)).view(np.uint16)
    return np.where(bits & 0x8000, ~bits, bits | 0x8000)


def value_of(code: int) -> float:
    """The float16 value of a code."""
    bits = np.uint16(code & 0x7FFF) if code & 0x8000 else ~np.uint16(code)
    return float(np.array(bits, np.uint16).view(np.float16))


def count_subject(
    anomaly_map: np.ndarray, slice_scores: np.ndarray, subject: PreparedSubject, healthy: np.ndarray
) -> SubjectCounts:
    """Counts inside the brain; `healthy` bool [slice] says which slices count as healthy material."""
    brain, lesion = np.asarray(subject.brain), np.asarray(subject.lesion)
    code = codes(anomaly_map)

    def counted(where: np.ndarray) -> np.ndarray:
        return np.bincount(code[where], minlength=CODES).astype(np.int32)

    seen = brain.any(axis=(1, 2))
    return SubjectCounts(
        subject.id, subject.healthy, counted(brain & lesion), counted(brain & ~lesion),
        counted(brain & healthy[:, None, None]), slice_scores[seen], lesion.any(axis=(1, 2))[seen],
    )  # fmt: skip


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
    return _ratio(2 * hits, hits + _above(negative) + positive.sum(axis=-1, keepdims=True))


def threshold_code(healthy: np.ndarray, rate: float = PROMISED_FPR) -> int:
    """The lowest code that at most `rate` of the healthy voxels reach; 65 536 where none is so low."""
    above = np.cumsum(healthy[::-1])[::-1]
    allowed = np.flatnonzero(above <= rate * healthy.sum())
    return int(allowed[0]) if len(allowed) else CODES


def dice_at(subject: SubjectCounts, code: int) -> float:
    """Dice of the voxels that reach a frozen threshold; NaN without lesion."""
    hits, alarms, size = subject.lesion[code:].sum(), subject.other[code:].sum(), subject.lesion.sum()
    return float(2 * hits / (hits + alarms + size)) if size else float("nan")


def evaluate(run: str, cohort: Cohort, seed: int = 0) -> pd.DataFrame:
    """Judge every method that has maps in this run, and write `results.csv`: sorted, fixed decimals, byte for byte
    equal for equal maps. Columns as in COLUMNS; `low` and `high` are a 95 % bootstrap over patients."""
    rows = [row for method in scoring.methods(run) for row in _evaluate_method(run, method, cohort, seed)]
    table = pd.DataFrame(rows, columns=COLUMNS).sort_values(["method", "level", "metric"], ignore_index=True)
    table["note"] = _notes(table, cohort)
    write_bytes(
        run_folder(run) / "results.csv", table.to_csv(index=False, float_format="%.4f", lineterminator="\n").encode()
    )
    return table


def test_counts(run: str, method: str, cohort: Cohort) -> list[SubjectCounts]:
    """Counts of every test subject under a method."""
    return [_counted(run, method, s, cohort) for s in cohort.split("test")]


def frozen_threshold(run: str, method: str, cohort: Cohort) -> int:
    """The code of the threshold that the healthy material of validation fixes."""
    counts = [_counted(run, method, s, cohort).healthy_material for s, _ in cohort.healthy_material("validation")]
    return threshold_code(np.sum(counts, axis=0))


def patients_by_precision(subjects: list[SubjectCounts]) -> list[tuple[str, float]]:
    """Identity and average precision of each test patient, the lowest first."""
    found = [(s.id, float(average_precision(s.lesion, s.other))) for s in subjects if s.lesion.any()]
    return sorted(found, key=lambda pair: pair[1])


def slice_confusion(run: str, method: str, cohort: Cohort) -> np.ndarray:
    """Test slices by truth (row: healthy, lesion) and call (column), int [2, 2].

    The threshold leaves 5 % of the healthy validation slices above it.
    Slices of patients without lesion are healthy here.
    """
    healthy = [
        scoring.read_map(run, method, s, cohort)[1][usable] for s, usable in cohort.healthy_material("validation")
    ]
    limit = np.quantile(np.concatenate(healthy), 1 - PROMISED_SLICE_FPR)
    tested = test_counts(run, method, cohort)
    called = np.concatenate([s.slice_scores > limit for s in tested]).astype(int)
    truth = np.concatenate([s.slice_labels for s in tested]).astype(int)
    return np.bincount(2 * truth + called, minlength=4).reshape(2, 2)


def _counted(run: str, method: str, subject: PreparedSubject, cohort: Cohort) -> SubjectCounts:
    anomaly_map, slice_scores = scoring.read_map(run, method, subject, cohort)
    usable = subject.lesion_free & (subject.healthy or cohort.training == LESION_FREE)
    return count_subject(anomaly_map, slice_scores, subject, usable)


def _evaluate_method(run: str, method: str, cohort: Cohort, seed: int) -> list[dict]:
    subjects = test_counts(run, method, cohort)
    code = frozen_threshold(run, method, cohort)
    random = np.random.default_rng(derived_seed(seed, "bootstrap"))
    figures = {
        **_voxel_figures(subjects, code, random),
        **_slice_figures(subjects, random),
        **_healthy_figures(subjects, code, random),
    }
    shared = {"method": method, "family": models.family(method), "modality": "+".join(cohort.modalities),
              "postprocess": "none", "stratum": "all", "seed": seed}  # fmt: skip
    return [{**shared, "level": level, "metric": metric, "value": value, "low": low, "high": high, "n": n}
            for (level, metric), (value, low, high, n) in figures.items()]  # fmt: skip


def _voxel_figures(subjects: list[SubjectCounts], code: int, random: np.random.Generator) -> dict:
    patients = [s for s in subjects if s.lesion.any()]
    if not patients:
        return {}
    lesion, other = _used(np.stack([s.lesion for s in patients]), np.stack([s.other for s in patients]))
    weights = _resampled(len(patients), random)
    curves = dice_curve(lesion, other)
    figures = {
        "ap": _bootstrap(lambda w: w @ average_precision(lesion, other) / len(patients), weights),
        "ap_pooled": _bootstrap(lambda w: average_precision(w @ lesion, w @ other), weights),
        "dice": _bootstrap(lambda w: w @ np.array([dice_at(s, code) for s in patients]) / len(patients), weights),
        "dice_oracle": _bootstrap(lambda w: (w @ curves).max(axis=-1) / len(patients), weights),
        "prevalence": _bootstrap(lambda w: (w @ lesion).sum(axis=-1) / (w @ (lesion + other)).sum(axis=-1), weights),
    }
    return {("voxel", metric): (*figure, len(patients)) for metric, figure in figures.items()}


def _slice_figures(subjects: list[SubjectCounts], random: np.random.Generator) -> dict:
    values, place = np.unique(np.concatenate([s.slice_scores for s in subjects]), return_inverse=True)
    parts = np.split(place, np.cumsum([len(s.slice_scores) for s in subjects])[:-1])
    pairs = list(zip(subjects, parts, strict=True))
    sick = np.stack([np.bincount(p[s.slice_labels], minlength=len(values)) for s, p in pairs]).astype(float)
    well = np.stack([np.bincount(p[~s.slice_labels], minlength=len(values)) for s, p in pairs]).astype(float)
    if not sick.any() or not well.any():
        return {}
    weights = _resampled(len(subjects), random)
    figures = {
        "auroc": _bootstrap(lambda w: auroc(w @ sick, w @ well), weights),
        "ap": _bootstrap(lambda w: average_precision(w @ sick, w @ well), weights),
    }
    return {("slice", metric): (*figure, len(subjects)) for metric, figure in figures.items()}


def _healthy_figures(subjects: list[SubjectCounts], code: int, random: np.random.Generator) -> dict:
    """The false-positive rate that the threshold promises, and the one seen on the healthy material of test."""
    tested = [s for s in subjects if s.healthy_material.any()]
    promised = {("voxel", "fpr_promised"): (PROMISED_FPR, np.nan, np.nan, len(tested))}
    if not tested:
        return promised
    above = np.array([s.healthy_material[code:].sum() for s in tested])
    total = np.array([s.healthy_material.sum() for s in tested])
    seen = _bootstrap(lambda w: (w @ above) / (w @ total), _resampled(len(tested), random))
    return promised | {("voxel", "fpr_seen"): (*seen, len(tested))}


def _bootstrap(figure: Callable[[np.ndarray], np.ndarray], weights: np.ndarray) -> tuple[float, float, float]:
    """The figure with every subject once, and the 95 % percentile interval over resampled subjects.

    `figure` takes weights [resample, subject] to [resample].
    """
    value = float(figure(np.ones((1, weights.shape[1])))[0])
    drawn = np.concatenate([figure(weights[i : i + CHUNK]) for i in range(0, len(weights), CHUNK)])
    low, high = np.nanpercentile(drawn, INTERVAL)
    return value, float(low), float(high)


def _resampled(subjects: int, random: np.random.Generator) -> np.ndarray:
    """How often each subject is drawn, [resample, subject]."""
    return random.multinomial(subjects, np.full(subjects, 1 / subjects), RESAMPLES).astype(float)


def _used(*counts: np.ndarray) -> list[np.ndarray]:
    """Only the values that occur."""
    occurring = np.any([c.any(axis=0) for c in counts], axis=0)
    return [c[:, occurring].astype(float) for c in counts]


def _above(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts[..., ::-1], axis=-1)[..., ::-1].astype(float)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    part, whole = np.broadcast_arrays(np.asarray(part, float), np.asarray(whole, float))
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _notes(table: pd.DataFrame, cohort: Cohort) -> list[str]:
    """Where a trivial baseline does as well as a model, its name; and what the healthy material was."""
    material = f"healthy material: {cohort.training}" if cohort.training == LESION_FREE else ""
    judged = table[(table.family == "baseline") & table.metric.isin(["ap", "ap_pooled", "auroc", "dice"])]
    best = judged.sort_values("value").groupby(["level", "metric"]).tail(1).set_index(["level", "metric"])
    notes = []
    for row in table.itertuples():
        rival = best.loc[(row.level, row.metric)] if (row.level, row.metric) in best.index else None
        beaten = rival is not None and row.family != "baseline" and rival.value >= row.value
        notes.append("; ".join(filter(None, [f"{rival.method} does as well or better" if beaten else "", material])))
    return notes
