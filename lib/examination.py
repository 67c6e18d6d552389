"""What is found in a subject's files before anything is prepared: a record each, remembered as soon as it is made."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from lib import acquisition, data_folder, datasets, dicom, pictures, privacy, quality, volumes, workers
from lib.boxes import extent_mm
from lib.errors import CourseError
from lib.extraction import BONE_HU, MOST_BONE, find, keep, kept
from lib.intensities import CT_WINDOW
from lib.preprocessing import brain_mask, canonical, signal
from lib.refusals import words
from lib.subjects import Subject
from lib.volumes import Volume

BRAIN_LITRES = (0.3, 3.0)
LEAST_LEVELS = 16
EXAMINATION = 6  # raised whenever records change their meaning, so that older ones are forgotten
MOST_NEGATIVE = 0.001  # share of voxels; interpolation leaves a few


def examine(
    subjects: tuple[Subject, ...],
    modalities: tuple[str, ...],
    side_mm: float,
    extraction: str = "auto",
    cluster: str = "",
) -> dict[str, dict]:
    """What is found in each subject's files, by subject.

    A record has `problems` (pairs of what and cure, empty for a good subject), `checksums` of the voxels by modality,
    `identity` (a checksum of all voxels and grids, the lesion mask's too), `brain_litres`, `extent_mm` and `voxel_mm`
    (right, anterior, superior), `lesion_ml`, `lesion_outside_brain_ml`, `lesion_labels`, `unoriented` (files whose axes
    are assumed), and by modality `acquisition` (facts as `datasets.acquisition`), `series` (slices and mm of a DICOM
    series), `notes` (of reading); of scans that showed a head, `extracted` (the modality and by what the brain was
    found, kept by `extraction.keep`), else []; `quality` of the brain's mask and `flags`, what of it is unlike a brain.
    A brain longer than `side_mm` is a problem.
    Good files that have not changed since they were examined, by size and time, are not read again; each subject is
    remembered as soon as it is done. `cluster`: as in workers.each.
    """
    memory = _Memory(data_folder("examined"))
    records = {s.id: memory.recall(memory.key(s, modalities, extraction)) for s in subjects}
    waiting = [s for s in subjects if not records[s.id]]
    shared = {"cluster": cluster, "needs": [p for s in waiting for p in s.scans.values()], "writes": memory.folder}
    work = partial(_examine_and_keep, modalities, extraction, memory)
    found = workers.each(work, waiting, what="examining", unit="subject", **shared)
    records |= {s.id: record for s, record in zip(waiting, found, strict=True)}
    return _with_square(_with_duplicates(records), side_mm)


def examine_scan(subject: Subject, scans: Mapping[str, Volume], side_mm: float) -> dict:
    """The record of one person's scans that are read already, as `examine` gives it. Of a single slice, the brain may
    be of any volume up to the usual."""
    record = _record()
    _look(record, subject, scans, None, "never")
    return _with_square(_with_duplicates({subject.id: record}), side_mm)[subject.id]


def _record() -> dict:
    return {
        "problems": [], "checksums": {}, "identity": "", "brain_litres": 0.0, "extent_mm": [0, 0, 0],
        "voxel_mm": [1, 1, 1], "lesion_ml": 0.0, "lesion_outside_brain_ml": 0.0, "lesion_labels": [],
        "unoriented": [], "acquisition": {}, "series": {}, "notes": {}, "extracted": [],
        "quality": {}, "flags": [],
    }  # fmt: skip


def _examine_and_keep(modalities: tuple[str, ...], extraction: str, memory: "_Memory", subject: Subject) -> dict:
    key = memory.key(subject, modalities, extraction)
    record = _examine_subject(subject, modalities, extraction)
    memory.keep(key, record)
    return record


def _examine_subject(subject: Subject, modalities: tuple[str, ...], extraction: str) -> dict:
    record = _record()
    scans = {m: _attempt(record, datasets.read_modality, subject, m) for m in subject.having(modalities)}
    lesion = _attempt(record, datasets.read_lesion, subject)
    _look(record, subject, scans, lesion, extraction)
    return record


def _look(
    record: dict, subject: Subject, scans: Mapping[str, Volume | None], lesion: Volume | None, extraction: str
) -> None:
    """Fill a record. Of single slices, the brain may be of any volume up to the usual."""
    for modality, volume in scans.items():
        if volume:
            record["checksums"][modality] = volumes.checksum(volume.voxels)
            record["problems"] += _intensity_problems(subject.scans[modality], modality, volume, extraction)
            record["unoriented"] += [] if volume.oriented else [subject.hiding(subject.scans[modality].name)]
            _look_at_acquisition(record, modality, subject.scans[modality], volume)
    if lesion and lesion.notes:
        record["notes"]["mask"] = list(lesion.notes)
    if not record["problems"]:
        record["identity"] = content([*scans.values(), lesion])
        flat = all(volume.voxels.shape[2] == 1 for volume in scans.values())
        _look_at_brain(record, subject, scans, lesion, (0.0, BRAIN_LITRES[1]) if flat else BRAIN_LITRES, extraction)
    record["problems"] = [(_told(subject, what), cure) for what, cure in record["problems"]]


def _told(subject: Subject, what: str) -> str:
    """A problem as it may be written; where a path is hidden, the subject is named instead."""
    safe = subject.hiding(what)
    return f"{subject.id}: {safe}" if privacy.HIDDEN in safe and not safe.startswith(subject.id) else safe


def _look_at_acquisition(record: dict, modality: str, path: Path, volume: Volume) -> None:
    try:
        record["acquisition"][modality] = datasets.acquisition(path)
    except CourseError as error:
        record["problems"].append((error.what, error.cure))
    record["notes"][modality] = list(volume.notes)
    if dicom.is_series(path):
        slices = volume.voxels.shape[2]
        record["series"][modality] = [slices, round(float(slices * volume.voxel_mm[2]), 1)]


def content(found: list[Volume | None]) -> str:
    """Identity of a subject's scans and lesion mask, voxels and grids."""
    parts = [volumes.checksum(a) for v in found if v for a in (v.voxels, v.affine)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:32]


def _attempt(record: dict, read: Callable[..., Volume | None], *what) -> Volume | None:
    try:
        return read(*what)
    except CourseError as error:
        record["problems"].append((error.what, error.cure))
        return None


def _intensity_problems(path, modality: str, volume: Volume, extraction: str):
    if modality == "CT":
        yield from _hounsfield_problems(path, volume, extraction)
    elif (volume.voxels < 0).mean() > MOST_NEGATIVE:
        yield words("E01", path=path)
    if extraction == "never" and volume.voxels.shape[2] == 1 and not pictures.on_black(volume):
        yield words("E07", path=path)
    if len(np.unique(volume.voxels[::2, ::2, ::2])) < LEAST_LEVELS:
        yield words("E02", path=path, least=LEAST_LEVELS)


def _hounsfield_problems(path, volume: Volume, extraction: str):
    found = volume.voxels[signal("CT", volume.voxels)]
    bone = float((found > BONE_HU).mean()) if len(found) else 0.0
    middle = float(np.median(found)) if len(found) else 0.0
    if bone > MOST_BONE and middle < BONE_HU and extraction == "auto":
        return
    if not CT_WINDOW[0] <= middle <= CT_WINDOW[1]:
        yield words("E03", path=path, middle=middle)
    elif bone > MOST_BONE:
        yield words("E04", path=path, percent=100 * bone, bone=BONE_HU)


def _look_at_brain(
    record: dict,
    subject: Subject,
    scans: Mapping[str, Volume],
    lesion: Volume | None,
    allowed: tuple[float, float],
    extraction: str,
) -> None:
    scans, lesion = {m: canonical(v) for m, v in scans.items()}, canonical(lesion) if lesion else None
    first, *others = scans.values()
    paths = [*[subject.scans[m] for m in scans][1:], subject.lesion_mask]
    for volume, path in zip([*others, lesion], paths, strict=True):
        if volume and not volumes.same_grid(first.voxels.shape, first.affine, volume.voxels.shape, volume.affine):
            other = next(iter(subject.scans[m] for m in scans)).name
            record["problems"].append(words("E05", path=path, other=other))
    if record["problems"]:
        return
    found = find(scans) if extraction == "auto" else None
    if found:
        brain, record["extracted"] = found[0], list(found[1:])
        keep(record["identity"], Volume(brain, first.affine))
    else:
        brain = brain_mask([signal(m, v.voxels) for m, v in scans.items()])
    litres = float(brain.sum() * first.millilitres / 1000)
    record["brain_litres"] = round(litres, 3)
    least, most = allowed
    if not least <= litres <= most or not brain.any():
        record["problems"].append(_no_brain(subject, scans, record, allowed))
        return
    record["quality"] = quality.measured(brain, first.voxel_mm)
    sized = not any(pictures.is_picture(path) or pictures.is_stack(path) for path in subject.scans.values())
    record["flags"] = quality.flags(record["quality"], brain.shape[2], sized)
    record["extent_mm"] = extent_mm(brain, first.voxel_mm).round(1).tolist()
    record["voxel_mm"] = first.voxel_mm.round(4).tolist()
    if lesion:
        _look_at_lesion(record, subject, lesion, brain)


def _no_brain(
    subject: Subject, scans: Mapping[str, Volume], record: dict, allowed: tuple[float, float]
) -> tuple[str, str]:
    said = {"subject": subject.id, "litres": record["brain_litres"], "least": allowed[0], "most": allowed[1]}
    if record["extracted"]:
        modality, method = record["extracted"]
        return words("E16", modality=modality, method=method, **said)
    above, outside = ("not background", "one value") if "CT" in scans else ("above 0", "0")
    return words("E06", above=above, outside=outside, **said)


def _look_at_lesion(record: dict, subject: Subject, lesion: Volume, brain: np.ndarray) -> None:
    labels = np.unique(lesion.voxels)
    path, truth = subject.lesion_mask, lesion.voxels > 0
    outside = float((truth & ~brain).sum() * lesion.millilitres)
    record["lesion_ml"] = round(float(truth.sum() * lesion.millilitres), 6)
    record["lesion_outside_brain_ml"] = round(outside, 3)
    if (labels != labels.round()).any() or len(labels) > LEAST_LEVELS:
        record["problems"].append(words("E08", path=path, count=len(labels)))
        return
    if labels[0] < 0:
        record["problems"].append(words("E09", path=path, least=labels[0]))
        return
    record["lesion_labels"] = [int(v) for v in labels if v]
    if truth.sum() > 0.8 * brain.sum():
        record["problems"].append(words("E10", path=path))
    elif outside > record["lesion_ml"] / 2:
        record["problems"].append(words("E11", path=path))
    if subject.healthy and truth.any():
        record["problems"].append(words("E12", path=path))


def _with_duplicates(records: dict[str, dict]) -> dict[str, dict]:
    """The same voxels under two names: the later name has a problem."""
    owner: dict[str, str] = {}
    for subject, record in records.items():
        for modality, mark in record["checksums"].items():
            first = owner.setdefault(mark, f"{subject} {modality}")
            if first != f"{subject} {modality}":
                problem = words("E13", scan=f"{subject} {modality}", other=first)
                record["problems"] = [*record["problems"], problem]
    return records


def _with_square(records: dict[str, dict], side: float) -> dict[str, dict]:
    for subject, record in records.items():
        longest = max(record["extent_mm"][:2])
        if longest > side:
            problem = words("E14", subject=subject, longest=longest, side=side)
            record["problems"] = [*record["problems"], problem]
    return records


@dataclass(frozen=True)
class _Memory:
    """Records of earlier examinations in a folder, a file each, named by the names, sizes and times of a subject's
    files; copying may keep the time of the last change of the content, but not that of the last change of any kind."""

    folder: Path

    def key(self, subject: Subject, modalities: tuple[str, ...], extraction: str) -> str:
        paths = [subject.scans[m] for m in subject.having(modalities)]
        scans = [*paths, subject.lesion_mask, subject.brain]
        beside = [other for path in paths for other in (acquisition.sidecar(path), path.with_suffix(".hdr"))]
        files = [f for scan in scans if scan for f in (sorted(scan.iterdir()) if scan.is_dir() else [scan])] + beside
        seen = [(os.path.realpath(f), *_state(f)) for f in files]
        asked = [EXAMINATION, seen, modalities, subject.healthy, sorted(subject.channels.items()), extraction]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def recall(self, key: str) -> dict | None:
        """The record of good files, None where there is none; a damaged one is as good as none, and so is one whose
        extracted brain is gone."""
        try:
            record = json.loads((self.folder / f"{key}.json").read_bytes())
            whole = record.keys() == _record().keys()
            return record if whole and (not record["extracted"] or kept(record["identity"])) else None
        except (OSError, ValueError, AttributeError):
            return None

    def keep(self, key: str, record: dict) -> None:
        if not record["problems"]:
            volumes.write_bytes(self.folder / f"{key}.json", json.dumps(record).encode())


def _state(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
