"""Judged subjects → figures, each with its 95 % interval over resampled patients.

A figure is (value, low, high, n) and, where there is something to say, a note; figures stand under (level, metric).
"""

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd
from sklearn.metrics import roc_curve

from lib import judging, metrics
from lib.judging import PROMISED_ALARMS, Frozen, Judged
from lib.metrics import PROMISED_FPR, RESAMPLES, SubjectCounts, auroc, average_precision, bootstrap, resampled

MEANS = {  # over the subjects that have the figure
    ("voxel", "ap"): "ap",
    ("voxel", "dice"): "dice",
    ("voxel", "dice_conformal"): "dice_conformal",
    ("voxel", "dice_mean_sigma"): "dice_mean_sigma",
    ("voxel", "sensitivity_at_fpr1"): "sensitivity_at_fpr1",
    ("voxel", "sensitivity_at_fpr5"): "sensitivity_at_fpr5",
    ("lesion", "false_positives_per_volume"): "false_positives",
    ("scan", "false_alarms_seen"): "false_alarm",
}
SHARES = {  # of the sums over subjects
    ("voxel", "fpr_seen"): ("healthy_called", "healthy_voxels"),
    ("voxel", "lesion_lost"): ("lesion_lost", "lesion_voxels"),
    ("lesion", "lesion_recall"): ("lesions_found", "lesions"),
    ("lesion", "lesion_recall_strict"): ("lesions_found_strictly", "lesions"),
}
POOLED = {"ap_pooled": metrics.pooled_precision, "dice_oracle": metrics.oracle_dice}
IN_VOXELS = {metric for _, metric in (*MEANS, *SHARES)} | {"prevalence", *POOLED}
ONLY_RAW = {"prevalence", "dice_conformal", "dice_mean_sigma", "false_alarms_promised", "false_alarms_seen"}
OF_DETECTIONS = {"dice", "sensitivity_at_fpr1", "fpr_promised", "fpr_seen", "lesion_lost", "lesion_recall",
                 "lesion_recall_strict", "false_positives_per_volume"}  # fmt: skip
NOTES = {
    "balanced_accuracy_youden": "threshold tuned on these very labels",
    "balanced_accuracy_cutoff": f"slices whose mean squared map exceeds {judging.SQUARES_CUTOFF}, on whatever scale",
    "dice_mean_sigma": f"threshold from the tested scan itself: mean + {judging.SIGMAS} standard deviations of its map",
}


def of_step(subjects: Sequence[Judged], limits: Frozen, step: str, seed: int) -> dict:
    """All figures of a post-processing step; subjects whose lesions are not outlined count at the level of scans."""
    known = [s for s in subjects if s.counts.outlined]
    if step == "none":
        found = voxels(known, seed, IN_VOXELS - {"lesion_lost"}) | _promises(known, limits)
        found |= slices([s.counts for s in known], seed) | slice_rules(known, seed) | _scans(subjects, seed)
        return found | ({("lesion", "froc"): _froc(known, seed)} if found.get(("voxel", "ap")) else {})
    kept = OF_DETECTIONS if step == "components" else (IN_VOXELS | {"fpr_promised"}) - ONLY_RAW
    found = voxels(known, seed, kept) | _promises(known, limits)
    return {key: figure for key, figure in found.items() if key[1] in kept}


def voxels(subjects: Sequence[Judged], seed: int, wanted: Collection[str]) -> dict:
    """Figures of voxels and lesions, those that are wanted of IN_VOXELS; those that no subject has are left out."""
    if not subjects:
        return {}
    table = pd.DataFrame([s.record for s in subjects])
    found = {key: _mean(table[column], seed) for key, column in MEANS.items() if key[1] in wanted}
    found |= {key: _share(table[one], table[all_], seed) for key, (one, all_) in SHARES.items() if key[1] in wanted}
    if "prevalence" in wanted:
        ill = table[table.lesion_voxels > 0]
        found["voxel", "prevalence"] = _share(ill.lesion_voxels, ill.brain_voxels, seed)
    sick = [s.counts for s in subjects if s.counts.lesion_voxels]
    for name in (name for name in POOLED if name in wanted and sick):
        found["voxel", name] = (*POOLED[name](sick, resampled(len(sick), seed)), len(sick))
    return {key: _noted(key, figure) for key, figure in found.items() if figure}


def slices(subjects: Sequence[SubjectCounts], seed: int) -> dict:
    """How well slices with lesion are ranked above those without."""
    if not subjects:
        return {}
    values, place = np.unique(np.concatenate([s.slice_scores for s in subjects]), return_inverse=True)
    parts = np.split(place, np.cumsum([len(s.slice_scores) for s in subjects])[:-1])
    pairs = list(zip(subjects, parts, strict=True))
    sick = np.stack([np.bincount(p[s.slice_labels], minlength=len(values)) for s, p in pairs]).astype(float)
    well = np.stack([np.bincount(p[~s.slice_labels], minlength=len(values)) for s, p in pairs]).astype(float)
    return ranked("slice", sick, well, resampled(len(subjects), seed))


