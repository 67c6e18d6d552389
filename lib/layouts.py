"""How public data sets lay out their scans, and the table of all layouts that are recognised."""

import csv
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from lib import conventions, dicom, pictures
from lib.conventions import BIDS_NAME, DICOM_FOLDERS
from lib.errors import CourseError
from lib.subjects import BRAIN, LESION, UNNAMED, Found, Subject, grouped, some
from lib.volumes import SUFFIXES

_MSD_CHANNELS = {"flair": "FLAIR", "t1w": "T1", "t1": "T1", "t1gd": "T1ce", "t1ce": "T1ce", "t2w": "T2", "t2": "T2"}
_MSD_ORDER = ("FLAIR", "T1w", "t1gd", "T2w")  # of Task01_BrainTumour
_IXI_NAME = re.compile(r"IXI(?P<person>\d+)-(?P<site>Guys|HH|IOP)-\d+-(?P<scan>T1|T2|PD)\.nii(\.gz)?", re.IGNORECASE)
IXI = "Everybody in IXI is healthy. The hospital stands in the name, and is kept as the site."
_OASIS_NAME = re.compile(r"(?P<session>OAS1_\d{4}_MR(?P<visit>\d))_.*_t88_masked_gfc\.img", re.IGNORECASE)
OASIS_YOUNG = 60  # years; younger subjects of OASIS-1 were not rated, and none was demented (Marcus 2007)
_ATLAS_SPACE = "_space-MNI152NLin2009aSym"
_MSLUB_NAME = re.compile(
    r"(?:patient\d+_)?(?P<what>FLAIR|T1W?|T1WKS|T1POST|T2W?|consensus_gt|GOLD_STANDARD|brainmask)"
    r"(?:_N4_\w+)?\.nii(\.gz)?"
)
_MSLUB_WHAT = {
    **{"FLAIR": "FLAIR", "T1": "T1", "T1W": "T1", "T1WKS": "T1ce", "T1POST": "T1ce", "T2": "T2", "T2W": "T2"},
    **{"consensus_gt": LESION, "GOLD_STANDARD": LESION, "brainmask": BRAIN},
}
_MSLUB_FORMS = ("raw", "preprocessed", "coregistered", "MNI")  # the later, the better they fit each other
_RSNA_FOLDERS, _RSNA_LABELS = ("FLAIR", "T1w", "T1wCE", "T2w"), "train_labels.csv"
MGMT = (
    f"The label in {_RSNA_LABELS} is the methylation of a tumour's MGMT promoter, not health: every subject has a "
    "tumour, and the label is not used."
)
_LGG_COLOURS = ("T1", "FLAIR", "T1ce")  # red, green, blue (Buda 2019)


def _msd(folder: Path, files: list[Path]) -> Found:
    """Medical Segmentation Decathlon, Task01_BrainTumour: imagesTr/BRATS_001.nii.gz [x, y, z, 4], labelsTr with the
    same names, and dataset.json with the order of the four."""
    images = [p for p in files if p.parent.name == "imagesTr" and p.name.lower().endswith(SUFFIXES)]
    if not images:
        return Found()
    labels = {p.name: p for p in files if p.parent.name == "labelsTr"}
    try:
        channels, notes = _msd_channels(images[0].parents[1] / "dataset.json")
    except CourseError as error:
        return Found((Subject("", {UNNAMED: images[0]}),), (), len(images) + len(labels), error)
    if not channels:
        return Found()
    subjects = [
        Subject(re.sub(r"\.nii(\.gz)?$", "", p.name), dict.fromkeys(channels, p), labels.get(p.name), channels=channels)
        for p in images
    ]
    waiting = sum(p.parent.name == "imagesTs" for p in files)
    if waiting:
        notes.append(f"imagesTs has {waiting} scans without masks: left alone.")
    return Found(tuple(subjects), tuple(notes), len(images) + len(labels))


def _msd_channels(path: Path) -> tuple[dict[str, int], list[str]]:
    """Which volume of a file each modality is, from dataset.json where it is there."""
    notes = []
    try:
        order = json.loads(path.read_bytes())["modality"]
        order = [order[key] for key in sorted(order, key=int)]
    except OSError:
        order = _MSD_ORDER
        notes = [f"There is no dataset.json: the volumes of a file are taken to be {', '.join(order)}."]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        cure = 'Give the file that came with the scans, with "modality": {"0": "FLAIR", …}.'
        raise CourseError(f"{path} does not say which modality each volume is.", cure) from error
    known = {_MSD_CHANNELS[str(name).lower()]: i for i, name in enumerate(order) if str(name).lower() in _MSD_CHANNELS}
    return known, notes


