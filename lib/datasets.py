"""Where scans come from: folders, their layouts, and who belongs to train, validation and test."""

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np

from lib import acquisition as acquired
from lib import dicom, pictures, privacy, volumes
from lib.errors import CourseError
from lib.refusals import check_name, refusal
from lib.volumes import SUFFIXES, Volume

SPLITS = ("train", "validation", "test")
HEALTHY_SHARES = (0.6, 0.2, 0.2)
PATIENT_SHARES = (0.5, 0.2, 0.3)

GAP = (
    "Healthy subjects and patients come from different folders: whatever tells the folders apart, as scanner and "
    "preparation do, tells them apart as well."
)
MODALITIES = ("T1", "T1ce", "T2", "FLAIR", "PD", "CT")
_BRATS_ENDINGS = {
    "flair": "FLAIR",
    "t2f": "FLAIR",
    "t1": "T1",
    "t1n": "T1",
    "t1ce": "T1ce",
    "t1c": "T1ce",
    "t1gd": "T1ce",
    "t2": "T2",
    "t2w": "T2",
    "seg": "lesion",
    "segm": "lesion",
    "ct": "CT",
}
_BRATS_NAME = re.compile(rf".*[_-]({'|'.join(_BRATS_ENDINGS)})\.nii(\.gz)?", re.IGNORECASE)
_BIDS_ENDINGS = {"FLAIR": "FLAIR", "T1w": "T1", "T2w": "T2", "PDw": "PD"}
_BIDS_NAME = re.compile(
    r"(?P<subject>sub-[a-zA-Z0-9]+)(?P<session>_ses-[a-zA-Z0-9]+)?(?P<entities>(?:_[a-z]+-[a-zA-Z0-9]+)*)"
    rf"_(?:(?P<scan>{'|'.join(_BIDS_ENDINGS)})|\w*(?:mask|roi))\.nii(\.gz)?"
)
_DICOM_FOLDERS = {name.lower(): name for name in MODALITIES} | {"t1w": "T1", "t1wce": "T1ce", "t2w": "T2"}
_MASK_NAME = re.compile(r"(.*[_-])?(segm?|mask|lesion|roi)\.nii(\.gz)?", re.IGNORECASE)
_RSNA_FOLDERS, _RSNA_LABELS = ("FLAIR", "T1w", "T1wCE", "T2w"), "train_labels.csv"
MGMT = (
    f"The label in {_RSNA_LABELS} is the methylation of a tumour's MGMT promoter, not health: every subject has a "
    "tumour, and the label is not used."
)
_EXPECTED = (
    "a folder a subject, its files ending in _flair, _t1, _t1ce, _t2 and _seg (.nii or .nii.gz), BIDS, or a folder a "
    "DICOM series"
)


@dataclass(frozen=True)
class Subject:
    """One person's scans. `healthy` is None where it is not known; `hidden`: names of folders and files that lead to
    the person, never to be written."""

    id: str
    scans: Mapping[str, Path]
    lesion_mask: Path | None = None
    healthy: bool | None = None
    site: str | None = None
    kind: str | None = None
    hidden: frozenset[str] = frozenset()

    def having(self, modalities: Sequence[str]) -> tuple[str, ...]:
        """Those of some modalities that it has, in their order."""
        return tuple(m for m in modalities if m in self.scans)

    def hiding(self, text: str) -> str:
        """A text as it may be written."""
        return privacy.without(text, self.hidden)


@dataclass(frozen=True)
class Dataset:
    """A folder as it was understood; `notes` are sentences for people; `called`: the ids of subjects whose folders'
    names lead to a person, by those names."""

    layout: str
    subjects: tuple[Subject, ...]
    notes: tuple[str, ...] = field(default=())
    called: Mapping[str, str] = field(default_factory=dict, repr=False)


def find_subjects(folder: Path, layout: str = "", healthy: Path | str = "") -> Dataset:
    """Recognise the subjects of a folder by its layout ("" looks for one that fits), and those of one of `healthy`
    subjects, if there is one.

    Raises CourseError for a wrong path, an empty or unknown folder, an unknown layout, two files for one modality,
    identities that are not unique, and healthy subjects whose table calls them ill.
    """
    found = _find(Path(folder), layout)
    return _called(_joined(found, _find(Path(healthy), "")) if healthy else found)


