"""Runs the course: `python -m lib.course`, or `./run_all.sh`, which sets up first."""

import argparse
import contextlib
import inspect
import io
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import lib
from lib import runs
from lib.errors import CourseError
from lib.jobs import Jobs, Place, clock
from lib.runner import Outcome
from lib.settings import Course

DEFAULTS = {"profile": "quick", "kernel": "python3", "device": "auto"}
PREPARES = "01_preprocessing"
CURES = {
    "KernelDied": "If memory ran out: give --jobs 1, or ask for less by --profile quick or -p.",
    "NoKernel": "See whether JupyterLab can start this kernel, or leave --kernel out.",
    "NoRunner": "If memory ran out: --jobs 1 runs one notebook at a time.",
    "SystemExit": "Take sys.exit or exit out of the cell.",
    "MissingOutput": "See what its last cells say, or mend 'makes' in notebooks/course.toml.",
}
P_HELP = "set a parameter in every notebook that has it, or in one: -p 03.NAME=VALUE"
SAID = {"CourseError", *CURES}  # errors whose message is for people


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status, and shows people no traceback.

    0 done, 1 a notebook failed, 2 the call or the data was refused and nothing started, 130 interrupted.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _main(arguments)
    except CourseError as refusal:
        print(refusal.what, refusal.cure, sep="\n", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. --resume goes on with a run that had begun.", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"{error.filename or lib.ROOT} cannot be used: {error.strerror}.", file=sys.stderr)
        print("Check the folder's permissions and the space on the disk; --resume then goes on.", file=sys.stderr)
        return 1
    except Exception as error:
        log = lib.run_folder("error.log")
        log.parent.mkdir(exist_ok=True)
        log.write_text(traceback.format_exc())
        print(f"The course itself failed, with {type(error).__name__}: {error}", file=sys.stderr)
        print(f"{log} says where.", file=sys.stderr)
        return 1


def _main(arguments: list[str] | None) -> int:
    given = _parse(arguments)
    course = Course.read(lib.ROOT / "notebooks")
    if given.pop("list"):
        print("\n".join(_listing(course, given)))
        return 0
    resume, overwrite, quiet, jobs = (given.pop(mode) for mode in ("resume", "overwrite", "quiet", "jobs"))
    with runs.claimed(given["run"], given["profile"] or DEFAULTS["profile"], resume, overwrite) as folder:
        stored = runs.read(folder) if resume else {}
        settings = _settings(course, stored, given) | {"run": folder.name}
        record = runs.plan(course, settings, stored, folder)
        waiting = runs.waiting(course, settings, record)
        if waiting:
            record |= runs.circumstances(settings, record)
        if PREPARES in waiting:
            record["data"] = _examine(record["notebooks"][PREPARES]["parameters"], quiet)
        if overwrite:
            runs.clear(folder)
        return _Run(folder, course, record, waiting, quiet).go(jobs or _at_once(record.get("device", "")))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise CourseError(f"{message[0].upper()}{message[1:]}.", "./run_all.sh --help shows the options.")


def _parse(arguments: list[str] | None) -> dict:
    """The options by name; None where one is not given."""
    parser = _Parser("./run_all.sh", description="Runs the notebooks into one report.", allow_abbrev=False)
    add = parser.add_argument
    add("--data", metavar="DIR", type=_from_root, help="folder of scans; without it the embedded cohort")
    add("--healthy", metavar="DIR", type=_from_root, help="folder of healthy subjects' scans, beside --data")
    add("--layout", metavar="NAME", help="how that folder is laid out, where it is not recognised")
    add("--modality", metavar="FLAIR[,T2]", help="what the detectors see; else what is usual in the folder")
    add("--splits", metavar="FILE", type=_from_root, help="which subject is for training, validation, test")
    add("--skip-broken", action="store_true", default=None, help="leave broken scans out, do not refuse")
    add("--profile", choices=("quick", "full", "tiny"), help="parameter values: quick (default), full or tiny")
    add("--run", metavar="NAME", help="name of the run and its folder in reports/; else date, time and profile")
    add("--only", metavar="01,03", help="run these notebooks")
    add("--from", metavar="05", help="run this notebook and those behind it")
    add("--resume", action="store_true", help="go on with --run, else the newest unfinished run")
    add("--overwrite", action="store_true", help="clear the folder of --run NAME first")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), help="where networks compute (auto)")
    add("--cluster", metavar="tcp://HOST:PORT", help="a Dask scheduler whose workers examine, prepare and judge")
    add("--kernel", metavar="NAME", help="Jupyter kernel (python3)")
    add("--seed", metavar="N", type=int, help="the one source of randomness")
    add("-p", metavar="NAME=VALUE", dest="parameters", action="append", type=_assignment, default=[], help=P_HELP)
    add("-f", metavar="FILE.yml", dest="file", type=_values_file, default={}, help="parameter values from a file")
    add("--jobs", metavar="N", type=_count, help="notebooks at a time (2 on a processor, 1 on an accelerator)")
    add("--list", action="store_true", help="show the notebooks and every parameter with its value and unit")
    add("--quiet", action="store_true", help="say only how it ended")
    options = vars(parser.parse_args(arguments))
    return options | {"parameters": dict(options["parameters"])}


