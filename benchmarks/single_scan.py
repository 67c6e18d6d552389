"""What single-scan methods find, each patient's scan on its own: `python -m benchmarks.single_scan --data DIR`.

Mean over patients of the voxel average precision inside the brain with its 95 % bootstrap interval, and the paired
difference to `intensity_median` on the same patients. Nothing is trained on other scans, so every patient is tested.
"""

import argparse
import json
import time
from pathlib import Path

import pandas as pd

from lib import cohort, intake, models, preparation, single_scan
from lib.cohort import PreparedSubject
from lib.preprocessing import Recipe

BASELINE = "intensity_median"
ATTEMPTS = {
    "mirror, difference as it is": ("mirror", {"smoothing_mm": 2.0, "edge": 10.0}),
    "mirror, smoothed 4 mm": ("mirror", {"smoothing_mm": 4.0, "edge": 10.0}),
    "mirror, smoothed 8 mm": ("mirror", {"edge": 10.0}),
    "mirror, 8 mm and guided": ("mirror", {}),
    "mirror, 16 mm and guided": ("mirror", {"smoothing_mm": 16.0}),
    "masked, 10 mm": ("single_masked", {"mask_mm": 10.0}),
    "masked, 16 mm": ("single_masked", {}),
    "masked, 24 mm": ("single_masked", {"mask_mm": 24.0}),
    "median and mirror": ("single_ensemble", {}),
    "median and masked": ("single_ensemble", {"members": "intensity_median,single_masked"}),
    "median, mirror, masked": ("single_ensemble", {"members": "intensity_median,mirror,single_masked"}),
    "all four": ("single_ensemble", {"members": "intensity_median,mirror,single_masked,single_similarity"}),
}
QUICK = ("empty", "intensity", BASELINE, "mirror", "single_masked", "single_similarity", "single_ensemble")
SLOW = ("single_ae", "single_anogan")


def patients(data: str, modality: str) -> list[PreparedSubject]:
    """Every subject of a folder with a lesion, prepared as the course does."""
    folder = preparation.prepare_cohort(intake.gather(data, modalities=modality), Recipe(modalities=(modality,)))
    return [s for s in cohort.open_cohort(folder).subjects if s.lesion.any()]


def measured(subjects: list[PreparedSubject], modality: str, names: tuple[str, ...]) -> pd.DataFrame:
    """A row a method: mean AP and difference to the baseline, with intervals, and seconds of processor time a scan."""
    found, seconds = {}, {}
    for name in names:
        detector, started = models.create(name, (modality,)), time.process_time()
        found[name] = {s.id: single_scan.precision(s, detector.maps(s)) for s in subjects}
        seconds[name] = (time.process_time() - started) / len(subjects)
    table = single_scan.against(found, BASELINE)
    return table.assign(seconds=pd.Series(seconds), modality=modality)


def attempted(subjects: list[PreparedSubject], modality: str) -> pd.DataFrame:
    """The same for every attempt; and for the attempt that is best on all other patients, chosen anew for each: what
    the choice among them is worth on patients that had no part in it."""
    detectors = {what: models.create(name, (modality,), **given) for what, (name, given) in ATTEMPTS.items()}
    found = {what: {s.id: single_scan.precision(s, d.maps(s)) for s in subjects} for what, d in detectors.items()}
    table = pd.DataFrame(found)
    best = {s: table.drop(index=s).mean().idxmax() for s in table.index}
    found["best on the others"] = {s: found[what][s] for s, what in best.items()}
    plain = models.create(BASELINE, (modality,))
    found[BASELINE] = {s.id: single_scan.precision(s, plain.maps(s)) for s in subjects}
    return single_scan.against(found, BASELINE).assign(seconds=float("nan"), modality=modality)


def show(table: pd.DataFrame, baseline: str = BASELINE) -> None:
    print(f"{table.modality.iloc[0]}, {table.n.iloc[0]:.0f} patients: mean voxel AP, and difference to {baseline}")
    print(f"{'':>28}{'AP':>7}{'95 % interval':>16}{'difference':>12}{'95 % interval':>18}{'s CPU':>8}")
    for r in table.itertuples():
        own = f"{r.ap_low:.3f} to {r.ap_high:.3f}"
        gap = f"{r.difference_low:+.3f} to {r.difference_high:+.3f}"
        print(f"{r.Index:>28}{r.ap:7.3f}{own:>16}{r.difference:+12.3f}{gap:>18}{r.seconds:8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="", metavar="DIR", help="scans with lesion masks; none: the embedded cohort")
    parser.add_argument("--modality", default="FLAIR", help="modalities joined by commas, each on its own")
    parser.add_argument("--quick", action="store_true", help="without the two that train networks")
    parser.add_argument("--attempts", action="store_true", help="variants of the methods instead, failures too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    given = parser.parse_args()
    names, tables = QUICK + (() if given.quick else SLOW), []
    for modality in given.modality.split(","):
        subjects = patients(given.data, modality)
        tables.append(attempted(subjects, modality) if given.attempts else measured(subjects, modality, names))
        show(tables[-1])
    if given.json:
        rows = pd.concat(tables).rename_axis("method").reset_index().to_dict("records")
        given.json.write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
