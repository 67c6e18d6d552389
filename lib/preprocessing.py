"""From the scans of one subject to slices that a network can learn from: orientation, resampling, brain, intensity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import nibabel
import numpy as np
from scipy import ndimage
from skimage.exposure import equalize_adapthist

from lib import registration
from lib.boxes import extent_mm, sample
from lib.components import bounding_box
from lib.errors import CourseError, check_choice, check_least
from lib.intensities import NORMALISATIONS, STANDARDS, normalised
from lib.volumes import Volume

HALVINGS = 16
AIR_HU = -500
DARKEST = 1e-3  # what is 0 inside a mask of the brain is given, so that it stays inside


@dataclass(frozen=True)
class Recipe:
    """How scans are prepared; the cohort's hash contains it.

    `pixel_mm`: edge of a pixel within a slice; `slice_mm`: distance of slices, 0 keeps that of the scan;
    `size`: rows and columns of the square; `normalisation`: a key of NORMALISATIONS or STANDARDS; `clahe`:
    contrast-limited adaptive histogram equalisation of each slice; `slices`: "all", or "largest" for the one slice with
    most brain; `bias`: whether the scanner's shading is taken off; `register`: "", or "rigid" or "affine" to the MNI152
    template, so that prepared slices lie along its axes and at the same height in every brain.
    """

    modalities: tuple[str, ...] = ("FLAIR",)
    pixel_mm: float = 2.0
    slice_mm: float = 0.0
    size: int = 96
    normalisation: str = "p99"
    clahe: bool = False
    slices: str = "all"
    bias: bool = False
    register: str = ""

    def __post_init__(self):
        check_choice("normalisation", self.normalisation, (*NORMALISATIONS, *STANDARDS))
        check_choice("register", self.register, registration.KINDS)
        check_choice("slices", self.slices, ("all", "largest"))
        check_least("pixel_mm", self.pixel_mm, 0.1)
        check_least("slice_mm", self.slice_mm, 0)
        check_least("size", self.size, HALVINGS)
        if self.size % HALVINGS:
            raise CourseError(
                f"size is {self.size}.", f"Give a multiple of {HALVINGS}: networks halve slices four times."
            )
        if self.bias or self.register:
            registration.toolkit()


@dataclass(frozen=True)
class OwnGrid:
    """The masks of a scan on its own grid, turned to right, anterior, superior and cut to the box of the brain.

    `brain`, `lesion` bool [slice, row, column]; `affine` [4, 4] from (column, row, slice) to mm of the scan in RAS+;
    `to_template` [4, 4] from there to the mm of the prepared grid, which differ where the recipe registers.
    """

    brain: np.ndarray
    lesion: np.ndarray
    affine: np.ndarray
    to_template: np.ndarray = field(default_factory=lambda: np.eye(4))

    def within(self, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`step`, [3], or [3, 3] where the scan is registered, and `start`, [3], from the voxels of this grid to those
        of a prepared one, both [slice, row, column]."""
        between = np.linalg.inv(affine) @ self.to_template @ self.affine
        if (self.to_template == np.eye(4)).all():
            return np.diag(between)[2::-1], between[2::-1, 3]
        return between[2::-1, 2::-1], between[2::-1, 3]

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
    `affine` [4, 4] from (column, row, slice) to mm in RAS+, the template's where the recipe registers, and then
    `template_dice` is the overlap of the brains; `scales`: what each modality was divided by;
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
    template_dice: float | None = None


