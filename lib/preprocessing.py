"""From the scans of one subject to slices that a network can learn from: orientation, resampling, brain, intensity."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import nibabel
import numpy as np
from scipy import ndimage
from skimage.exposure import equalize_adapthist

from lib.boxes import extent_mm, sample
from lib.components import bounding_box
from lib.errors import CourseError, check_choice, check_least
from lib.volumes import Volume

HALVINGS = 16
CT_WINDOW = (0.0, 80.0)  # Hounsfield units; the usual window of the brain, centre 40 and width 80
AIR_HU = -500
DARKEST = 1e-3  # what is 0 inside a mask of the brain is given, so that it stays inside


@dataclass(frozen=True)
class Recipe:
    """How scans are prepared; the cohort's hash contains it.

    `pixel_mm`: edge of a pixel within a slice; `slice_mm`: distance of slices, 0 keeps that of the scan;
    `size`: rows and columns of the square; `normalisation`: a key of NORMALISATIONS; `clahe`: contrast-limited
    adaptive histogram equalisation of each slice; `slices`: "all", or "largest" for the one slice with most brain.
    """

    modalities: tuple[str, ...] = ("FLAIR",)
    pixel_mm: float = 2.0
    slice_mm: float = 0.0
    size: int = 96
    normalisation: str = "p99"
    clahe: bool = False
    slices: str = "all"

    def __post_init__(self):
        check_choice("normalisation", self.normalisation, NORMALISATIONS)
        check_choice("slices", self.slices, ("all", "largest"))
        check_least("pixel_mm", self.pixel_mm, 0.1)
        check_least("slice_mm", self.slice_mm, 0)
        check_least("size", self.size, HALVINGS)
        if self.size % HALVINGS:
            raise CourseError(
                f"size is {self.size}.", f"Give a multiple of {HALVINGS}: networks halve slices four times."
            )


@dataclass(frozen=True)
class OwnGrid:
    """The masks of a scan on its own grid, turned to right, anterior, superior and cut to the box of the brain.

    `brain`, `lesion` bool [slice, row, column]; `affine` [4, 4] from (column, row, slice) to mm in RAS+.
    """

    brain: np.ndarray
    lesion: np.ndarray
    affine: np.ndarray

    def within(self, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`step` and `start`, [slice, row, column], from the voxels of this grid to those of a prepared one."""
        between = np.linalg.inv(affine) @ self.affine
        return np.diag(between)[2::-1], between[2::-1, 3]

    def placed(self, values: np.ndarray, shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
        """Values of this grid, [slice, row, column], on the whole scan as its file has it, [i, j, k] of that shape and
        affine; 0 elsewhere."""
        turn = nibabel.io_orientation(affine)
        turned = affine @ nibabel.orientations.inv_ornt_aff(turn, shape)
        corner = np.round(np.linalg.solve(turned, self.affine[:, 3])[:3]).astype(int)
        whole = np.zeros([shape[i] for i in turn[:, 0].argsort()], values.dtype)
        box = tuple(slice(at, at + n) for at, n in zip(corner, values.shape[::-1], strict=True))
        whole[box] = values.transpose(2, 1, 0)
        back = nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), turn)
        return nibabel.apply_orientation(whole, back)


@dataclass(frozen=True)
class Prepared:
    """One subject on the prepared grid: axial slices, rows from back to front, columns from left to right.

    `image` float32 [modality, slice, row, column], 0 outside the brain; `brain`, `lesion` bool [slice, row, column];
    `affine` [4, 4] from (column, row, slice) to mm in RAS+; `scales`: what each modality was divided by;
    `lesion_slices`: the slices that the scan's own lesion mask touches, also where it is lost on this grid;
    `own`: the masks before any resampling.
    """

    image: np.ndarray
    brain: np.ndarray
    lesion: np.ndarray
    affine: np.ndarray
    scales: tuple[float, ...]
    lesion_slices: tuple[int, ...]
    own: OwnGrid


