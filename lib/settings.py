"""What a run is asked for: its notebooks, and their parameters as profile, file and command line set them."""

import ast
import difflib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lib.errors import CourseError

SHARED = {  # option of the command line: the parameter of each notebook that has it
    "data": "data",
    "healthy": "healthy_data",
    "layout": "layout",
    "modality": "modalities",
    "splits": "splits",
    "skip_broken": "skip_broken",
    "seed": "seed",
    "device": "device",
    "cluster": "cluster",
}
WORDS = {"true": True, "yes": True, "false": False, "no": False, "none": None, "null": None}
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
LIST = "./run_all.sh --list shows every notebook and parameter."


@dataclass(frozen=True)
class Parameter:
    """A name of a notebook's `parameters` cell: its value there and the comment behind it."""

    default: object
    help: str


@dataclass(frozen=True)
class Notebook:
    """A notebook of the course: what it needs made before it, what it comes after where that runs too, and what it
    promises to make in the run's folder."""

    name: str
    path: Path
    title: str
    needs: tuple[str, ...]
    after: tuple[str, ...]
    makes: tuple[str, ...]
    parameters: dict[str, Parameter]


@dataclass(frozen=True)
class Course:
    """The notebooks in their order, and the values of each profile by notebook and parameter."""

    notebooks: dict[str, Notebook]
    profiles: dict[str, dict]

    @classmethod
    def read(cls, folder: Path) -> "Course":
        """Read `course.toml` and the parameters of its notebooks; raises CourseError where one cannot be read."""
        try:
            table = tomllib.loads((folder / "course.toml").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CourseError(f"{folder / 'course.toml'} cannot be read: {error}.", "Mend or restore it.") from error
        notebooks = {}
        for name, entry in table["notebooks"].items():
            path = folder / f"{name}.ipynb"
            lists = (tuple(entry.get(key, ())) for key in ("needs", "after", "makes"))
            notebooks[name] = Notebook(name, path, entry["title"], *lists, read_parameters(path))
        return cls(notebooks, table.get("profiles", {}))

    def find(self, text: str) -> str:
        """A notebook's name from itself or its number."""
        for name in self.notebooks:
            if text in (name, name.partition("_")[0]):
                return name
        raise CourseError(f"There is no notebook {text!r}.", f"There are {', '.join(self.notebooks)}.")

    def choose(self, only: str | None, first: str | None) -> list[str]:
        """The notebooks that `--only` and `--from` leave, in the order of the course."""
        names = list(self.notebooks)
        if first:
            names = names[names.index(self.find(first)) :]
        wanted = [self.find(text.strip()) for text in only.split(",")] if only else names
        return [name for name in names if name in wanted]

    def values(self, settings: Mapping) -> dict[str, dict]:
        """The value of every parameter by notebook.

        Later ones win: the notebook's own, the profile's, those of `-f`, the shared options, `-p NAME`, `-p 03.NAME`.
        Raises CourseError for a name that no notebook has and a value of another type than the notebook's own.
        """
        values = {n.name: {p: known.default for p, known in n.parameters.items()} for n in self.notebooks.values()}
        for name, table in self.profiles.get(settings["profile"], {}).items():
            self._assign(values, {f"{name}.{parameter}": value for parameter, value in table.items()})
        self._assign(values, settings["file"])
        shared = {parameter: settings[option] for option, parameter in SHARED.items() if settings[option] is not None}
        self._assign(values, {p: v for p, v in shared.items() if any(p in table for table in values.values())})
        self._assign(values, settings["parameters"])
        for table in values.values():
            if "run" in table and settings["run"]:
                table["run"] = settings["run"]
        return json.loads(json.dumps(values))  # as run.json will say it: a tuple is a list

    def _assign(self, values: dict[str, dict], given: Mapping[str, object]) -> None:
        for target, value in sorted(given.items(), key=lambda item: "." in item[0]):
            prefix, _, parameter = target.rpartition(".")
            for name in self._having(prefix, parameter):
                values[name][parameter] = self._converted(name, parameter, value)

    def _having(self, prefix: str, parameter: str) -> list[str]:
        names = [self.find(prefix)] if prefix else list(self.notebooks)
        having = [name for name in names if parameter in self.notebooks[name].parameters]
        if parameter == "run":
            raise CourseError("The parameter 'run' is not set by -p.", "Name the run with --run.")
        if not having:
            known = sorted({p for name in names for p in self.notebooks[name].parameters} - {"run"})
            close = difflib.get_close_matches(parameter, known, n=1)
            whose = names[0] if prefix else "No notebook"
            hint = f"Did you mean {close[0]!r}? " if close else ""
            has = "has no" if prefix else "has a"
            raise CourseError(f"{whose} {has} parameter {parameter!r}.", f"{hint}There are {', '.join(known)}. {LIST}")
        return having

    def _converted(self, name: str, parameter: str, value):
        default = self.notebooks[name].parameters[parameter].default
        try:
            return convert(value, default)
        except ValueError as expected:
            example = f"as {default!r} is" if default != "" else ""
            what = f"{parameter} of {name} cannot be {value!r}."
            raise CourseError(what, f"Give {expected} {example}".strip() + ".") from None


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """The parameters of a notebook by name; papermill's own inspection loses a line whose comment holds a `=`.

    Raises CourseError where the file is no notebook or the cell holds more than literals.
    """
    try:
        return dict(_literals(_parameters_cell(json.loads(notebook.read_bytes()))))
    except OSError as error:
        raise CourseError(f"{notebook} is not there.", "Restore it from the repository.") from error
    except (ValueError, SyntaxError, KeyError, AttributeError) as error:
        what = f"{notebook} is no notebook, or its parameters are not literals with a name each."
        raise CourseError(what, "Mend it, or restore it from the repository.") from error


def _parameters_cell(notebook: dict) -> str:
    tagged = (c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", ()))
    return "".join(next(tagged, {"source": ""})["source"])


def _literals(source: str):
    lines = source.splitlines()
    for node in ast.parse(source).body:
        behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
        name = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        yield name.id, Parameter(ast.literal_eval(node.value), behind.partition("#")[2].strip())


def convert(value, default):
    """What `value`, a text or a literal, means where a notebook has `default`.

    Raises ValueError saying what is expected where it is of another type.
    """
    kind = type(default)
    if default is None:
        return _literal(value)
    try:
        if kind in (list, tuple):
            return kind(convert(item, default[0] if default else None) for item in _items(value))
        return {bool: _truth, int: _whole, float: _finite, str: _text}[kind](value)
    except (ValueError, KeyError):
        raise ValueError(KINDS.get(kind, f"a {kind.__name__}")) from None


def _literal(value):
    if not isinstance(value, str):
        return value
    if value.lower() in WORDS:
        return WORDS[value.lower()]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _truth(value) -> bool:
    truth = WORDS[str(value).lower()]
    if truth is None:
        raise ValueError
    return truth


def _whole(value) -> int:
    return int(str(value))


def _finite(value) -> float:
    if not math.isfinite(number := float(str(value))):
        raise ValueError
    return number


def _text(value) -> str:
    if isinstance(value, (list, dict)):
        raise ValueError
    return str(value)


def _items(value) -> list:
    if isinstance(value, (list, tuple)):
        return list(value)
    return [item.strip(" '\"") for item in str(value).strip("[]() ").split(",") if item.strip()]
