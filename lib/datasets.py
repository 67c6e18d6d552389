"""Where scans come from: folders, their layouts, and who belongs to train, validation and test."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import numpy as np

from lib import acquisition as acquired
from lib import conventions, dicom, formats, layouts, participants, pictures, privacy, volumes
from lib.errors import CourseError
from lib.layouts import LAYOUTS
from lib.subjects import MODALITIES, UNNAMED, Subject, files_below, kinds_of, some
from lib.volumes import Volume

HEALTHY_FOLDER = "healthy"  # the origin of subjects that come from a folder of healthy ones beside another
SPLITS = ("train", "validation", "test")
HEALTHY_SHARES = (0.6, 0.2, 0.2)
PATIENT_SHARES = (0.5, 0.2, 0.3)

GAP = (
    "Healthy subjects and patients come from different folders: whatever tells the folders apart, as scanner and "
    "preparation do, tells them apart as well."
)
MASKED = "What lies outside the mask of the brain that came with the scan is set to 0."
USUAL = ("FLAIR", "T2", "T1", "T1ce", "PD", "CT")  # which modality is looked at, of those that as many subjects have
_EXPECTED = (
    "a folder a subject, its files ending in _flair, _t1, _t1ce, _t2 and _seg (.nii or .nii.gz), BIDS, a folder a "
    "DICOM series, loose NIfTI files, pictures in folders as yes and no, or a public data set as it was published; "
    "data/README.md has the names"
)


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
    if layout and layout.lower() not in LAYOUTS:
        raise CourseError(f"Layout {layout!r} is not known.", f"Layouts are: {', '.join(LAYOUTS)}.")
    files = files_below(folder, conventions.SCAN_NAME)
    name, found = (
        (layout.lower(), LAYOUTS[layout.lower()](folder, files)) if layout else layouts.recognise(folder, files)
    )
    if not any(s.scans for s in found.subjects):
        kinds = f" Most files are {kinds_of(files)}." if files else " It is empty."
        of = f" of the layout {layout}" if layout else ""
        raise CourseError(f"No scans{of} were recognised in {folder}.{kinds}", f"Expected: {_EXPECTED}.")
    if found.clash:
        raise found.clash
    subjects, said = participants.told(folder, _unique(found.subjects))
    return _described(name, subjects, (*found.notes, *said))


def _joined(dataset: Dataset, healthy: Dataset) -> Dataset:
    ill = [s.hiding(s.id) for s in healthy.subjects if s.healthy is False]
    if ill:
        what = f"In the folder of healthy subjects, participants.tsv says that {some(ill)} are not."
        raise CourseError(what, "Leave them out.")
    well = [replace(s, healthy=True, origin=HEALTHY_FOLDER) for s in healthy.subjects]
    added = _described(healthy.layout, well, healthy.notes[1:])
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


def read_scan(path: Path, *, channel: int | None = None, constant_allowed: bool = False) -> Volume:
    """A scan of any kind that is recognised: NIfTI, Analyze, MetaImage, a picture, or a folder that is a DICOM series
    or a stack of pictures; as `volumes`, `formats`, `pictures` and `dicom` read it. `channel`: as in Subject."""
    path = Path(path)
    if pictures.is_picture(path):
        return pictures.read(path)
    if formats.is_analyze(path):
        return formats.read_analyze(path, constant_allowed=constant_allowed)
    if formats.is_meta(path):
        return formats.read_meta(path, constant_allowed=constant_allowed)
    if pictures.is_stack(path):
        return pictures.read_stack(path, channel or 0)
    if dicom.is_series(path):
        return dicom.read(path)
    return volumes.read(path, channel=channel, constant_allowed=constant_allowed)


def read_modality(subject: Subject, modality: str) -> Volume:
    """The scan of a modality, 0 outside the mask of the brain where one on its grid came with the scans."""
    scan = read_scan(subject.scans[modality], channel=subject.channels.get(modality))
    if subject.brain is None:
        return scan
    brain = read_scan(subject.brain, constant_allowed=True)
    if not volumes.same_grid(scan.voxels.shape, scan.affine, brain.voxels.shape, brain.affine):
        return scan
    return replace(scan, voxels=scan.voxels * (brain.voxels > 0), notes=(*scan.notes, MASKED))


def read_subject(subject: Subject, modalities: Sequence[str]) -> dict[str, Volume]:
    """A subject's scans of those of some modalities that it has, in their order."""
    return {m: read_modality(subject, m) for m in subject.having(modalities)}


