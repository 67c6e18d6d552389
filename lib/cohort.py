"""The prepared cohort on disk: written a subject at a time, opened memory-mapped."""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import nibabel
import numpy as np
import scipy
from joblib import Parallel, delayed
from scipy import ndimage

from lib import ROOT, dicom, privacy, run_folder, volumes
from lib.datasets import Subject, hidden_names, read_scan
from lib.errors import CourseError, check_choice
from lib.extraction import VERSION as EXTRACTION
from lib.extraction import find, kept
from lib.intake import LESION_FREE, Gathered, examine_scan, is_healthy
from lib.preprocessing import OwnGrid, Prepared, Recipe, between_empty, canonical, extracted, prepare
from lib.progress import bar
from lib.volumes import Volume

FORMAT = 5  # of a subject's folder and all that is kept in it: raise it when one of them comes out differently
LEAST_BRAIN = 0.05  # of a slice's square; emptier slices teach nothing
GUARD = 2  # slices between a lesion and a slice that counts as lesion-free
GRIDS = ("prepared", "scan")
OPEN_ARRAYS = 300  # each mapped array holds a file open, and a process may have 1024


def prepare_cohort(gathered: Gathered, recipe: Recipe) -> Path:
    """Write the cohort, a subject at a time, to `data/prepared/<hash>`; what is there already is not made again.

    Needs the memory of one subject a core, however many there are. Returns the cohort's folder.
    """
    identity = _identity(gathered, recipe)
    folder = ROOT / "data" / "prepared" / identity
    waiting = [s for s in gathered.subjects if not (folder / s.id / "facts.json").exists()]
    if waiting or not (folder / "manifest.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        jobs = (delayed(_prepare_subject)(s, gathered.facts[s.id], recipe, folder) for s in waiting)
        for _ in bar(
            _parallel(jobs, len(waiting)), "preparing", total=len(waiting), unit="subject", disable=not waiting
        ):
            pass
        manifest = json.dumps(_manifest(identity, gathered, recipe, folder), indent=1)
        volumes.write_bytes(folder / "manifest.json", manifest.encode())
    return folder


def prepare_scan(
    scans: Mapping[str, Path], recipe: Recipe, brain: Path | None = None, keep: Path | None = None
) -> "PreparedSubject":
    """Prepare one person's scans outside any cohort, without a lesion mask, named after the first file.

    `scans`: a file for each of the recipe's modalities that there is; `brain`: a mask on their grid, above 0 in the
    brain; without one the brain is extracted from scans that show the whole head; `keep`: the folder it is kept in,
    else `data/prepared/scans`. Its facts have `scan_shape` and `scan_affine`, the grid of the first file, `missing`,
    `notes` of reading, `unoriented` files, and `extracted` and `flags` as `intake.examine` has them.
    Raises CourseError that lists what the examination finds wrong with the files.
    """
    subject = _alone({m: Path(scans[m]) for m in recipe.modalities if m in scans})
    read = {m: read_scan(path) for m, path in subject.scans.items()}
    grid, name = next(iter(read.values())), subject.id
    found = None if brain or not _on_one_grid(read.values()) else find(read)
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
    content = json.dumps([FORMAT, asdict(recipe), name, list(read), record["identity"]], sort_keys=True)
    folder = (keep or ROOT / "data" / "prepared" / "scans") / hashlib.sha256(content.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / name / "facts.json").exists():
        thick = {m: between_empty(v) if v.voxels.shape[2] == 1 else v for m, v in ready.items()}
        _write_subject(prepare(thick, None, recipe), folder / name)
    facts = json.loads((folder / name / "facts.json").read_bytes())
    about = {"id": name, "split": "", "healthy": False, "modality": "+".join(recipe.modalities)}
    about |= {"acquisition": record["acquisition"], "missing": [m for m in recipe.modalities if m not in scans]}
    about |= {"scan_shape": grid.voxels.shape, "scan_affine": grid.affine.tolist()}
    about |= {"notes": record["notes"], "unoriented": record["unoriented"]}
    about |= {"extracted": list(found[1:]) if found else [], "flags": record["flags"]}
    return PreparedSubject.load(folder / name, about | facts)


def announce(run: str, folder: Path, gathered: Gathered) -> None:
    """Tell the later notebooks of a run which cohort is theirs."""
    said = {
        "path": folder.relative_to(ROOT).as_posix(),
        "hash": folder.name,
        "training": gathered.training,
        "notes": gathered.notes,
        "left_out": gathered.left_out,
    }
    volumes.write_bytes(run_folder(run) / "cohort.json", json.dumps(said, indent=1).encode())


def of_run(run: str, grid: str = "prepared") -> "Cohort":
    """The cohort that notebook 01 prepared for this run; `grid` as in Cohort."""
    check_choice("grid", grid, GRIDS)
    try:
        said = json.loads((run_folder(run) / "cohort.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CourseError(
            f"The run {run!r} has no prepared cohort.", "Run 01_preprocessing with this run's name first."
        ) from error
    return replace(open_cohort(ROOT / said["path"]), grid=grid)


def open_cohort(folder: Path) -> "Cohort":
    """Open a prepared cohort; voxels are memory-mapped and read when they are used.

    Raises CourseError where the folder holds no whole cohort.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if manifest["format"] != FORMAT:
            raise ValueError(manifest["format"])
        subjects = tuple(PreparedSubject.load(folder / s["id"], s) for s in manifest["subjects"])
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise CourseError(
            f"{folder} holds no whole cohort of this version.", "Delete it and run 01_preprocessing again."
        ) from error
    return Cohort(folder, manifest, subjects)


@dataclass(frozen=True)
class PreparedSubject:
    """One subject of a cohort. Arrays are memory-mapped: `image` float16 [modality, slice, row, column];
    `brain`, `lesion` bool [slice, row, column]; `affine` from (column, row, slice) to mm."""

    id: str
    split: str
    healthy: bool
    folder: Path
    facts: dict

    @classmethod
    def load(cls, folder: Path, facts: dict) -> "PreparedSubject":
        subject = cls(facts["id"], facts["split"], facts["healthy"], folder, facts)
        shapes = {array.shape[-3:] for array in (subject.image, subject.brain, subject.lesion)}
        if shapes != {tuple(facts["shape"])}:
            raise ValueError(f"{folder}: arrays of {shapes}")
        return subject

    @property
    def image(self) -> np.ndarray:
        return _mapped(self.folder / "image.npy")

    @property
    def brain(self) -> np.ndarray:
        return _mapped(self.folder / "brain.npy")

    @property
    def lesion(self) -> np.ndarray:
        return _mapped(self.folder / "lesion.npy")

    @property
    def affine(self) -> np.ndarray:
        return np.array(self.facts["affine"])

    @property
    def voxel_mm(self) -> np.ndarray:
        """Edges of a voxel in mm: column, row, slice."""
        return nibabel.affines.voxel_sizes(self.affine)

    @property
    def own_voxel_mm(self) -> np.ndarray:
        """Edges of a voxel of the scan itself in mm: column, row, slice."""
        with np.load(self.folder / "own_grid.npz", allow_pickle=False) as file:
            return nibabel.affines.voxel_sizes(file["affine"])

    def own_grid(self) -> OwnGrid:
        """Brain and lesion as the scan itself has them, before any resampling."""
        with np.load(self.folder / "own_grid.npz", allow_pickle=False) as file:
            return OwnGrid(file["brain"], file["lesion"], file["affine"])

    @cached_property
    def lesion_free(self) -> np.ndarray:
        """Slices with brain and at least GUARD slices between them and any lesion voxel, bool [slice]."""
        touched = np.zeros(len(self.brain), bool)
        touched[self.facts["lesion_slices"]] = True
        near = ndimage.binary_dilation(touched, iterations=GUARD)
        return self.brain.any(axis=(1, 2)) & ~near


@dataclass(frozen=True)
class Cohort:
    """A prepared cohort: `manifest` as on disk, `subjects` in the order of their names; `grid`: the voxels that are
    judged, "prepared" or the "scan"'s own."""

    folder: Path
    manifest: dict
    subjects: tuple[PreparedSubject, ...]
    grid: str = "prepared"

    @property
    def hash(self) -> str:
        return self.manifest["hash"]

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.manifest["recipe"]["modalities"])

    @property
    def incomplete(self) -> bool:
        """Whether some subject lacks one of the modalities."""
        return any(s.facts["missing"] for s in self.subjects)

    @property
    def size(self) -> int:
        """Rows and columns of a slice."""
        return self.manifest["recipe"]["size"]

    @property
    def training(self) -> str:
        """What the healthy material is: healthy subjects, or lesion-free slices of patients."""
        return self.manifest["training"]

    def split(self, name: str) -> tuple[PreparedSubject, ...]:
        return tuple(s for s in self.subjects if s.split == name)

    def healthy_material(self, name: str) -> list[tuple[PreparedSubject, np.ndarray]]:
        """Subjects of a split with the slices [slice, bool] that count as healthy in this cohort."""
        members = [s for s in self.split(name) if self.training == LESION_FREE or s.healthy]
        return [(s, s.lesion_free) for s in members]

    def slices(self, split: str) -> "Slices":
        """The healthy slices of a split with enough brain, as a torch Dataset."""
        index = []
        for subject, usable in self.healthy_material(split):
            enough = subject.brain.mean(axis=(1, 2)) >= LEAST_BRAIN
            index += [(subject, int(i)) for i in np.flatnonzero(usable & enough)]
        if not index:
            raise CourseError(
                f"The split {split} has no healthy slice.", "Give more healthy subjects, or other splits."
            )
        return Slices(tuple(index))


@dataclass(frozen=True)
class Slices:
    """Slices of a cohort; an item is a dict of `image` float32 [modality, row, column], `brain` and `lesion`
    bool [row, column], `subject` (its id) and `slice`."""

    index: tuple[tuple[PreparedSubject, int], ...]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict:
        subject, number = self.index[i]
        return {
            "image": subject.image[:, number].astype(np.float32),
            "brain": np.array(subject.brain[number]),
            "lesion": np.array(subject.lesion[number]),
            "subject": subject.id,
            "slice": number,
        }


@lru_cache(maxsize=OPEN_ARRAYS)
def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


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


def _parallel(jobs, count: int) -> Iterator:
    """In processes where that is worth their start."""
    return Parallel(n_jobs=min(os.cpu_count() or 1, max(1, count // 4)), return_as="generator_unordered")(jobs)


def _prepare_subject(subject: Subject, found: dict, recipe: Recipe, folder: Path) -> None:
    scans = read_brain(subject, recipe.modalities, found)
    lesion = read_scan(subject.lesion_mask, constant_allowed=True) if subject.lesion_mask else None
    _write_subject(prepare(scans, lesion, recipe), folder / subject.id)


def read_brain(subject: Subject, modalities: Sequence[str], found: dict) -> dict[str, Volume]:
    """Those of some modalities that a subject has, without what lies outside the brain, which its examination has found
    where they show the whole head."""
    scans = {m: read_scan(subject.scans[m]) for m in subject.having(modalities)}
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
    place = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    place.mkdir()
    np.save(place / "image.npy", prepared.image.astype(np.float16))
    np.save(place / "brain.npy", prepared.brain)
    np.save(place / "lesion.npy", prepared.lesion)
    np.savez_compressed(place / "own_grid.npz", **asdict(prepared.own))
    voxel_ml = abs(np.linalg.det(prepared.affine[:3, :3])) / 1000
    facts = {
        "affine": prepared.affine.tolist(),
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
    name = re.sub(r"\.(nii|nii\.gz|png|jpe?g)$", "", scan.absolute().name, flags=re.IGNORECASE)
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
    return {
        "format": FORMAT,
        "hash": identity,
        "recipe": asdict(recipe),
        "versions": versions,
        "training": gathered.training,
        "subjects": subjects,
        "left_out": gathered.left_out,
    }