def _from_root(path: str) -> str:
    """A path as the notebooks need it, whose working folder is the repository."""
    path = os.path.expanduser(path)
    return path if not path or os.path.isabs(path) else os.path.relpath(os.path.abspath(path), lib.ROOT)


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise CourseError(f"-p {text} sets nothing.", "Write -p NAME=VALUE or -p 03.NAME=VALUE.")
    return name.strip(), value


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise CourseError(f"--jobs cannot be {text!r}.", "Give a whole number from 1.")
    return int(text)


def _values_file(path: str) -> dict[str, object]:
    """Values of a YAML file under `NAME` or `03.NAME`, all as texts; the notebook's own value says what they mean."""
    import yaml

    try:
        found = yaml.load(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader) or {}
        pairs = [(k, v) for k, v in found.items() if not isinstance(v, dict)]
        return dict(pairs) | {f"{k}.{p}": v for k, d in found.items() if isinstance(d, dict) for p, v in d.items()}
    except OSError as error:
        raise CourseError(f"{path} cannot be read: {error.strerror}.", "Give -f the path of a YAML file.") from error
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        cure = "Write a line a parameter: `epochs: 20`, or under `03:` for one notebook."
        raise CourseError(f"{path} is not a YAML file of parameters.", cure) from error


def _listing(course: Course, given: dict) -> Iterator[str]:
    values = course.values(_settings(course, {}, given))
    for notebook in course.notebooks.values():
        yield f"{notebook.name}  {notebook.title}"
        for name, parameter in notebook.parameters.items():
            yield f"  {f'{name} = {values[notebook.name][name]!r}':<36}  {parameter.help}".rstrip()


def _settings(course: Course, stored: Mapping, given: dict) -> dict:
    """What is given now, over what the run was started with; its choice of notebooks holds until they are done."""
    before = stored.get("settings", {})
    if given["only"] or given["from"] or not _unfinished(course, stored):
        before = {**before, "only": None, "from": None}
    together = {table: {**before.get(table, {}), **given[table]} for table in ("file", "parameters")}
    return {**given, **DEFAULTS, **before, **{k: v for k, v in given.items() if v is not None}, **together}


def _unfinished(course: Course, stored: Mapping) -> list[str]:
    if not stored:
        return []
    chosen = course.choose(stored["settings"].get("only"), stored["settings"].get("from"))
    return [name for name in chosen if stored["notebooks"].get(name, {}).get("status") != "done"]


def _examine(values: dict, quiet: bool) -> list[str]:
    from lib import intake, preparation, workers
    from lib.preprocessing import Recipe

    if values.get("cluster"):
        workers.check(values["cluster"])
    chosen = {f.name: values[f.name] for f in fields(Recipe) if f.name in values}
    recipe = Recipe(**chosen)
    known = inspect.signature(intake.gather).parameters
    with contextlib.redirect_stdout(io.StringIO() if quiet else sys.stdout):
        gathered = intake.gather(**{name: value for name, value in values.items() if name in known})
        print("\n".join(gathered.notes))
        print(preparation.space(gathered, replace(recipe, modalities=gathered.modalities)))
    return list(gathered.notes)


