"""What `participants.tsv` says of subjects: health, site and kind of lesion."""

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lib import privacy
from lib.errors import CourseError
from lib.subjects import Subject

CONTROLS = ("control", "controls", "healthy", "healthy control", "healthy controls", "hc", "cn", "nc", "normal")


def told(folder: Path, subjects: Sequence[Subject]) -> tuple[tuple[Subject, ...], tuple[str, ...]]:
    """Add what `participants.tsv` says of health, site and lesion kind; notes on how it was read."""
    path = folder / "participants.tsv"
    if not path.exists():
        return tuple(subjects), ()
    listed = [{(k or "").strip().lower(): v for k, v in row.items()} for row in table(path, "\t", ("participant_id",))]
    rows = {row["participant_id"]: row for row in listed}
    if len(rows) < len(listed):
        twice = Counter(row["participant_id"] for row in listed).most_common(1)[0][0]
        said = privacy.without(twice, frozenset().union(*(s.hidden for s in subjects)))
        raise CourseError(f"{path} has more than one row for {said}.", "Keep one of them.")
    known = tuple(_one(path, s, rows[s.id]) if s.id in rows else s for s in subjects)
    return known, tuple(_by_group(known, rows))


def _one(path: Path, subject: Subject, row: dict[str, str]) -> Subject:
    stated = _healthy(path, row.get("healthy"))
    stated = _by_words(row) if stated is None else stated
    healthy = subject.healthy if stated is None else stated
    site, kind = row.get("site") or subject.site, row.get("kind") or subject.kind
    return replace(subject, healthy=healthy, site=site, kind=kind)


def _by_words(row: dict[str, str]) -> bool | None:
    """Health by the group that a row puts a subject in, or by its clinical dementia rating; None where neither is."""
    if _group(row) in CONTROLS:
        return True
    try:
        return float(row["cdr"]) == 0 if (row.get("cdr") or "").strip() else None
    except ValueError:
        return None


def _group(row: dict[str, str]) -> str:
    return (row.get("group") or row.get("diagnosis") or "").strip().lower().replace("_", " ")


def _by_group(subjects: Sequence[Subject], rows: Mapping[str, dict[str, str]]) -> Iterator[str]:
    groups = Counter(
        _group(rows[s.id]) for s in subjects if s.healthy and s.id in rows and not rows[s.id].get("healthy")
    )
    for word, number in sorted(groups.items()):
        if word in CONTROLS:
            yield f"participants.tsv puts {number} subjects in the group {word!r}: they are taken to be healthy."


def _healthy(path: Path, word: str | None) -> bool | None:
    meaning = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": None, "n/a": None}
    try:
        return meaning[(word or "").strip().lower()]
    except KeyError:
        raise CourseError(f"{path} has {word!r} in its column healthy.", "Write 1, 0 or n/a.") from None


def table(path: Path, delimiter: str, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a text file by the names in its first line; CourseError where it cannot be read, has no rows, or
    lacks one of the columns."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter=delimiter, restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CourseError(f"{path} cannot be read as a table.", "Give a text file with one row a subject.") from error
    if not rows or not set(columns) <= rows[0].keys():
        what = f"{path} has no rows with the columns {', '.join(columns)}."
        raise CourseError(what, "Name the columns in its first line, then give one row a subject.")
    return rows
