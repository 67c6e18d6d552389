"""Maps × truth → figures with intervals. Only maps are judged, and every figure comes from counts by score value.

A subject is read once, reduced to counts, and forgotten; each post-processing step has thresholds of its own, frozen
on the healthy material of validation. `patients.csv` keeps what was found of every subject, `results.csv` the figures.
"""

from functools import partial
from itertools import combinations

import numpy as np
import pandas as pd

from lib import domain, figures, judging, models, postprocessing, run_folder, scoring, workers
from lib.baselines import SLICE_LABELS
from lib.cohort import Cohort, PreparedSubject
from lib.errors import CourseError
from lib.figures import MEANS
from lib.intake import LESION_FREE
from lib.judging import Judged
from lib.metrics import CODES, PROMISED_FPR, SubjectCounts, average_precision, bootstrap, codes, resampled, value_of
from lib.volumes import write_bytes

FEWEST = 2  # subjects in a stratum
TIE = 0.01  # smaller differences of a patient are a draw
COLUMNS = [
    "method", "family", "modality", "postprocess", "stratum", "level", "metric",
    "value", "low", "high", "n", "seed", "note",
]  # fmt: skip
FROC_COLUMNS = ["method", "false_positives_per_volume", "recall"]
IN_STRATA = {"ap", "dice", "dice_oracle", "sensitivity_at_fpr1", "sensitivity_at_fpr5", "fpr_seen", "lesion_recall",
             "lesion_recall_strict", "false_positives_per_volume"}  # fmt: skip
RIVALLED = ["ap", "ap_pooled", "auroc", "balanced_accuracy", "dice", "froc", "lesion_recall", "lesion_recall_strict",
            "sensitivity_at_fpr1", "sensitivity_at_fpr5"]  # fmt: skip
LEADING = {  # metric that puts methods in order: the first that there is
    "ap": "voxel average precision, mean over patients",
    "auroc": "AUROC of scans",
    "fpr_seen": "share of healthy voxels called",
}
DOMAIN = "domain_classifier"  # scores scans by histogram, header and size alone


def evaluate(run: str, cohort: Cohort, seed: int = 0, cluster: str = "") -> pd.DataFrame:
    """Judge every method that has maps in this run, and write `results.csv`, `patients.csv` and `froc.csv`: sorted,
    fixed decimals, byte for byte equal for equal maps. Columns as in COLUMNS; `low` and `high` are a 95 % bootstrap
    over patients. A method that was trained with several seeds has rows for each of them. `cluster`: as in
    workers.each. Raises CourseError where a subject, or a scan, stands in two splits."""
    _refuse_leaks(cohort)
    trainings = [trained for method in scoring.methods(run) for trained in scoring.trainings(run, method)]
    rows, records, curves, warned = _domain_rows(cohort, seed), [], [], {}
    work = partial(_evaluate_training, run=run, cohort=cohort, seed=seed)
    shared = {"cluster": cluster, "needs": [cohort.folder, run_folder(run)]}
    judged = workers.each(work, trainings, what="judging", unit="method", **shared)
    for trained, found in zip(trainings, judged, strict=True):
        method = scoring.method_of(trained)
        rows += [row | {"family": models.family(method)} for row in found[0]]
        records, curves = records + found[1], curves + found[2]
        warned[method, scoring.seed_of(trained, seed)] = scoring.warnings(run, trained)
    order = ["method", "postprocess", "stratum", "level", "metric", "seed"]
    table = pd.DataFrame(rows, columns=COLUMNS).sort_values(order, ignore_index=True)
    if leading(table).empty:
        what = "No test subject can be judged: nobody is healthy, and no lesion is outlined."
        raise CourseError(what, "Add lesion masks, or healthy subjects to the split test.")
    table["note"] = _notes(table, cohort, warned)
    _write(run, "results.csv", table, "%.4f")
    _write(run, "patients.csv", pd.DataFrame(records), "%.6f")
    _write(run, "froc.csv", pd.DataFrame(curves, columns=FROC_COLUMNS), "%.6f")
    return table


def patients(run: str, cohort: Cohort) -> pd.DataFrame:
    """What `evaluate` found of every test subject, by method, seed and step: a row of `patients.csv` each.

    Raises CourseError where this run was not evaluated on this cohort.
    """
    path = run_folder(run) / "patients.csv"
    try:
        missing = {c: [""] for c in (*MEANS.values(), "scan_score", *judging.OF_LESIONS)}
        text = {"patient": str, "site": str, "kind": str}
        table = pd.read_csv(path, dtype=text, keep_default_na=False, na_values=missing)
    except (OSError, ValueError) as error:
        raise CourseError(f"{path} is missing or damaged.", "Run 08_comparison of this run first.") from error
    if set(table.patient) != {s.id for s in cohort.split("test")}:
        raise CourseError(f"{path} is of another cohort.", "Run 08_comparison of this run again.")
    return table