@dataclass(frozen=True)
class _Run:
    """A run at work: its folder, the record there, and the notebooks that wait, in their order."""

    folder: Path
    course: Course
    record: dict
    waiting: list[str]
    quiet: bool

    def go(self, most: int) -> int:
        """Run what waits, so many notebooks at a time, and write the report; the exit status."""
        kept = [name for name, entry in self.record["notebooks"].items() if entry["status"] == "done"]
        if kept and not self.quiet:
            print(f"Finished before, not repeated: {', '.join(kept)}.")
        jobs = Jobs(self.quiet)
        try:
            self._run_all(jobs, most)
        except KeyboardInterrupt:
            for place, outcome in jobs.stop():
                self._note(place, outcome)
        if self.waiting:
            runs.save(self.folder, self.record, runs.status(self.record))
        return _close(self.record, self.waiting, _report(self.folder))

    def _run_all(self, jobs: Jobs, most: int) -> None:
        """Start each as soon as what it needs is there; after a failure those at work end, and no other begins."""
        left, past = list(self.waiting), runs.past_seconds(self.record["settings"])
        while left or jobs:
            for name in list(filter(self._can_start, left))[: most - len(jobs)]:
                left.remove(name)
                self._start(jobs, self._place(name, past, left, most), most)
            place, outcome = jobs.next()
            if self._note(place, outcome) != "done":
                left.clear()

    def _can_start(self, name: str) -> bool:
        notebook, entries = self.course.notebooks[name], self.record["notebooks"]
        before = [*notebook.needs, *(one for one in notebook.after if one in self.waiting)]
        return all(entries[one]["status"] == "done" for one in before)

    def _place(self, name: str, past: Mapping, left: list[str], most: int) -> Place:
        later = [past.get(other) for other in left]
        number = f"{self.waiting.index(name) + 1}/{len(self.waiting)}"
        return Place(name, number, past.get(name), None if None in later else sum(later) / most)

    def _start(self, jobs: Jobs, place: Place, most: int) -> None:
        name, threads = place.name, max(1, (os.cpu_count() or 1) // most)
        notebook, entry = self.course.notebooks[name], self.record["notebooks"][name]
        entry |= {"status": "running", "error": None}
        runs.save(self.folder, self.record, "running")
        if not self.quiet and not sys.stderr.isatty():
            print(f"{place.number} {name} …", flush=True)
        target, log = self.folder / "notebooks" / f"{name}.ipynb", self.folder / "logs" / f"{name}.log"
        target.parent.mkdir(exist_ok=True)
        values = {p: v for p, v in entry["parameters"].items() if p == "run" or v != notebook.parameters[p].default}
        call = {"kernel": self.record["settings"]["kernel"], "root": lib.ROOT}
        jobs.start(place, threads, source=notebook.path, target=target, log=log, values=values, **call)

    def _note(self, place: Place, outcome: Outcome) -> str:
        """Record how a notebook ended and say so; its status."""
        entry = self.record["notebooks"][place.name]
        entry |= asdict(outcome)
        lacking = runs.lacking(self.folder, self.course.notebooks[place.name].makes)
        if outcome.status == "done" and lacking:
            message = f"It ended without making {', '.join(lacking)}."
            entry |= {"status": "failed", "error": {"cell": None, "name": "MissingOutput", "message": message}}
        runs.save(self.folder, self.record, "running")
        if not self.quiet and entry["status"] == "done":
            memory = f"peak memory {outcome.peak_memory_gb:.1f} GB"
            print(f"{place.number} {place.name} done in {clock(outcome.seconds)}, {memory}", flush=True)
        return entry["status"]


def _at_once(device: str) -> int:
    """Networks this small gain nothing from a second core; notebooks do. An accelerator's memory holds one."""
    return min(2, os.cpu_count() or 1) if device.startswith("cpu") else 1


def _report(folder: Path) -> str:
    """The page to open; a report that cannot be written must not hide how the run went."""
    from lib import report

    try:
        return str(report.write(folder))
    except Exception as error:
        print(f"The report could not be written: {error or type(error).__name__}", file=sys.stderr)
        return str(folder / "run.json")


def _close(record: dict, waiting: list[str], page: str) -> int:
    """Say how it ended, which page to open and what to do next; the exit status."""
    entries = {name: record["notebooks"][name] for name in waiting}
    again = f"./run_all.sh --resume --run {shlex.quote(record['run'])}"
    failed = next((name for name, entry in entries.items() if entry["status"] == "failed"), None)
    if failed:
        _explain(failed, entries[failed]["error"])
        print(f"The report shows it in its place: {page}; once mended, {again} goes on.", file=sys.stderr)
        return 1
    if any(entry["status"] != "done" for entry in entries.values()):
        print(f"Interrupted. {again} goes on; the report so far: {page}", file=sys.stderr)
        return 130
    rest = [name for name, entry in record["notebooks"].items() if entry["status"] != "done"]
    print(f"Done. Open the report: {page}")
    if rest:
        print(f"Still to run with these settings: {', '.join(rest)}; {again} does it.")
    return 0


def _explain(name: str, error: dict) -> None:
    """Two lines: where it failed, and the error with its cure."""
    cell = f" in cell [{error['cell']}]" if error["cell"] else ""
    message = " ".join(error["message"].split("\n")) if error["name"] in SAID else error["message"].partition("\n")[0]
    kind = "" if error["name"] in SAID else f"{error['name']}: "
    cure = CURES.get(error["name"], "")
    print(f"{name} failed{cell}.", f"{kind}{message[:400]} {cure}".rstrip(), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
