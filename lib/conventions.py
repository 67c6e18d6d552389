"""Ways to lay out a folder of scans that no single data set owns: BraTS, BIDS, DICOM, loose files, folders of pictures.

Each takes a folder and the files below it and says what it understands.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from lib import dicom, pictures, privacy
from lib.errors import CourseError
from lib.subjects import BRAIN, LESION, MASK_FOLDERS, MODALITIES, SCAN_FOLDERS, UNNAMED, Found, Subject, grouped, some
from lib.volumes import SUFFIXES

ENDINGS = {
    **{"flair": "FLAIR", "t2f": "FLAIR", "t1": "T1", "t1n": "T1", "t1w": "T1", "t1ce": "T1ce", "t1c": "T1ce"},
    **{"t1gd": "T1ce", "t2": "T2", "t2w": "T2", "pd": "PD", "ct": "CT"},
    **{"seg": LESION, "segm": LESION, "truth": LESION, "lesion": LESION, "brainmask": BRAIN, "brain_mask": BRAIN},
}
SCAN_NAME = re.compile(rf"(?P<stem>.*)[_-](?P<what>{'|'.join(ENDINGS)})\.(?:nii(?:\.gz)?|mha)", re.IGNORECASE)
_VSD_NAME = re.compile(r"VSD\.Brain.*\.(?:MR_(?P<scan>Flair|T1c?|T2)|OT)\.\d+\.mha", re.IGNORECASE)  # until 2015
_BIDS_ENDINGS = {"FLAIR": "FLAIR", "T1w": "T1", "T2w": "T2", "PDw": "PD"}
BIDS_NAME = re.compile(
    r"(?P<subject>sub-[a-zA-Z0-9]+)(?P<session>_ses-[a-zA-Z0-9]+)?(?P<entities>(?:_[a-zA-Z]+-[a-zA-Z0-9]+)*)"
    rf"_(?:(?P<scan>{'|'.join(_BIDS_ENDINGS)})|\w*(?:mask|roi))\.nii(\.gz)?"
)
DICOM_FOLDERS = {name.lower(): name for name in MODALITIES} | {"t1w": "T1", "t1wce": "T1ce", "t2w": "T2"}
_MASK_NAME = re.compile(r"(.*[_-])?(segm?|mask|lesion|roi)\.nii(\.gz)?", re.IGNORECASE)
_HEALTHY_CLASSES = ("no", "healthy", "normal", "notumor", "notumour", "control", "controls", "negative", "nondemented")
_ILL_CLASSES = (
    *("yes", "tumor", "tumour", "positive", "abnormal", "ill", "sick", "patient", "patients", "lesion", "stroke", "ms"),
    *("glioma", "gliomatumor", "meningioma", "meningiomatumor", "pituitary", "pituitarytumor", "ischemic"),
    *("hemorrhagic", "verymilddemented", "milddemented", "moderatedemented"),
)
MIXED = (
    "Pictures in folders of classes come from many scanners, in several planes and modalities: what tells the classes "
    "apart may be the frame, the size or the source of a picture, and not the disease; nor does a name say which "
    "pictures are of one person, who may stand in two splits."
)


def brats(folder: Path, files: list[Path]) -> Found:
    """A folder a subject, its files ending in a modality or a mask: BraTS 2012 to 2023, and whoever names alike."""
    scans = [path for path in files if path.name.lower().endswith((*SUFFIXES, ".mha"))]
    if _is_loose(folder, scans):
        return Found()

    def meaning(path: Path):
        what = None if BIDS_NAME.fullmatch(path.name) else brats_what(path.name)
        place = Path(os.path.abspath(path.parent))
        alone = place.name.lower() == path.name.lower().rpartition(".mha")[0]  # a folder a file, until 2015
        return what and (place.parent if alone else place, what)

    return grouped(folder, scans, meaning)


def brats_what(name: str) -> str | None:
    """The modality, LESION or BRAIN that a name ends in."""
    match, old = SCAN_NAME.fullmatch(f"_{name}"), _VSD_NAME.fullmatch(name)
    if old:
        return ENDINGS[(old["scan"] or "truth").lower()]
    return ENDINGS[match["what"].lower()] if match else None


def nifti(folder: Path, files: list[Path]) -> Found:
    """Loose files, CASE.nii.gz or CASE_MODALITY.nii.gz, in the folder or below it in `images` and the like; masks end
    as in `brats`, or lie in `masks`, `labels` and the like under the name of the scan."""
    scans = [path for path in files if path.name.lower().endswith(SUFFIXES)]
    loose = [path for path in scans if _lies_loose(folder, path)]
    scanned = [path for path in loose if brats_what(path.name) not in (LESION, BRAIN)]
    named = 2 * sum(brats_what(path.name) in MODALITIES for path in scanned) > len(scanned)

    def meaning(path: Path):
        match = SCAN_NAME.fullmatch(path.name)
        what = LESION if _is_mask_folder(folder, path) else ENDINGS[match["what"].lower()] if match else UNNAMED
        if path not in loose or (what == UNNAMED and named):
            return None
        return folder / (match["stem"] if match else _stem(path)), what

    found = grouped(folder, scans, meaning)
    return replace(found, subjects=tuple(s for s in found.subjects if s.scans))


def _is_loose(folder: Path, scans: list[Path]) -> bool:
    """Whether one place holds the same modality of several subjects, told apart by their files' names alone."""
    stems = defaultdict(set)
    for path in scans:
        match = SCAN_NAME.fullmatch(path.name)
        if match and _lies_loose(folder, path):
            stems[path.parent, ENDINGS[match["what"].lower()]].add(match["stem"])
    return any(len(names) > 1 for names in stems.values())