def slice_rules(subjects: Sequence[Judged], seed: int) -> dict:
    """Mean of sensitivity and specificity for slices: at the threshold that healthy validation slices fixed, at the
    one that is best on these labels (Youden), and at a fixed cut-off of the mean squared map."""
    if not subjects:
        return {}
    table = pd.DataFrame([s.record for s in subjects])
    scores, labels = (np.concatenate([getattr(s.counts, name) for s in subjects])
                      for name in ("slice_scores", "slice_labels"))  # fmt: skip
    if not labels.any() or labels.all():
        return {}
    alarms, hits, limits = roc_curve(labels, scores)
    best = limits[(hits - alarms).argmax()]
    rules = {"": "called", "_cutoff": "above_cutoff", "_youden": "tuned"}
    for kind, wanted in (("ill", True), ("well", False)):
        of_kind = [s.counts.slice_scores[s.counts.slice_labels == wanted] for s in subjects]
        table[f"{kind}_slices_tuned"] = [int((one >= best).sum()) for one in of_kind]
    found = {("slice", f"balanced_accuracy{suffix}"): _balanced(table, rule, seed) for suffix, rule in rules.items()}
    return {key: _noted(key, figure) for key, figure in found.items()}


def froc_points(subjects: Sequence[Judged]) -> list[tuple[float, float]]:
    """False positives per volume and recall at each threshold; nothing where no subject has a lesion."""
    found, _, false = np.maximum.accumulate(np.sum([s.curve for s in subjects], axis=0)).T
    lesions = sum(s.record["lesions"] for s in subjects)
    return list(zip(false / len(subjects), found / lesions, strict=True)) if lesions else []


def by_health(scores: Sequence[float], healthy: Sequence[bool], seed: int) -> dict:
    """How well patients are ranked above healthy subjects; each resampled among their own."""
    order = np.argsort(healthy, kind="stable")
    well = np.asarray(healthy, bool)[order]
    values, place = np.unique(np.asarray(scores)[order], return_inverse=True)
    places = np.eye(len(values))[place]
    groups = [resampled(n, seed) for n in ((~well).sum(), well.sum()) if n]
    return ranked("scan", places * ~well[:, None], places * well[:, None], np.hstack(groups))


def ranked(level: str, sick: np.ndarray, well: np.ndarray, weights: np.ndarray) -> dict:
    """AUROC and average precision from counts by ascending score, [subject, value]; nothing where a class is empty."""
    if not sick.any() or not well.any():
        return {}
    return {
        (level, "auroc"): (*bootstrap(lambda w: auroc(w @ sick, w @ well), weights), len(sick)),
        (level, "ap"): (*bootstrap(lambda w: average_precision(w @ sick, w @ well), weights), len(sick)),
    }


def _scans(subjects: Sequence[Judged], seed: int) -> dict:
    return by_health([s.record["scan_score"] for s in subjects], [s.counts.healthy for s in subjects], seed)


def _noted(key: tuple[str, str], figure: tuple) -> tuple:
    return (*figure, NOTES[key[1]]) if key[1] in NOTES else figure


def _mean(column: pd.Series, seed: int) -> tuple | None:
    values = column.dropna().to_numpy(float)
    if not len(values):
        return None
    return *bootstrap(lambda w: w @ values / len(values), resampled(len(values), seed), RESAMPLES), len(values)


def _share(part: pd.Series, whole: pd.Series, seed: int) -> tuple | None:
    parts, wholes = part[whole > 0].to_numpy(float), whole[whole > 0].to_numpy(float)
    if not len(parts):
        return None
    return *bootstrap(lambda w: (w @ parts) / (w @ wholes), resampled(len(parts), seed), RESAMPLES), len(parts)


def _balanced(table: pd.DataFrame, rule: str, seed: int) -> tuple:
    hits, ill = table[f"ill_slices_{rule}"].to_numpy(float), table.ill_slices.to_numpy(float)
    spared, well = (table.well_slices - table[f"well_slices_{rule}"]).to_numpy(float), table.well_slices.to_numpy(float)

    def figure(w: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return ((w @ hits) / (w @ ill) + (w @ spared) / (w @ well)) / 2

    return *bootstrap(figure, resampled(len(table), seed), RESAMPLES), len(table)


def _promises(subjects: Sequence[Judged], limits: Frozen) -> dict:
    """What the thresholds promise, without interval; in words where there are too few healthy scans for it."""
    tested = sum(s.record["healthy_voxels"] > 0 for s in subjects)
    few = limits.promise > PROMISED_ALARMS
    note = f"{limits.scans} healthy validation scans cannot promise {100 * PROMISED_ALARMS:.0f} % of false alarms: " \
           f"the smallest promise they support is {100 * limits.promise:.1f} %" if few else ""  # fmt: skip
    return {
        ("voxel", "fpr_promised"): (PROMISED_FPR, np.nan, np.nan, tested),
        ("scan", "false_alarms_promised"): (limits.promise, np.nan, np.nan, tested, note),
    }


def _froc(subjects: Sequence[Judged], seed: int) -> tuple:
    """Recall over all lesions against false components over all scans, healthy ones too."""
    found, _, false = np.stack([s.curve for s in subjects]).transpose(2, 0, 1).astype(float)
    lesions = np.array([s.record["lesions"] for s in subjects], float)

    def figure(w: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            recall = (w @ found) / (w @ lesions)[:, None]
        return metrics.froc(recall, w @ false / len(subjects))

    return *bootstrap(figure, resampled(len(subjects), seed), RESAMPLES), len(subjects)
