"""The prepared cohort on disk, opened memory-mapped."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

import lib
from lib import registration, run_folder, volumes
from lib.errors import CourseError, check_choice
from lib.intake import LESION_FREE, Gathered
from lib.preprocessing import OwnGrid

FORMAT = 6  # of a subject's folder and all that is kept in it: raise it when one of them comes out differently
LEAST_BRAIN = 0.05  # of a slice's square; emptier slices teach nothing
GUARD = 2  # slices between a lesion and a slice that counts as lesion-free
GRIDS = ("prepared", "scan")
OPEN_ARRAYS = 300  # each mapped array holds a file open, and a process may have 1024


def announce(run: str, folder: Path, gathered: Gathered, warnings: Sequence[str] = ()) -> None:
    """Tell the later notebooks of a run which cohort is theirs; its report puts `warnings` first."""
    said = {
        "path": folder.relative_to(lib.ROOT).as_posix(),
        "hash": folder.name,
        "training": gathered.training,
        "notes": [*gathered.notes, *registration_notes(open_cohort(folder))],
        "warnings": list(warnings),
        "left_out": gathered.left_out,
    }
    volumes.write_bytes(run_folder(run) / "cohort.json", json.dumps(said, indent=1).encode())


def registration_notes(prepared: "Cohort") -> list[str]:
    """Whose registration is doubtful, in words, a line each."""
    doubts = {s.id: s.registration_doubt for s in prepared.subjects}
    return [f"{name}: {why}; look at its slices." for name, why in doubts.items() if why]


def of_run(run: str, grid: str = "prepared") -> "Cohort":
    """The cohort that notebook 01 prepared for this run; `grid` as in Cohort."""
    check_choice("grid", grid, GRIDS)
    try:
        said = json.loads((run_folder(run) / "cohort.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CourseError(
            f"The run {run!r} has no prepared cohort.", "Run 01_preprocessing with this run's name first."
        ) from error
    return replace(open_cohort(lib.ROOT / said["path"]), grid=grid)


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
            return OwnGrid(**file)

    @property
    def to_template(self) -> np.ndarray:
        """From mm of the scan to mm of the prepared grid, [4, 4]."""
        return np.array(self.facts.get("to_template") or np.eye(4))

    @property
    def voxel_mm3(self) -> float:
        """Volume of a prepared voxel in the scan's own mm³, whatever an affine registration made of it."""
        return float(abs(np.linalg.det(self.affine[:3, :3]) / np.linalg.det(self.to_template[:3, :3])))

    @property
    def registration_doubt(self) -> str:
        """What makes its registration doubtful, in words; "" where nothing does or there was none."""
        dice = self.facts.get("template_dice")
        return "" if dice is None else registration.doubt(self.to_template, dice)

    @property
    def outlined(self) -> bool:
        """Whether it is known which voxels are lesion; where not, `lesion` is empty and says nothing."""
        return self.facts.get("outlined", True)

    @cached_property
    def lesion_free(self) -> np.ndarray:
        """Slices with brain and at least GUARD slices between them and any lesion voxel, bool [slice]; none where
        lesions are not outlined."""
        return lesion_free(np.asarray(self.brain), self.facts["lesion_slices"]) & self.outlined


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


def lesion_free(brain: np.ndarray, lesion_slices: Sequence[int]) -> np.ndarray:
    """Slices with brain and at least GUARD slices between them and any that a lesion touches, bool [slice]."""
    touched = np.zeros(len(brain), bool)
    touched[list(lesion_slices)] = True
    return brain.any(axis=(1, 2)) & ~ndimage.binary_dilation(touched, iterations=GUARD)


@lru_cache(maxsize=OPEN_ARRAYS)
def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")
