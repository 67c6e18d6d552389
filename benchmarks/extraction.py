"""What extracting the brain costs lesions and gives figures: `python -m benchmarks.extraction --data DIR`.

For every patient whose scans show the whole head: the share of the lesion's voxels that stays, litres, and the voxel
average precision of `intensity_median` on the whole head, on the head with its outline eroded, and on the brain.
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from scipy import ndimage

from lib import datasets, extraction, models, quality, single_scan
from lib.errors import CourseError
from lib.preprocessing import Recipe, canonical, extracted, prepare
from lib.volumes import Volume

SQUARE = 144  # pixels of 2 mm that a whole head fits in
ERODED = 9 / 128  # of the picture's edge


def head(voxels: np.ndarray) -> np.ndarray:
    """All that is not air, slice by slice without holes; bool [i, j, k]."""
    tissue = voxels > extraction.TISSUE * np.percentile(voxels, 98)
    closed = ndimage.binary_closing(np.pad(tissue, ((4, 4), (4, 4), (0, 0))), np.ones((3, 3, 1)), iterations=3)
    return np.stack([ndimage.binary_fill_holes(one) for one in closed.transpose(2, 0, 1)], axis=2)[4:-4, 4:-4]


def eroded(outline: np.ndarray) -> np.ndarray:
    cross = ndimage.generate_binary_structure(2, 1)[..., None]
    return ndimage.binary_erosion(outline, cross, iterations=round(ERODED * max(outline.shape[:2])))


def precision(modality: str, scan: Volume, lesion: Volume, mask: np.ndarray) -> float:
    """Average precision of `intensity_median` inside a mask [i, j, k]."""
    inside = extracted(modality, scan, Volume(mask.astype(np.float32), scan.affine))
    ready = prepare({modality: inside}, lesion, Recipe((modality,), size=SQUARE))
    subject = SimpleNamespace(image=ready.image.astype(np.float16), brain=ready.brain, lesion=ready.lesion)
    return single_scan.precision(subject, models.create("intensity_median", (modality,)).maps(subject))


def measured(data: str, modality: str) -> pd.DataFrame:
    """A row a patient and way: `kept` % of the lesion, `litres`, `ap`, `flags` of the mask."""
    rows = []
    for subject in datasets.find_subjects(Path(data)).subjects:
        if modality not in subject.scans or subject.lesion_mask is None:
            continue
        scan = canonical(datasets.read_modality(subject, modality))
        lesion = canonical(datasets.read_lesion(subject))
        if not (extraction.shows_head(scan, modality) and (lesion.voxels > 0).any()):
            continue
        outline, truth = head(scan.voxels), lesion.voxels > 0
        masks = {"head": outline, "eroded": eroded(outline), "brain": extraction.brain(scan, modality)}
        for way, mask in masks.items():
            found = quality.measured(mask, scan.voxel_mm)
            row = {"subject": subject.id, "way": way, "voxels": int(truth.sum()), "litres": found["litres"]}
            row |= {"kept": 100 * float(mask[truth].mean()), "ap": precision(modality, scan, lesion, mask)}
            rows.append(row | {"flags": "; ".join(quality.flags(found, mask.shape[2])) if way == "brain" else ""})
    if not rows:
        raise CourseError(
            f"No patient of {data} shows the whole head in {modality}.", "Give scans with skull and mask."
        )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, metavar="DIR", help="scans of whole heads with lesion masks")
    parser.add_argument("--modality", default="FLAIR", help="what is extracted from, and judged")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    given = parser.parse_args()
    table = measured(given.data, given.modality)
    print(f"{'':>28}{'way':>8}{'kept %':>8}{'litres':>8}{'AP':>7}")
    for r in table.itertuples():
        print(f"{r.subject[:27]:>28}{r.way:>8}{r.kept:8.1f}{r.litres:8.2f}{r.ap:7.3f}  {r.flags}")
    for way, of in table.groupby("way", sort=False):
        kept = np.average(of.kept, weights=of.voxels)
        print(f"{f'all {len(of)}':>28}{way:>8}{kept:8.1f}{of.litres.mean():8.2f}{of.ap.mean():7.3f}")
    if given.json:
        given.json.write_text(json.dumps({"rows": table.to_dict("records")}, indent=1))


if __name__ == "__main__":
    main()
