"""Scans under a saved detector: `python -m lib.detect SCAN … --run reports/RUN --method dae --out DIR`."""

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import lib
from lib.errors import CourseError
from lib.refusals import check_name


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit status, and shows people no traceback.

    0 done, 1 a scan was refused and the others went through, 2 nothing could start, 130 interrupted.
    """
    try:
        given = _parse(arguments)
        run, jobs = _run(given.run), _jobs(given)
        _check(given, run, jobs)
        return _go(given, run, jobs)
    except CourseError as refusal:
        _say(refusal)
        return 2
    except OSError as error:
        _say(_unusable(error))
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the folders that are there are whole.", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise CourseError(f"{message[0].upper()}{message[1:]}.", "python -m lib.detect --help shows the options.")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        "python -m lib.detect", description="Marks in a scan what a detector of a run has not seen in healthy brains.",
        epilog=lib.RESEARCH, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("scans", metavar="SCAN", nargs="+", type=Path,
        help="NIfTI file, DICOM series, folder of one person's files, or PNG or JPEG picture of a slice")  # fmt: skip
    add("--run", metavar="reports/RUN", required=True, help="folder or name of the run that has the detector")
    add("--method", metavar="NAME", required=True, help="the detector, as dae")
    add("--out", metavar="DIR", type=Path, required=True, help="folder for the results; of several scans, one for each")
    add("--modality", metavar="FLAIR", default="", help="what the scan is, where its name or header does not say")
    add("--with", metavar="T2=FILE", dest="others", action="append", default=[], type=_other,
        help="a further modality of the same person, for a run of several")  # fmt: skip
    add("--mask", metavar="FILE", type=Path, help="mask of the brain on the scan's grid, for a scan that shows more")
    add("--threshold", metavar="X", type=_threshold, help="instead of the one that healthy validation scans fixed")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where the network computes (auto)")
    add("--overwrite", action="store_true", help="write over an earlier result")
    return parser.parse_args(arguments)


def _other(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not path:
        raise CourseError(f"--with {text} names no file.", "Write --with T2=FILE.")
    return _modality(name), Path(path)


def _modality(name: str) -> str:
    from lib.datasets import parse_modalities

    found = parse_modalities(name)
    if len(found) > 1:
        raise CourseError(f"{name} are several modalities.", "Give the one of the scan, and others by --with T2=FILE.")
    return found[0]


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise CourseError(f"--threshold cannot be {text!r}.", "Give a number, as 0.2.")
    return value


def _run(text: str) -> Path:
    """The folder of a run that is given by path or name."""
    found = next((path for path in (Path(text), lib.run_folder(text)) if path.is_dir()), None)
    if found is None:
        raise CourseError(f"There is no run {text}.", "Give the folder of a run, as reports/NAME.")
    return found.resolve()


def _jobs(given: argparse.Namespace) -> dict[Path, Path]:
    """The folder for the results of each scan."""
    for path in (*given.scans, given.out):
        check_name(path)
    if len(given.scans) == 1:
        return {given.scans[0]: given.out}
    if given.others or given.mask:
        raise CourseError("--with and --mask belong to one scan, and there are several.", "Give one scan at a time.")
    return dict(zip(given.scans, (given.out / name for name in _names(given.scans)), strict=True))


def _names(scans: Sequence[Path]) -> Iterator[str]:
    """A name for each scan that leads to no person, none of them twice."""
    from lib.preparation import name_of

    taken: set[str] = set()
    for scan in scans:
        name = base = name_of(scan)
        number = 1
        while name.casefold() in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name.casefold())
        yield name


def _check(given: argparse.Namespace, run: Path, jobs: Mapping[Path, Path]) -> None:
    """Refuse what would be refused for every scan."""
    from lib import cohort, detection

    cohort.of_run(str(run))
    detection.check_method(run, given.method)
    given.modality = given.modality and _modality(given.modality)
    for out in jobs.values():
        detection.check_free(out, given.overwrite)


def _go(given: argparse.Namespace, run: Path, jobs: Mapping[Path, Path]) -> int:
    refused = 0
    for number, (scan, out) in enumerate(jobs.items(), 1):
        print(f"{number}/{len(jobs)} {_shown(scan)}:", end="", flush=True)
        try:
            print(_one(given, run, scan, out))
        except CourseError as refusal:
            print(" refused")
            _say(refusal)
            refused += 1
        except OSError as error:
            print(" stopped")
            _say(_unusable(error))
            refused += 1
        except Exception as error:
            print(" failed")
            _say(_failed(error))
            refused += 1
    return int(refused > 0)


def _one(given: argparse.Namespace, run: Path, scan: Path, out: Path) -> str:
    """What was found in a scan and where it is written; the stages are told as they end."""
    from lib import detection

    scans = detection.scans_of(scan, run, given.modality) | dict(given.others)
    tell = {"tell": lambda stage: print(f" {stage},", end="", flush=True)}
    found = detection.detect(
        scans, run, given.method, device=given.device, brain=given.mask, threshold=given.threshold, **tell
    )
    started = time.perf_counter()
    detection.write(found, out, overwrite=given.overwrite)
    seconds, summary = time.perf_counter() - started, json.loads((out / "summary.json").read_bytes())
    share, places = f"{100 * summary['found_share']:.2g} % of the brain", summary["components"]
    much = share if summary["found_ml"] is None else f"{summary['found_ml']:.1f} ml, {share},"
    figures = f"{much} in {places} {'place' if places == 1 else 'places'} reach {found.threshold:.4g}."
    return "\n  ".join([f" writing {seconds:.1f} s.", figures, *found.warnings, str(out / "report.html")])


def _shown(path: Path) -> str:
    from lib import dicom, privacy

    return privacy.shown(path, dicom.patient(path))


def _unusable(error: OSError) -> CourseError:
    what = f"{error.filename or 'The folder for the results'} cannot be used: {error.strerror or type(error).__name__}."
    return CourseError(what, "Check the folder's permissions and the space on the disk.")


def _failed(error: Exception) -> CourseError:
    """A fault of the program itself; where it happened is noted without the message, which may hold a person's name."""
    log = lib.run_folder("error.log")
    log.parent.mkdir(exist_ok=True)
    log.write_text("".join([*traceback.format_tb(error.__traceback__), type(error).__name__]))
    return CourseError(f"The detection itself failed, with {type(error).__name__}.", f"{log} says where.")


def _say(refusal: CourseError) -> None:
    print(refusal.what, refusal.cure, sep="\n", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
