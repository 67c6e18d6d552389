"""Maps × truth → figures with intervals. Only maps are judged, and every figure comes from counts by score value.

A subject is read once, reduced to counts, and forgotten; each post-processing step has thresholds of its own, frozen
on the healthy material of validation. `patients.csv` keeps what was found of every subject, `results.csv` the figures.
"""

from itertools import combinations

import numpy as np
import pandas as pd

from lib import judging, metrics, models, postprocessing, run_folder, scoring
from lib.baselines import SLICE_LABELS
from lib.cohort import Cohort, PreparedSubject
from lib.errors import CourseError
from lib.intake import LESION_FREE
from lib.judging import PROMISED_ALARMS, Frozen, Judged
from lib.metrics import (
    CODES,
    PROMISED_FPR,
    SubjectCounts,
    auroc,
    average_precision,
    bootstrap,
    codes,
    resampled,
    value_of,
)
from lib.volumes import write_bytes

PROMISED_SLICE_FPR = 0.05  # share of healthy validation slices above the slice threshold
FEWEST = 2  # patients in a stratum
TIE = 0.01  # smaller differences of a patient are a draw
COLUMNS = [
    "method", "family", "modality", "postprocess", "stratum", "level", "metric",
    "value", "low", "high", "n", "seed", "note",
]  # fmt: skip
FROC_COLUMNS = ["method", "false_positives_per_volume", "recall"]
MEANS = {  # over the subjects that have the figure
    ("voxel", "ap"): "ap",
    ("voxel", "dice"): "dice",
    ("voxel", "dice_conformal"): "dice_conformal",
    ("voxel", "sensitivity_at_fpr1"): "sensitivity_at_fpr1",
    ("voxel", "sensitivity_at_fpr5"): "sensitivity_at_fpr5",
    ("lesion", "false_positives_per_volume"): "false_positives",
    ("scan", "false_alarms_seen"): "false_alarm",
}
SHARES = {  # of the sums over subjects
    ("voxel", "fpr_seen"): ("healthy_called", "healthy_voxels"),
    ("voxel", "lesion_lost"): ("lesion_lost", "lesion_voxels"),
    ("lesion", "lesion_recall"): ("lesions_found", "lesions"),
}
IN_STRATA = {"ap", "dice", "dice_oracle", "sensitivity_at_fpr1", "sensitivity_at_fpr5", "lesion_recall",
             "false_positives_per_volume"}  # fmt: skip
ONLY_RAW = {"prevalence", "dice_conformal", "false_alarms_promised", "false_alarms_seen", "auroc"}
OF_DETECTIONS = {"dice", "sensitivity_at_fpr1", "fpr_promised", "fpr_seen", "lesion_lost", "lesion_recall",
                 "false_positives_per_volume"}  # fmt: skip
RIVALLED = ["ap", "ap_pooled", "auroc", "dice", "froc", "lesion_recall", "sensitivity_at_fpr1", "sensitivity_at_fpr5"]


def evaluate(run: str, cohort: Cohort, seed: int = 0) -> pd.DataFrame:
    """Judge every method that has maps in this run, and write `results.csv`, `patients.csv` and `froc.csv`: sorted,
    fixed decimals, byte for byte equal for equal maps. Columns as in COLUMNS; `low` and `high` are a 95 % bootstrap
    over patients. Raises CourseError where a subject, or a scan, stands in two splits."""
    _refuse_leaks(cohort)
    rows, records, curves = [], [], []
    for method in scoring.methods(run):
        of_method, of_patients, of_curve = _evaluate_method(run, method, cohort, seed)
        rows, records, curves = rows + of_method, records + of_patients, curves + of_curve
    order = ["method", "postprocess", "stratum", "level", "metric"]
    table = pd.DataFrame(rows, columns=COLUMNS).sort_values(order, ignore_index=True)
    table["note"] = _notes(table, cohort)
    _write(run, "results.csv", table, "%.4f")
    _write(run, "patients.csv", pd.DataFrame(records), "%.6f")
    _write(run, "froc.csv", pd.DataFrame(curves, columns=FROC_COLUMNS), "%.6f")
    return table


def patients(run: str, cohort: Cohort) -> pd.DataFrame:
    """What `evaluate` found of every test subject, by method and step: a row of `patients.csv` each.

    Raises CourseError where this run was not evaluated on this cohort.
    """
    path = run_folder(run) / "patients.csv"
    try:
        table = pd.read_csv(path, dtype={"patient": str, "site": str, "kind": str}, keep_default_na=False,
                            na_values={c: [""] for c in (*MEANS.values(), "scan_score")})  # fmt: skip
    except (OSError, ValueError) as error:
        raise CourseError(f"{path} is missing or damaged.", "Run 08_comparison of this run first.") from error
    if set(table.patient) != {s.id for s in cohort.split("test")}:
        raise CourseError(f"{path} is of another cohort.", "Run 08_comparison of this run again.")
    return table


