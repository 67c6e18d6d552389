"""Ways of judging slices and scans that flatter, each with its number on a run's own maps.

Every function returns a table to print and to draw; None where the cohort lacks the subjects that it needs.
"""

from functools import partial
from operator import attrgetter

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional

from lib import domain, scoring
from lib.cohort import LEAST_BRAIN, Cohort, PreparedSubject
from lib.metrics import HIGHEST, INTERVAL
from lib.training import derived_seed

LEVEL_TOLERANCE = 0.03  # of the brain's height: about two slices
AREA_TOLERANCE = 0.05  # of the slice's brain area
QUANTILES = (5, 25, 50, 75, 95)  # percentiles of a slice's brain pixels
FOLDS = 5
THUMBNAIL = 8  # fields along each edge of a slice
SLICE_SCORES = {
    "area": "brain area alone",
    "centrality": "nearness to the middle slice",
    "mean_image": "mean over the whole image",
    "mean_brain": "mean inside the brain",
    "slice_score": "the method's slice score",
}


def slice_table(run: str, prepared: Cohort, method: str = "ae") -> pd.DataFrame:
    """A row for each test slice with brain: `subject`, `patient`, `lesion` (bool), `level` (from 0 to 1 up the brain),
    `area` (pixels), and scores: `centrality`, `mean_image` (the map is 0 outside the brain), `mean_brain`,
    `slice_score`."""
    tables = []
    for subject in filter(attrgetter("outlined"), prepared.split("test")):
        anomaly_map, slice_score = scoring.read_map(run, method, subject, prepared)
        table = _places(subject, subject.brain.any(axis=(1, 2)))
        total = anomaly_map.sum(axis=(1, 2), dtype=np.float64)[table.slice]
        table["mean_image"], table["mean_brain"] = total / anomaly_map[0].size, total / table.area
        table["slice_score"], table["centrality"] = slice_score[table.slice], -abs(table.level - 0.5)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def scan_table(run: str, prepared: Cohort, method: str = "ae") -> pd.DataFrame:
    """A row for each test scan: `subject`, `patient` (bool), and scores: `highest` (mean of the highest 1 % inside the
    brain), `mean_image` (over the whole volume) and `brain_litres`."""
    rows = []
    for subject in prepared.split("test"):
        anomaly_map, _ = scoring.read_map(run, method, subject, prepared)
        inside = np.sort(anomaly_map[np.asarray(subject.brain)].astype(np.float64))
        rows.append({
            "subject": subject.id,
            "patient": not subject.healthy,
            "highest": inside[-max(1, round(HIGHEST * len(inside))):].mean(),
            "mean_image": inside.sum() / anomaly_map.size,
            "brain_litres": len(inside) * subject.voxel_mm3 / 1e6,
        })  # fmt: skip
    return pd.DataFrame(rows)


