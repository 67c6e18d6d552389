"""Maps × truth → counts: a subject is read once, reduced to counts and a record, and forgotten.

Each post-processing step has thresholds of its own, frozen on the healthy material of validation. Steps work on the
prepared grid, where maps are made; voxels are counted there or, if the cohort says so, on the scan's own grid.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lib import metrics, postprocessing, scoring
from lib.cohort import Cohort, PreparedSubject
from lib.components import bounding_box, lesion_counts, lesions
from lib.errors import CourseError
from lib.intake import LESION_FREE
from lib.metrics import (
    CODES,
    PROMISED_FPR,
    SubjectCounts,
    average_precision,
    codes,
    dice_at,
    threshold_code,
    values_of,
)
from lib.preprocessing import OwnGrid, resampled

LOOSE_FPR = 0.05  # share of healthy validation voxels above the second threshold
PROMISED_ALARMS = 0.05  # share of healthy scans with more than 1 % of their voxels above the conformal threshold
PROMISED_SLICE_FPR = 0.05  # share of healthy validation slices above the slice threshold
SQUARES_CUTOFF = 0.02  # of a slice's mean squared map, as fixed cut-offs in use have it
SIGMAS = 2  # above the mean of the tested scan's own map
SMALLEST_MM3 = 20.0  # smaller components are no detections
OF_LESIONS = (
    *("lesion_ml", "lesions", "lesion_voxels", "lesion_lost", "lesions_found", "lesions_found_strictly"),
    *("false_positives", "ill_slices", "well_slices"),
    *(f"{kind}_slices_{rule}" for rule in ("called", "above_cutoff") for kind in ("ill", "well")),
)  # of a record, what is not known where lesions are not outlined
FROC_SHARES = np.geomspace(1e-5, 0.1, 16)  # of the healthy validation voxels above each threshold of the curve


@dataclass(frozen=True)
class Ground:
    """The voxels that are judged: brain, lesion and healthy material, bool [slice, row, column]; the volume of one;
    `step`, [3] or [3, 3], and `start`, [3], from their places to those of the map, None where these are the same."""

    brain: np.ndarray
    lesion: np.ndarray
    healthy: np.ndarray
    voxel_mm3: float
    step: np.ndarray | None = None
    start: np.ndarray | None = None

    @cached_property
    def kinds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Whether each voxel of the brain is lesion, is not, and is healthy material: bool [voxel] each."""
        lesion = self.lesion[self.brain]
        return lesion, ~lesion, self.healthy[self.brain]


@dataclass(frozen=True)
class Scored:
    """A subject's map as codes uint16 and the brain that it is of, [slice, row, column] in the box of the brain; the
    voxels that are judged; of the slices that have brain the scores, the mean squares of the map over the whole square,
    and whether they hold lesion and count as healthy. Where lesions are not outlined, no slice is judged."""

    subject: PreparedSubject
    code: np.ndarray
    brain: np.ndarray
    ground: Ground
    slice_scores: np.ndarray
    slice_squares: np.ndarray
    slice_labels: np.ndarray
    slice_healthy: np.ndarray

    def codes(self, step: str) -> np.ndarray:
        """The map after a step, as codes of the voxels that are judged."""
        after = postprocessing.scores(self.code, self.brain, step)
        return after if self.ground.step is None else _resampled(after, self.brain, self.ground)


@dataclass(frozen=True)
class Frozen:
    """Thresholds (codes) that healthy validation material fixes: 1 % and 5 % of its voxels above, the conformal one
    with the rate of false alarms it promises from `scans` healthy scans, and those of the FROC curve, falling; and the
    slice score that 5 % of its slices exceed."""

    code: int
    loose: int
    conformal: int
    promise: float
    scans: int
    curve: tuple[int, ...]
    slice_limit: float


@dataclass(frozen=True)
class Judged:
    """One subject under one method and step: its counts, its row of `patients.csv`, and [threshold; lesions found,
    found strictly, false components] along the FROC curve."""

    counts: SubjectCounts
    record: dict
    curve: np.ndarray


