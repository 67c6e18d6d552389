"""From subjects that were let in to a prepared cohort on disk, a subject at a time; and one scan prepared by itself."""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import nibabel
import numpy as np
import psutil
import scipy

from lib import data_folder, dicom, intensities, privacy, volumes, workers
from lib.cohort import FORMAT, PreparedSubject, lesion_free
from lib.conventions import hidden_names
from lib.datasets import modality_of, read_lesion, read_scan, read_subject
from lib.errors import CourseError
from lib.examination import content, examine_scan
from lib.extraction import VERSION as EXTRACTION
from lib.extraction import find, kept
from lib.intake import LESION_FREE, Gathered, is_healthy, is_outlined
from lib.preprocessing import Prepared, Recipe, canonical, extracted, prepare
from lib.refusals import refusal
from lib.subjects import Subject
from lib.volumes import Volume

WRITING_SECONDS = 3600  # no subject takes so long to write
OWN_BYTES = 0.03  # of a voxel of the scan's own masks, compressed


def prepare_cohort(gathered: Gathered, recipe: Recipe, cluster: str = "") -> Path:
    """Write the cohort, a subject at a time, to `data/prepared/<hash>`; what is there already is not made again.

    A standard of intensities is learnt first, from the healthy material of training alone. Needs the memory of one
    subject a core, however many there are, and says how much of the disk. `cluster`: as in workers.each. Returns the
    cohort's folder. Raises CourseError where the disk has too little space.
    """
    identity, folder, waiting = _plan(gathered, recipe)
    if waiting or not (folder / "manifest.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        if waiting:
            print(space(gathered, recipe))
        standard = _standard(gathered, recipe, folder, cluster)
        work = partial(_prepare_subject, recipe=recipe, folder=folder, standard=standard)
        for _ in _for_each(work, waiting, gathered, "preparing", cluster):
            pass
        manifest = json.dumps(_manifest(identity, gathered, recipe, folder) | {"standard": standard}, indent=1)
        volumes.write_bytes(folder / "manifest.json", manifest.encode())
    return folder


def space(gathered: Gathered, recipe: Recipe) -> str:
    """How much of the disk the subjects that are not prepared yet will take, of what is free: a sentence.

    Raises CourseError where it is too little.
    """
    _, folder, waiting = _plan(gathered, recipe)
    facts = [gathered.facts[s.id] for s in waiting]
    slices = [1 if recipe.slices == "largest" else _slices(one, recipe) for one in facts]
    own = sum(np.prod(np.divide(one["extent_mm"], one["voxel_mm"])) for one in facts)
    needed = recipe.size**2 * sum(slices) * (2 * len(recipe.modalities) + 2) + own * OWN_BYTES
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    count = f"{len(facts):,} subject{'s' * (len(facts) != 1)}"
    said = f"{count} to prepare will take some {_gigabytes(needed)} of disk; {_gigabytes(free)} are free."
    if needed > free:
        cure = "Make room, raise pixel_mm or slice_mm, or put data/prepared on another disk by a link."
        raise CourseError(f"The disk is too small for this cohort: {said}", cure)
    return said


def _plan(gathered: Gathered, recipe: Recipe) -> tuple[str, Path, list[Subject]]:
    """A cohort's hash, its folder, and the subjects that are not in it yet."""
    identity = _identity(gathered, recipe)
    folder = data_folder("prepared", identity)
    return identity, folder, [s for s in gathered.subjects if not (folder / s.id / "facts.json").exists()]


def _slices(found: dict, recipe: Recipe) -> float:
    return np.ceil(found["extent_mm"][2] / (recipe.slice_mm or found["voxel_mm"][2]) - 0.1)


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def prepare_scan(
    scans: Mapping[str, Path],
    recipe: Recipe,
    brain: Path | None = None,
    standard: Mapping[str, Sequence[float]] | None = None,
    keep: Path | None = None,
) -> PreparedSubject:
    """Prepare one person's scans outside any cohort, without a lesion mask, named after the first file.

    `scans`: a file for each of the recipe's modalities that there is; `brain`: a mask on their grid, above 0 in the
    brain; without one the brain is extracted from scans that show the whole head; `standard`: of intensities, as a
    cohort's manifest has it where the recipe's normalisation is learnt; `keep`: the folder it is kept in, else
    `data/prepared/scans`. Its facts have `scan_shape` and `scan_affine`, the grid of the first file, `missing`, `notes`
    of reading, `unoriented` files, and `extracted` and `flags` as `intake.examine` has them.
    Raises CourseError that lists what the examination finds wrong with the files.
    """
    unknown = [m for m in scans if m not in (standard or {})] if recipe.normalisation in intensities.STANDARDS else []
    if unknown:
        what = f"Intensities by {recipe.normalisation} need a standard, and {' and '.join(unknown)} has none."
        raise CourseError(what, "Give a scan of the modality that the run's training scans taught.")
    subject = _alone({m: Path(scans[m]) for m in recipe.modalities if m in scans})
    read = {m: read_scan(path) for m, path in subject.scans.items()}
    grid, name = next(iter(read.values())), subject.id
    own = {_own_modality(subject.scans[m], m): scan for m, scan in read.items()}
    found = None if brain or not _on_one_grid(read.values()) else find(own)
    if found:
        inside = Volume(found[0], canonical(grid).affine)
        ready = {m: extracted(m, scan, inside) for m, scan in read.items()}
    else:
        ready = _extracted(subject, read, brain) if brain else read
    record = examine_scan(subject, ready, recipe.size * recipe.pixel_mm)
    if record["problems"]:
        raise _refusal(name, record, found)
    if grid.voxels.shape[2] == 1 and nibabel.io_orientation(grid.affine)[2, 0] != 2:
        raise CourseError(f"{name} is a single slice that is not axial.", "Give an axial slice, or the whole series.")
    if grid.voxels.shape[2] == 1 and recipe.register:
        what = f"{name} is a single slice, and this recipe lays whole brains over a template."
        raise CourseError(what, "Give the whole series, or a run without register.")
    content = json.dumps([FORMAT, asdict(recipe), name, list(read), record["identity"], standard], sort_keys=True)
    folder = (keep or data_folder("prepared", "scans")) / hashlib.sha256(content.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / name / "facts.json").exists():
        _write_subject(prepare(ready, None, recipe, standard), folder / name)
    facts = json.loads((folder / name / "facts.json").read_bytes())
    about = {"id": name, "split": "", "healthy": False, "modality": "+".join(recipe.modalities)}
    about |= {"acquisition": record["acquisition"], "missing": [m for m in recipe.modalities if m not in scans]}
    about |= {"scan_shape": grid.voxels.shape, "scan_affine": grid.affine.tolist()}
    about |= {"notes": record["notes"], "unoriented": record["unoriented"]}
    about |= {"extracted": list(found[1:]) if found else [], "flags": record["flags"]}
    return PreparedSubject.load(folder / name, about | facts)


def _identity(gathered: Gathered, recipe: Recipe) -> str:
    who = [
        [
            s.id,
            gathered.splits[s.id],
            is_healthy(s, gathered.facts[s.id]),
            s.site,
            s.kind,
            gathered.facts[s.id]["identity"],
            *_extraction(gathered.facts[s.id]),
            _acquisition(gathered.facts[s.id], s, recipe),
        ]
        for s in gathered.subjects
    ]
    left_out = [one["subject"] for one in gathered.left_out]
    content = json.dumps([FORMAT, asdict(recipe), gathered.training, who, left_out], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _standard(gathered: Gathered, recipe: Recipe, folder: Path, cluster: str) -> dict[str, list[float]]:
    """What the healthy material of the training split teaches a normalisation, by modality; kept in the folder."""
    way, path = recipe.normalisation, folder / "standard.json"
    if way not in intensities.STANDARDS:
        return {}
    if not path.exists():
        healthy = {s.id for s in gathered.subjects if is_healthy(s, gathered.facts[s.id])}
        train = [s for s in gathered.subjects if gathered.splits[s.id] == "train"]
        members = [s for s in train if gathered.training == LESION_FREE or s.id in healthy]
        looks = list(_for_each(partial(_look, recipe=recipe), members, gathered, "learning intensities", cluster))
        known = {m: [one[m] for one in looks if m in one] for m in recipe.modalities}
        if not all(known.values()):
            what = f"The training split has no healthy slice of {' and '.join(m for m in known if not known[m])}."
            raise CourseError(what, f"Give more healthy subjects, other splits, or another normalisation than {way}.")
        volumes.write_bytes(
            path, json.dumps({m: intensities.learnt(scans, way) for m, scans in known.items()}).encode()
        )
    return json.loads(path.read_bytes())


def _for_each(work: Callable, subjects: Sequence[Subject], gathered: Gathered, what: str, cluster: str) -> Iterator:
    """`work` of each subject with what its examination has found."""
    items = [(s, gathered.facts[s.id]) for s in subjects]
    needs = [path for s in subjects for path in s.scans.values()]
    writes = data_folder("prepared")
    return workers.each(work, items, what=what, unit="subject", cluster=cluster, needs=needs, writes=writes)


def _look(examined: tuple[Subject, dict], recipe: Recipe) -> dict[str, np.ndarray]:
    """The percentiles of a training subject's healthy slices, by modality."""
    there = examined[0].having(recipe.modalities)
    plain = replace(recipe, modalities=there, normalisation="max", register="", clahe=False, slices="all")
    prepared = _prepared(examined, plain)
    usable = prepared.brain & lesion_free(prepared.brain, prepared.lesion_slices)[:, None, None]
    way, images = recipe.normalisation, dict(zip(there, prepared.image, strict=True))
    return {m: intensities.percentiles(one[usable], way) for m, one in images.items() if usable.any()}


def _prepare_subject(examined: tuple[Subject, dict], recipe: Recipe, folder: Path, standard: Mapping) -> None:
    target = folder / examined[0].id
    if not (target / "facts.json").exists():  # otherwise another run was quicker
        _write_subject(_prepared(examined, recipe, standard), target)


def _prepared(examined: tuple[Subject, dict], recipe: Recipe, standard: Mapping | None = None) -> Prepared:
    """A subject, with what its examination has found; what has changed since is refused."""
    subject, found = examined
    try:
        scans, lesion = read_subject(subject, recipe.modalities), read_lesion(subject)
    except CourseError as error:
        raise refusal("E15", subject=subject.id) from error
    if _has_changed(scans, lesion, found):
        raise refusal("E15", subject=subject.id)
    try:
        return prepare(_brain_alone(subject, scans, found), lesion, recipe, standard)
    except CourseError as error:
        raise CourseError(f"{subject.id}: {error.what}", error.cure) from error


def _has_changed(scans: Mapping[str, Volume], lesion: Volume | None, found: dict) -> bool:
    """Whether scans are no longer those that were examined; where some modalities alone are read, by their voxels."""
    if scans.keys() == found["checksums"].keys():
        return content([*scans.values(), lesion]) != found["identity"]
    return any(volumes.checksum(scan.voxels) != found["checksums"][m] for m, scan in scans.items())


def _half(target: Path) -> Path:
    """A folder to write in beside `target`; its name says whose it is, as `_clear` reads it."""
    return target.with_name(f".{target.name}-{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


@cache
def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _clear(folder: Path) -> None:
    """Remove what writers that were killed have left: those of this machine that are gone, any after an hour."""
    for place in folder.glob(".*-*"):
        *_, machine, process, _ = ("", "", *place.name.split("-"))
        gone = machine == _machine() and process.isdecimal() and _is_over(int(process))
        with contextlib.suppress(OSError):  # it was moved into place just now
            if gone or time.time() - place.stat().st_mtime > WRITING_SECONDS:
                shutil.rmtree(place)


def _is_over(process: int) -> bool:
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def read_brain(subject: Subject, modalities: Sequence[str], found: dict) -> dict[str, Volume]:
    """Those of some modalities that a subject has, without what lies outside the brain, which its examination has found
    where they show the whole head."""
    return _brain_alone(subject, read_subject(subject, modalities), found)


def _brain_alone(subject: Subject, scans: dict[str, Volume], found: dict) -> dict[str, Volume]:
    if not found["extracted"]:
        return scans
    inside = kept(found["identity"])
    if inside is None:
        what = f"The brain that was extracted of {subject.id} is gone from data/prepared/brains."
        raise CourseError(what, "Start again: it is made anew.")
    return {m: extracted(m, scan, inside) for m, scan in scans.items()}


def _write_subject(prepared: Prepared, target: Path) -> None:
    if target.exists() and not (target / "facts.json").exists():  # damaged: whole folders are moved in at once
        shutil.rmtree(target)
    place = _half(target)
    place.mkdir()
    np.save(place / "image.npy", prepared.image.astype(np.float16))
    np.save(place / "brain.npy", prepared.brain)
    np.save(place / "lesion.npy", prepared.lesion)
    np.savez_compressed(place / "own_grid.npz", **asdict(prepared.own))
    to_template = prepared.own.to_template
    voxel_ml = abs(np.linalg.det(prepared.affine[:3, :3]) / np.linalg.det(to_template[:3, :3])) / 1000
    facts = {
        "affine": prepared.affine.tolist(),
        "to_template": to_template.tolist() if prepared.template_dice is not None else None,
        "template_dice": prepared.template_dice and round(prepared.template_dice, 4),
        "scales": prepared.scales,
        "shape": prepared.brain.shape,
        "lesion_slices": prepared.lesion_slices,
        "prepared_lesion_ml": round(float(prepared.lesion.sum() * voxel_ml), 3),
    }
    (place / "facts.json").write_text(json.dumps(facts))
    try:
        place.rename(target)
    except OSError:
        shutil.rmtree(place)
        if not (target / "facts.json").exists():  # otherwise another run was quicker
            raise


def name_of(scan: Path) -> str:
    """The name of a scan's file or folder without its ending; "scan" where it leads to a person."""
    name = re.sub(r"\.(nii|nii\.gz|png|jpe?g|mha|img)$", "", scan.absolute().name, flags=re.IGNORECASE)
    return "scan" if not name or privacy.leads(name, dicom.patient(scan)) else name


def _alone(scans: Mapping[str, Path]) -> Subject:
    """Someone known by these files alone."""
    subject = Subject(name_of(next(iter(scans.values()))), scans)
    return replace(subject, hidden=hidden_names(subject))


def _extracted(subject: Subject, scans: Mapping[str, Volume], brain: Path) -> dict[str, Volume]:
    inside = read_scan(brain, constant_allowed=True)
    if not (inside.voxels > 0).any():
        raise CourseError(f"{brain} is 0 everywhere.", "Give a mask that is above 0 in the brain.")
    mask = canonical(inside)
    for m, scan in scans.items():
        turned = canonical(scan)
        if not volumes.same_grid(mask.voxels.shape, mask.affine, turned.voxels.shape, turned.affine):
            name = subject.hiding(subject.scans[m].name)
            raise CourseError(f"{brain} lies on another grid than {name}.", "Give the mask that belongs to this scan.")
    return {m: extracted(m, scan, inside) for m, scan in scans.items()}


def _own_modality(path: Path, stands_for: str) -> str:
    """What a scan is, where its name or header tells, or else what it stands for."""
    try:
        return modality_of(path)
    except CourseError:
        return stands_for


def _on_one_grid(scans: Iterable[Volume]) -> bool:
    first, *others = (canonical(scan) for scan in scans)
    return all(volumes.same_grid(first.voxels.shape, first.affine, o.voxels.shape, o.affine) for o in others)


def _refusal(name: str, record: dict, found: tuple | None) -> CourseError:
    if found and not record["quality"]:
        what = (
            f"No brain was found in {name}: of the head that it shows, {found[2]} left {record['brain_litres']} litres."
        )
        return CourseError(what, "Give a brain-extracted scan, or a mask of its brain by --mask.")
    return CourseError("\n".join(what for what, _ in record["problems"]), record["problems"][0][1])


def _extraction(found: dict) -> list:
    return [EXTRACTION, *found["extracted"]] if found["extracted"] else []


def _acquisition(found: dict, subject: Subject, recipe: Recipe) -> dict[str, dict]:
    return {m: found["acquisition"].get(m, {}) for m in subject.having(recipe.modalities)}


def _manifest(identity: str, gathered: Gathered, recipe: Recipe, folder: Path) -> dict:
    subjects = []
    for s in gathered.subjects:
        found = gathered.facts[s.id]
        subjects.append(
            {
                "id": s.id,
                "split": gathered.splits[s.id],
                "healthy": is_healthy(s, found),
                "outlined": is_outlined(s),
                "site": s.site,
                "kind": s.kind,
                "checksums": found["checksums"],
                "acquisition": _acquisition(found, s, recipe),
                "missing": [m for m in recipe.modalities if m not in s.scans],
                "lesion_ml": found["lesion_ml"],
                "brain_litres": found["brain_litres"],
                "lesion_outside_brain_ml": found["lesion_outside_brain_ml"],
                "extracted": found["extracted"],
                "quality": found["quality"],
                "flags": found["flags"],
                **json.loads((folder / s.id / "facts.json").read_bytes()),
            }
        )
    versions = {"numpy": np.__version__, "scipy": scipy.__version__, "nibabel": nibabel.__version__}
    if recipe.bias or recipe.register:
        versions |= {"SimpleITK": version("SimpleITK")}
    return {
        "format": FORMAT,
        "hash": identity,
        "recipe": asdict(recipe),
        "versions": versions,
        "training": gathered.training,
        "subjects": subjects,
        "left_out": gathered.left_out,
    }