def matched(positive: pd.DataFrame, negative: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of slices of like level (± 3 % of the brain's height) and brain area (± 5 %), each slice in one pair:
    places in both tables, int [pair]."""
    level = np.subtract.outer(positive.level.to_numpy(), negative.level.to_numpy()) / LEVEL_TOLERANCE
    area = np.subtract.outer(np.log(positive.area.to_numpy()), np.log(negative.area.to_numpy())) / AREA_TOLERANCE
    cost = np.maximum(abs(level), abs(area))
    rows, columns = linear_sum_assignment(np.where(cost <= 1, cost, 1e3))
    kept = cost[rows, columns] <= 1
    return rows[kept], columns[kept]


def brain_area(run: str, prepared: Cohort, method: str = "ae") -> pd.DataFrame:
    """Slice AUROC of brain area alone beside that of the method's map reduced in three ways: over all test slices, and
    over pairs of like level and area (`matched`), where area can tell nothing. 95 % intervals over subjects."""
    table = slice_table(run, prepared, method)
    sick, well = table[table.lesion], table[~table.lesion]
    rows, columns = matched(sick, well)
    pairs = pd.concat([sick.iloc[rows], well.iloc[columns]])
    found = {}
    for score, name in SLICE_SCORES.items():
        everywhere = _interval("auroc", table[score], table.lesion, table.subject)
        alike = _interval("matched", pairs[score], pairs.lesion, pairs.subject)
        found[name] = everywhere | alike | {"pairs": len(rows)}
    return pd.DataFrame.from_dict(found, orient="index")


def youden(run: str, prepared: Cohort, method: str = "ae", *, splits: int = 200, seed: int = 0) -> pd.DataFrame:
    """Sensitivity + specificity − 1 where the threshold was tuned for it, and on the other half of the test subjects.

    Test subjects are halved `splits` times. Rows for slices, and for scans where healthy ones are tested, of the method
    and of a score drawn at random; `low` and `high` hold 95 % of the splits' optimism (`tuned` − `elsewhere`).
    """
    slices, scans = slice_table(run, prepared, method), scan_table(run, prepared, method)
    levels = {"slice": (slices.slice_score, slices.lesion, slices.subject)}
    if _enough(scans.patient):
        levels["scan"] = (scans.highest, scans.patient, scans.subject)
    random = np.random.default_rng(derived_seed(seed, "youden"))
    patients = dict(zip(scans.subject, scans.patient, strict=True))
    rows = []
    for level, (score, labels, subjects) in levels.items():
        for name, draw in ((method, score.to_numpy), ("random score", partial(random.random, len(score)))):
            halves = [subjects.isin(_half(patients, random)).to_numpy() for _ in range(splits)]
            pairs = [_tuned_and_elsewhere(draw(), labels.to_numpy(), half) for half in halves]
            rows.append({"level": level, "score": name, **_optimism(np.array(pairs)), "n": subjects.nunique()})
    return pd.DataFrame(rows)


def lesion_free_slices(prepared: Cohort, *, seed: int = 0) -> pd.DataFrame | None:
    """Patients' lesion-free slices against slices of healthy subjects: how well a logistic regression on histogram and
    asymmetry tells them apart, subjects held out; and one on level and area alone.

    AUROC over pairs of like level and area. Well over ½, it says that lesion-free slices of patients are no healthy
    slices (mass effect, age, scanner). None with fewer than 4 subjects of either kind.
    """
    table = pd.concat([_described(s, s.lesion_free) for s in prepared.subjects if s.outlined], ignore_index=True)
    if table.groupby("subject").patient.first().value_counts().reindex([True, False]).fillna(0).min() < domain.LEAST:
        return None
    ill, well = table[table.patient], table[~table.patient]
    rows, columns = matched(ill, well)
    pairs = np.concatenate([ill.index[rows], well.index[columns]])
    found = {}
    for name, used in {"histogram and asymmetry": _looks(table), "level and area alone": ["level", "area"]}.items():
        scores = _told_apart(table, used, seed)
        figures = _interval("auroc", scores[pairs], table.patient[pairs], table.subject[pairs])
        found[name] = figures | {"pairs": len(rows), "n": table.subject.nunique()}
    return pd.DataFrame.from_dict(found, orient="index")


def split_leak(prepared: Cohort, *, repeats: int = 10, seed: int = 0) -> pd.DataFrame | None:
    """A coin tossed for each subject, predicted from its slices by their nearest neighbours: `accuracy` and `auroc`
    with slices of a subject on both sides of the split (`by slice`), and with subjects kept whole (`by subject`).

    There is nothing to learn, so ½ is the truth; a row for each split and repeat. None with fewer than 4 subjects.
    """
    if len(prepared.subjects) < domain.LEAST:
        return None
    pictures = [_thumbnails(s) for s in prepared.subjects]
    owner, pixels = np.repeat(np.arange(len(pictures)), [len(p) for p in pictures]), np.concatenate(pictures)
    rows = []
    for repeat in range(repeats):
        coins = _balanced(len(pictures), np.random.default_rng(derived_seed(seed, "coin", repeat)))
        for name, kind in (("by slice", KFold), ("by subject", GroupKFold)):
            folds = kind(min(FOLDS, len(pictures)), shuffle=True, random_state=repeat)
            rows.append({"split": name, "repeat": repeat, **_learned(pixels, coins[owner], owner, folds)})
    return pd.DataFrame(rows)


def mislabelled(run: str, prepared: Cohort, method: str = "ae", *, draws: int = 500, seed: int = 0) -> dict | None:
    """Half of the test patients declared healthy by lot, as a label does that has nothing to do with health.

    `null`: the AUROC of the scan score at each draw, float [draw], with its `mean`, `low` and `high` (95 % of draws).
    `truth`: the AUROC of the same score for patients against healthy subjects with its interval, NaN without them.
    None with a single patient.
    """
    scans = scan_table(run, prepared, method)
    scores = scans.highest[scans.patient].to_numpy()
    if len(scores) < 2:
        return None
    random = np.random.default_rng(derived_seed(seed, "mislabelled"))
    null = np.array([roc_auc_score(_balanced(len(scores), random), scores) for _ in range(draws)])
    low, high = np.percentile(null, INTERVAL)
    truth = domain.auroc_interval(scans.highest, scans.patient, scans.subject)
    return {"null": null, "mean": null.mean(), "low": low, "high": high, "truth": truth, "n": len(scores)}


def scanner(run: str, prepared: Cohort, method: str = "ae", *, seed: int = 0) -> pd.DataFrame | None:
    """Patients against healthy test subjects: AUROC of the method's scan score, of its mean over the whole volume,
    of brain size, and of the domain classifier that sees no lesion. None without healthy test subjects."""
    scans = scan_table(run, prepared, method)
    if not _enough(scans.patient):
        return None
    rows = {}
    for score, name in (("highest", f"{method}, highest 1 %"), ("mean_image", f"{method}, mean of the volume"),
                        ("brain_litres", "brain size")):  # fmt: skip
        rows[name] = _interval("auroc", scans[score], scans.patient, scans.subject) | {"n": len(scans)}
    found = domain.domain_classifier(prepared, dict(zip(scans.subject, scans.patient, strict=True)), seed=seed)
    if found:
        rows["domain classifier"] = {"auroc": found.auroc, "auroc_low": found.low, "auroc_high": found.high,
                                     "n": found.n, "p_value": found.p_value}  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index")


def _interval(name: str, scores: np.ndarray, labels: np.ndarray, subjects: np.ndarray) -> dict[str, float]:
    value, low, high = domain.auroc_interval(scores, labels, subjects)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _places(subject: PreparedSubject, wanted: np.ndarray) -> pd.DataFrame:
    area, height = subject.brain.sum(axis=(1, 2)), np.flatnonzero(subject.brain.any(axis=(1, 2)))
    numbers = np.flatnonzero(wanted)
    return pd.DataFrame({
        "subject": subject.id,
        "patient": not subject.healthy,
        "slice": numbers,
        "level": (numbers - height[0]) / max(height[-1] - height[0], 1),
        "area": area[numbers],
        "lesion": subject.lesion.any(axis=(1, 2))[numbers],
    })  # fmt: skip


def _described(subject: PreparedSubject, wanted: np.ndarray) -> pd.DataFrame:
    """Places of the slices with enough brain, and for each modality percentiles and left–right difference."""
    table = _places(subject, wanted & (subject.brain.mean(axis=(1, 2)) >= LEAST_BRAIN))
    for m, image in enumerate(subject.image):
        looks = [_look(image[i].astype(np.float32), np.asarray(subject.brain[i])) for i in table.slice]
        table[[f"look {m} {i}" for i in range(len(QUANTILES) + 1)]] = np.reshape(looks, (-1, len(QUANTILES) + 1))
    return table


def _look(image: np.ndarray, brain: np.ndarray) -> list[float]:
    both = brain & brain[:, ::-1]
    asymmetry = abs(image - image[:, ::-1])[both].mean() if both.any() else 0.0
    return [*np.percentile(image[brain], QUANTILES), asymmetry]


def _told_apart(table: pd.DataFrame, used: list[str], seed: int) -> np.ndarray:
    """Scores of held-out subjects' slices for being a patient's."""
    folds = StratifiedGroupKFold(domain.LEAST, shuffle=True, random_state=seed)
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    return cross_val_predict(
        model, table[used], table.patient, groups=table.subject, cv=folds, method="decision_function"
    )


def _thumbnails(subject: PreparedSubject) -> np.ndarray:
    """Means of the image over 8 × 8 fields, float32 [slice with brain, field]."""
    seen = subject.brain.any(axis=(1, 2))
    images = torch.from_numpy(subject.image[:, seen].astype(np.float32)).transpose(0, 1)
    return functional.adaptive_avg_pool2d(images, THUMBNAIL).flatten(1).numpy()


def _learned(pixels: np.ndarray, labels: np.ndarray, owner: np.ndarray, folds: KFold | GroupKFold) -> dict[str, float]:
    parts = list(folds.split(pixels, groups=owner if isinstance(folds, GroupKFold) else None))
    chance = cross_val_predict(KNeighborsClassifier(), pixels, labels, cv=parts, method="predict_proba")[:, 1]
    return {"accuracy": ((chance > 0.5) == labels).mean(), "auroc": roc_auc_score(labels, chance)}


def _looks(table: pd.DataFrame) -> list[str]:
    return [name for name in table if name.startswith("look")]


def _enough(patient: pd.Series) -> bool:
    return min(patient.sum(), (~patient).sum()) >= 2


def _balanced(n: int, random: np.random.Generator) -> np.ndarray:
    return random.permutation(n) < n // 2


def _half(patients: dict[str, bool], random: np.random.Generator) -> list[str]:
    """Half of the patients and half of the healthy."""
    half = []
    for kind in (True, False):
        names = [name for name, patient in patients.items() if patient == kind]
        half += list(random.permutation(names)[: len(names) // 2])
    return half


def _tuned_and_elsewhere(scores: np.ndarray, labels: np.ndarray, tuning: np.ndarray) -> tuple[float, float]:
    """Youden's index at the best threshold of one half, and at the same on the other; NaN without both kinds."""
    if len(np.unique(labels[tuning])) < 2 or len(np.unique(labels[~tuning])) < 2:
        return float("nan"), float("nan")
    alarms, hits, thresholds = roc_curve(labels[tuning], scores[tuning])
    best = (hits - alarms).argmax()
    called, truth = scores[~tuning] >= thresholds[best], labels[~tuning]
    return hits[best] - alarms[best], called[truth].mean() - called[~truth].mean()


def _optimism(pairs: np.ndarray) -> dict[str, float]:
    tuned, elsewhere = pairs[~np.isnan(pairs).any(axis=1)].T
    if not len(tuned):
        return dict.fromkeys(("tuned", "elsewhere", "optimism", "low", "high"), float("nan"))
    low, high = np.percentile(tuned - elsewhere, INTERVAL)
    return {"tuned": tuned.mean(), "elsewhere": elsewhere.mean(), "optimism": (tuned - elsewhere).mean(),
            "low": low, "high": high}  # fmt: skip