def _find(folder: Path, layout: str) -> Dataset:
    if not folder.is_dir():
        raise CourseError(f"{folder} is not a folder.", "Give the folder that holds the scans.")
    if layout and layout not in LAYOUTS:
        raise CourseError(f"Layout {layout!r} is not known.", f"Layouts are: {', '.join(LAYOUTS)}.")
    for name in [layout] if layout else LAYOUTS:
        subjects, notes = LAYOUTS[name](folder)
        if any(s.scans for s in subjects):
            return _described(name, _with_participants(folder, _unique(subjects)), notes)
    raise CourseError(f"No scans were recognised in {folder}.", f"Expected: {_EXPECTED}.")


def _joined(dataset: Dataset, healthy: Dataset) -> Dataset:
    ill = [s.hiding(s.id) for s in healthy.subjects if s.healthy is False]
    if ill:
        what = f"In the folder of healthy subjects, participants.tsv says that {_some(ill)} are not."
        raise CourseError(what, "Leave them out.")
    added = _described(healthy.layout, [replace(s, healthy=True) for s in healthy.subjects], list(healthy.notes[1:]))
    subjects = _unique([*dataset.subjects, *added.subjects])
    return Dataset(dataset.layout, tuple(subjects), (*dataset.notes, *added.notes, GAP))


def _called(dataset: Dataset) -> Dataset:
    """Subjects named by what leads to a person are called subject-001, …, in the order of their names."""
    taken = {s.id for s in dataset.subjects}
    free = (name for n in count(1) if (name := f"subject-{n:03d}") not in taken)
    called = dict(zip(sorted(s.id for s in dataset.subjects if s.id in s.hidden), free, strict=False))
    if not called:
        return dataset
    subjects = sorted((replace(s, id=called.get(s.id, s.id)) for s in dataset.subjects), key=lambda s: s.id)
    first, last = min(called.values()), max(called.values())
    note = (
        f"{len(called)} folders bear a patient's name or number or a unique identifier: in the order of their names "
        f"they are called {first} to {last}."
    )
    return replace(dataset, subjects=tuple(subjects), notes=(*dataset.notes, note), called=called)


def acquisition(path: Path) -> dict[str, str | float]:
    """What the scanner did for a scan, by the names in `dicom.FACTS`: from the headers of a DICOM folder, or the BIDS
    sidecar beside a NIfTI file (`X.nii.gz`, `X.json`); {} without one. CourseError for a damaged one."""
    if dicom.is_series(path):
        return dicom.facts(path)
    beside = acquired.sidecar(Path(path))
    return acquired.of_sidecar(beside) if beside.exists() else {}


def read_scan(path: Path, **options) -> Volume:
    """A NIfTI file, a picture, or a folder that is a DICOM series, as `volumes.read`, `pictures.read`, `dicom.read`."""
    if pictures.is_picture(path):
        return pictures.read(path)
    return dicom.read(path) if dicom.is_series(path) else volumes.read(path, **options)


def parse_modalities(text: str) -> tuple[str, ...]:
    """Modalities from names joined by commas, case set right; CourseError for an unknown or doubled one."""
    known = {m.lower(): m for m in MODALITIES}
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name.lower() not in known]
    if unknown or len({n.lower() for n in names}) < len(names):
        wrong = f"Modality {unknown[0]!r} is not known." if unknown else f"{text!r} names a modality twice."
        raise CourseError(wrong, f"Modalities are: {', '.join(MODALITIES)}.")
    return tuple(known[name.lower()] for name in names)