def _ixi(folder: Path, files: list[Path]) -> Found:
    """IXI, IXI002-Guys-0828-T1.nii.gz, all in one folder or in IXI-T1, IXI-T2 and IXI-PD."""
    sites = {}

    def meaning(path: Path):
        match = _IXI_NAME.fullmatch(path.name)
        if not match:
            return None
        name = f"IXI{match['person']}"
        sites[name] = match["site"]
        return folder / name, match["scan"].upper()

    found = grouped(folder, _nifti(files), meaning)
    subjects = tuple(replace(s, healthy=True, site=sites[s.id]) for s in found.subjects)
    return replace(found, subjects=subjects, notes=(IXI, *found.notes))


def _oasis1(folder: Path, files: list[Path]) -> Found:
    """OASIS-1, cross-sectional: disc1/OAS1_0001_MR1/PROCESSED/MPRAGE/T88_111/…_t88_masked_gfc.img with its .hdr; health
    by the clinical dementia rating (CDR) in oasis_cross-sectional.csv, or in the session's own text file."""
    scans = [(path, match) for path in files if (match := _OASIS_NAME.fullmatch(path.name))]
    ratings = _oasis_ratings(folder, files) if scans else {}
    found, again = [], 0
    for path, match in scans:
        if match["visit"] != "1":
            again += 1
            continue
        healthy = ratings.get(match["session"])
        kind = "dementia" if healthy is False else None
        found.append(Subject(match["session"], {"T1": path}, healthy=healthy, kind=kind))
    notes = ["Health is a clinical dementia rating of 0; below 60 years without a rating, nobody was demented."]
    notes += [f"{again} second visits of the same persons are left alone."] if again else []
    return Found(tuple(found), tuple(notes), len(found))


