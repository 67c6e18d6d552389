"""Maps × truth → counts: a subject is read once, reduced to counts and a record, and forgotten.

Each post-processing step has thresholds of its own, frozen on the healthy material of validation.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
from joblib import Parallel, delayed
from scipy import ndimage

from lib import metrics, postprocessing, scoring
from lib.cohort import Cohort, PreparedSubject
from lib.errors import CourseError
from lib.intake import LESION_FREE
from lib.metrics import CODES, PROMISED_FPR, SubjectCounts, average_precision, codes, dice_at, threshold_code

LOOSE_FPR = 0.05  # share of healthy validation voxels above the second threshold
PROMISED_ALARMS = 0.05  # share of healthy scans with more than 1 % of their voxels above the conformal threshold
FEW = 4  # subjects, for which no process is worth its start
SMALLEST_MM3 = 20.0  # smaller components are no detections
FROC_SHARES = np.geomspace(1e-5, 0.1, 16)  # of the healthy validation voxels above each threshold of the curve


@dataclass(frozen=True)
class Scored:
    """A subject's map as codes uint16, its brain, lesion and healthy material bool, [slice, row, column] in the box of
    the brain; scores and labels of the slices that have brain."""

    subject: PreparedSubject
    code: np.ndarray
    brain: np.ndarray
    lesion: np.ndarray
    healthy: np.ndarray
    slice_scores: np.ndarray
    slice_labels: np.ndarray


@dataclass(frozen=True)
class Frozen:
    """Thresholds (codes) that healthy validation material fixes: 1 % and 5 % of its voxels above, the conformal one
    with the rate of false alarms it promises from `scans` healthy scans, and those of the FROC curve, falling."""

    code: int
    loose: int
    conformal: int
    promise: float
    scans: int
    curve: tuple[int, ...]


@dataclass(frozen=True)
class Judged:
    """One subject under one method and step: its counts, its row of `patients.csv`, and [threshold; lesions found,
    false components] along the FROC curve."""

    counts: SubjectCounts
    record: dict
    curve: np.ndarray


def read(run: str, method: str, subject: PreparedSubject, cohort: Cohort) -> Scored:
    """A subject with its map; raises CourseError as scoring.read_map does."""
    anomaly_map, slice_scores = scoring.read_map(run, method, subject, cohort)
    brain, lesion = np.asarray(subject.brain), np.asarray(subject.lesion)
    usable = subject.lesion_free & (subject.healthy or cohort.training == LESION_FREE)
    box = ndimage.find_objects(brain.astype(np.int8))[0]
    inside, seen = brain[box], brain.any(axis=(1, 2))
    return Scored(
        subject, codes(anomaly_map[box]), inside, inside & lesion[box], inside & usable[box[0], None, None],
        slice_scores[seen], lesion.any(axis=(1, 2))[seen],
    )  # fmt: skip


def tested(run: str, method: str, cohort: Cohort) -> list[Callable[[], Scored]]:
    """The test subjects in the order of their names, each read when it is called."""
    return [partial(read, run, method, s, cohort) for s in sorted(cohort.split("test"), key=lambda s: s.id)]


def count(scored: Scored, code: np.ndarray | None = None) -> SubjectCounts:
    """Counts inside the brain, of another map where `code` is given."""
    inside = (scored.code if code is None else code)[scored.brain]
    lesion, healthy = scored.lesion[scored.brain], scored.healthy[scored.brain]
    counts = metrics.count(inside, lesion, ~lesion, healthy)
    return SubjectCounts(scored.subject.id, scored.subject.healthy, *counts, scored.slice_scores, scored.slice_labels)


def freeze(run: str, method: str, cohort: Cohort, steps: Sequence[str]) -> dict[str, Frozen]:
    """The thresholds of each step, from the healthy material of validation."""
    scans = (read(run, method, subject, cohort) for subject, _ in cohort.healthy_material("validation"))
    counts = [[_healthy(scan, step) for step in steps] for scan in scans]
    return {step: _thresholds([of_scan[i] for of_scan in counts]) for i, step in enumerate(steps)}


def judge_all(
    method: str, subjects: Sequence[Callable[[], Scored]], frozen: dict[str, Frozen]
) -> list[dict[str, Judged]]:
    """`judge` of every subject, in processes where that is worth their start; a few subjects in memory at a time."""
    jobs = min(os.cpu_count() or 1, max(1, len(subjects) // FEW))
    return Parallel(n_jobs=jobs, max_nbytes=None)(delayed(judge)(method, subject(), frozen) for subject in subjects)


def judge(method: str, scored: Scored, frozen: dict[str, Frozen]) -> dict[str, Judged]:
    """One subject after each step; the FROC curve is that of the map as it is."""
    code, brain, lesion = scored.code, scored.brain, scored.lesion
    scores = {step: postprocessing.scores(code, brain, step) for step in frozen}
    masks = {step: postprocessing.detected(scores[step], brain, frozen[step].code, step) for step in frozen}
    curve = ((code >= c) & brain for c in frozen["none"].curve)
    found = metrics.lesion_counts(chain(masks.values(), curve), lesion, _smallest(scored.subject))
    judged = {}
    for (step, mask), (hits, false) in zip(masks.items(), found[: len(masks)], strict=True):
        counted = count(scored, scores[step])
        record = {
            "method": method, "postprocess": step, **_about(scored), **_scores(counted, frozen[step]),
            **_detected(scored, mask), "lesion_lost": int((masks["none"] & ~mask & lesion).sum()),
            "lesions_found": int(hits), "false_positives": int(false),
        }  # fmt: skip
        judged[step] = Judged(counted, record, found[len(masks) :])
    return judged


def _healthy(scored: Scored, step: str) -> np.ndarray:
    code = postprocessing.scores(scored.code, scored.brain, step)
    return np.bincount(code[scored.healthy], minlength=CODES)


def _thresholds(scans: list[np.ndarray]) -> Frozen:
    scans = [s for s in scans if s.any()]
    if not scans:
        raise CourseError(
            "The validation split has no healthy voxel, so no threshold can be frozen.",
            "Give more healthy subjects, or other splits.",
        )
    pooled = np.sum(scans, axis=0)
    strict, promise = metrics.conformal([threshold_code(s) for s in scans], PROMISED_ALARMS)
    curve = tuple(threshold_code(pooled, share) for share in FROC_SHARES)
    return Frozen(threshold_code(pooled), threshold_code(pooled, LOOSE_FPR), strict, promise, len(scans), curve)


def _smallest(subject: PreparedSubject) -> int:
    """Voxels of the smallest component that counts as a detection."""
    return int(np.ceil(SMALLEST_MM3 / np.prod(subject.voxel_mm)))


def _about(scored: Scored) -> dict:
    subject, lesion = scored.subject, scored.lesion
    voxel_ml = float(np.prod(subject.voxel_mm)) / 1000
    return {
        "patient": subject.id, "healthy": subject.healthy, "site": subject.facts.get("site") or "",
        "kind": subject.facts.get("kind") or "", "lesion_ml": round(int(lesion.sum()) * voxel_ml, 3),
        "lesions": metrics.lesion_number(lesion),
    }  # fmt: skip


def _scores(counts: SubjectCounts, limits: Frozen) -> dict:
    """Figures that need the scores; those of a lesion are NaN without one."""
    size = counts.lesion_voxels or np.nan
    healthy = counts.counts[2]
    above = healthy[np.searchsorted(counts.values, limits.conformal) :].sum()
    return {
        "ap": float(average_precision(counts.counts[0], counts.counts[1])),
        "dice_conformal": dice_at(counts, limits.conformal),
        "sensitivity_at_fpr5": metrics.called(counts, limits.loose)[0] / size,
        "scan_score": metrics.scan_score(counts),
        "false_alarm": float(above > PROMISED_FPR * healthy.sum()) if healthy.any() else np.nan,
    }


def _detected(scored: Scored, mask: np.ndarray) -> dict:
    """Figures of the detection at the frozen threshold."""
    lesion, healthy = scored.lesion, scored.healthy
    size, hits = int(lesion.sum()), int((mask & lesion).sum())
    return {
        "dice": 2 * hits / (int(mask.sum()) + size) if size else np.nan,
        "sensitivity_at_fpr1": hits / size if size else np.nan,
        "lesion_voxels": size, "brain_voxels": int(scored.brain.sum()),
        "healthy_called": int((mask & healthy).sum()), "healthy_voxels": int(healthy.sum()),
    }  # fmt: skip