def read_lesion(subject: Subject) -> Volume | None:
    """A subject's lesion mask, above 0 in the lesion; None without one."""
    path = subject.lesion_mask
    if path and pictures.is_stack(path):
        return pictures.read_stack_mask(path)
    return read_scan(path, constant_allowed=True) if path else None


def with_modalities(dataset: Dataset, asked: str = "") -> tuple[Dataset, tuple[str, ...]]:
    """The modalities to look at: those asked for, joined by commas, or the one that is usual among the subjects; scans
    whose modality nothing says are taken to be the first of them, and a note says so."""
    named = Counter(m for s in dataset.subjects for m in s.scans if m != UNNAMED)
    total, notes = len(dataset.subjects), []
    if asked:
        wanted = parse_modalities(asked)
    else:
        wanted = (_usual(dataset.subjects, named),)
        if named:
            had = "all" if named[wanted[0]] == total else f"{named[wanted[0]]} of {total}"
            notes.append(f"No modality was asked for; {wanted[0]} is looked at, which {had} subjects have.")
    unnamed = [s for s in dataset.subjects if UNNAMED in s.scans]
    if unnamed:
        notes.append(f"Nothing says the modality of {len(unnamed)} subjects' scans: they are taken to be {wanted[0]}.")
    subjects = tuple(replace(s, scans={wanted[0]: s.scans[UNNAMED]} | s.scans) if s in unnamed else s
                     for s in dataset.subjects)  # fmt: skip
    return replace(dataset, subjects=subjects, notes=(*dataset.notes, *notes)), wanted


def _usual(subjects: Sequence[Subject], times: Mapping[str, int]) -> str:
    """Of the modalities that either folder has: FLAIR where half of the subjects have it, else what most have."""
    folders = [{m for s in subjects if s.origin == origin for m in s.scans} for origin in {s.origin for s in subjects}]
    shared = [m for m in USUAL if all(m in there for there in folders)] or USUAL
    if "FLAIR" in shared and 2 * times["FLAIR"] >= len(subjects):
        return "FLAIR"
    return max(shared, key=lambda m: times[m])


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
    bids = conventions.BIDS_NAME.fullmatch(name)
    ending = conventions.bids_what(bids) if bids else conventions.brats_what(name)
    found = ending or conventions.DICOM_FOLDERS.get(name.lower()) or dicom.weighting(acquisition(path))
    if found not in MODALITIES:
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
    rows = participants.table(path, ",", ("subject", "split"))
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
        raise CourseError(f"{path} names {some(unknown)}, not in the data.", "Use the names of the subjects' folders.")
    return result


def _counts(subjects: int, shares) -> list[int]:
    """Subjects of each split: at least one where there are enough, then whichever is furthest behind its share."""
    counts = np.full(len(shares), int(subjects >= len(shares)))
    while counts.sum() < subjects:
        counts[np.argmax(np.multiply(shares, subjects) - counts)] += 1
    return counts.tolist()


def _unique(subjects: Sequence[Subject]) -> list[Subject]:
    times = Counter(s.id.lower() for s in subjects)
    twice = sorted(s.hiding(s.id) for s in subjects if times[s.id.lower()] > 1)
    if twice:
        raise CourseError(f"Folders share a subject's name, or differ in case only: {some(twice)}.", "Rename them.")
    return sorted(subjects, key=lambda s: s.id)


def _described(layout: str, subjects: Sequence[Subject], notes: Sequence[str]) -> Dataset:
    scans = Counter(m for s in subjects for m in s.scans)
    masks = sum(s.lesion_mask is not None for s in subjects)
    known = [(m, scans[m]) for m in (*MODALITIES, UNNAMED) if scans[m]]
    said = ", ".join(f"{f'modality {m}' if m == UNNAMED else m} {number}" for m, number in known)
    healthy, ill = (sum(s.healthy is known for s in subjects) for known in (True, False))
    patients = f"; known to be patients {ill}" if ill else ""
    sites = sorted({s.site for s in subjects if s.site})
    places = f"; sites {some(sites)}" if sites else ""
    summary = (
        f"{len(subjects)} subjects in the layout {layout}: {said}; lesion masks {masks}; known to be healthy "
        f"{healthy}{patients}{places}."
    )
    return Dataset(layout, tuple(subjects), (summary, *notes))
