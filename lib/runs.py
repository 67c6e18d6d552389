"""The folder of a run and the record kept there: what was asked, what is finished, where and with what."""

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lib
from lib import volumes
from lib.errors import CourseError
from lib.settings import Course

PACKAGES = (
    *("torch", "monai", "numpy", "scipy", "scikit-image", "scikit-learn"),
    *("nibabel", "nilearn", "pandas", "matplotlib", "papermill"),
)
TIMING = ("notebook", "method", "stage", "seconds", "peak_memory_gb")


@contextlib.contextmanager
def claimed(name: str | None, profile: str, resume: bool, overwrite: bool) -> Iterator[Path]:
    """The folder of a run, held against a second process; where nothing came into it, it goes again."""
    name = name or (_newest_unfinished() if resume else None)
    folder = _named(name, resume, overwrite) if name else _dated(profile)
    hold = os.open(folder, os.O_RDONLY)
    try:
        _lock(hold, folder)
        yield folder
    finally:
        os.close(hold)
        with contextlib.suppress(OSError):
            folder.rmdir()
            folder.parent.rmdir()


def _lock(hold: int, folder: Path) -> None:
    try:
        fcntl.flock(hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        what = f"The run {folder.name!r} is at work in another process."
        raise CourseError(what, "Wait for it, or use another --run.") from None


def _named(name: str, resume: bool, overwrite: bool) -> Path:
    folder = lib.run_folder(name)
    if not re.fullmatch(r"\w[\w .+-]*", name):
        raise CourseError(f"{name!r} cannot name a run.", "Use letters, digits, points, dashes and spaces.")
    if resume and overwrite:
        raise CourseError("--resume keeps a run and --overwrite clears it.", "Give one of them.")
    if resume and not read(folder):
        runs = ", ".join(record["run"] for record in records()) or "none"
        raise CourseError(f"There is no run {name!r} to resume.", f"There are: {runs}.")
    if not _make(folder) and not (resume or overwrite):
        cure = "Go on with it by --resume, clear it by --overwrite, or use another --run."
        raise CourseError(f"There is a run {name!r} already.", cure)
    return folder


def _dated(profile: str) -> Path:
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{profile}"
    folders = map(lib.run_folder, (name, *(f"{name}_{i}" for i in range(2, 100))))
    return next(folder for folder in folders if _make(folder))


def _make(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        what = f"{folder} cannot be made: {error.strerror}."
        raise CourseError(what, "Make the folder reports/ writable.") from error
    return True


def _newest_unfinished() -> str:
    unfinished = [record for record in records() if record["status"] != "done"]
    if not unfinished:
        raise CourseError("There is no unfinished run to resume.", "Start one, or name one with --run.")
    return unfinished[0]["run"]


def records() -> list[dict]:
    """What the runs in `reports/` say of themselves, the newest first."""
    folders = sorted(lib.run_folder(".").glob("*/run.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [record for record in map(read, (path.parent for path in folders)) if record]


def read(folder: Path) -> dict:
    """The record of a run; empty where there is none that this version can read."""
    try:
        record = json.loads((folder / "run.json").read_bytes())
        return record if {"run", "status", "settings", "notebooks"} <= record.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def plan(course: Course, settings: dict, stored: dict, folder: Path) -> dict:
    """The record of the run before it starts: notebooks that are finished as they were, the others waiting.

    Finished: done before with these parameters, by this notebook, after notebooks that are finished too, and what it
    promised to make is there.
    """
    values, before = course.values(settings), stored.get("notebooks", {})
    chosen, entries = course.choose(settings["only"], settings["from"]), {}
    for name, notebook in course.notebooks.items():
        source = hashlib.sha256(notebook.path.read_bytes()).hexdigest()[:16]
        fresh = {"title": notebook.title, "status": "waiting", "seconds": None, "peak_memory_gb": None}
        fresh |= {"parameters": values[name], "source": source, "error": None}
        old = before.get(name, {})
        same = old.get("status") == "done" and _what(old) == _what(fresh)
        before_it = [*notebook.needs, *(one for one in notebook.after if one in entries)]
        upstream = all(entries.get(one, fresh)["status"] == "done" for one in before_it)
        finished = same and upstream and not lacking(folder, notebook.makes)
        if name in chosen or old:
            entries[name] = old if finished else fresh
    return {**stored, "run": settings["run"], "settings": settings, "notebooks": entries}


def _what(entry: dict) -> tuple[str, dict]:
    """What of a notebook's record decides its results; by whom they were computed does not."""
    return entry["source"], {name: value for name, value in entry["parameters"].items() if name != "cluster"}


def waiting(course: Course, settings: dict, record: dict) -> list[str]:
    """The notebooks to run; raises CourseError where one needs what no notebook has made or will make."""
    entries = record["notebooks"]
    chosen = course.choose(settings["only"], settings["from"])
    waiting = [name for name in chosen if entries[name]["status"] != "done"]
    for name in waiting:
        needs = course.notebooks[name].needs
        lacking = [n for n in needs if n not in waiting and entries.get(n, {}).get("status") != "done"]
        if lacking:
            what = f"{name} needs {', '.join(lacking)}, which this run has not made with these settings."
            cure = f"Add {', '.join(lacking)} to --only, or --resume a run that has made it."
            raise CourseError(what, cure)
    return waiting


def lacking(folder: Path, makes: tuple[str, ...]) -> list[str]:
    """What is promised and not there; an empty folder is not there."""
    paths = {name: folder / name for name in makes}
    return [n for n, path in paths.items() if not path.exists() or (path.is_dir() and not any(path.iterdir()))]


def circumstances(settings: dict, record: dict) -> dict:
    """Where and with what a run happens; raises CourseError where kernel or device are not there."""
    _check_kernel(settings["kernel"])
    tables = [entry["parameters"] for entry in record["notebooks"].values()]
    return {
        "data": record.get("data", []),
        "profile": settings["profile"],
        "device": _device(settings["device"]),
        "seed": next((table["seed"] for table in tables if "seed" in table), settings["seed"]),
        "kernel": settings["kernel"],
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **dict(_versions())},
        "started": record.get("started") or _now(),
    }


def _check_kernel(name: str) -> None:
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")  # a user's own python3 kernel has other packages
    manager = KernelSpecManager()
    try:
        manager.get_kernel_spec(name)
    except NoSuchKernel as error:
        there = ", ".join(sorted(manager.find_kernel_specs()))
        raise CourseError(f"There is no Jupyter kernel {name!r}.", f"Give --kernel one of: {there}.") from error


def _device(name: str) -> str:
    if name != "cpu":
        from lib.training import choose_device

        name = choose_device(name).type
    if name == "cuda":
        import torch

        return f"cuda ({torch.cuda.get_device_name()})"
    return f"{name} ({_processor()}, {os.cpu_count()} cores)"


def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.machine()


def _commit() -> str:
    """The repository's commit, `+changes` where files differ from it, `unknown` without git."""
    git = ["git", "-C", str(lib.ROOT)]
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(lib.ROOT.parent)}
    ask = {"env": environment, "capture_output": True, "text": True, "check": True}
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], **ask).stdout.strip()
        return commit + ("+changes" if subprocess.run([*git, "status", "--porcelain"], **ask).stdout else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            yield package, version(package)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def save(folder: Path, record: dict, status: str) -> None:
    """Write `run.json` and `timings.csv` as things stand."""
    record |= {"status": status, "finished": None if status == "running" else _now()}
    volumes.write_bytes(folder / "run.json", json.dumps(record, indent=1, ensure_ascii=False).encode())
    text = io.StringIO()
    table = csv.DictWriter(text, TIMING, lineterminator="\n")
    table.writeheader()
    table.writerows(_timings(folder, record))
    volumes.write_bytes(folder / "timings.csv", text.getvalue().encode())


def _timings(folder: Path, record: dict) -> list[dict]:
    """A row a notebook, and those that notebooks add to `logs/timings.jsonl`; of equal ones the last."""
    rows = {}
    for name, entry in record["notebooks"].items():
        if entry["seconds"] is not None:
            figures = {key: entry[key] for key in ("seconds", "peak_memory_gb")}
            rows[name, "", "notebook"] = {"notebook": name, "method": "", "stage": "notebook", **figures}
    for added in _added_timings(folder / "logs" / "timings.jsonl"):
        row = {column: added.get(column, "") for column in TIMING}
        rows[row["notebook"], row["method"], row["stage"]] = row
    return list(rows.values())


def _added_timings(path: Path) -> Iterator[dict]:
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # a kill leaves half a line
            yield json.loads(line)


def status(record: dict) -> str:
    """How a run that has ended stands: failed, done, or interrupted where notebooks wait."""
    states = {entry["status"] for entry in record["notebooks"].values()}
    return "failed" if "failed" in states else "done" if states == {"done"} else "interrupted"


def past_seconds(settings: Mapping) -> dict[str, float]:
    """What each notebook took when it last ran on this data with this profile."""
    past = {}
    for record in reversed(records()):
        if all(record["settings"].get(key) == settings[key] for key in ("profile", "data", "healthy")):
            past |= {name: entry["seconds"] for name, entry in record["notebooks"].items() if entry["status"] == "done"}
    return past
