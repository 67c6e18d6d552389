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
from dataclasses import asdict, fields
from pathlib import Path

import lib
from lib import runner, runs
from lib.errors import CourseError
from lib.runner import Place, clock
from lib.settings import Course

DEFAULTS = {"profile": "quick", "kernel": "python3", "device": "auto"}
PREPARES = "01_preprocessing"
CURES = {
    "KernelDied": "If memory ran out: close other programs, or ask for less by --profile quick or -p.",
    "NoKernel": "See whether JupyterLab can start this kernel, or leave --kernel out.",
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
    resume, overwrite, quiet = (given.pop(mode) for mode in ("resume", "overwrite", "quiet"))
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
        return _run(folder, course, record, waiting, quiet)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise CourseError(f"{message[0].upper()}{message[1:]}.", "./run_all.sh --help shows the options.")


def _parse(arguments: list[str] | None) -> dict:
    """The options by name; None where one is not given."""
    parser = _Parser("./run_all.sh", description="Runs the notebooks into one report.", allow_abbrev=False)
    add = parser.add_argument
    add("--data", metavar="DIR", type=_from_root, help="folder of scans; without it the embedded cohort")
    add("--layout", metavar="NAME", help="how that folder is laid out, where it is not recognised")
    add("--modality", metavar="FLAIR[,T2]", help="what the detectors see")
    add("--splits", metavar="FILE", type=_from_root, help="which subject is for training, validation, test")
    add("--skip-broken", action="store_true", default=None, help="leave broken scans out, do not refuse")
    add("--profile", choices=("quick", "full", "tiny"), help="parameter values: quick (default), full or tiny")
    add("--run", metavar="NAME", help="name of the run and its folder in reports/; else date, time and profile")
    add("--only", metavar="01,03", help="run these notebooks")
    add("--from", metavar="05", help="run this notebook and those behind it")
    add("--resume", action="store_true", help="go on with --run, else the newest unfinished run")
    add("--overwrite", action="store_true", help="clear the folder of --run NAME first")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), help="where networks compute (auto)")
    add("--kernel", metavar="NAME", help="Jupyter kernel (python3)")
    add("--seed", metavar="N", type=int, help="the one source of randomness")
    add("-p", metavar="NAME=VALUE", dest="parameters", action="append", type=_assignment, default=[], help=P_HELP)
    add("-f", metavar="FILE.yml", dest="file", type=_values_file, default={}, help="parameter values from a file")
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
    from lib import intake
    from lib.preprocessing import Recipe

    recipe = {f.name: values[f.name] for f in fields(Recipe) if f.name in values and f.name != "modalities"}
    Recipe(**recipe)  # refuses what it cannot prepare
    known = inspect.signature(intake.gather).parameters
    with contextlib.redirect_stdout(io.StringIO() if quiet else sys.stdout):
        gathered = intake.gather(**{name: value for name, value in values.items() if name in known})
        print("\n".join(gathered.notes))
    return list(gathered.notes)


def _run(folder: Path, course: Course, record: dict, waiting: list[str], quiet: bool) -> int:
    kept = [name for name, entry in record["notebooks"].items() if entry["status"] == "done"]
    if kept and not quiet:
        print(f"Finished before, not repeated: {', '.join(kept)}.")
    past = runs.past_seconds(record["settings"])
    with contextlib.suppress(KeyboardInterrupt):
        for name in waiting:
            _run_notebook(folder, course, record, name, _place(waiting, name, past, quiet))
            if record["notebooks"][name]["status"] != "done":
                break
    if waiting:
        runs.save(folder, record, runs.status(record))
    return _close(record, waiting, _report(folder))


def _place(waiting: list[str], name: str, past: Mapping, quiet: bool) -> Place:
    number = waiting.index(name) + 1
    later = [past.get(n) for n in waiting[number:]]
    known = None if None in later else sum(later)
    return Place(f"{number}/{len(waiting)} {name}", past.get(name), known, quiet)


def _run_notebook(folder: Path, course: Course, record: dict, name: str, place: Place) -> None:
    notebook, entry = course.notebooks[name], record["notebooks"][name]
    entry |= {"status": "running", "error": None}
    runs.save(folder, record, "running")
    if not place.quiet and not sys.stderr.isatty():
        print(f"{place.label} …", flush=True)
    values = {p: v for p, v in entry["parameters"].items() if p == "run" or v != notebook.parameters[p].default}
    target, log = folder / "notebooks" / f"{name}.ipynb", folder / "logs" / f"{name}.log"
    target.parent.mkdir(exist_ok=True)
    kernel = record["settings"]["kernel"]
    outcome = runner.execute(notebook.path, target, log, values, kernel=kernel, root=lib.ROOT, place=place)
    entry |= asdict(outcome)
    lacking = runs.lacking(folder, notebook.makes)
    if outcome.status == "done" and lacking:
        message = f"It ended without making {', '.join(lacking)}."
        entry |= {"status": "failed", "error": {"cell": None, "name": "MissingOutput", "message": message}}
    if not place.quiet and entry["status"] == "done":
        memory = f"peak memory {outcome.peak_memory_gb:.1f} GB"
        print(f"{place.label} done in {clock(outcome.seconds)}, {memory}", flush=True)


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