def read(run: str, method: str, subject: PreparedSubject, cohort: Cohort) -> Scored:
    """A subject with its map; raises CourseError as scoring.read_map does."""
    anomaly_map, slice_scores = scoring.read_map(run, method, subject, cohort)
    brain, lesion = np.asarray(subject.brain), np.asarray(subject.lesion)
    usable = subject.lesion_free & (subject.healthy or cohort.training == LESION_FREE)
    box = bounding_box(brain)
    inside, seen = brain[box], brain.any(axis=(1, 2)) & subject.outlined
    if cohort.grid == "scan":
        ground = _on_own_grid(subject.own_grid(), subject.affine, box, usable)
    else:
        ground = Ground(inside, inside & lesion[box], inside & usable[box[0], None, None], subject.voxel_mm3)
    squares = np.square(anomaly_map, dtype=np.float32).mean(axis=(1, 2))
    labels = lesion.any(axis=(1, 2))
    return Scored(
        subject, codes(anomaly_map[box]), inside, ground, slice_scores[seen], squares[seen], labels[seen], usable[seen]
    )


def tested(run: str, method: str, cohort: Cohort) -> Iterator[Scored]:
    """The test subjects in the order of their names, one in memory at a time."""
    return (read(run, method, s, cohort) for s in sorted(cohort.split("test"), key=lambda s: s.id))


def count(scored: Scored, code: np.ndarray) -> SubjectCounts:
    """Counts inside the brain of a map's codes."""
    counts = metrics.count(code[scored.ground.brain], *scored.ground.kinds)
    slices, subject = (scored.slice_scores, scored.slice_labels), scored.subject
    return SubjectCounts(subject.id, subject.healthy, *counts, *slices, subject.outlined)


def freeze(run: str, method: str, cohort: Cohort, steps: Sequence[str]) -> dict[str, Frozen]:
    """The thresholds of each step, from the healthy material of validation."""
    counts, scores = zip(*(_healthy_counts(scan, steps) for scan in _watched(run, method, cohort)), strict=True)
    return {step: _thresholds([of_scan[step] for of_scan in counts], scores) for step in steps}


def healthy_counts(run: str, method: str, cohort: Cohort, step: str) -> np.ndarray:
    """Voxels of the healthy material of validation by code after a step of the map, int [65 536]."""
    found = (_healthy_counts(scan, (step,))[0][step] for scan in _watched(run, method, cohort))
    return sum(found, np.zeros(CODES, int))


def judge(scored: Scored, frozen: dict[str, Frozen]) -> dict[str, Judged]:
    """One subject after each step; the FROC curve is that of the map as it is."""
    ground, smallest = scored.ground, postprocessing.voxels(SMALLEST_MM3, scored.ground.voxel_mm3)
    truth, scores = lesions(ground.lesion), _once(scored.codes, frozen)
    counts = _once(lambda step: count(scored, scores[step]), frozen)
    masks = {step: _detection(scores[step], ground, frozen[step].code, step) for step in frozen}
    curve = lesion_counts(np.where(ground.brain, scores["none"], 0), frozen["none"].curve, truth, smallest)
    about, judged = _about(scored, len(truth.sizes)) | _slices(scored, frozen["none"]), {}
    for step, mask in masks.items():
        hits, strict, false = lesion_counts(mask, [1], truth, smallest)[0]
        record = {
            **about, **_scores(counts[step], frozen[step]),
            **_detected(ground, mask), "lesion_lost": int((masks["none"] & ~mask & ground.lesion).sum()),
            "lesions_found": int(hits), "lesions_found_strictly": int(strict), "false_positives": int(false),
        }  # fmt: skip
        unknown = () if scored.subject.outlined else OF_LESIONS
        judged[step] = Judged(counts[step], record | dict.fromkeys(unknown, np.nan), curve)
    return judged


def _watched(run: str, method: str, cohort: Cohort) -> Iterator[Scored]:
    return (read(run, method, s, cohort) for s, _ in cohort.healthy_material("validation"))


def _once(make: Callable, steps: Iterable[str]) -> dict:
    """What `make` gives for each step; for one that leaves the map alone, what it gave for the map as it is."""
    made = {step: make(step) for step in steps if step not in postprocessing.OF_DETECTIONS}
    return {step: made[step] if step in made else made["none"] for step in steps}