def paired_differences(run: str, cohort: Cohort, metric: str = "ap", seed: int = 0) -> pd.DataFrame:
    """Each method against each one below it: mean difference over patients of a figure in `patients.csv` ("ap",
    "dice", "sensitivity_at_fpr1", "sensitivity_at_fpr5"), its 95 % interval over the same resampled patients for
    every pair, and patients won, drawn (within 0.01) and lost.

    Columns method_a, method_b, difference, low, high, wins, ties, losses, n; method_a has the higher mean.
    """
    table = patients(run, cohort)
    wide = table[table.postprocess == "none"].pivot(index="patient", columns="method", values=metric).dropna()
    ranked = wide.mean().sort_values(ascending=False, kind="stable").index
    weights = resampled(len(wide), seed) if len(wide) else None
    rows = []
    for a, b in combinations(ranked, 2) if len(wide) else ():
        gap = (wide[a] - wide[b]).to_numpy()
        difference, low, high = bootstrap(lambda w, gap=gap: w @ gap / len(gap), weights)
        wins, losses = int((gap > TIE).sum()), int((gap < -TIE).sum())
        rows.append((a, b, difference, low, high, wins, len(gap) - wins - losses, losses, len(gap)))
    columns = ["method_a", "method_b", "difference", "low", "high", "wins", "ties", "losses", "n"]
    return pd.DataFrame(rows, columns=columns)


def who_beats_whom(differences: pd.DataFrame) -> pd.DataFrame:
    """Methods × methods: 1 where the row beats the column (the interval of the difference excludes 0), −1 where it
    is beaten, 0 where these patients cannot tell."""
    names = list(dict.fromkeys([*differences.method_a, *differences.method_b]))
    matrix = pd.DataFrame(0, index=names, columns=names)
    for row in differences.itertuples():
        verdict = int(row.low > 0) - int(row.high < 0)
        matrix.loc[row.method_a, row.method_b], matrix.loc[row.method_b, row.method_a] = verdict, -verdict
    return matrix


def test_counts(run: str, method: str, cohort: Cohort) -> list[SubjectCounts]:
    """Counts of every test subject under a method, in the order of their names."""
    return [judging.count(read()) for read in judging.tested(run, method, cohort)]


def frozen_threshold(run: str, method: str, cohort: Cohort) -> int:
    """The code of the threshold that the healthy material of validation fixes."""
    return judging.freeze(run, method, cohort, ("none",))["none"].code


def patients_by_precision(subjects: list[SubjectCounts]) -> list[tuple[str, float]]:
    """Identity and average precision of each test patient, the lowest first."""
    found = [(s.id, float(average_precision(s.lesion, s.other))) for s in subjects if s.lesion_voxels]
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


def steps_of(method: str) -> tuple[str, ...]:
    """The post-processing steps that a method is judged with."""
    if method in ("empty", *SLICE_LABELS):
        return ("none",)
    return tuple(s for s in postprocessing.STEPS if (method, s) != ("intensity_median", "median"))


def _refuse_leaks(cohort: Cohort) -> None:
    """Whatever stands on both sides of a split makes every figure worthless."""
    seen: dict[str, PreparedSubject] = {}
    for subject in cohort.subjects:
        for mark in (subject.id, *subject.facts.get("checksums", {}).values()):
            other = seen.setdefault(mark, subject)
            if other.split != subject.split:
                raise CourseError(
                    f"The same scan is in two splits: {other.id} in {other.split} and {subject.id} in {subject.split}.",
                    "Remove the duplicate, or put both into one split, and run 01_preprocessing again.",
                )


