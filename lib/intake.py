"""Who is let in: subjects are found, examined and split before anything is prepared, all problems listed at once."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from lib import ROOT, acquisition, datasets, dicom, pictures, privacy, quality, volumes, workers
from lib.boxes import extent_mm
from lib.datasets import HEALTHY_SHARES, PATIENT_SHARES
from lib.errors import CourseError, check_choice, check_least
from lib.extraction import BONE_HU, CHOICES, MOST_BONE, find, keep, kept, shows_head
from lib.intensities import CT_WINDOW
from lib.preprocessing import brain_mask, canonical, signal
from lib.progress import bar
from lib.refusals import words
from lib.subjects import Subject
from lib.volumes import Volume

HEALTHY, LESION_FREE = "healthy subjects", "lesion-free slices of patients"
EMBEDDED = "embedded cohort (simulated; its figures are not to be compared with the literature)"
BRAIN_LITRES = (0.3, 3.0)
LEAST_LEVELS = 16
EXAMINATION = 5  # raised whenever records change their meaning, so that older ones are forgotten
MOST_NEGATIVE = 0.001  # share of voxels; interpolation leaves a few
MOST_LOST = 0.03  # share of a lesion outside the brain above which a subject is named


@dataclass(frozen=True)
class Gathered:
    """Subjects that can be used, each with its split and what the examination found, and those that were left out;
    `modalities`: those that are looked at."""

    subjects: tuple[Subject, ...]
    modalities: tuple[str, ...]
    facts: dict[str, dict]
    splits: dict[str, str]
    training: str
    left_out: tuple[dict, ...]
    notes: tuple[str, ...]


def gather(
    data: str = "",
    *,
    healthy_data: str = "",
    layout: str = "",
    modalities: str = "",
    size: int = 96,
    pixel_mm: float = 2.0,
    splits: str = "",
    skip_broken: bool = False,
    incomplete: bool = False,
    extraction: str = "auto",
    seed: int = 0,
    healthy: int = 24,
    patients: int = 16,
    voxel_mm: float = 2.0,
    cluster: str = "",
) -> Gathered:
    """Find, examine and split the subjects of a folder; nothing is written but what the examination remembers.

    `data`: a folder, or "" for the embedded cohort of `healthy` subjects and `patients` at `voxel_mm`;
    `healthy_data`: one of healthy subjects beside it;
    `modalities`: names joined by commas, "" for the one that is usual among the subjects; `incomplete`: whether one of
    them is enough; `size` × `pixel_mm`: the square that a brain must fit; `extraction`: "auto" finds the brain in scans
    that show the whole head, "never" refuses them; `cluster`: as in workers.each.
    Raises CourseError that lists every problem of every scan, unless `skip_broken`, which leaves those subjects out.
    """
    check_least("seed", seed, 0)
    check_choice("extraction", extraction, CHOICES)
    _check_patients(data, healthy_data)
    folder = Path(data) if data else _embedded(healthy, patients, voxel_mm, seed)
    dataset = datasets.find_subjects(folder, layout, healthy_data)
    dataset, wanted = datasets.with_modalities(dataset, modalities or ("" if data else "FLAIR"))
    subjects, lacking = _with_modalities(dataset.subjects, wanted, incomplete)
    facts = examine(subjects, wanted, size * pixel_mm, extraction, cluster)
    broken = {s: record["problems"] for s, record in facts.items() if record["problems"]}
    if broken and not skip_broken:
        raise _refusal(broken, len(subjects), dataset.notes[0])
    useful, unknown = _known([s for s in subjects if s.id not in broken])
    left_out = [*lacking, *_left_out_broken(broken), *unknown]
    stated = datasets.read_splits(Path(splits), {s.id for s in dataset.subjects}, dataset.called) if splits else {}
    assigned, training = _assign(useful, facts, stated, left_out, seed)
    left_out += _in_no_split(useful, assigned)
    used = tuple(s for s in useful if s.id in assigned)
    source = " and ".join(filter(None, (data, healthy_data))) or EMBEDDED
    notes = (
        f"Data: {source}.",
        *dataset.notes,
        *_notes(used, facts, assigned, training, left_out),
        *_missing(used, wanted),
    )
    return Gathered(used, wanted, facts, assigned, training, tuple(left_out), notes)


def _check_patients(data: str, healthy_data: str) -> None:
    if healthy_data and not data:
        what = f"There are no patients beside the healthy subjects of {healthy_data}."
        raise CourseError(what, "Give the folder of their scans by --data.")


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
    memory = _Memory(ROOT / "data" / "examined")
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


def _refusal(broken: Mapping[str, list], subjects: int, understood: str) -> CourseError:
    lines = [f"  {what} {cure}" for problems in broken.values() for what, cure in problems]
    count = f"{len(broken)} of {subjects} subjects cannot be used:"
    return CourseError("\n".join([understood, count, *lines]), "Mend them, or leave them out with --skip-broken.")


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
    grey = volume.voxels.shape[2] == 1 and not pictures.on_black(volume)
    if grey and (extraction == "never" or not shows_head(volume, modality)):
        yield words("E07", path=path)
    if len(np.unique(volume.voxels[::2, ::2, ::2])) < LEAST_LEVELS:
        yield words("E02", path=path, least=LEAST_LEVELS)


def _hounsfield_problems(path, volume: Volume, extraction: str):
    found = volume.voxels[signal("CT", volume.voxels)]
    bone = float((found > BONE_HU).mean()) if len(found) else 0.0
    middle = float(np.median(found)) if len(found) else 0.0
    if bone > MOST_BONE and extraction == "auto":
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
    record["flags"] = quality.flags(record["quality"], brain.shape[2])
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


def _embedded(healthy: int, patients: int, voxel_mm: float, seed: int) -> Path:
    from lib import phantom  # and nilearn with it, which scans of one's own do without

    folder = ROOT / "data" / "embedded" / phantom.folder_name(healthy, patients, voxel_mm, seed)
    numbers = {"healthy": healthy, "patients": patients, "voxel_mm": voxel_mm, "seed": seed}
    there = (folder / "participants.tsv").exists()
    with bar(what="simulating", total=healthy + patients, unit="subject", disable=there) as shown:
        return phantom.write_cohort(folder, **numbers, progress=lambda done, _: shown.update(done - shown.n))


def _with_modalities(subjects, modalities, incomplete: bool) -> tuple[tuple[Subject, ...], list[dict]]:
    needed = 1 if incomplete else len(modalities)
    complete = tuple(s for s in subjects if len(s.having(modalities)) >= needed)
    if not complete:
        there = sorted({m for s in subjects for m in s.scans})
        every = (" or " if incomplete else " and ").join(modalities)
        raise CourseError(f"No subject has {every}.", f"The folder has: {', '.join(there)}.")
    lacking = [
        {"subject": s.id, "why": f"It has no {' and no '.join(m for m in modalities if m not in s.scans)}."}
        for s in subjects
        if s not in complete
    ]
    return complete, lacking


def _left_out_broken(broken: Mapping[str, list]) -> list[dict]:
    return [{"subject": s, "why": " ".join(what for what, _ in problems)} for s, problems in broken.items()]


def _in_no_split(subjects, assigned) -> list[dict]:
    return [{"subject": s.id, "why": "It stands in no split."} for s in subjects if s.id not in assigned]


def _known(subjects) -> tuple[tuple[Subject, ...], list[dict]]:
    """Without a lesion mask, a subject is of use only where it is known to be healthy or ill."""
    unknown = [s for s in subjects if s.lesion_mask is None and s.healthy is None]
    why = (
        "It has no lesion mask and is not known to be healthy or ill; say so in the column healthy of participants.tsv."
    )
    return tuple(s for s in subjects if s not in unknown), [{"subject": s.id, "why": why} for s in unknown]


def is_healthy(subject: Subject, facts: dict) -> bool:
    """Healthy by declaration, or by a lesion mask that is empty."""
    return subject.healthy if subject.healthy is not None else facts["lesion_ml"] == 0


def is_outlined(subject: Subject) -> bool:
    """Whether it is known which voxels are lesion: by a lesion mask, or because there is none in the healthy."""
    return subject.lesion_mask is not None or bool(subject.healthy)


def _assign(subjects, facts, stated: Mapping[str, str], left_out, seed: int) -> tuple[dict[str, str], str]:
    """Splits by subject, and what the healthy material is; `stated`: the splits of a file, where there is one. Patients
    whose lesions are not outlined are tested and no more."""
    loads = {s.id: facts[s.id]["lesion_ml"] for s in subjects}
    outlined = {s.id: loads[s.id] for s in subjects if is_outlined(s)}
    healthy = {s.id for s in subjects if is_healthy(s, facts[s.id])}
    if stated:
        result = {s: name for s, name in stated.items() if s in loads}
    elif len(healthy) >= len(datasets.SPLITS):
        result = dict.fromkeys(loads, "test") | datasets.split(dict.fromkeys(healthy, 0.0), HEALTHY_SHARES, seed)
    else:
        result = dict.fromkeys(loads, "test") | datasets.split(outlined, PATIENT_SHARES, seed)
    for name in datasets.SPLITS:
        if name not in result.values():
            reasons = "".join(f"\n  {one['subject']}: {one['why']}" for one in left_out)
            count = f"{len(loads)} can be used, {len(left_out)} cannot"
            what = f"No subject is left for the split {name}; {count}.{reasons}"
            raise CourseError(what, "Give at least three usable subjects, or other splits.")
    covered = {result.get(s) for s in healthy}
    return result, HEALTHY if {"train", "validation"} <= covered else LESION_FREE


def _missing(subjects, modalities) -> Iterator[str]:
    for modality in modalities:
        lacking = sum(modality not in s.scans for s in subjects)
        if lacking:
            yield f"{lacking} of {len(subjects)} subjects have no {modality}: its channel is 0 in them."


def _notes(subjects, facts, splits, training, left_out) -> Iterator[str]:
    for name in datasets.SPLITS:
        members = [s for s in subjects if splits[s.id] == name]
        healthy = sum(is_healthy(s, facts[s.id]) for s in members)
        yield f"Split {name}: {healthy} healthy, {len(members) - healthy} patients."
    yield f"Healthy material for training and thresholds: {training}."
    ill = [s for s in subjects if not is_healthy(s, facts[s.id])]
    bare = sum(not is_outlined(s) for s in ill)
    if bare:
        yield (
            f"{bare} of {len(ill)} patients have no lesion mask: they are judged as whole scans alone, and count in no "
            "figure of voxels, lesions or slices."
        )
    if not ill:
        yield "Nobody is ill in this data: it is asked what healthy scans allow alone, false alarms promised and seen."
    labels = sorted({v for s in subjects for v in facts[s.id]["lesion_labels"]})
    if labels:
        yield f"Lesion labels found: {', '.join(map(str, labels))}; any of them counts as lesion."
    unoriented = [name for s in subjects for name in facts[s.id]["unoriented"]]
    if unoriented:
        yield f"No orientation in the header, taken as right, anterior, superior: {', '.join(unoriented)}."
    yield from _brain_notes(subjects, facts)
    yield from _series_notes({f"{s.id} {m}": (facts[s.id], m) for s in subjects for m in facts[s.id]["notes"]})
    for one in left_out:
        yield f"Left out: {one['subject']}. {one['why']}"


def _brain_notes(subjects, facts) -> Iterator[str]:
    """How brains were extracted, which of them look wrong, and whose lesion lies outside."""
    heads: dict[tuple[str, str], list[str]] = {}
    for s in subjects:
        if facts[s.id]["extracted"]:
            heads.setdefault(tuple(facts[s.id]["extracted"]), []).append(s.id)
    for (modality, method), names in heads.items():
        many = "1 subject shows" if len(names) == 1 else f"{len(names)} subjects show"
        yield (
            f"{many} the whole head; the brain was extracted from {modality} by {method}; look at the masks in "
            "01_preprocessing."
        )
    doubtful = [f"{s.id} ({'; '.join(facts[s.id]['flags'])})" for s in subjects if facts[s.id]["flags"]]
    if doubtful:
        yield f"Brains unlike an adult's, look at their masks: {', '.join(doubtful)}."
    for s in subjects:
        lost, whole = facts[s.id]["lesion_outside_brain_ml"], facts[s.id]["lesion_ml"]
        if lost > MOST_LOST * whole:
            yield f"{s.id}: {100 * lost / whole:.0f} % of its lesion lies outside the brain and is not judged."


def _span(values) -> str:
    least, most = f"{min(values):.0f}", f"{max(values):.0f}"
    return least if least == most else f"{least} to {most}"


def _series_notes(scans: Mapping[str, tuple[dict, str]]) -> Iterator[str]:
    """What was found and done in reading; `scans`: the subject's record and the modality, by the scan's name."""
    series = {name: tuple(record["series"][m]) for name, (record, m) in scans.items() if m in record["series"]}
    if series:
        slices, lengths = zip(*series.values(), strict=True)
        shortest = min(series, key=lambda name: series[name][1])
        yield (
            f"{len(series)} DICOM series of {_span(slices)} slices over {_span(lengths)} mm, the shortest {shortest}; "
            "whether more were scanned cannot be seen."
        )
    said: dict[str, list[str]] = {}
    for name, (record, m) in scans.items():
        for note in record["notes"][m]:
            said.setdefault(note, []).append(name)
    yield from (f"{', '.join(names)}: {note}" for note, names in said.items())