def modality_of(path: Path) -> str:
    """The modality that a scan's name ends in, as `_flair.nii.gz` or BIDS, or its folder's name or the scanner's times
    make; CourseError where none does."""
    name = Path(path).name
    match, bids = _BRATS_NAME.fullmatch(f"_{name}"), _BIDS_NAME.fullmatch(name)
    ending = _bids_what(bids) if bids else _BRATS_ENDINGS[match[1].lower()] if match else None
    found = ending or _DICOM_FOLDERS.get(name.lower()) or dicom.weighting(acquisition(path))
    if found in ("lesion", None):
        what = f"The name of {privacy.shown(Path(path), dicom.patient(path))} does not end in a modality."
        raise CourseError(what, f"Name it: {', '.join(MODALITIES)}.")
    return found


def split(loads: Mapping[str, float], shares=PATIENT_SHARES, seed: int = 0) -> dict[str, str]:
    """Give every subject one of train, validation, test, each with its share of every lesion load.

    `loads`: lesion load by subject. Each split takes its places at equal distances along the order of load, so any
    stretch of loads is divided by the shares; the seed sets where it starts. Of three subjects each split has one.
    """
    random = np.random.default_rng(seed)
    chance = dict(zip(sorted(loads), random.random(len(loads)), strict=True))
    starts = random.random(len(SPLITS))
    counts = zip(SPLITS, starts, _counts(len(loads), shares), strict=True)
    places = sorted(((i + start) / count, name) for name, start, count in counts for i in range(count))
    ordered = sorted(loads, key=lambda s: (loads[s], chance[s]))
    return {subject: name for subject, (_, name) in zip(ordered, places, strict=True)}


def read_splits(path: Path, subjects: set[str], called: Mapping[str, str] | None = None) -> dict[str, str]:
    """Splits from a CSV file with the columns `subject,split`; `called`: as in Dataset.

    Raises CourseError for an unreadable file, a missing column, a subject that is in two splits or
    not in the data, and a split that is not train, validation or test.
    """
    rows = _table(path, ",", ("subject", "split"))
    result: dict[str, str] = {}
    for row in rows:
        subject, name = row["subject"].strip(), row["split"].strip()
        subject = (called or {}).get(subject, subject)
        if result.get(subject, name) != name:
            raise CourseError(
                f"{path} puts {subject} in two splits: {result[subject]} and {name}.", "Keep one of them."
            )
        if name not in SPLITS:
            raise CourseError(f"{path} has the split {name!r} for {subject}.", f"Splits are: {', '.join(SPLITS)}.")
        result[subject] = name
    unknown = sorted(result.keys() - subjects)
    if unknown:
        raise CourseError(f"{path} names {_some(unknown)}, not in the data.", "Use the names of the subjects' folders.")
    return result


def _counts(subjects: int, shares) -> list[int]:
    """Subjects of each split: at least one where there are enough, then whichever is furthest behind its share."""
    counts = np.full(len(shares), int(subjects >= len(shares)))
    while counts.sum() < subjects:
        counts[np.argmax(np.multiply(shares, subjects) - counts)] += 1
    return counts.tolist()


def _brats(folder: Path) -> tuple[list[Subject], list[str]]:
    def meaning(path: Path):
        match = _BRATS_NAME.fullmatch(path.name)
        return match and (Path(os.path.abspath(path.parent)), _BRATS_ENDINGS[match[1].lower()])

    return _grouped(folder, _scans(folder), meaning)


def _bids(folder: Path) -> tuple[list[Subject], list[str]]:
    """BIDS 1.8, "Anatomy imaging data": sub-01[_ses-1]_T1w.nii.gz. Of derivatives, lesion masks are used alone."""

    def meaning(path: Path):
        match = _BIDS_NAME.fullmatch(path.name)
        what = match and _bids_what(match)
        if not what or (what != "lesion" and "derivatives" in path.relative_to(folder).parts):
            return None
        return folder / (match["subject"] + (match["session"] or "")), what

    return _grouped(folder, _scans(folder), meaning)


def _bids_what(match: re.Match) -> str | None:
    if match["scan"]:
        return "T1ce" if match["scan"] == "T1w" and "_ce-" in match["entities"] else _BIDS_ENDINGS[match["scan"]]
    return "lesion" if "lesion" in match[0].lower() else None