def prepare(
    scans: Mapping[str, Volume],
    lesion: Volume | None,
    recipe: Recipe,
    standard: Mapping[str, Sequence[float]] | None = None,
) -> Prepared:
    """Bring one subject's scans onto the prepared grid, interpolating once.

    `scans`: a volume for each of the recipe's modalities, all on one grid, brain extracted (0 outside; CT: one value
    outside); a modality that is missing is 0 everywhere, and its scale 1. Where the recipe says p99, CT, whose units
    mean the same on every scanner, is seen through its window instead. `standard`: by modality what training scans
    taught, for a normalisation of STANDARDS. The first modality there is registered, and the others go with it.
    Raises CourseError where the brain does not fit the recipe's square.
    """
    volumes = {m: canonical(between_empty(scans[m])) for m in recipe.modalities if m in scans}
    inside = brain_mask([signal(m, v.voxels) for m, v in volumes.items()])
    if recipe.bias:
        volumes = {m: v if m == "CT" else registration.bias_corrected(v, inside) for m, v in volumes.items()}
    first, to_template, dice = next(iter(volumes.values())), np.eye(4), None
    if recipe.register:
        to_template = registration.to_template(first, inside, recipe.register)
        dice = registration.template_dice(first, inside, to_template)
    grid = _Grid.around(inside, first, recipe, to_template)
    brain = grid.sample_mask(inside)
    own_truth = canonical(between_empty(lesion)).voxels > 0 if lesion else np.zeros_like(inside)
    truth = grid.sample_mask(own_truth) if lesion else np.zeros_like(brain)
    sampled = {m: grid.sample(v.voxels * inside if m == "CT" else v.voxels) for m, v in volumes.items()}
    known = {m: normalised(one, brain, m, recipe.normalisation, (standard or {}).get(m)) for m, one in sampled.items()}
    missing = np.zeros(brain.shape, np.float32), 1.0
    images, scales = zip(*(known.get(m, missing) for m in recipe.modalities), strict=True)
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
    return Prepared(image.astype(np.float32), brain, truth & brain, grid.affine, tuple(scales), touched, own, dice)


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


def between_empty(scan: Volume) -> Volume:
    """A single slice [i, j, 1] with an empty one on either side, so that there is something to interpolate with; a scan
    of more slices as it is."""
    if scan.voxels.shape[2] > 1:
        return scan
    affine = scan.affine @ nibabel.affines.from_matvec(np.eye(3), (0, 0, -1))
    return replace(scan, voxels=np.pad(scan.voxels, ((0, 0), (0, 0), (1, 1))), affine=affine)