def _oasis_ratings(folder: Path, files: list[Path]) -> dict[str, bool | None]:
    tables = [p for p in files if re.fullmatch(r"oasis_cross-sectional.*\.csv", p.name)]
    tables += sorted(Path(os.path.abspath(folder)).parent.glob("oasis_cross-sectional*.csv"))
    texts = [p for p in files if re.fullmatch(r"OAS1_\d{4}_MR1\.txt", p.name)]
    said = {p.stem: dict(_pairs(p)) for p in texts}
    for path in tables[:1]:
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                said |= {row.get("ID", ""): {k.upper(): v for k, v in row.items() if k} for row in csv.DictReader(file)}
        except (OSError, UnicodeDecodeError, csv.Error, AttributeError) as error:
            raise CourseError(
                f"{path} cannot be read as a table.", "Give the table that came with the scans."
            ) from error
    return {session: _demented(row) for session, row in said.items()}


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Lines as `CDR: 0`."""
    for line in path.read_text(errors="replace").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            yield name.strip().upper(), value.strip()


def _demented(row: dict[str, str]) -> bool | None:
    """Whether a person is healthy, by rating or age; None where neither says it."""
    try:
        if (row.get("CDR") or "").strip():
            return float(row["CDR"]) == 0
        return True if float(row.get("AGE") or "nan") < OASIS_YOUNG else None
    except ValueError:
        return None


def _atlas(folder: Path, files: list[Path]) -> Found:
    """ATLAS R2.0, stroke: sub-r001s001_ses-1_space-MNI152NLin2009aSym_T1w.nii.gz, its mask ending in
    _label-L_desc-T1lesion_mask; the cohort in the name is kept as the site."""

    def meaning(path: Path):
        match = BIDS_NAME.fullmatch(path.name)
        what = match and _ATLAS_SPACE in match["entities"] and conventions.bids_what(match)
        return (folder / (match["subject"] + (match["session"] or "")), what) if what else None

    found = conventions.first_sessions(grouped(folder, _nifti(files), meaning))
    return replace(found, subjects=tuple(_of_stroke(s) for s in found.subjects))


def _of_stroke(subject: Subject) -> Subject:
    site = re.fullmatch(r"sub-(r\d+)s\d+", subject.id)
    return replace(subject, healthy=False, kind="stroke", site=site and site[1].upper())


def _mslub(folder: Path, files: list[Path]) -> Found:
    """MSLUB (Lesjak 2017): patient01/[patient01_]FLAIR.nii.gz, T1W, T1WKS, T2W, consensus_gt and brainmask, in the
    forms raw, preprocessed, coregistered or MNI (long names, FLAIR_N4_…_regtoMNI.nii.gz, GOLD_STANDARD_…)."""
    scans = _nifti(files)
    if not any(_of_mslub(path) in (LESION, BRAIN) for path in scans):
        return Found()
    there = {form: [p for p in scans if form in p.relative_to(folder).parts] for form in _MSLUB_FORMS}
    form = next((form for form in reversed(_MSLUB_FORMS) if any(map(_of_mslub, there[form]))), None)
    several = [name for name in _MSLUB_FORMS if any(map(_of_mslub, there[name]))]

    def meaning(path: Path):
        return (Path(os.path.abspath(path.parent)), _of_mslub(path)) if _of_mslub(path) else None

    found = grouped(folder, there[form] if form else scans, meaning)
    found = replace(found, subjects=tuple(replace(s, kind="multiple sclerosis") for s in found.subjects))
    if len(several) < 2:
        return found
    said = f"The scans are there as {', '.join(several)}: {form} is used."
    total = sum(len(list(filter(_of_mslub, there[name]))) for name in several)
    return replace(found, notes=(*found.notes, said), understood=total)


def _of_mslub(path: Path) -> str | None:
    match = re.fullmatch(r"patient\d+", path.parent.name) and _MSLUB_NAME.fullmatch(path.name)
    return _MSLUB_WHAT[match["what"]] if match else None


def _rsna_miccai(folder: Path, files: list[Path]) -> Found:
    """RSNA-MICCAI 2021: train/00000/FLAIR/*.dcm and `train_labels.csv`; the numbers are the challenge's own."""
    if not any((place / _RSNA_LABELS).is_file() for place in (folder, Path(os.path.abspath(folder)).parent)):
        return Found()
    places = sorted({path.parent for path in files if path.parent.name in _RSNA_FOLDERS})
    owners = {p: p.parent for p in places if re.fullmatch(r"\d{5}", p.parent.name) and dicom.is_series(p)}
    found = conventions.of_series(folder, files, owners, lambda place: DICOM_FOLDERS[place.name.lower()])
    return replace(found, subjects=tuple(replace(s, healthy=False) for s in found.subjects), notes=(*found.notes, MGMT))


def _lgg(folder: Path, files: list[Path]) -> Found:
    """LGG of Kaggle, kaggle_3m (Buda 2019): TCGA_CS_4941_19960909/…_12.tif with T1, FLAIR and T1ce as its colours, and
    …_12_mask.tif. Where a sequence is missing, its colour repeats FLAIR; it is left out."""
    stacks = sorted({path.parent for path in files if pictures.is_slice(path)})
    subjects, repeated = [], []
    for stack in stacks:
        masks = pictures.has_masks(stack)
        same = pictures.repeated_colours(stack, of=_LGG_COLOURS.index("FLAIR"))
        there = {m: i for i, m in enumerate(_LGG_COLOURS) if i not in same}
        repeated += [f"{stack.name} {m}" for m in _LGG_COLOURS if m not in there]
        name = Path(os.path.abspath(stack)).name
        subjects.append(
            Subject(name, dict.fromkeys(there, stack), stack if masks else None, kind="glioma", channels=there)
        )
    notes = (f"Missing, FLAIR repeated in its place, and left out: {some(repeated)}.",) if repeated else ()
    return Found(tuple(subjects), notes, sum(map(pictures.is_slice, files)))


def _nifti(files: list[Path]) -> list[Path]:
    return [path for path in files if path.name.lower().endswith(SUFFIXES)]


LAYOUTS: dict[str, Callable[[Path, list[Path]], Found]] = {
    "msd": _msd,
    "ixi": _ixi,
    "oasis1": _oasis1,
    "atlas": _atlas,
    "mslub": _mslub,
    "rsna_miccai": _rsna_miccai,
    "lgg": _lgg,
    "bids": conventions.bids,
    "brats": conventions.brats,
    "dicom": conventions.series,
    "nifti": conventions.nifti,
    "classes": conventions.classes,
}


def recognise(folder: Path, files: list[Path]) -> tuple[str, Found]:
    """The first layout of the table that places more than half as many of a folder's files as the one that places most,
    so that neither a stray file nor a more general layout takes a folder away; its name is "" where none finds a scan.
    Raises CourseError for a damaged header only where no layout is left."""
    found, damaged = {}, []
    for name, layout in LAYOUTS.items():
        try:
            found[name] = layout(folder, files)
        except CourseError as error:
            damaged.append(error)
    usable = {name: one for name, one in found.items() if any(s.scans for s in one.subjects)}
    if damaged and not usable:
        raise damaged[0]
    most = max((one.understood for one in usable.values()), default=0)
    best = next((name for name, one in usable.items() if 2 * one.understood > most), "")
    return best, usable.get(best, Found())
