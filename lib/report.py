"""The report of a run: an index and a page for each notebook that open from disk, without a network."""

import json
import logging
import tomllib
from datetime import datetime
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from nbconvert.filters import strip_ansi
from pygments.formatters import HtmlFormatter

from lib import pages as notebook_pages
from lib import volumes
from lib.errors import CourseError
from lib.pages import TEMPLATES

PAGE_MB = 3
LABELS = {"method": "Method", "modality": "Modality", "postprocess": "Post-processing", "seed": "Seed"}
RESULTS = [
    *("method", "family", "modality", "postprocess", "stratum", "level", "metric"),
    *("value", "low", "high", "n", "seed", "note"),
]
TIMINGS = ["notebook", "method", "stage", "seconds", "peak_memory_gb"]
NUMBERS = {"value", "low", "high", "n", "seconds", "peak_memory_gb"}
METRICS = {
    (metric["level"], metric["name"]): metric
    for metric in tomllib.loads((TEMPLATES / "metrics.toml").read_text(encoding="utf-8"))["metric"]
}
MAIN = [key for key, metric in METRICS.items() if "main" in metric]
FURTHER = [key for key in METRICS if key not in MAIN]


def write(folder: Path) -> Path:
    """Write `index.html`, `notebooks/*.html` and, where there are maps, `scrubber.html` of a run; return the index.

    `folder` is `reports/<run>/`. Of its files only `run.json` must be there: a run that failed or
    was interrupted gets a report of what there is. Raises CourseError where `run.json` is missing
    or unreadable. Same folder, same bytes.
    """
    folder = Path(folder)
    run = _read_run(folder)
    environment = _environment()
    pages = {page["name"]: page for page in notebook_pages.read(folder, run)}
    _write_pages(folder, run, list(pages.values()), environment)
    index = folder / "index.html"
    context = _what_ran(run) | _figures(folder) | {"run": run, "pages": pages, "files": _files(folder)}
    context["data"] = _data_lines(run, context["cohort"])
    context["pictures"] = [picture for page in pages.values() for picture in page["pictures"]]
    context["scrubber"] = _write_scrubber(folder, run, context["embedded"], environment)
    _save(index, environment.get_template("index.html.j2").render(context))
    return index


def _read_run(folder: Path) -> dict:
    path = folder / "run.json"
    try:
        run = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CourseError(f"{path} is missing or damaged.", "Give the folder of a run.") from error
    return {"run": folder.name, "notebooks": {}, "data": []} | run


def _environment() -> Environment:
    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "duration": _duration,
        "gigabytes": lambda gb: "" if pd.isna(gb) else f"{gb:.2f} GB",
        "literal": lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False),
        "plain": lambda text: strip_ansi(text).strip(),
    }
    return environment


def _duration(seconds: float | None) -> str:
    if pd.isna(seconds):
        return ""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _save(path: Path, html: str) -> None:
    volumes.write_bytes(path, html.encode())
    if len(html) > PAGE_MB * 1e6:
        logging.getLogger(__name__).warning("%s is %.1f MB: its pictures are large.", path, len(html) / 1e6)


def _what_ran(run: dict) -> dict:
    began, ended = (run.get(key) and datetime.fromisoformat(run[key]) for key in ("started", "finished"))
    times = {"Started": began, "Finished": ended}
    facts = {"Profile": run.get("profile"), "Device": run.get("device"), "Seed": run.get("seed")}
    facts |= {"Kernel": run.get("kernel"), "Commit": run.get("commit")}
    facts |= {term: time and f"{time:%Y-%m-%d %H:%M:%S}" for term, time in times.items()}
    return {
        "facts": list(facts.items()),
        "elapsed": _duration((ended - began).total_seconds()) if began and ended else None,
        "embedded": any(line.lower().removeprefix("data: ").startswith("embedded") for line in run["data"]),
    }


def _data_lines(run: dict, cohort: dict) -> list[str]:
    """What was understood of the data, each line once; who was left out has a table of its own."""
    lines = dict.fromkeys([*run["data"], *cohort.get("notes", [])])
    repeated = "Left out: " if cohort.get("left_out") else ()
    return [line.removeprefix("Data: ") for line in lines if not line.startswith(repeated)]


def _files(folder: Path) -> list[str]:
    names = ("results.csv", "timings.csv", "run.json", "cohort.json")
    paths = [folder / name for name in names] + sorted(folder.glob("logs/*"))
    return [path.relative_to(folder).as_posix() for path in paths if path.is_file()]


def _figures(folder: Path) -> dict:
    """What `cohort.json`, `results.csv` and `timings.csv` say, each of which may be missing."""
    cohort = folder / "cohort.json"
    cohort = json.loads(cohort.read_bytes()) if cohort.is_file() else {}
    timings = _read_table(folder / "timings.csv", TIMINGS)
    results = _read_table(folder / "results.csv", RESULTS)
    return {
        "cohort": cohort,
        "timings": timings.to_dict("records"),
        "results": None if results.empty else _results(results, cohort.get("training")),
    }