def _lies_loose(folder: Path, path: Path) -> bool:
    below = path.relative_to(folder).parts[:-1]
    return not below or (len(below) == 1 and bool(SCAN_FOLDERS.fullmatch(below[0])))


def _is_mask_folder(folder: Path, path: Path) -> bool:
    return path.parent != folder and bool(MASK_FOLDERS.fullmatch(path.parent.name))


def _stem(path: Path) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def bids(folder: Path, files: list[Path]) -> Found:
    """BIDS 1.8, "Anatomy imaging data": sub-01[_ses-1]_T1w.nii.gz. Of derivatives, lesion masks are used alone."""

    def meaning(path: Path):
        match = BIDS_NAME.fullmatch(path.name)
        what = match and bids_what(match)
        if not what or (what != LESION and "derivatives" in path.relative_to(folder).parts):
            return None
        return folder / (match["subject"] + (match["session"] or "")), what

    scans, repeats = _first_runs([path for path in files if path.name.lower().endswith(SUFFIXES)])
    found = first_sessions(grouped(folder, scans, meaning))
    said = (f"Of several runs the first is used, and left alone: {some(repeats)}.",) if repeats else ()
    return replace(found, notes=(*found.notes, *said))


def bids_what(match: re.Match) -> str | None:
    """The modality, or LESION, of a BIDS name."""
    if match["scan"]:
        return "T1ce" if match["scan"] == "T1w" and "_ce-" in match["entities"] else _BIDS_ENDINGS[match["scan"]]
    return LESION if "lesion" in match[0].lower() else None


def _first_runs(scans: list[Path]) -> tuple[list[Path], list[str]]:
    """Scans without later runs of the same, wherever they lie, and the names of those."""
    first, later = {}, []
    for path in scans:
        key = re.sub(r"_run-\d+", "", path.name)
        if key in first and "_run-" in path.name:
            later.append(path.name)
        else:
            first.setdefault(key, []).append(path)
    return [path for same in first.values() for path in same], later


def first_sessions(found: Found) -> Found:
    """Of each person the first session with a scan: two of one person in two splits would be learnt and tested."""
    persons: dict[str, list[Subject]] = {}
    for subject in sorted(found.subjects, key=lambda s: (s.id, not s.scans)):
        persons.setdefault(subject.id.partition("_ses-")[0], []).append(subject)
    kept = []
    for person, sessions in persons.items():
        scanned = [s for s in sessions if s.scans] or sessions
        loose = [s.lesion_mask for s in sessions if s.id == person] if len(scanned) == 1 else []
        mask = next(filter(None, [scanned[0].lesion_mask, *loose]), None)
        kept.append(replace(scanned[0], id=person, lesion_mask=mask))
    several = sum(sum(bool(s.scans) for s in sessions) > 1 for sessions in persons.values())
    said = (f"Of {several} subjects with several sessions, the first session is used.",) if several else ()
    return replace(found, subjects=tuple(kept), notes=(*found.notes, *said))