def prepare(scans: Mapping[str, Volume], lesion: Volume | None, recipe: Recipe) -> Prepared:
    """Bring one subject's scans onto the prepared grid.

    `scans`: a volume for each of the recipe's modalities, all on one grid, brain extracted (0 outside; CT: one value
    outside); a modality that is missing is 0 everywhere, and its scale 1. Where the recipe says p99, CT, whose units
    mean the same on every scanner, is seen through CT_WINDOW instead.
    Raises CourseError where the brain does not fit the recipe's square.
    """
    volumes = {m: canonical(scan) for m, scan in scans.items()}
    inside = brain_mask([signal(m, v.voxels) for m, v in volumes.items()])
    grid = _Grid.around(inside, next(iter(volumes.values())), recipe)
    brain = grid.sample_mask(inside)
    own_truth = canonical(lesion).voxels > 0 if lesion else np.zeros_like(inside)
    truth = grid.sample_mask(own_truth) if lesion else np.zeros_like(brain)
    sampled = {m: grid.sample(v.voxels * inside if m == "CT" else v.voxels) for m, v in volumes.items()}
    normalised = {m: _normalisation(m, recipe)(image, brain) for m, image in sampled.items()}
    missing = np.zeros(brain.shape, np.float32), 1.0
    images, scales = zip(*(normalised.get(m, missing) for m in recipe.modalities), strict=True)
    image = np.stack(images)
    if recipe.clahe:
        image = np.stack([clahe(one) for one in image])
    image = image * brain
    if recipe.slices == "largest":
        most = int(brain.sum(axis=(1, 2)).argmax())
        keep = slice(most, most + 1)
        grid = grid.only(most)
        image, brain, truth = image[:, keep], brain[keep], truth[keep]
    touched = grid.slices_of(own_truth)
    own = grid.own_grid(inside, own_truth)
    return Prepared(image.astype(np.float32), brain, truth & brain, grid.affine, tuple(scales), touched, own)


def canonical(volume: Volume) -> Volume:
    """Flip and exchange axes, without interpolation, so that they point right, anterior, superior."""
    turn = nibabel.io_orientation(volume.affine)
    affine = volume.affine @ nibabel.orientations.inv_ornt_aff(turn, volume.voxels.shape)
    return Volume(nibabel.apply_orientation(volume.voxels, turn), affine)


def signal(modality: str, voxels: np.ndarray) -> np.ndarray:
    """What is above 0 where a brain-extracted scan shows something: the scan itself; of CT, whose water is 0, what is
    neither air nor the usual value on the box's faces."""
    if modality != "CT":
        return voxels
    faces = [np.take(voxels, (0, -1), axis).ravel() for axis in range(3)]
    values, counts = np.unique(np.concatenate(faces), return_counts=True)
    return (voxels != values[counts.argmax()]) & (voxels > AIR_HU)


def brain_mask(volumes: list[np.ndarray]) -> np.ndarray:
    """The brain in brain-extracted scans: the largest connected part above 0 in any modality, its holes filled.

    `volumes`: arrays of one shape [i, j, k], as `signal` gives them; returns bool of that shape.
    """
    inside = np.any([v > 0 for v in volumes], axis=0)
    brain = np.zeros_like(inside)
    if not inside.any():
        return brain
    box = bounding_box(inside)
    parts, _ = ndimage.label(inside[box])
    largest = parts == 1 + np.bincount(parts.ravel())[1:].argmax()
    outside, _ = ndimage.label(np.pad(~largest, 1, constant_values=True))
    brain[box] = (outside != outside[0, 0, 0])[1:-1, 1:-1, 1:-1]
    return brain


def extracted(modality: str, scan: Volume, brain: Volume) -> Volume:
    """A scan without what lies outside a mask of the brain, above 0 and on its grid, whichever way the axes of the two
    files point; turned to right, anterior, superior."""
    turned, inside = canonical(scan), canonical(brain)
    outside, least = (2 * AIR_HU, AIR_HU + 1) if modality == "CT" else (0, DARKEST)
    voxels = np.where(inside.voxels > 0, np.maximum(turned.voxels, np.float32(least)), np.float32(outside))
    return replace(scan, voxels=voxels, affine=turned.affine)


def between_empty(slice_alone: Volume) -> Volume:
    """A single slice [i, j, 1] with an empty one on either side, so that there is something to interpolate with."""
    affine = slice_alone.affine @ nibabel.affines.from_matvec(np.eye(3), (0, 0, -1))
    return replace(slice_alone, voxels=np.pad(slice_alone.voxels, ((0, 0), (0, 0), (1, 1))), affine=affine)


def resampled(
    values: np.ndarray, brain: np.ndarray, step: np.ndarray, start: np.ndarray, shape: Sequence[int]
) -> np.ndarray:
    """Values of a brain at `start` + `step` × index, linearly between its voxels, at its edge from those inside, 0 away
    from it: float32 of that shape. Arrays [slice, row, column]."""
    placed = {"matrix": step, "offset": start, "output_shape": tuple(shape), "order": 1, "mode": "constant"}
    total = ndimage.affine_transform(values.astype(np.float32) * brain, **placed)
    weight = ndimage.affine_transform(brain.astype(np.float32), **placed)
    return np.divide(total, weight, out=np.zeros_like(total), where=weight > 1e-3)


def clahe(image: np.ndarray) -> np.ndarray:
    """Equalise each slice of [slice, row, column] adaptively, keeping its range (Pizer 1987; clip limit 0.01)."""
    image = np.clip(image, 0, None)
    return np.stack([equalize_adapthist(one / one.max()) * one.max() if one.any() else one for one in image])