def _healthy_counts(scored: Scored, steps: Sequence[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Voxels of the healthy material by code, after each step, and its slices' scores."""
    healthy = scored.ground.healthy
    counts = _once(lambda step: np.bincount(scored.codes(step)[healthy], minlength=CODES), steps)
    return counts, scored.slice_scores[scored.slice_healthy]


def _on_own_grid(own: OwnGrid, affine: np.ndarray, box: tuple[slice, ...], usable: np.ndarray) -> Ground:
    """A scan's own voxels; those count as healthy whose place lies in a prepared slice that does."""
    step, start = own.within(affine)
    along = (factor * np.arange(n) for factor, n in zip(_to_slice(step), own.brain.shape, strict=True))
    slices = np.clip(np.round(start[0] + sum(np.ix_(*along))).astype(int), 0, len(usable) - 1)
    volume = float(abs(np.linalg.det(own.affine[:3, :3])))
    return Ground(own.brain, own.lesion, own.brain & usable[slices], volume, step, start - [s.start for s in box])


def _to_slice(step: np.ndarray) -> np.ndarray:
    return step[0] if step.ndim == 2 else np.array([step[0], 0, 0])


def _resampled(code: np.ndarray, brain: np.ndarray, ground: Ground) -> np.ndarray:
    """A map at the places that are judged."""
    return codes(resampled(values_of(code), brain, ground.step, ground.start, ground.brain.shape))


def _detection(code: np.ndarray, ground: Ground, threshold: int, step: str) -> np.ndarray:
    smallest = postprocessing.voxels(postprocessing.SMALLEST_MM3, ground.voxel_mm3)
    return postprocessing.detected(code, ground.brain, threshold, step, smallest)


def _thresholds(scans: list[np.ndarray], slice_scores: list[np.ndarray]) -> Frozen:
    scans = [s for s in scans if s.any()]
    if not scans:
        raise CourseError(
            "The validation split has no healthy voxel, so no threshold can be frozen.",
            "Give more healthy subjects, or other splits.",
        )
    pooled = np.sum(scans, axis=0)
    strict, promise = metrics.conformal([threshold_code(s) for s in scans], PROMISED_ALARMS)
    curve = tuple(threshold_code(pooled, share) for share in FROC_SHARES)
    code, loose = threshold_code(pooled), threshold_code(pooled, LOOSE_FPR)
    limit = float(np.quantile(np.concatenate(slice_scores), 1 - PROMISED_SLICE_FPR))
    return Frozen(code, loose, strict, promise, len(scans), curve, limit)


def _about(scored: Scored, number: int) -> dict:
    subject, lesion = scored.subject, scored.ground.lesion
    voxel_ml = scored.ground.voxel_mm3 / 1000
    return {
        "patient": subject.id, "healthy": subject.healthy, "site": subject.facts.get("site") or "",
        "kind": subject.facts.get("kind") or "", "lesion_ml": round(int(lesion.sum()) * voxel_ml, 3),
        "lesions": number,
    }  # fmt: skip


def _slices(scored: Scored, limits: Frozen) -> dict:
    """Slices with and without lesion, and how many of either the frozen threshold and the cut-off call."""
    rules = {"called": scored.slice_scores > limits.slice_limit, "above_cutoff": scored.slice_squares > SQUARES_CUTOFF}
    ill = scored.slice_labels
    return {"ill_slices": int(ill.sum()), "well_slices": int((~ill).sum())} | {
        f"{kind}_slices_{name}": int((called & of_kind).sum())
        for name, called in rules.items() for kind, of_kind in (("ill", ill), ("well", ~ill))
    }  # fmt: skip


def _scores(counts: SubjectCounts, limits: Frozen) -> dict:
    """Figures that need the scores; those of a lesion are NaN without one."""
    size = counts.lesion_voxels or np.nan
    healthy = counts.counts[2]
    above = healthy[np.searchsorted(counts.values, limits.conformal) :].sum()
    return {
        "ap": float(average_precision(counts.counts[0], counts.counts[1])),
        "dice_conformal": dice_at(counts, limits.conformal),
        "dice_mean_sigma": dice_at(counts, metrics.own_threshold(counts, SIGMAS)),
        "sensitivity_at_fpr5": metrics.called(counts, limits.loose)[0] / size,
        "scan_score": metrics.scan_score(counts),
        "false_alarm": float(above > PROMISED_FPR * healthy.sum()) if healthy.any() else np.nan,
    }


def _detected(ground: Ground, mask: np.ndarray) -> dict:
    """Figures of the detection at the frozen threshold."""
    lesion, healthy = ground.lesion, ground.healthy
    size, hits = int(lesion.sum()), int((mask & lesion).sum())
    return {
        "dice": 2 * hits / (int(mask.sum()) + size) if size else np.nan,
        "sensitivity_at_fpr1": hits / size if size else np.nan,
        "lesion_voxels": size, "brain_voxels": int(ground.brain.sum()),
        "healthy_called": int((mask & healthy).sum()), "healthy_voxels": int(healthy.sum()),
    }  # fmt: skip