def series(folder: Path, files: list[Path]) -> Found:
    """DICOM, a folder a series, as in ID/FLAIR or ID/any name; the modality is that name, or what the scanner's times
    make."""

    def owner(place: Path) -> Path:
        below = place.relative_to(folder).parts
        named = below[-2:-1] if place.name.lower() in DICOM_FOLDERS else below[:1]
        return folder / named[0] if named else Path(os.path.abspath(folder))

    def modality(place: Path) -> str | None:
        if place.name.lower() in DICOM_FOLDERS:
            return DICOM_FOLDERS[place.name.lower()]
        try:
            return dicom.weighting(dicom.facts(place)) or UNNAMED
        except CourseError:  # nothing in it can be read: left alone, and said
            return None

    others = (*SUFFIXES, *pictures.SUFFIXES, *pictures.STACK_SUFFIXES)
    possible = sorted({path.parent for path in files if not path.name.lower().endswith(others)})
    owners = {place: owner(place) for place in possible if dicom.is_series(place)}
    known = frozenset().union(*map(dicom.patient, owners))
    found = of_series(folder, files, owners, modality, partial(privacy.shown, known=known))
    return replace(found, subjects=tuple(replace(s, hidden=hidden_names(s)) for s in found.subjects))


def of_series(
    folder: Path,
    files: list[Path],
    owners: Mapping[Path, Path],
    modality: Callable[[Path], str | None],
    shown: Callable[[Path], str] = str,
) -> Found:
    """Subjects from the folders of series and whose they are; masks are NIfTI files below a subject's folder."""
    by_name = {owner.name: owner for owner in owners.values()}
    times = Counter(owners.values())

    def meaning(path: Path):
        if path in owners:
            what = modality(path)
            known = what and (what != UNNAMED or times[owners[path]] == 1)
            return (owners[path], what) if known else None
        above = [by_name[part] for part in path.parent.parts if part in by_name]
        return (above[-1], LESION) if above and _MASK_NAME.fullmatch(path.name) else None

    scans = [path for path in files if path.name.lower().endswith(SUFFIXES)] if owners else []
    return grouped(folder, [*owners, *scans], meaning, shown)


def hidden_names(subject: Subject) -> frozenset[str]:
    """The names in the paths of a subject's scans that lead to a person."""
    known = frozenset().union(*(dicom.patient(path) for path in subject.scans.values()))
    paths = [*subject.scans.values(), *filter(None, [subject.lesion_mask])]
    names = {subject.id, *(part for path in paths for part in path.parts)}
    return frozenset(name for name in names if privacy.leads(name, known))


def classes(folder: Path, files: list[Path]) -> Found:
    """PNG and JPEG pictures in folders named after what they show, as `yes` and `no`: each a subject of one slice."""
    images = [path for path in files if pictures.is_picture(path)]
    names = Counter((_class(path), path.stem.lower()) for path in images)
    subjects, left = [], []
    for path in images:
        word = _class(path)
        if word not in (*_HEALTHY_CLASSES, *_ILL_CLASSES):
            left.append("/".join(path.relative_to(folder).parts))
            continue
        twice = names[word, path.stem.lower()] > 1
        name = f"{path.parent.name}-{path.name if twice else path.stem}"
        healthy = word in _HEALTHY_CLASSES
        subjects.append(Subject(name, {UNNAMED: path}, healthy=healthy, kind=None if healthy else path.parent.name))
    notes = (f"Not understood and left alone: {some(left)}.",) if left else ()
    return Found(tuple(subjects), (*notes, MIXED), len(subjects))


def _class(path: Path) -> str:
    return re.sub(r"[^a-z]", "", path.parent.name.lower())