def unanswered(cohort: Cohort) -> str:
    """What cannot be judged for want of outlined lesions among the test subjects, in words; "" where all is known."""
    ill = [s for s in cohort.split("test") if not s.healthy]
    bare = sum(not s.outlined for s in ill)
    if not ill:
        return "nobody is ill among the test subjects: nothing is found or missed"
    if bare == len(ill):
        return "no subject has a lesion mask: only whole scans are judged"
    return f"{bare} of {len(ill)} patients have no lesion mask and count at the level of scans alone" if bare else ""


def leading(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `results.csv` that hold the figure by which methods are put in order, the best last: voxel AP; where
    no lesion is outlined, the AUROC of scans; where nobody is ill, the share of healthy voxels called."""
    asked = table[table.level == table.metric.map({"ap": "voxel", "auroc": "scan", "fpr_seen": "voxel"})]
    metric = next((name for name in LEADING if name in set(asked.metric)), "")
    return asked[asked.metric == metric].sort_values("value", kind="stable", ascending=metric != "fpr_seen")


def first_seed(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of each method's first training, of `results.csv` or `patients.csv`."""
    return table[table.seed == table.groupby("method").seed.transform("min")]


def seed_spread(run: str, cohort: Cohort, metric: str = "ap", seed: int = 0) -> pd.DataFrame:
    """A figure of `patients.csv` for methods that were trained with several seeds, a row each: `mean` over patients of
    each patient's mean over seeds, `low` and `high` its 95 % interval over patients, `seed_sd` the standard deviation
    of the seeds' own means over patients, `lowest` and `highest` of those, `seeds` and `n`."""
    table = patients(run, cohort)
    rows = []
    for method, of_method in table[table.postprocess == "none"].groupby("method", sort=False):
        wide = of_method.pivot(index="patient", columns="seed", values=metric).dropna()
        if wide.shape[1] > 1 and len(wide):
            own, by_seed = wide.mean(axis=1).to_numpy(), wide.mean()
            mean, low, high = bootstrap(lambda w, own=own: w @ own / len(own), resampled(len(own), seed))
            of_seeds = {"seed_sd": by_seed.std(), "lowest": by_seed.min(), "highest": by_seed.max()}
            about = {"mean": mean, "low": low, "high": high, **of_seeds, "seeds": len(by_seed), "n": len(own)}
            rows.append({"method": method, **about})
    return pd.DataFrame(rows)


def paired_differences(run: str, cohort: Cohort, metric: str = "ap", seed: int = 0) -> pd.DataFrame:
    """Each method against each one below it: mean difference over patients of a figure in `patients.csv` ("ap",
    "dice", "sensitivity_at_fpr1", "sensitivity_at_fpr5"), its 95 % interval over the same resampled patients for
    every pair, and patients won, drawn (within 0.01) and lost.

    Columns method_a, method_b, difference, low, high, wins, ties, losses, n; method_a has the higher mean.
    """
    table = first_seed(patients(run, cohort))
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
    """Counts of every test subject under a method, in the order of their names, but of those whose lesions are not
    outlined."""
    scans = judging.tested(run, method, cohort)
    return [judging.count(scan, scan.codes("none")) for scan in scans if scan.subject.outlined]


def frozen_threshold(run: str, method: str, cohort: Cohort) -> int:
    """The code of the threshold that the healthy material of validation fixes."""
    return judging.freeze(run, method, cohort, ("none",))["none"].code


def patients_by_precision(subjects: list[SubjectCounts]) -> list[tuple[str, float]]:
    """Identity and average precision of each test patient, the lowest first."""
    found = [(s.id, float(average_precision(s.lesion, s.other))) for s in subjects if s.lesion_voxels]
    return sorted(found, key=lambda pair: pair[1])


def scans_by_score(run: str, method: str, cohort: Cohort) -> list[tuple[str, float]]:
    """Identity and scan score of each test subject, the lowest first."""
    table = first_seed(patients(run, cohort)).query("method == @method and postprocess == 'none'")
    return sorted(zip(table.patient, table.scan_score, strict=True), key=lambda pair: pair[1])


def slice_confusion(run: str, method: str, cohort: Cohort) -> np.ndarray:
    """Test slices by truth (row: healthy, lesion) and call (column), int [2, 2], at the frozen slice threshold.

    Slices of patients without lesion are healthy here.
    """
    table = first_seed(patients(run, cohort)).query("method == @method and postprocess == 'none'")
    well, ill, alarms, hits = table[["well_slices", "ill_slices", "well_slices_called", "ill_slices_called"]].sum()
    return np.array([[well - alarms, alarms], [ill - hits, hits]]).astype(int)


def steps_of(trained: str) -> tuple[str, ...]:
    """The post-processing steps that a training of a method is judged with."""
    if trained in ("empty", *SLICE_LABELS) or scoring.method_of(trained) != trained:
        return ("none",)
    return tuple(s for s in postprocessing.STEPS if (trained, s) != ("intensity_median", "median"))


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


def _evaluate_training(trained: str, run: str, cohort: Cohort, seed: int) -> tuple[list[dict], list[dict], list[tuple]]:
    """Rows of `results.csv`, of `patients.csv` and of `froc.csv`."""
    method, own = scoring.method_of(trained), scoring.seed_of(trained, seed)
    shared = {"method": method, "modality": "+".join(cohort.modalities), "seed": own}
    frozen = judging.freeze(run, trained, cohort, steps_of(trained))
    judged = [judging.judge(scan, frozen) for scan in judging.tested(run, trained, cohort)]
    rows, records = [], []
    for step, limits in frozen.items():
        subjects = [one[step] for one in judged]
        known = [one for one in subjects if one.counts.outlined]
        of_all = shared | {"postprocess": step, "stratum": "all"}
        if method in SLICE_LABELS:
            counts = [s.counts for s in known]
            return _rows(figures.slices(counts, seed) | figures.slice_rules(known, seed), of_all), [], []
        records += [{"method": method, "seed": own, "postprocess": step, **one.record} for one in subjects]
        rows += _rows(figures.of_step(subjects, limits, step, seed), of_all)
        for name, members in _strata(known).items() if (trained, step) == (method, "none") else ():
            few = figures.voxels(members, seed, IN_STRATA)
            rows += _rows(few, shared | {"postprocess": step, "stratum": name})
    known = [one["none"] for one in judged if one["none"].counts.outlined]
    curve = figures.froc_points(known) if known and trained == method else []
    return rows, records, [(method, *point) for point in curve]


def _domain_rows(cohort: Cohort, seed: int) -> list[dict]:
    """What histogram, header and size alone reach on the test scans: every scan-level claim stands beside it."""
    tested = sorted(cohort.split("test"), key=lambda s: s.id)
    scores = domain.held_out_scores(tested, [not s.healthy for s in tested], seed)
    if scores is None:
        return []
    shared = {"method": DOMAIN, "family": "baseline", "modality": "+".join(cohort.modalities), "seed": seed,
              "postprocess": "none", "stratum": "all"}  # fmt: skip
    return _rows(figures.by_health(scores, [s.healthy for s in tested], seed), shared)


def _strata(subjects: list[Judged]) -> dict[str, list[Judged]]:
    """Patients by lesion load in thirds and by lesion kind, and all subjects by site, where a group has two."""
    sick = sorted((s for s in subjects if s.counts.lesion_voxels), key=lambda s: s.record["lesion_ml"])
    names = ("load:small", "load:medium", "load:large")
    found = {name: list(map(sick.__getitem__, part)) for name, part in zip(names, _thirds(len(sick)), strict=True)}
    for facet, members in (("kind", sick), ("site", subjects)):
        for value in sorted({s.record[facet] for s in members} - {"", "n/a"}):
            found[f"{facet}:{value}"] = [s for s in members if s.record[facet] == value]
    return {name: members for name, members in found.items() if len(members) >= FEWEST}


def _thirds(number: int) -> list[np.ndarray]:
    return np.array_split(np.arange(number), 3)


def _rows(figures: dict, shared: dict) -> list[dict]:
    named = ("value", "low", "high", "n", "note")
    return [shared | {"level": level, "metric": metric, **dict(zip(named, figure, strict=False))}
            for (level, metric), figure in figures.items()]  # fmt: skip


def _write(run: str, name: str, table: pd.DataFrame, decimals: str) -> None:
    write_bytes(run_folder(run) / name, table.to_csv(index=False, float_format=decimals, lineterminator="\n").encode())


def _notes(table: pd.DataFrame, cohort: Cohort, warned: dict[tuple[str, int], list[str]]) -> list[str]:
    """Where a trivial baseline does as well as a model, its name; what cannot be promised; what went wrong in training;
    and what the healthy material was."""
    material = f"healthy material: {cohort.training}" if cohort.training == LESION_FREE else ""
    grid = "judged on the scan's own grid" if cohort.grid == "scan" else ""
    lacking = unanswered(cohort)
    same = ["postprocess", "stratum", "level", "metric"]
    judged = table[(table.family == "baseline") & table.metric.isin(RIVALLED)]
    best = judged.sort_values("value", kind="stable").groupby(same).tail(1).set_index(same)
    rivals = {key: (row.method, row.value) for key, row in zip(best.index, best.itertuples(), strict=True)}
    notes = []
    for row in table.itertuples():
        rival, value = rivals.get(tuple(getattr(row, name) for name in same), ("", -np.inf))
        beaten = row.family != "baseline" and value >= row.value
        said = row.note if isinstance(row.note, str) else ""
        outdone = f"{rival} does as well or better" if beaten else ""
        went_wrong = warned.get((row.method, row.seed), [])
        notes.append("; ".join(filter(None, [said, outdone, *went_wrong, material, grid, lacking])))
    return notes


__all__ = [
    "CODES",
    "COLUMNS",
    "PROMISED_FPR",
    "SubjectCounts",
    "codes",
    "evaluate",
    "frozen_threshold",
    "leading",
    "paired_differences",
    "patients",
    "patients_by_precision",
    "scans_by_score",
    "seed_spread",
    "slice_confusion",
    "steps_of",
    "test_counts",
    "unanswered",
    "value_of",
    "who_beats_whom",
]  # fmt: skip