def _dicom(folder: Path) -> tuple[list[Subject], list[str]]:
    """A folder a series, as in ID/FLAIR or ID/any name; the modality is that name, or what the scanner's times make."""

    def owner(place: Path) -> Path:
        below = place.relative_to(folder).parts
        named = below[-2:-1] if place.name.lower() in _DICOM_FOLDERS else below[:1]
        return folder / named[0] if named else Path(os.path.abspath(folder))

    def modality(place: Path) -> str | None:
        if place.name.lower() in _DICOM_FOLDERS:
            return _DICOM_FOLDERS[place.name.lower()]
        try:
            return dicom.weighting(dicom.facts(place))
        except CourseError:  # nothing in it can be read: left alone, and said
            return None

    files = _files(folder)
    places = [place for place in sorted({path.parent for path in files}) if dicom.is_series(place)]
    known = frozenset().union(*map(dicom.patient, places))
    shown = partial(privacy.shown, known=known)
    subjects, notes = _of_series(folder, files, {place: owner(place) for place in places}, modality, shown)
    return [replace(s, hidden=hidden_names(s)) for s in subjects], notes


def _rsna_miccai(folder: Path) -> tuple[list[Subject], list[str]]:
    """RSNA-MICCAI 2021: train/00000/FLAIR/*.dcm and `train_labels.csv`; the numbers are the challenge's own."""
    if not any((place / _RSNA_LABELS).is_file() for place in (folder, Path(os.path.abspath(folder)).parent)):
        return [], []
    files = _files(folder)
    places = sorted({path.parent for path in files if path.parent.name in _RSNA_FOLDERS})
    owners = {p: p.parent for p in places if re.fullmatch(r"\d{5}", p.parent.name) and dicom.is_series(p)}
    subjects, notes = _of_series(folder, files, owners, lambda place: _DICOM_FOLDERS[place.name.lower()])
    return [replace(s, healthy=False) for s in subjects], [*notes, MGMT]


