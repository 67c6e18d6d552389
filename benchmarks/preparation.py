"""What preparing many subjects costs, and the same steps by MONAI's transforms: `python -m benchmarks.preparation`.

Subjects are a few simulated heads, each with noise of its own, 2 mm a voxel, and are prepared at twice that, as scans
of BraTS are. Examined and prepared from nothing in a process of its own and its workers, for cohorts of growing size;
peak memory is the sum of what they all hold at once. Then a few subjects one by one, ours and MONAI's in turn.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

import lib
from lib import datasets, intake, phantom, preparation, preprocessing, volumes
from lib.preprocessing import Recipe

HEADS = 4
SCAN_MM = 2.0
RECIPE = Recipe(pixel_mm=2 * SCAN_MM, size=48)
LOOK_SECONDS = 0.02
LARGEST_DIFFERENCE = 0.02  # of the 99th percentile, mean over the brain: more is another result
SAID = ("subjects", "seconds", "cpu_seconds", "subjects_per_minute", "peak_memory_gb", "bytes_per_subject")


def write_scans(place: Path, number: int) -> Path:
    """So many patients with FLAIR and lesion mask, in a folder of the layout of BraTS."""
    heads = datasets.find_subjects(phantom.write_cohort(place / "heads", healthy=0, patients=HEADS, voxel_mm=SCAN_MM))
    read = [(volumes.read(s.scans["FLAIR"]), s.lesion_mask.read_bytes()) for s in heads.subjects]
    for i in range(number):
        head, mask = read[i % HEADS]
        voxels = head.voxels * (1000 / head.voxels.max())
        noise = np.random.default_rng(i).normal(0, 10, voxels.shape)
        folder = place / "scans" / f"p{i:04d}"
        jittered = np.where(voxels > 0, np.maximum(voxels + noise, 1), 0)
        volumes.write(folder / f"{folder.name}_flair.nii.gz", jittered.astype(np.int16), head.affine)
        (folder / f"{folder.name}_seg.nii.gz").write_bytes(mask)
    return place / "scans"


def prepare(scans: Path, root: Path) -> dict:
    """Seconds of the clock and of all processors, and the cohort's bytes a subject, from nothing."""
    lib.ROOT = root
    started, before = time.perf_counter(), _cpu_seconds()
    gathered = intake.gather(str(scans), size=RECIPE.size, pixel_mm=RECIPE.pixel_mm)
    folder = preparation.prepare_cohort(gathered, RECIPE)
    seconds, cpu_seconds = time.perf_counter() - started, _cpu_seconds() - before
    taken = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "bytes_per_subject": taken / len(gathered.subjects)}