def _read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    """A table with exactly `columns`: text with "" and numbers with NaN where the file has nothing."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (FileNotFoundError, pd.errors.EmptyDataError):
        table = pd.DataFrame()
    table = table.reindex(columns=columns, fill_value="")
    return table.assign(**{name: pd.to_numeric(table[name], errors="coerce") for name in NUMBERS & set(columns)})


def _results(results: pd.DataFrame, training: str | None) -> dict:
    results = results.assign(column=list(zip(results.level, results.metric, strict=True)))
    raw = results.postprocess.isin(["", "none"])
    plain, steps = results[raw], results[~raw & (results.stratum == "all")]
    labels = ["method"] + [name for name in list(LABELS)[1:] if plain[name].nunique() > 1]
    plain = _in_order(plain, labels)
    everyone = plain[plain.stratum == "all"]
    others = FURTHER + sorted(set(plain.column) - set(METRICS))
    groups = [(name, rows) for name, rows in plain.groupby("stratum") if name != "all"]
    groups += [(f"post-processing:{name}", rows) for name, rows in steps.groupby("postprocess")]
    return {
        "main": _table(everyone, MAIN, labels),
        "further": _table(everyone, others, labels),
        "strata": [{"name": name.replace(":", ": "), "table": _table(rows, MAIN, labels)} for name, rows in groups],
        "caption": _caption(plain, labels, training),
    }


def _in_order(results: pd.DataFrame, labels: list[str]) -> pd.DataFrame:
    """Rows by falling voxel AP over all patients, the same order in every table."""
    leading = results.value.where((results.column == MAIN[0]) & (results.stratum == "all"))
    ap = leading.groupby([results[name] for name in labels]).transform("max")
    return results.assign(order=-ap).sort_values(["order", *labels], kind="stable")


def _caption(results: pd.DataFrame, labels: list[str], training: str | None) -> str:
    first = results.iloc[0]
    same = [f"{LABELS[name].lower()} {first[name]}" for name in LABELS if name not in labels and first[name]]
    trained = f"Trained, and thresholds frozen before the test, on {training}."
    return " ".join([
        "Small type: 95 % interval, bootstrap over patients; n counts the test subjects behind a figure.",
        trained if training else "Thresholds are frozen before the test.",
        *([f"All rows: {', '.join(same)}."] if same else []),
    ])  # fmt: skip


def _table(rows: pd.DataFrame, metrics: list[tuple], labels: list[str]) -> dict:
    """Columns with heading, meaning and n; groups of rows, detectors before baselines."""
    rows = rows[rows.column.isin(metrics) & rows.value.notna()]
    columns = [_column(rows, metric) for metric in metrics if metric in set(rows.column)]
    groups = [
        {"title": "Baselines" if baseline else "Detectors", "rows": _rows(part, columns, labels)}
        for baseline, part in rows.groupby(rows.family == "baseline")
    ]
    common = _take_common([row for group in groups for row in group["rows"]])
    noted = any(row["notes"] for group in groups for row in group["rows"])
    shown = {"columns": columns, "labels": [LABELS[name] for name in labels]}
    return shown | {"groups": groups, "noted": noted, "common": common}


def _column(rows: pd.DataFrame, metric: tuple[str, str]) -> dict:
    counts = rows.n[rows.column == metric].mode()
    unknown = {"heading": f"{metric[1].replace('_', ' ')} ({metric[0]})"}
    return {"key": metric, "n": None if counts.empty else int(counts[0])} | METRICS.get(metric, unknown)


def _rows(part: pd.DataFrame, columns: list[dict], labels: list[str]) -> list[dict]:
    rows = []
    for key, group in part.groupby(labels, sort=False):
        found = {row.column: row for row in group.itertuples()}
        cells = [_cell(found.get(column["key"]), column) for column in columns]
        rows.append({"labels": key, "cells": cells, "notes": _notes(found, columns)})
    return rows


def _cell(row, column: dict) -> dict | None:
    if row is None:
        return None
    interval = "" if pd.isna(row.low) else f"{_number(row.low)} to {_number(row.high)}"
    count = "" if pd.isna(row.n) or row.n == column["n"] else int(row.n)
    return {"value": _number(row.value), "interval": interval, "n": count}


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _notes(found: dict, columns: list[dict]) -> dict[str, list[str]]:
    """The columns that each note speaks of; a row's note may hold several, parted by semicolons."""
    said: dict[str, list[str]] = {}
    for column in columns:
        row = found.get(column["key"])
        for words in filter(None, (part.strip() for part in row.note.split(";")) if row else ()):
            said.setdefault(words, []).append(column["heading"])
    return said


def _take_common(rows: list[dict]) -> list[str]:
    """Turn each row's notes into sentences, but those that every figure carries: they are said once."""
    whole = [{note for note, at in row["notes"].items() if len(at) == sum(map(bool, row["cells"]))} for row in rows]
    common = set.intersection(*whole) if whole else set()
    for row in rows:
        row["notes"] = [f"{', '.join(at)}: {note}" for note, at in row["notes"].items() if note not in common]
    return sorted(common)


def _write_pages(folder: Path, run: dict, pages: list[dict], environment: Environment) -> None:
    template = environment.get_template("page.html.j2")
    code_style = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    around = zip([None, *pages], pages, [*pages[1:], None], strict=False)
    for before, page, after in around:
        html = template.render(run=run, page=page, before=before, after=after, code_style=code_style)
        _save(folder / "notebooks" / f"{page['name']}.html", html)


def _write_scrubber(folder: Path, run: dict, embedded: bool, environment: Environment) -> dict | None:
    """Write `scrubber.html`; what it shows, or None and no page where the run has no maps that it could show."""
    page, shown = folder / "scrubber.html", None
    if (folder / "maps").is_dir():
        from lib import scrubber  # with all that reads maps

        shown = scrubber.read(folder)
    if shown:
        html = environment.get_template("scrubber.html.j2").render(run=run, embedded=embedded, **shown)
        _save(page, html)
    else:
        page.unlink(missing_ok=True)
    return shown
