"""Who is let in: subjects are found, examined and split before anything is prepared, all problems listed at once."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lib import data_folder, datasets
from lib.datasets import HEALTHY_SHARES, PATIENT_SHARES
from lib.errors import CourseError, check_choice, check_least
from lib.examination import examine
from lib.extraction import CHOICES
from lib.progress import bar
from lib.subjects import Subject, some

HEALTHY, LESION_FREE = "healthy subjects", "lesion-free slices of patients"
EMBEDDED = "embedded cohort (simulated; its figures are not to be compared with the literature)"
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
    assigned, training = _assign(useful, facts, stated, left_out, seed, dataset.notes[0])
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


def _refusal(broken: Mapping[str, list], subjects: int, understood: str) -> CourseError:
    lines = [f"  {what} {cure}" for problems in broken.values() for what, cure in problems]
    count = f"{len(broken)} of {subjects} subjects cannot be used:"
    return CourseError("\n".join([understood, count, *lines]), "Mend them, or leave them out with --skip-broken.")


def _embedded(healthy: int, patients: int, voxel_mm: float, seed: int) -> Path:
    from lib import phantom  # and nilearn with it, which scans of one's own do without

    folder = data_folder("embedded", phantom.folder_name(healthy, patients, voxel_mm, seed))
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


def _assign(
    subjects, facts, stated: Mapping[str, str], left_out, seed: int, understood: str
) -> tuple[dict[str, str], str]:
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
            what = f"{understood}\nNo subject is left for the split {name}; {count}.{reasons}"
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
    yield from (f"{some(names)}: {note}" for note, names in said.items())