def _cpu_seconds() -> float:
    """What this process and those at work for it have used of processors."""
    me = psutil.Process()
    times = [one.cpu_times() for one in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def measured(scans: Path, number: int) -> dict:
    """The first so many subjects, prepared by a process of its own and those it starts."""
    with tempfile.TemporaryDirectory(dir=scans.parent) as place:
        for folder in sorted(scans.iterdir())[:number]:
            shutil.copytree(folder, Path(place) / "scans" / folder.name, copy_function=os.link)
        call = [sys.executable, "-m", "benchmarks.preparation", "--folder", place]
        with subprocess.Popen(call, stdout=subprocess.PIPE, text=True) as process:
            peak = _peak(psutil.Process(process.pid))
            found = json.loads(process.stdout.read().splitlines()[-1])
    rate = 60 * number / found["seconds"]
    return {"subjects": number, "subjects_per_minute": rate, "peak_memory_gb": peak / 1e9, **found}


def _peak(process: psutil.Process) -> int:
    """The most bytes that a process and its children held at once, until it ends."""
    peak = 0
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        together = 0
        for one in (process, *process.children(recursive=True)):
            try:
                together += one.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak = max(peak, together)
        time.sleep(LOOK_SECONDS)
    return peak


def monai_steps():
    """The recipe in MONAI's transforms, for a dict of the paths `image` and `lesion`."""
    from monai import transforms as monai

    both, every, ratio = ("image", "lesion"), ("image", "lesion", "brain"), RECIPE.pixel_mm / SCAN_MM
    sigma = ((ratio - 1) / 2, (ratio - 1) / 2, 1e-3)
    return monai.Compose(
        [
            monai.LoadImaged(both, reader="NibabelReader", image_only=True),
            monai.EnsureChannelFirstd(both),
            monai.Orientationd(both, "RAS", labels=None),
            monai.CopyItemsd("image", names="brain"),
            monai.Lambdad("brain", lambda image: image > 0),
            monai.KeepLargestConnectedComponentd("brain"),
            monai.FillHolesd("brain"),
            monai.CropForegroundd(every, source_key="brain"),
            monai.ResizeWithPadOrCropd(every, (int(RECIPE.size * ratio), int(RECIPE.size * ratio), -1)),
            monai.GaussianSmoothd(every, sigma),
            monai.Spacingd(every, (RECIPE.pixel_mm, RECIPE.pixel_mm, SCAN_MM), padding_mode="zeros"),
            monai.Lambdad(("lesion", "brain"), lambda mask: mask > 0.5),
            _scaled,
        ]
    )


def _scaled(found: dict) -> dict:
    image, brain = found["image"].numpy(), found["brain"].numpy()
    return found | {"image": np.clip(image / np.percentile(image[brain], 99), 0, 1.5) * brain}


def by_monai(steps, subject: datasets.Subject, target: Path) -> tuple[np.ndarray, np.ndarray]:
    """Prepare a subject and write what ours writes; image [slice, row, column] and its affine."""
    found = steps({"image": subject.scans["FLAIR"], "lesion": subject.lesion_mask})
    target.mkdir(parents=True)
    image = found["image"].transpose(0, 3, 2, 1)
    np.save(target / "image.npy", image.astype(np.float16))
    for name in ("brain", "lesion"):
        np.save(target / f"{name}.npy", found[name].numpy()[0].transpose(2, 1, 0))
    return image[0], found["brain"].affine.numpy()


def by_ours(subject: datasets.Subject, target: Path) -> tuple[np.ndarray, np.ndarray]:
    target.parent.mkdir(parents=True, exist_ok=True)
    scans, lesion = datasets.read_subject(subject, RECIPE.modalities), datasets.read_lesion(subject)
    preparation._write_subject(preprocessing.prepare(scans, lesion, RECIPE), target)
    facts = json.loads((target / "facts.json").read_bytes())
    return np.load(target / "image.npy")[0], np.array(facts["affine"])


def difference(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> float | None:
    """Mean absolute difference inside our brain, where both grids have the same points; None where they have not."""
    (mine, here), (other, there) = ours, theirs
    shift = (np.linalg.inv(there) @ here)[:3, 3]
    whole = np.round(shift).astype(int)
    if not np.allclose(shift, whole, atol=1e-3):
        return None
    places = np.argwhere(mine > 0) + whole[::-1]
    inside = ((places >= 0) & (places < other.shape)).all(axis=1)
    values = np.zeros(len(places))
    values[inside] = other[tuple(places[inside].T)]
    return float(np.abs(values - mine[mine > 0]).mean())


def beside_monai(scans: Path, number: int) -> dict:
    """So many subjects in this process, one way after the other: medians of processor seconds, which other programs
    disturb least, and how far the images differ."""
    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's, of readers for other files
        steps, rows = monai_steps(), []
    with tempfile.TemporaryDirectory(dir=scans.parent) as place:
        for subject in datasets.find_subjects(scans).subjects[: number + 1]:
            started = time.process_time()
            mine = by_ours(subject, Path(place) / "ours" / subject.id)
            between = time.process_time()
            theirs = by_monai(steps, subject, Path(place) / "monai" / subject.id)
            ended = time.process_time()
            rows.append({"ours": between - started, "monai": ended - between, "difference": difference(mine, theirs)})
    table = pd.DataFrame(rows[1:], dtype=float)  # the first loads what both need
    return {**table[["ours", "monai"]].median(), "difference": table.difference.max(), "same": table.difference.count()}


def report(scans: Path, sizes: list[int], compared: int) -> dict:
    """Print the tables and return their figures."""
    rows = [measured(scans, number) for number in sizes]
    print(pd.DataFrame(rows)[list(SAID)].round(2).to_string(index=False))
    first, last = rows[0], rows[-1]
    each = (last["cpu_seconds"] / last["subjects"]) / (first["cpu_seconds"] / first["subjects"])
    print(f"A subject of {last['subjects']} needs {each:.2f} times the processor of one of {first['subjects']}.")
    found = beside_monai(scans, compared)
    ours, monai = 1000 * found["ours"], 1000 * found["monai"]
    print(f"One by one: ours {ours:.0f} ms of a processor a subject, MONAI {monai:.0f} ms (medians).")
    print("Ours also looks for damage in the files and keeps the masks on the scan's own grid; MONAI does not.")
    print(f"Where the grids coincide ({found['same']:.0f} of {compared}), images differ by {found['difference']:.4f}.")
    if not found["difference"] < LARGEST_DIFFERENCE:
        raise SystemExit(
            f"The two ways differ by more than {LARGEST_DIFFERENCE}: the ratio would compare other things."
        )
    return {
        "subjects_per_minute": last["subjects_per_minute"],
        "speedup_vs_monai": found["monai"] / found["ours"],
        "peak_memory_gb": last["peak_memory_gb"],
        "memory_growth": last["peak_memory_gb"] / first["peak_memory_gb"],
        "cpu_growth_per_subject": each,
        "difference_vs_monai": found["difference"],
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few subjects")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder:
        print(json.dumps(prepare(given.folder / "scans", given.folder)))
        return
    sizes = [6, 12] if given.quick else [50, 100, 200]
    with tempfile.TemporaryDirectory() as place:
        figures = report(write_scans(Path(place), sizes[-1]), sizes, 4 if given.quick else 12)
    print(f"{figures['speedup_vs_monai']:.1f} times as fast as MONAI's transforms")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