def resampled(
    values: np.ndarray, brain: np.ndarray, step: np.ndarray, start: np.ndarray, shape: Sequence[int]
) -> np.ndarray:
    """Values of a brain at `start` + `step` × index, linearly between its voxels, at its edge from those inside, 0 away
    from it: float32 of that shape. Arrays [slice, row, column]; `step` as `OwnGrid.within` gives it."""
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
    """The prepared grid in a scan's canonical grid: `step` ([3], of a registered scan [3, 3]) and `start` in that
    grid's voxels, `shape` of the result; `to_template` from the scan's mm to those of the prepared grid."""

    step: np.ndarray
    start: np.ndarray
    shape: tuple[int, int, int]
    scan_affine: np.ndarray
    to_template: np.ndarray

    @classmethod
    def around(cls, brain: np.ndarray, volume: Volume, recipe: Recipe, to_template: np.ndarray) -> "_Grid":
        target = np.array([recipe.pixel_mm, recipe.pixel_mm, recipe.slice_mm or volume.voxel_mm[2]])
        if recipe.register:
            return cls._along_template(brain, volume.affine, recipe, target, to_template)
        _check_fits(max(extent_mm(brain, volume.voxel_mm)[:2]), recipe)
        step = target / volume.voxel_mm
        box = bounding_box(brain)
        slices = int(np.ceil((box[2].stop - box[2].start) / step[2] - 1e-6))
        shape = (recipe.size, recipe.size, slices)
        centre = np.array([(s.start + s.stop - 1) / 2 for s in box])
        start = np.round(centre - step * (np.array(shape) - 1) / 2)
        return cls(step, start, shape, volume.affine, to_template)

    @classmethod
    def _along_template(
        cls, brain: np.ndarray, scan_affine: np.ndarray, recipe: Recipe, target: np.ndarray, to_template: np.ndarray
    ) -> "_Grid":
        """A square about the middle of the template's brain, or so many pixels beside as a brain needs that reaches
        beyond it; slices at multiples of their distance."""
        world = to_template @ scan_affine
        mm = nibabel.affines.apply_affine(world, np.argwhere(brain & ~ndimage.binary_erosion(brain)))
        low, high = mm.min(axis=0), mm.max(axis=0)
        _check_fits((high - low)[:2].max(), recipe)
        corner = registration.template_middle() - target * (recipe.size - 1) / 2
        within = (low - corner) / target, (high - corner) / target - (recipe.size - 1)
        corner += target * (np.ceil(within[1]).clip(0) - np.ceil(-within[0]).clip(0))
        first, last = np.round(low[2] / target[2]), np.round(high[2] / target[2])
        corner[2] = first * target[2]
        place = np.linalg.inv(world) @ nibabel.affines.from_matvec(np.diag(target), corner)
        shape = (recipe.size, recipe.size, int(last - first) + 1)
        return cls(place[:3, :3], place[:3, 3], shape, scan_affine, to_template)

    @property
    def place(self) -> np.ndarray:
        """From places of this grid to those of the scan, [4, 4]."""
        return nibabel.affines.from_matvec(np.diag(self.step) if self.step.ndim == 1 else self.step, self.start)

    @property
    def affine(self) -> np.ndarray:
        return self.to_template @ self.scan_affine @ self.place

    def heights(self, shape: Sequence[int]) -> np.ndarray:
        """The slice of this grid, between slices too, that each voxel [i, j, k] of the scan lies on: of that shape, or
        of length 1 along axes that change nothing."""
        to_slice = np.linalg.inv(self.place)[2]
        along = (factor * np.arange(n if factor else 1) for factor, n in zip(to_slice[:3], shape, strict=True))
        return np.round(sum(np.ix_(*along)) + to_slice[3], 6)

    def own_grid(self, brain: np.ndarray, lesion: np.ndarray) -> OwnGrid:
        """The scan's masks [i, j, k] where this grid covers them."""
        height = self.heights(brain.shape)
        covered = brain & (height >= -0.5) & (height < self.shape[2] - 0.5)
        box = bounding_box(covered)
        affine = self.scan_affine @ nibabel.affines.from_matvec(np.eye(3), [s.start for s in box])
        turned = (np.ascontiguousarray(mask[box].transpose(2, 1, 0)) for mask in (covered, lesion & covered))
        return OwnGrid(*turned, affine, self.to_template)

    def only(self, number: int) -> "_Grid":
        start = nibabel.affines.apply_affine(self.place, (0, 0, number))
        return replace(self, start=start, shape=(*self.shape[:2], 1))

    def slices_of(self, mask: np.ndarray) -> tuple[int, ...]:
        """The slices of this grid that voxels of a mask [i, j, k] lie on or between."""
        exact = np.unique(np.broadcast_to(self.heights(mask.shape), mask.shape)[mask])
        near = np.union1d(np.floor(exact), np.ceil(exact)).astype(int)
        return tuple(near[(near >= 0) & (near < self.shape[2])].tolist())

    def sample(self, voxels: np.ndarray, shift: float = 0.0) -> np.ndarray:
        """Linear interpolation after the smoothing that coarser voxels ask for, as [slice, row, column]."""
        return np.ascontiguousarray(sample(voxels, self.step, self.start + shift, self.shape).transpose(2, 1, 0))

    def sample_mask(self, mask: np.ndarray) -> np.ndarray:
        """Where at least half is mask; the shift decides for samples midway between voxels, or masks would shrink."""
        return self.sample(mask.astype(np.float32), shift=1e-3) > 0.5


def _check_fits(mm: float, recipe: Recipe) -> None:
    side = recipe.size * recipe.pixel_mm
    if mm > side:
        raise CourseError(f"A brain of {mm:.0f} mm does not fit slices of {side:.0f} mm.", "Raise size or pixel_mm.")