def _evaluate_method(run: str, method: str, cohort: Cohort, seed: int) -> tuple[list[dict], list[dict], list[tuple]]:
    """Rows of `results.csv`, of `patients.csv` and of `froc.csv`."""
    shared = {"method": method, "family": models.family(method), "modality": "+".join(cohort.modalities), "seed": seed}
    if method in SLICE_LABELS:
        figures = _slice_figures(test_counts(run, method, cohort), seed)
        return _rows(figures, shared | {"postprocess": "none", "stratum": "all"}), [], []
    frozen = judging.freeze(run, method, cohort, steps_of(method))
    judged = judging.judge_all(method, judging.tested(run, method, cohort), frozen)
    rows, records = [], []
    for step, limits in frozen.items():
        subjects = [one[step] for one in judged]
        records += [one.record for one in subjects]
        rows += _rows(_figures(subjects, limits, step, seed), shared | {"postprocess": step, "stratum": "all"})
        for name, members in _strata(subjects).items() if step == "none" else ():
            few = {key: figure for key, figure in _voxel_figures(members, seed).items() if key[1] in IN_STRATA}
            rows += _rows(few, shared | {"postprocess": step, "stratum": name})
    return rows, records, [(method, *point) for point in _froc_points([one["none"] for one in judged])]


def _figures(subjects: list[Judged], limits: Frozen, step: str, seed: int) -> dict:
    """All figures of a step: (level, metric) → value, low, high, n, and a note where there is one."""
    figures = _voxel_figures(subjects, seed) | _promises(subjects, limits)
    if step == "none":
        figures |= _slice_figures([s.counts for s in subjects], seed) | _scan_figures(subjects, seed)
        figures |= {("lesion", "froc"): _froc(subjects, seed)} if figures.get(("voxel", "ap")) else {}
        return {key: figure for key, figure in figures.items() if key[1] != "lesion_lost"}
    kept = OF_DETECTIONS if step == "components" else {metric for _, metric in figures} - ONLY_RAW
    return {key: figure for key, figure in figures.items() if key[1] in kept}


def _voxel_figures(subjects: list[Judged], seed: int) -> dict:
    table = pd.DataFrame([s.record for s in subjects])
    figures = {key: _mean(table[column], seed) for key, column in MEANS.items()}
    figures |= {key: _share(table[part], table[whole], seed) for key, (part, whole) in SHARES.items()}
    ill = table[table.lesion_voxels > 0]
    figures["voxel", "prevalence"] = _share(ill.lesion_voxels, ill.brain_voxels, seed)
    sick = [s.counts for s in subjects if s.counts.lesion_voxels]
    if sick:
        weights = resampled(len(sick), seed)
        figures["voxel", "ap_pooled"] = (*metrics.pooled_precision(sick, weights), len(sick))
        figures["voxel", "dice_oracle"] = (*metrics.oracle_dice(sick, weights), len(sick))
    return {key: figure for key, figure in figures.items() if figure}


def _mean(column: pd.Series, seed: int) -> tuple | None:
    values = column.dropna().to_numpy(float)
    if not len(values):
        return None
    return *bootstrap(lambda w: w @ values / len(values), resampled(len(values), seed)), len(values)


def _share(part: pd.Series, whole: pd.Series, seed: int) -> tuple | None:
    parts, wholes = part[whole > 0].to_numpy(float), whole[whole > 0].to_numpy(float)
    if not len(parts):
        return None
    return *bootstrap(lambda w: (w @ parts) / (w @ wholes), resampled(len(parts), seed)), len(parts)


def _promises(subjects: list[Judged], limits: Frozen) -> dict:
    """What the thresholds promise, without interval; in words where there are too few healthy scans for it."""
    tested = sum(s.record["healthy_voxels"] > 0 for s in subjects)
    few = limits.promise > PROMISED_ALARMS
    note = f"{limits.scans} healthy validation scans cannot promise {100 * PROMISED_ALARMS:.0f} % of false alarms: " \
           f"the smallest promise they support is {100 * limits.promise:.1f} %" if few else ""  # fmt: skip
    return {
        ("voxel", "fpr_promised"): (PROMISED_FPR, np.nan, np.nan, tested),
        ("scan", "false_alarms_promised"): (limits.promise, np.nan, np.nan, tested, note),
    }


