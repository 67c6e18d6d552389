"""What trained detectors find in patients that they never saw: `python -m benchmarks.detectors_on_brats`.

Three folds: every patient is tested once, by detectors that learnt from lesion-free slices of patients of the other two
folds. Mean over patients of the voxel average precision inside the brain with its 95 % bootstrap interval, and the
paired difference of each method to the first one on the same patients.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.single_scan import show
from lib import ROOT, cohort, intake, models, preparation, single_scan
from lib.cohort import Cohort
from lib.preprocessing import Recipe

BRATS = ROOT.parent / "shared" / "data" / "brats"
METHODS = "sided_ensemble,synthetic_lesions,dae,mirror,intensity_median,intensity,blur,random"
FOLDS = 3
VALIDATED = 4  # of the patients that are not tested, one in so many stops the training


def prepared(data: str, modalities: str, size: int, pixel_mm: float) -> Cohort:
    """Every patient of a folder that has these modalities, joined by commas."""
    gathered = intake.gather(data, modalities=modalities, size=size, pixel_mm=pixel_mm)
    recipe = Recipe(tuple(modalities.split(",")), size=size, pixel_mm=pixel_mm)
    return cohort.open_cohort(preparation.prepare_cohort(gathered, recipe))


def folds(whole: Cohort, seed: int) -> Iterator[Cohort]:
    """The cohort once a fold, its patients split anew; each is in test once."""
    order = np.random.default_rng(seed).permutation(len(whole.subjects))
    for fold in range(FOLDS):
        rest = [i for i in order if i not in order[fold::FOLDS]]
        splits = dict.fromkeys(order[fold::FOLDS], "test") | dict.fromkeys(rest[::VALIDATED], "validation")
        subjects = (replace(s, split=splits.get(i, "train")) for i, s in enumerate(whole.subjects))
        yield replace(whole, subjects=tuple(subjects))


def measured(whole: Cohort, names: list[str], seed: int) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Average precision by method and patient, and seconds of processor time by method, training and maps included.

    A training that methods share is made once, and counts for the first of them.
    """
    found, seconds = {name: {} for name in names}, dict.fromkeys(names, 0.0)
    for split in folds(whole, seed):
        with tempfile.TemporaryDirectory() as out:
            for name in names:
                detector, started = models.create(name, whole.modalities), time.process_time()
                detector.fit(split, out=Path(out), seed=seed)
                found[name] |= {s.id: single_scan.precision(s, detector.maps(s)) for s in split.split("test")}
                seconds[name] += time.process_time() - started
    return found, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=str(BRATS), metavar="DIR", help="scans with lesion masks")
    parser.add_argument("--methods", default=METHODS, help="joined by commas; each is compared with the first")
    parser.add_argument("--modality", default="FLAIR,T2", help="each on its own; joined by + together")
    parser.add_argument("--size", type=int, default=96, help="rows and columns of a slice")
    parser.add_argument("--pixel-mm", type=float, default=2.0, help="edge of a pixel")
    parser.add_argument("--seed", type=int, default=0, help="folds and trainings")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    given = parser.parse_args()
    names, tables = given.methods.split(","), []
    for together in given.modality.split(","):
        whole = prepared(given.data, together.replace("+", ","), given.size, given.pixel_mm)
        found, seconds = measured(whole, names, given.seed)
        tables.append(single_scan.against(found, names[0]).assign(seconds=pd.Series(seconds), modality=together))
        show(tables[-1], names[0])
    if given.json:
        columns = {"ap_low": "low", "ap_high": "high"}
        rows = pd.concat(tables).rename_axis("method").rename(columns=columns).reset_index().to_dict("records")
        given.json.write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
