"""Public data sets, when asked for: `python -m lib.fetch` lists them, `python -m lib.fetch ixi_t1` fetches one."""

import argparse
import shlex
import sys
from pathlib import Path

import lib
from lib.errors import CourseError, check_choice


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit status, and shows people no traceback.

    0 done, 1 a data set did not come or is not whole, 2 the call was refused, 130 interrupted.
    """
    try:
        given = _parse(arguments)
        return _go(given) if given.name else _list()
    except CourseError as refusal:
        print(refusal.what, refusal.cure, sep="\n", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted; what has come is kept, and the same command goes on from there.", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise CourseError(f"{message[0].upper()}{message[1:]}.", "python -m lib.fetch --help shows the options.")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        "python -m lib.fetch", description="Fetches a public data set, or says how to come by one.",
        epilog="Without a name: lists the data sets. Nothing is downloaded but by this command.", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", nargs="?", default="", help="the data set, as ixi_t1")
    parser.add_argument("--to", metavar="DIR", type=Path, default=lib.data_folder("downloads"),
                        help="folder for data sets (data/downloads)")  # fmt: skip
    parser.add_argument(
        "--check", metavar="DIR", type=Path, help="only look whether the data set is whole in this folder"
    )
    given = parser.parse_args(arguments)
    if given.check and not given.name:
        parser.error("--check needs the name of a data set")
    if given.name:
        from lib.sources import SOURCES

        check_choice("The data set", given.name, SOURCES)
    return given


def _list() -> int:
    from lib.downloads import gigabytes
    from lib.sources import SOURCES

    for name, source in SOURCES.items():
        size = gigabytes(source.size) if source.size else "registration"
        print(f"{name:12} {size:>12}  {source.subjects:>4} subjects  {', '.join(source.modalities):18}  {source.title}")
        print(f"{'':34}{source.licence}; {source.page}")
    print("python -m lib.fetch NAME fetches one, or says how to come by it.")
    return 0


def _go(given: argparse.Namespace) -> int:
    from lib import sources

    source = sources.SOURCES[given.name]
    if given.check:
        return _check(source, given.check)
    print(*sources.told(given.name), sep="\n")
    if not source.remotes:
        return 0
    try:
        folder, notes = sources.bring(source, given.to)
        print(*notes, sep="\n")
        return _check(source, folder, given.to / (source.data or source.folder))
    except CourseError as refusal:
        print(refusal.what, refusal.cure, sep="\n", file=sys.stderr)
    except OSError as error:
        what = f"{error.filename or given.to} cannot be used: {error.strerror or type(error).__name__}."
        print(what, "Check the folder's permissions and the space on the disk.", sep="\n", file=sys.stderr)
    return 1


def _check(source, folder: Path, data: Path | None = None) -> int:
    """Say whether a folder holds the data set whole, and how the course runs on it, or on `data`."""
    from lib import sources

    notes, problems = sources.check(source, folder)
    print(*notes, sep="\n")
    if problems:
        print("It is not whole.", *problems, sep="\n", file=sys.stderr)
        return 1
    print(f"It is whole: ./run_all.sh {source.run.format(shlex.quote(str(data or folder)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
