"""What a scanner can pass for: the same brains under simulated scanners, in designs of who was scanned where.

Three designs of equal size, each brain once and always at its scanner. **balanced**: each scanner has as many patients
as healthy subjects. **confounded**: one scanner has mostly healthy subjects, another mostly patients. **nobody ill**:
the confounded design with every lesion left out and the labels kept; whatever is found there is the scanner.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import joblib
import numpy as np
import pandas as pd

from lib import cohort, data_folder, datasets, intake, phantom, preparation, transfer, volumes
from lib.cohort import Cohort
from lib.errors import check_least
from lib.preprocessing import HALVINGS, Recipe
from lib.progress import bar
from lib.transfer import Plan

VERSION = 1  # part of the folder's name: raise it whenever the same numbers give other subjects
ILL = dict(zip(phantom.SCANNERS, (1 / 12, 11 / 12, 1 / 2), strict=True))  # share of patients in the confounded design
FIRST = 10_000  # index of the first brain: none of the embedded cohort
KINDS = ("glioma", "hyper", "hypo")
LEAST_PER_SCANNER = 6  # brains, so that every scanner has both labels
SQUARE_MM = 192


@dataclass(frozen=True)
class Study:
    """`scans`: the rows of `plan` by participant_id; `cohorts`: these scans prepared, by modality. The split test has
    the brains of the designs, train and validation other ones, all healthy."""

    scans: pd.DataFrame
    cohorts: dict[str, Cohort]

    def designs(self) -> dict[str, dict[str, bool]]:
        """The labels of each design, by scan; in `nobody ill` they are about nobody's health."""
        tested = self.scans[self.scans.split == "test"]
        chosen = {name: tested[tested.healthy + tested[name] == 1][name] for name in ("balanced", "confounded")}
        chosen["nobody ill"] = tested[tested.healthy == 1].confounded
        return {name: labels.astype(bool).to_dict() for name, labels in chosen.items()}


def plan(per_scanner: int = 10, learners: int = 15) -> pd.DataFrame:
    """Who is scanned, a row a scan: `participant_id, index, healthy, site, kind` as `phantom.plan`, `split`, and the
    label of the brain in two designs, `balanced` and `confounded` (1, 0).

    `per_scanner` brains of the designs at each scanner, scanned healthy and, where a design needs it, ill as well;
    `learners`: healthy brains for encoders, dealt to the scanners in turn, every fifth for validation.
    Raises CourseError for too few.
    """
    check_least("per_scanner", per_scanner, LEAST_PER_SCANNER)
    check_least("learners", learners, 2)
    rows = []
    for number, site in enumerate(list(ILL) * per_scanner):
        place = number // len(ILL)
        ill = {"balanced": per_scanner // 2, "confounded": min(max(round(ILL[site] * per_scanner), 1), per_scanner - 1)}
        labels = {design: int(place >= per_scanner - patients) for design, patients in ill.items()}
        brain = {"index": FIRST + number, "site": site, "split": "test"} | labels
        rows += [brain | {"kind": "n/a"}] + [brain | {"kind": KINDS[place % len(KINDS)]}] * max(labels.values())
    for number in range(learners):
        brain = {"index": 2 * FIRST + number, "site": list(ILL)[number % len(ILL)], "balanced": 0, "confounded": 0}
        rows.append(brain | {"kind": "n/a", "split": "train" if number % 5 else "validation"})
    table = pd.DataFrame(rows)
    table["healthy"] = (table.kind == "n/a").astype(int)
    table["participant_id"] = "brain" + table["index"].astype(str) + np.where(table.healthy, "", "ill")
    return table


def simulate(per_scanner: int = 10, learners: int = 15, *, voxel_mm: float = 4.0, seed: int = 0) -> Path:
    """Write the scans of `plan` and their splits to `data/embedded`, what is there already not again; the folder."""
    table = plan(per_scanner, learners)
    name = f"confounding-{per_scanner}-per-scanner-{learners}-learners-{voxel_mm:g}mm-seed{seed}-v{VERSION}"
    folder = data_folder("embedded", f"{name}.{phantom.VERSION}")
    there = (folder / "participants.tsv").exists()
    with bar(what="simulating", total=len(table), unit="scan", disable=there) as shown:
        phantom.write_subjects(
            folder, table, voxel_mm=voxel_mm, seed=seed, progress=lambda done, _: shown.update(done - shown.n)
        )
    splits = table.rename(columns={"participant_id": "subject"})[["subject", "split"]]
    volumes.write_bytes(folder / "splits.csv", splits.to_csv(index=False, lineterminator="\n").encode())
    return folder


def study(per_scanner: int = 10, learners: int = 15, *, modalities: str = "T1,T2,FLAIR", voxel_mm: float = 4.0,
          normalisation: str = "p99", seed: int = 0) -> Study:  # fmt: skip
    """The scans of `simulate`, prepared as a cohort of its own for each of `modalities` (names joined by commas);
    `normalisation` as in Recipe."""
    size = HALVINGS * math.ceil(SQUARE_MM / voxel_mm / HALVINGS)
    with joblib.parallel_config(backend="sequential"):  # for so few, workers cost more to start than they save
        folder = simulate(per_scanner, learners, voxel_mm=voxel_mm, seed=seed)
        gathered = intake.gather(
            str(folder), modalities=modalities, size=size, pixel_mm=voxel_mm, splits=str(folder / "splits.csv")
        )
        recipe = Recipe(pixel_mm=voxel_mm, size=size, normalisation=normalisation)
        cohorts = {
            modality: cohort.open_cohort(preparation.prepare_cohort(gathered, replace(recipe, modalities=(modality,))))
            for modality in datasets.parse_modalities(modalities)
        }
    return Study(plan(per_scanner, learners).set_index("participant_id"), cohorts)


def experiment(
    study: Study, tables: Mapping[str, pd.DataFrame], *, classifiers=("logistic",), plan: Plan | None = None,
    permuted=(), seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """`transfer.compare` of the tables for each design, one above the other."""
    sites = study.scans.site.to_dict()
    found = {
        design: transfer.compare(
            tables, labels, sites=sites, classifiers=classifiers, plan=plan, permuted=permuted, seed=seed
        )
        for design, labels in study.designs().items()
    }
    return pd.concat(found, names=["design"])