def _of_series(
    folder: Path,
    files: list[Path],
    owners: Mapping[Path, Path],
    modality: Callable[[Path], str | None],
    shown: Callable[[Path], str] = str,
) -> tuple[list[Subject], list[str]]:
    """Subjects from the folders of series and whose they are; masks are NIfTI files below a subject's folder."""
    by_name = {owner.name: owner for owner in owners.values()}

    def meaning(path: Path):
        if path in owners:
            what = modality(path)
            return what and (owners[path], what)
        above = [by_name[part] for part in path.parent.parts if part in by_name]
        return (above[-1], "lesion") if above and _MASK_NAME.fullmatch(path.name) else None

    scans = [path for path in files if path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")]
    return _grouped(folder, [*owners, *scans], meaning, shown)


def hidden_names(subject: Subject) -> frozenset[str]:
    """The names in the paths of a subject's scans that lead to a person."""
    known = frozenset().union(*(dicom.patient(path) for path in subject.scans.values()))
    paths = [*subject.scans.values(), *filter(None, [subject.lesion_mask])]
    names = {subject.id, *(part for path in paths for part in path.parts)}
    return frozenset(name for name in names if privacy.leads(name, known))


def _scans(folder: Path) -> list[Path]:
    return [f for f in _files(folder) if f.name.lower().endswith(SUFFIXES) and not f.name.startswith(".")]


def _grouped(
    folder: Path,
    files: list[Path],
    meaning: Callable[[Path], tuple[Path, str] | None],
    shown: Callable[[Path], str] = str,
) -> tuple[list[Subject], list[str]]:
    """Subjects from what each scan means: a path that ends in the subject's name, and a modality or "lesion";
    `shown`: a path for people."""
    by_subject: dict[Path, dict[str, Path]] = {}
    odd = []
    for path in files:
        check_name(path)
        known = meaning(path)
        if not known:
            odd.append("/".join(Path(shown(path)).parts[len(folder.parts) :]))
            continue
        found = by_subject.setdefault(known[0], {})
        if known[1] in found:
            both = f"{shown(found[known[1]])} and {Path(shown(path)).name}"
            raise CourseError(f"{both} both claim to be {known[1]}.", "Keep one of them.")
        found[known[1]] = path
    subjects = [
        Subject(place.name, {m: p for m, p in found.items() if m != "lesion"}, found.get("lesion"))
        for place, found in by_subject.items()
    ]
    return subjects, [f"Not understood and left alone: {_some(odd)}."] if odd else []


def _files(folder: Path) -> list[Path]:
    """All files below a folder, behind links to folders too; no folder twice, so that links in a ring end."""
    seen, files = set(), []
    for place, below, names in os.walk(folder, onerror=_locked, followlinks=True):
        real = os.path.realpath(place)
        below[:] = [] if real in seen else sorted(below)
        files += [] if real in seen else [Path(place, name) for name in names + _odd_folders(place, below)]
        seen.add(real)
    return sorted(files)


def _locked(error: OSError) -> None:
    """A folder that cannot be listed is refused: the scans in it would be lost in silence."""
    raise refusal("F01", path=privacy.shown(Path(error.filename), ()), reason=error.strerror) from error


def _odd_folders(place: str, below: list[str]) -> list[str]:
    """Folders named like scans, which the examination then refuses by name."""
    return [name for name in below if _BRATS_NAME.fullmatch(name)]


LAYOUTS = {"bids": _bids, "brats": _brats, "rsna_miccai": _rsna_miccai, "dicom": _dicom}


def _unique(subjects: list[Subject]) -> list[Subject]:
    times = Counter(s.id.lower() for s in subjects)
    twice = sorted(s.hiding(s.id) for s in subjects if times[s.id.lower()] > 1)
    if twice:
        raise CourseError(f"Folders share a subject's name, or differ in case only: {_some(twice)}.", "Rename them.")
    return sorted(subjects, key=lambda s: s.id)


def _with_participants(folder: Path, subjects: list[Subject]) -> tuple[Subject, ...]:
    """Add what `participants.tsv` says of health, site and lesion kind."""
    path = folder / "participants.tsv"
    if not path.exists():
        return tuple(subjects)
    listed = _table(path, "\t", ("participant_id",))
    rows = {row["participant_id"]: row for row in listed}
    if len(rows) < len(listed):
        twice = Counter(row["participant_id"] for row in listed).most_common(1)[0][0]
        said = privacy.without(twice, frozenset().union(*(s.hidden for s in subjects)))
        raise CourseError(f"{path} has more than one row for {said}.", "Keep one of them.")
    return tuple(_told(path, s, rows[s.id]) if s.id in rows else s for s in subjects)


def _told(path: Path, subject: Subject, row: dict[str, str]) -> Subject:
    stated = _healthy(path, row.get("healthy"))
    healthy = subject.healthy if stated is None else stated
    return replace(subject, healthy=healthy, site=row.get("site") or None, kind=row.get("kind") or None)


def _healthy(path: Path, word: str | None) -> bool | None:
    meaning = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": None, "n/a": None}
    try:
        return meaning[(word or "").strip().lower()]
    except KeyError:
        raise CourseError(f"{path} has {word!r} in its column healthy.", "Write 1, 0 or n/a.") from None


def _table(path: Path, delimiter: str, columns: tuple[str, ...]) -> list[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter=delimiter, restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CourseError(f"{path} cannot be read as a table.", "Give a text file with one row a subject.") from error
    if not rows or not set(columns) <= rows[0].keys():
        what = f"{path} has no rows with the columns {', '.join(columns)}."
        raise CourseError(what, "Name the columns in its first line, then give one row a subject.")
    return rows


def _described(layout: str, subjects: Sequence[Subject], notes: list[str]) -> Dataset:
    scans = Counter(m for s in subjects for m in s.scans)
    masks = sum(s.lesion_mask is not None for s in subjects)
    said = ", ".join(f"{m} {scans[m]}" for m in MODALITIES if scans[m])
    healthy = sum(s.healthy is True for s in subjects)
    summary = (
        f"{len(subjects)} subjects in the layout {layout}: {said}; lesion masks {masks}; known to be healthy {healthy}."
    )
    return Dataset(layout, tuple(subjects), (summary, *notes))


def _some(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
