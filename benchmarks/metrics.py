"""What exact voxel figures cost, ours beside scikit-learn's: `python -m benchmarks.metrics`.

One map of ten million voxels and more, each way in a process of its own; then what memory a test set of 250 patients of
the size of BraTS takes, intervals included.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from lib import metrics

VOXELS = 10_000_000
BRAIN = 1_400_000  # voxels of a brain at 1 mm
LABELS = ("seconds", "peak_gb", "ap", "dice")


def ours(values: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Average precision and the best Dice of a map [voxel]."""
    _, counts = metrics.count(metrics.codes(values), truth, ~truth)
    return float(metrics.average_precision(*counts)), float(metrics.dice_curve(*counts).max())


def scikit_learn(values: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """The same from scikit-learn's functions."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    precision, recall, _ = precision_recall_curve(truth, values)
    best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))
    return float(average_precision_score(truth, values)), float(best)


def patients(values: np.ndarray, truth: np.ndarray, number: int) -> tuple[float, float]:
    """Pooled average precision and oracle Dice, with intervals, of so many patients, each a draw of the map."""
    subjects = []
    for i in range(number):
        drawn = np.random.default_rng(i).integers(0, len(values), BRAIN)
        found = metrics.count(metrics.codes(values[drawn]), truth[drawn], ~truth[drawn], ~truth[drawn])
        subjects.append(metrics.SubjectCounts(str(i), False, *found, np.zeros(0), np.zeros(0, bool)))
    weights = metrics.resampled(number, 0)
    return metrics.pooled_precision(subjects, weights)[0], metrics.oracle_dice(subjects, weights)[0]


def measured(way: str, folder: Path) -> dict:
    """A way run in a process of its own: seconds, peak memory of that process, and its two figures."""
    return json.loads(alone("--way", way, "--folder", str(folder)))


def alone(*arguments: str) -> str:
    """What this file prints as a process of its own; a process's peak starts at that of its parent, so the parent
    holds nothing."""
    command = [sys.executable, "-m", "benchmarks.metrics", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def run_way(way: str, folder: Path) -> dict:
    values, truth = np.load(folder / "values.npy"), np.load(folder / "truth.npy")
    started = time.perf_counter()
    if way.isdigit():
        figures = patients(values, truth, int(way))
    else:
        figures = {"ours": ours, "scikit-learn": scikit_learn}[way](values, truth)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return dict(zip(LABELS, (seconds, peak, *figures), strict=True))


def scans(data: Path | None, place: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """FLAIR scans of patients with their lesions, from a folder of scans or a small embedded cohort made in `place`."""
    from lib import datasets, phantom, volumes

    data = data or phantom.write_cohort(place / "phantom", healthy=1, patients=4)
    chosen = [s for s in datasets.find_subjects(data).subjects if s.lesion_mask and "FLAIR" in s.scans]
    read = ((volumes.read(s.scans["FLAIR"]), volumes.read(s.lesion_mask, constant_allowed=True)) for s in chosen)
    return [(scan.voxels, mask.voxels > 0) for scan, mask in read]


def write_map(folder: Path, data: Path | None, voxels: int) -> None:
    """Voxels inside the brains, intensity as their score, one brain after the other until there are enough."""
    parts, total = [], 0
    for scan, mask in islice(cycle(scans(data, folder)), 10_000):
        brain = scan > 0
        parts.append(((scan[brain] / np.percentile(scan[brain], 99)).astype(np.float16), mask[brain]))
        total += int(brain.sum())
        if total >= voxels:
            break
    for name, part in zip(("values", "truth"), zip(*parts, strict=True), strict=True):
        np.save(folder / f"{name}.npy", np.concatenate(part))


def report(folder: Path, sizes: tuple[int, int]) -> dict:
    """Print the table and return its figures."""
    rows = {way: measured(way, folder) for way in ("ours", "scikit-learn", *map(str, sizes))}
    mine, peer = rows["ours"], rows["scikit-learn"]
    print(f"{len(np.load(folder / 'truth.npy', mmap_mode='r')):,} voxels")
    print(f"{'':>16}{'seconds':>10}{'peak GB':>10}{'AP':>12}{'best Dice':>12}")
    for way, row in rows.items():
        name = f"{way} patients" if way.isdigit() else way
        print(f"{name:>16}{row['seconds']:10.2f}{row['peak_gb']:10.2f}{row['ap']:12.8f}{row['dice']:12.8f}")
    return {
        "speedup_vs_sklearn": peer["seconds"] / mine["seconds"],
        "memory_vs_sklearn": mine["peak_gb"] / peer["peak_gb"],
        "ap_difference": abs(mine["ap"] - peer["ap"]),
        "dice_difference": abs(mine["dice"] - peer["dice"]),
        "peak_gb_by_patients": {str(n): rows[str(n)]["peak_gb"] for n in sizes},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer patients in the test of memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--data", type=Path, metavar="DIR", help="scans with FLAIR; none: the embedded cohort")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder and not given.way:
        write_map(given.folder, given.data, VOXELS)
    elif given.way:
        print(json.dumps(run_way(given.way, given.folder)))
    else:
        compare(given)


def compare(given: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        alone("--folder", place, *(["--data", str(given.data)] if given.data else []))
        figures = report(Path(place), (5, 25) if given.quick else (25, 250))
    print(f"{figures['speedup_vs_sklearn']:.1f} times as fast, {figures['memory_vs_sklearn']:.2f} of the memory")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