def _froc(subjects: list[Judged], seed: int) -> tuple:
    """Recall over all lesions against false components over all scans, healthy ones too."""
    found, false = np.stack([s.curve for s in subjects]).transpose(2, 0, 1).astype(float)
    lesions = np.array([s.record["lesions"] for s in subjects], float)

    def figure(w: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            recall = (w @ found) / (w @ lesions)[:, None]
        return np.array([metrics.froc(*pair) for pair in zip(recall, w @ false / len(subjects), strict=True)])

    return *bootstrap(figure, resampled(len(subjects), seed)), len(subjects)


def _froc_points(subjects: list[Judged]) -> list[tuple[float, float]]:
    """False positives per volume and recall at each threshold; nothing where no subject has a lesion."""
    found, false = np.maximum.accumulate(np.sum([s.curve for s in subjects], axis=0)).T
    lesions = sum(s.record["lesions"] for s in subjects)
    return list(zip(false / len(subjects), found / lesions, strict=True)) if lesions else []


def _slice_figures(subjects: list[SubjectCounts], seed: int) -> dict:
    values, place = np.unique(np.concatenate([s.slice_scores for s in subjects]), return_inverse=True)
    parts = np.split(place, np.cumsum([len(s.slice_scores) for s in subjects])[:-1])
    pairs = list(zip(subjects, parts, strict=True))
    sick = np.stack([np.bincount(p[s.slice_labels], minlength=len(values)) for s, p in pairs]).astype(float)
    well = np.stack([np.bincount(p[~s.slice_labels], minlength=len(values)) for s, p in pairs]).astype(float)
    return _ranked("slice", sick, well, resampled(len(subjects), seed))


def _scan_figures(subjects: list[Judged], seed: int) -> dict:
    """Patients against healthy subjects, each resampled among their own."""
    ordered = sorted(subjects, key=lambda s: s.counts.healthy)
    values, place = np.unique([s.record["scan_score"] for s in ordered], return_inverse=True)
    well = np.array([s.counts.healthy for s in ordered])
    scores = np.eye(len(values))[place]
    groups = [resampled(n, seed) for n in ((~well).sum(), well.sum()) if n]
    return _ranked("scan", scores * ~well[:, None], scores * well[:, None], np.hstack(groups))


def _ranked(level: str, sick: np.ndarray, well: np.ndarray, weights: np.ndarray) -> dict:
    if not sick.any() or not well.any():
        return {}
    return {
        (level, "auroc"): (*bootstrap(lambda w: auroc(w @ sick, w @ well), weights), len(sick)),
        (level, "ap"): (*bootstrap(lambda w: average_precision(w @ sick, w @ well), weights), len(sick)),
    }


def _strata(subjects: list[Judged]) -> dict[str, list[Judged]]:
    """Patients by lesion load in thirds, by lesion kind and by site, where a group has at least two."""
    sick = sorted((s for s in subjects if s.counts.lesion_voxels), key=lambda s: s.record["lesion_ml"])
    names = ("load:small", "load:medium", "load:large")
    found = {name: list(map(sick.__getitem__, part)) for name, part in zip(names, _thirds(len(sick)), strict=True)}
    for facet in ("kind", "site"):
        for value in sorted({s.record[facet] for s in sick} - {"", "n/a"}):
            found[f"{facet}:{value}"] = [s for s in sick if s.record[facet] == value]
    return {name: members for name, members in found.items() if len(members) >= FEWEST}


def _thirds(number: int) -> list[np.ndarray]:
    return np.array_split(np.arange(number), 3)


def _rows(figures: dict, shared: dict) -> list[dict]:
    named = ("value", "low", "high", "n", "note")
    return [shared | {"level": level, "metric": metric, **dict(zip(named, figure, strict=False))}
            for (level, metric), figure in figures.items()]  # fmt: skip


def _write(run: str, name: str, table: pd.DataFrame, decimals: str) -> None:
    write_bytes(run_folder(run) / name, table.to_csv(index=False, float_format=decimals, lineterminator="\n").encode())


def _notes(table: pd.DataFrame, cohort: Cohort) -> list[str]:
    """Where a trivial baseline does as well as a model, its name; what cannot be promised; and what the healthy
    material was."""
    material = f"healthy material: {cohort.training}" if cohort.training == LESION_FREE else ""
    same = ["postprocess", "stratum", "level", "metric"]
    judged = table[(table.family == "baseline") & table.metric.isin(RIVALLED)]
    best = judged.sort_values("value", kind="stable").groupby(same).tail(1).set_index(same)
    rivals = {key: (row.method, row.value) for key, row in zip(best.index, best.itertuples(), strict=True)}
    notes = []
    for row in table.itertuples():
        rival, value = rivals.get(tuple(getattr(row, name) for name in same), ("", -np.inf))
        beaten = row.family != "baseline" and value >= row.value
        said = row.note if isinstance(row.note, str) else ""
        notes.append("; ".join(filter(None, [said, f"{rival} does as well or better" if beaten else "", material])))
    return notes


__all__ = [
    "CODES", "COLUMNS", "PROMISED_FPR", "SubjectCounts", "codes", "evaluate", "frozen_threshold", "paired_differences",
    "patients", "patients_by_precision", "slice_confusion", "steps_of", "test_counts", "value_of", "who_beats_whom",
]  # fmt: skip
