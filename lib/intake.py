"""Who is let in: subjects are found, examined and split before anything is prepared, all problems listed at once."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed

from lib import ROOT, acquisition, datasets, dicom, privacy, quality, volumes
from lib.boxes import extent_mm
from lib.datasets import HEALTHY_SHARES, PATIENT_SHARES, Subject
from lib.errors import CourseError, check_choice, check_least
from lib.extraction import BONE_HU, CHOICES, MOST_BONE, find, keep, kept
from lib.preprocessing import CT_WINDOW, brain_mask, canonical, signal
from lib.progress import bar
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
    """Subjects that can be used, each with its split and what the examination found, and those that were left out."""

    subjects: tuple[Subject, ...]
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
    modalities: str = "FLAIR",
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
) -> Gathered:
    """Find, examine and split the subjects of a folder; nothing is written but what the examination remembers.

    `data`: a folder, or "" for the embedded cohort of `healthy` subjects and `patients` at `voxel_mm`;
    `healthy_data`: one of healthy subjects beside it;
    `modalities`: names joined by commas; `incomplete`: whether one of them is enough; `size` × `pixel_mm`: the square
    that a brain must fit; `extraction`: "auto" finds the brain in scans that show the whole head, "never" refuses them.
    Raises CourseError that lists every problem of every scan, unless `skip_broken`, which leaves those subjects out.
    """
    check_least("seed", seed, 0)
    check_choice("extraction", extraction, CHOICES)
    _check_patients(data, healthy_data)
    folder = Path(data) if data else _embedded(healthy, patients, voxel_mm, seed)
    wanted = datasets.parse_modalities(modalities)
    dataset = datasets.find_subjects(folder, layout, healthy_data)
    subjects, lacking = _with_modalities(dataset.subjects, wanted, incomplete)
    facts = examine(subjects, wanted, size * pixel_mm, extraction)
    broken = {s: record["problems"] for s, record in facts.items() if record["problems"]}
    if broken and not skip_broken:
        raise _refusal(broken, len(subjects))
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
    return Gathered(used, facts, assigned, training, tuple(left_out), notes)


def _check_patients(data: str, healthy_data: str) -> None:
    if healthy_data and not data:
        what = f"There are no patients beside the healthy subjects of {healthy_data}."
        raise CourseError(what, "Give the folder of their scans by --data.")


def examine(
    subjects: tuple[Subject, ...], modalities: tuple[str, ...], side_mm: float, extraction: str = "auto"
) -> dict[str, dict]:
    """What is found in each subject's files, by subject.

    A record has `problems` (pairs of what and cure, empty for a good subject), `checksums` of the voxels by modality,
    `identity` (a checksum of all voxels and grids, the lesion mask's too), `brain_litres`, `extent_mm`, `lesion_ml`,
    `lesion_outside_brain_ml`, `lesion_labels`, `unoriented` (files whose axes are assumed), and by modality
    `acquisition` (facts as `datasets.acquisition`), `series` (slices and mm of a DICOM series), `notes` (of reading);
    of scans that showed a head, `extracted` (the modality and by what the brain was found, kept by `extraction.keep`),
    else []; `quality` of the brain's mask and `flags`, what of it is unlike a brain.
    A brain longer than `side_mm` is a problem.
    Good files that have not changed since the last examination, by size and time, are not read again.
    """
    memory = _Memory()
    keys = {s.id: memory.key(s, modalities, extraction) for s in subjects}
    waiting = [s for s in subjects if not memory.has(keys[s.id])]
    jobs = (delayed(_examine_subject)(s, modalities, extraction) for s in waiting)
    workers = min(os.cpu_count() or 1, max(1, len(waiting) // 4))
    found = Parallel(n_jobs=workers, return_as="generator")(jobs)
    shown = bar(found, "examining", total=len(waiting), unit="subject", disable=not waiting)
    for subject, record in zip(waiting, shown, strict=True):
        memory.records[keys[subject.id]] = record
    memory.keep()
    records = {s.id: {**memory.records[keys[s.id]]} for s in subjects}
    return _with_square(_with_duplicates(records), side_mm)


def examine_scan(subject: Subject, scans: Mapping[str, Volume], side_mm: float) -> dict:
    """The record of one person's scans that are read already, as `examine` gives it. Of a single slice, the brain may
    be of any volume up to the usual."""
    record = _record()
    flat = all(scan.voxels.shape[2] == 1 for scan in scans.values())
    _look(record, subject, scans, None, (0.0, BRAIN_LITRES[1]) if flat else BRAIN_LITRES, "never")
    return _with_square(_with_duplicates({subject.id: record}), side_mm)[subject.id]


def _record() -> dict:
    return {
        "problems": [], "checksums": {}, "identity": "", "brain_litres": 0.0, "extent_mm": [0, 0, 0], "lesion_ml": 0.0,
        "lesion_outside_brain_ml": 0.0, "lesion_labels": [], "unoriented": [], "acquisition": {}, "series": {},
        "notes": {}, "extracted": [], "quality": {}, "flags": [],
    }  # fmt: skip


def _examine_subject(subject: Subject, modalities: tuple[str, ...], extraction: str) -> dict:
    record = _record()
    scans = {m: _attempt(record, subject.scans[m]) for m in subject.having(modalities)}
    lesion = _attempt(record, subject.lesion_mask, constant_allowed=True) if subject.lesion_mask else None
    _look(record, subject, scans, lesion, BRAIN_LITRES, extraction)
    return record


def _look(
    record: dict, subject: Subject, scans: Mapping[str, Volume | None], lesion: Volume | None, litres, extraction: str
) -> None:
    """Fill a record; `litres`: the least and the most that a brain may have."""
    for modality, volume in scans.items():
        if volume:
            record["checksums"][modality] = volumes.checksum(volume.voxels)
            record["problems"] += _intensity_problems(subject.scans[modality], modality, volume, extraction)
            record["unoriented"] += [] if volume.oriented else [subject.hiding(subject.scans[modality].name)]
            _look_at_acquisition(record, modality, subject.scans[modality], volume)
    if not record["problems"]:
        record["identity"] = _content([*scans.values(), lesion])
        _look_at_brain(record, subject, scans, lesion, litres, extraction)
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


def _content(found: list[Volume | None]) -> str:
    parts = [volumes.checksum(a) for v in found if v for a in (v.voxels, v.affine)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:32]


def _refusal(broken: Mapping[str, list], subjects: int) -> CourseError:
    lines = [f"  {what} {cure}" for problems in broken.values() for what, cure in problems]
    count = f"{len(broken)} of {subjects} subjects cannot be used:"
    return CourseError("\n".join([count, *lines]), "Mend them, or leave them out with --skip-broken.")


def _attempt(record: dict, path, **options) -> Volume | None:
    try:
        return datasets.read_scan(path, **options)
    except CourseError as error:
        record["problems"].append((error.what, error.cure))
        return None


def _intensity_problems(path, modality: str, volume: Volume, extraction: str):
    if modality == "CT":
        yield from _hounsfield_problems(path, volume, extraction)
    elif (volume.voxels < 0).mean() > MOST_NEGATIVE:
        yield (
            f"{path} has negative intensities, as after a z-score.",
            "Give the scan from before, or shift its brain above 0.",
        )
    if len(np.unique(volume.voxels[::2, ::2, ::2])) < LEAST_LEVELS:
        yield f"{path} has fewer than {LEAST_LEVELS} grey levels.", "Give a scan, not a mask or a label map."


def _hounsfield_problems(path, volume: Volume, extraction: str):
    found = volume.voxels[signal("CT", volume.voxels)]
    bone = float((found > BONE_HU).mean()) if len(found) else 0.0
    middle = float(np.median(found)) if len(found) else 0.0
    if bone > MOST_BONE and extraction == "auto":
        return
    if not CT_WINDOW[0] <= middle <= CT_WINDOW[1]:
        what = f"{path} has a median of {middle:.0f}, and a brain in Hounsfield units has some 35."
        yield what, "Give a brain-extracted CT in Hounsfield units."
    elif bone > MOST_BONE:
        what = f"{path} shows a skull: {100 * bone:.0f} % of it is above {BONE_HU} Hounsfield units."
        yield what, "Give brain-extracted scans with one value outside the brain."


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
            what = f"{path} lies on another grid than {next(iter(subject.scans[m] for m in scans)).name}."
            record["problems"].append((what, "Resample it to that grid, or give the file that belongs to it."))
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
        record["problems"].append(_no_brain(subject, scans, record, f"a brain has {least} to {most}"))
        return
    record["quality"] = quality.measured(brain, first.voxel_mm)
    record["flags"] = quality.flags(record["quality"], brain.shape[2])
    record["extent_mm"] = extent_mm(brain, first.voxel_mm).round(1).tolist()
    if lesion:
        _look_at_lesion(record, subject, lesion, brain)
    elif subject.healthy is False:
        record["problems"].append(
            (f"{subject.id} is a patient without a lesion mask.", "Add its mask, or leave it out.")
        )


def _no_brain(subject: Subject, scans: Mapping[str, Volume], record: dict, allowed: str) -> tuple[str, str]:
    litres = f"{record['brain_litres']:.2f} litres"
    if record["extracted"]:
        modality, method = record["extracted"]
        what = f"{subject.id}: what was extracted from its {modality} by {method} has {litres}, and {allowed}."
        return what, "Give brain-extracted scans."
    above, outside = ("not background", "one value") if "CT" in scans else ("above 0", "0")
    what = f"{subject.id}: {litres} are {above}, and {allowed}."
    return what, f"Give brain-extracted scans with {outside} outside the brain."


def _look_at_lesion(record: dict, subject: Subject, lesion: Volume, brain: np.ndarray) -> None:
    labels = np.unique(lesion.voxels)
    path, truth = subject.lesion_mask, lesion.voxels > 0
    outside = float((truth & ~brain).sum() * lesion.millilitres)
    record["lesion_ml"] = round(float(truth.sum() * lesion.millilitres), 6)
    record["lesion_outside_brain_ml"] = round(outside, 3)
    if (labels != labels.round()).any() or len(labels) > LEAST_LEVELS:
        what = f"{path} holds no labels but {len(labels)} values."
        record["problems"].append((what, "Give a mask of whole numbers, above 0 in the lesion."))
        return
    record["lesion_labels"] = [int(v) for v in labels if v]
    if truth.sum() > 0.8 * brain.sum():
        record["problems"].append((f"{path} covers the whole brain.", "Give the lesion's mask, not the brain's."))
    elif outside > record["lesion_ml"] / 2:
        record["problems"].append((f"{path} lies mostly outside the brain.", "Check that it belongs to this scan."))
    if subject.healthy and truth.any():
        record["problems"].append(
            (f"{path} has a lesion in a subject declared healthy.", "Correct participants.tsv or the mask.")
        )


def _with_duplicates(records: dict[str, dict]) -> dict[str, dict]:
    """The same voxels under two names: the later name has a problem."""
    owner: dict[str, str] = {}
    for subject, record in records.items():
        for modality, mark in record["checksums"].items():
            first = owner.setdefault(mark, f"{subject} {modality}")
            if first != f"{subject} {modality}":
                problem = (f"{subject} {modality} has the same voxels as {first}.", "Keep one of the two.")
                record["problems"] = [*record["problems"], problem]
    return records


def _with_square(records: dict[str, dict], side: float) -> dict[str, dict]:
    for subject, record in records.items():
        longest = max(record["extent_mm"][:2])
        if longest > side:
            problem = (
                f"{subject}: its brain of {longest:.0f} mm does not fit slices of {side:.0f} mm.",
                "Raise size or pixel_mm.",
            )
            record["problems"] = [*record["problems"], problem]
    return records


class _Memory:
    """Records of earlier examinations, by the names, sizes and times of a subject's files."""

    def __init__(self):
        self.path = ROOT / "data" / "prepared" / "examined.json"
        try:
            self.records = json.loads(self.path.read_bytes())
            self.records.keys()
        except (OSError, ValueError, AttributeError):
            self.records = {}

    def has(self, key: str) -> bool:
        """Whether a record is there, and the brain that was extracted for it."""
        record = self.records.get(key)
        return record is not None and (not record["extracted"] or kept(record["identity"]) is not None)

    def key(self, subject: Subject, modalities: tuple[str, ...], extraction: str) -> str:
        scans = [*(subject.scans[m] for m in subject.having(modalities)), subject.lesion_mask]
        beside = [acquisition.sidecar(subject.scans[m]) for m in subject.having(modalities)]
        files = [f for scan in scans if scan for f in (sorted(scan.iterdir()) if scan.is_dir() else [scan])] + beside
        seen = [(os.path.realpath(f), *((s.st_size, s.st_mtime_ns) if (s := _stat(f)) else ())) for f in files]
        return hashlib.sha256(
            json.dumps([EXAMINATION, seen, modalities, subject.healthy, extraction]).encode()
        ).hexdigest()

    def keep(self) -> None:
        good = {key: record for key, record in self.records.items() if not record["problems"]}
        volumes.write_bytes(self.path, json.dumps(good).encode())


def _stat(path):
    try:
        return path.stat()
    except OSError:
        return None


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
    """Without a lesion mask, a subject is of use only where it is known to be healthy."""
    unknown = [s for s in subjects if s.lesion_mask is None and not s.healthy]
    why = "It has no lesion mask and is not known to be healthy; say so in the column healthy of participants.tsv."
    return tuple(s for s in subjects if s not in unknown), [{"subject": s.id, "why": why} for s in unknown]


def is_healthy(subject: Subject, facts: dict) -> bool:
    """Healthy by declaration, or by a lesion mask that is empty."""
    return subject.healthy if subject.healthy is not None else facts["lesion_ml"] == 0


def _assign(subjects, facts, stated: Mapping[str, str], left_out, seed: int) -> tuple[dict[str, str], str]:
    """Splits by subject, and what the healthy material is; `stated`: the splits of a file, where there is one."""
    loads = {s.id: facts[s.id]["lesion_ml"] for s in subjects}
    healthy = {s.id for s in subjects if is_healthy(s, facts[s.id])}
    if stated:
        result = {s: name for s, name in stated.items() if s in loads}
    elif len(healthy) >= len(datasets.SPLITS):
        result = dict.fromkeys(loads, "test") | datasets.split(dict.fromkeys(healthy, 0.0), HEALTHY_SHARES, seed)
    else:
        result = datasets.split(loads, PATIENT_SHARES, seed)
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
