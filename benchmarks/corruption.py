"""What is noticed of damage to scans, by us and by nibabel alone: `python -m benchmarks.corruption`.

The suite of `benchmarks.malformed`, then a good scan damaged at random: a bit flipped, bytes overwritten, the end cut
off. Of each file either reader says caught (an error; ours must name the file and the cure), noted (read, with a
sentence of what is not believed), harmless (read as the good scan is, voxels and affine), silent (read as something
else, without a word), lost (an odd but good file refused), or traceback (of us: any error but a refusal).

A plain .nii has no checksum. Of its voxels, and of the header's fields whose every value is that of some good scan and
which nothing repeats (`LONE`), damage can be seen by nobody: those have a row of their own and are not in the sums.
The scan says twice where it lies, by sform and qform, as those of converters from DICOM do; of one that says it once,
a plausible other place cannot be seen either.
"""

import argparse
import json
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np

from benchmarks.malformed import CASES, Case, content, flipped, packed, same
from lib import volumes
from lib.errors import CourseError

OUTCOMES = ("caught", "noted", "harmless", "silent", "lost", "traceback")
LONE = ("scl_slope", "scl_inter")
BEFORE = 352  # bytes before the voxels
UNASKED = ("S04", "a pipe")  # of nibabel: nothing can happen while it reads, and it would wait for ever
UNSEEN = "cannot be seen"
FULL, QUICK = 400, 40  # damages of each kind
LONGEST = 64  # bytes that are overwritten at once
MOST_VOXELS = 2**27  # that nibabel is asked for: it would take the memory of what a header promises


def ours(path: Path, case: Case) -> str:
    """What `volumes.read` makes of a file."""
    try:
        volume = volumes.read(path, constant_allowed=case.mask, channel=case.channel)
    except CourseError as error:
        named = str(path) in error.what and error.cure.strip()
        return ("caught" if case.code else "lost") if named else "traceback"
    except Exception:
        return "traceback"
    if same(volume.voxels, volume.affine, *_meant(case)):
        return "harmless"
    return "noted" if volume.notes else "silent"


def nibabel_alone(path: Path, case: Case) -> str:
    """What `nibabel.load(path).get_fdata()` makes of it; any error counts as caught."""
    try:
        image = nibabel.load(path)
        if np.prod(image.shape, dtype=float) > MOST_VOXELS:
            return "caught"  # what would happen depends on the machine's memory; this is the better outcome
        voxels = image.get_fdata() if case.channel is None else image.get_fdata()[..., case.channel]
    except Exception:
        return "caught" if case.code else "lost"
    if case.mask or same(voxels[..., 0] if voxels.shape[3:] == (1,) else voxels, image.affine, *_meant(case)):
        return "harmless"
    return "silent"


READERS = {"ours": ours, "nibabel": nibabel_alone}


def _meant(case: Case) -> tuple[np.ndarray, ...]:
    return () if case.affine is None else (case.affine,)


def damages(count: int, seed: int) -> Iterator[tuple[str, Case]]:
    """Damaged copies of the good scan, as many in each row, with the row's name."""
    random = np.random.default_rng(seed)
    plain, gzip = content(), packed()
    alone = lone_bytes()
    seen = np.setdiff1d(np.arange(BEFORE), alone)
    unseen = np.concatenate([alone, np.arange(BEFORE, len(plain))])
    for _ in range(count):
        yield "a gzip file", _bytes(damaged(gzip, np.arange(len(gzip)), random, cut=True), "x.nii.gz")
        yield "a plain header or end", _bytes(damaged(plain, seen, random, cut=True), "x.nii")
        yield UNSEEN, _bytes(damaged(plain, unseen, random, cut=False), "x.nii")


def _bytes(made: bytes, name: str) -> Case:
    return Case("any", lambda: made, name)


def lone_bytes() -> np.ndarray:
    """Places of the fields in LONE."""
    fields = nibabel.nifti1.header_dtype.fields
    return np.concatenate([np.arange(fields[f][1], fields[f][1] + fields[f][0].itemsize) for f in LONE])


def damaged(made: bytes, places: np.ndarray, random: np.random.Generator, cut: bool) -> bytes:
    """A file with a bit flipped, bytes overwritten in some of its places, or its end cut off."""
    kind = random.integers(3 if cut else 2)
    if kind == 2:
        return made[: random.integers(len(made))]
    start = random.integers(len(places))
    if kind == 1:
        return flipped(made, 8 * int(places[start]) + int(random.integers(8)))
    result = bytearray(made)
    for place in places[start : start + random.integers(1, LONGEST)]:
        result[place] = random.integers(256)
    return bytes(result)


def measured(count: int, seed: int) -> dict[str, dict[str, Counter]]:
    """Outcomes by row and reader, of the suite and of so many damages of each kind."""
    rows: dict[str, dict[str, Counter]] = {}
    suite = [("the suite", case) for case in CASES.values()]
    unasked = [id(case) for name, case in CASES.items() if name in UNASKED or case.code in UNASKED]
    for kind, case in [*suite, *damages(count, seed)]:
        row = rows.setdefault(kind, {"ours": Counter(), "nibabel": Counter()})
        row["ours"][outcome(ours, case)] += 1
        if id(case) not in unasked:
            row["nibabel"][outcome(nibabel_alone, case)] += 1
    return rows


def outcome(reader: Callable[[Path, Case], str], case: Case) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = case.write(Path(folder))
        with case.around(path):
            return reader(path, case)


def summed(rows: dict[str, dict[str, Counter]]) -> dict[str, dict[str, int]]:
    """Outcomes by reader, over all rows but that of what nobody can see."""
    totals = {
        reader: sum((row[reader] for kind, row in rows.items() if kind != UNSEEN), Counter()) for reader in READERS
    }
    return {reader: {name: total[name] for name in OUTCOMES} for reader, total in totals.items()}


@contextmanager
def quietly() -> Iterator[None]:
    """Without nibabel's words on headers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer random damages")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with quietly():
        rows = measured(QUICK if given.quick else FULL, given.seed)
    sums = summed(rows)
    print(f"{'':36}" + "".join(f"{name:>10}" for name in OUTCOMES))
    for kind, row in {**rows, "all but what cannot be seen": sums}.items():
        for reader in READERS:
            print(f"{kind:28}{reader:8}" + "".join(f"{row[reader][name]:10d}" for name in OUTCOMES))
    if given.json:
        given.json.write_text(json.dumps({**sums, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