@dataclass(frozen=True)
class _Grid:
    """The prepared grid in a scan's canonical grid: `step` and `start` in that grid's voxels, `shape` of the result."""

    step: np.ndarray
    start: np.ndarray
    shape: tuple[int, int, int]
    scan_affine: np.ndarray

    @classmethod
    def around(cls, brain: np.ndarray, volume: Volume, recipe: Recipe) -> "_Grid":
        extent = extent_mm(brain, volume.voxel_mm)
        side = recipe.size * recipe.pixel_mm
        if max(extent[:2]) > side:
            raise CourseError(
                f"A brain of {max(extent[:2]):.0f} mm does not fit slices of {side:.0f} mm.", "Raise size or pixel_mm."
            )
        target = np.array([recipe.pixel_mm, recipe.pixel_mm, recipe.slice_mm or volume.voxel_mm[2]])
        step = target / volume.voxel_mm
        box = bounding_box(brain)
        slices = int(np.ceil((box[2].stop - box[2].start) / step[2] - 1e-6))
        shape = (recipe.size, recipe.size, slices)
        centre = np.array([(s.start + s.stop - 1) / 2 for s in box])
        start = np.round(centre - step * (np.array(shape) - 1) / 2)
        return cls(step, start, shape, volume.affine)

    @property
    def affine(self) -> np.ndarray:
        return self.scan_affine @ nibabel.affines.from_matvec(np.diag(self.step), self.start)

    def own_grid(self, brain: np.ndarray, lesion: np.ndarray) -> OwnGrid:
        """The scan's masks [i, j, k] in those of its slices that this grid covers."""
        edges = self.start[2] + self.step[2] * (np.array([0, self.shape[2]]) - 0.5)
        covered = np.zeros_like(brain)
        first, last = np.clip(np.ceil(edges), 0, None).astype(int)
        covered[:, :, first:last] = brain[:, :, first:last]
        box = bounding_box(covered)
        affine = self.scan_affine @ nibabel.affines.from_matvec(np.eye(3), [s.start for s in box])
        turned = (np.ascontiguousarray(mask[box].transpose(2, 1, 0)) for mask in (covered, lesion & covered))
        return OwnGrid(*turned, affine)

    def only(self, number: int) -> "_Grid":
        start = self.start + self.step * (0, 0, number)
        return _Grid(self.step, start, (*self.shape[:2], 1), self.scan_affine)

    def slices_of(self, mask: np.ndarray) -> tuple[int, ...]:
        """The slices of this grid that the slices of a mask lie on or between."""
        exact = (np.flatnonzero(mask.any(axis=(0, 1))) - self.start[2]) / self.step[2]
        near = np.union1d(np.floor(exact), np.ceil(exact)).astype(int)
        return tuple(near[(near >= 0) & (near < self.shape[2])].tolist())

    def sample(self, voxels: np.ndarray, shift: float = 0.0) -> np.ndarray:
        """Linear interpolation after the smoothing that coarser voxels ask for, as [slice, row, column]."""
        return np.ascontiguousarray(sample(voxels, self.step, self.start + shift, self.shape).transpose(2, 1, 0))

    def sample_mask(self, mask: np.ndarray) -> np.ndarray:
        """Where at least half is mask; the shift decides for samples midway between voxels, or masks would shrink."""
        return self.sample(mask.astype(np.float32), shift=1e-3) > 0.5


def _by_percentile(image: np.ndarray, brain: np.ndarray) -> tuple[np.ndarray, float]:
    scale = max(float(np.percentile(image[brain], 99)), 1e-6)
    return np.clip(image / scale, 0, 1.5), scale


def _by_maximum(image: np.ndarray, brain: np.ndarray) -> tuple[np.ndarray, float]:
    scale = max(float(image[brain].max()), 1e-6)
    return image / scale, scale


def _by_z_score(image: np.ndarray, brain: np.ndarray) -> tuple[np.ndarray, float]:
    scale = max(float(image[brain].std()), 1e-6)
    return np.clip((image - image[brain].mean()) / scale, -5, 5), scale


def _by_slice_range(image: np.ndarray, brain: np.ndarray) -> tuple[np.ndarray, float]:
    image = image * brain
    low, high = image.min(axis=(1, 2), keepdims=True), image.max(axis=(1, 2), keepdims=True)
    return (image - low) / np.maximum(high - low, 1e-6), 1.0


def _by_window(image: np.ndarray, brain: np.ndarray) -> tuple[np.ndarray, float]:
    low, high = CT_WINDOW
    return np.clip((image - low) / (high - low), 0, 1), high - low


def _normalisation(modality: str, recipe: Recipe) -> Callable:
    windowed = modality == "CT" and recipe.normalisation == "p99"
    return _by_window if windowed else NORMALISATIONS[recipe.normalisation]


NORMALISATIONS = {"p99": _by_percentile, "max": _by_maximum, "zscore": _by_z_score, "slice_range": _by_slice_range}
