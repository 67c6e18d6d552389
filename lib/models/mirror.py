"""The mirrored hemisphere: what a scan has on one side and not on the other.

A brain is its own control: the symmetry plane is found in 3D by correlation (Ardekani et al., IEEE Transactions on
Medical Imaging 16, 1997), the scan reflected in it, and the difference smoothed, for no two hemispheres agree to the
voxel; a guided filter then gives the smooth difference the scan's own edges back (He et al., IEEE Transactions on
Pattern Analysis and Machine Intelligence 35, 2013, section 3). It cannot see a lesion that is alike on both sides, and
of one that crosses the midline it sees the surplus of one side only.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy import ndimage, optimize

from lib.cohort import PreparedSubject
from lib.components import bounding_box
from lib.errors import check_least
from lib.models.detector import LESION_SIGN, Detector
from lib.volumes import write_bytes

LEVELS_MM = (8.0, 5.0)  # grids of the search, coarse to fine
STARTS_MM = (-8.0, -4.0, 0.0, 4.0, 8.0)
BOUNDS = ((-20, 20), (-20, 20), (-25, 25))  # degrees, degrees, mm
ENOUGH = 1e-3  # weight below which a smoothed value means nothing


@dataclass(frozen=True)
class Settings:
    """`smoothing_mm`: standard deviation of the smoothing of the difference, which forgives what the plane cannot
    align, and of the windows of the guided filter; `edge`: contrast in the scan, as prepared, that the filter keeps."""

    smoothing_mm: float = 8.0
    edge: float = 0.1

    def __post_init__(self):
        check_least("smoothing_mm", self.smoothing_mm, 0.1)
        check_least("edge", self.edge, 0)


@dataclass(frozen=True)
class Plane:
    """The points x in mm along (slice, row, column) with (x − centre) · normal = offset_mm.

    `yaw` turns the normal about the slice axis, `roll` about the row axis, in degrees, from the column axis;
    `agreement`: correlation of the scan with its reflection.
    """

    yaw: float
    roll: float
    offset_mm: float
    centre: tuple[float, float, float]
    agreement: float = 0.0

    @property
    def normal(self) -> np.ndarray:
        yaw, roll = np.radians([self.yaw, self.roll])
        return np.array([np.sin(roll), np.cos(roll) * np.sin(yaw), np.cos(roll) * np.cos(yaw)])

    def moved(self, by: np.ndarray) -> "Plane":
        """The same plane where all places are `by` mm further."""
        return replace(self, centre=tuple(float(c) for c in self.centre + by))

    def distance_mm(self, points: np.ndarray) -> np.ndarray:
        """Signed distance of points in mm, [..., 3] → [...]."""
        return (points - self.centre) @ self.normal - self.offset_mm


@dataclass(frozen=True)
class Scan:
    """A prepared subject cut to the box of its brain: `image` float32 [modality, slice, row, column], 0 outside the
    brain; `brain` bool; `edges` of a voxel in mm along (slice, row, column); `plane` of symmetry; `place` of the box in
    the whole, of `shape`."""

    image: np.ndarray
    brain: np.ndarray
    edges: np.ndarray
    plane: Plane
    place: tuple[slice, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, subject: PreparedSubject) -> "Scan":
        edges = subject.voxel_mm[::-1]
        return cls(*_cut(subject.folder), edges, _plane_in(subject.folder, tuple(edges)), *_place(subject.folder))

    def back(self, values: np.ndarray) -> np.ndarray:
        """A map of the box [slice, row, column] as one of the whole subject, float32, 0 outside the brain."""
        result = np.zeros(self.shape, np.float32)
        result[self.place] = values * self.brain
        return result


class Mirror(Detector):
    """The lesion's side of the smoothed difference between a scan and its reflection."""

    Settings = Settings
    family = "single"

    def maps(self, subject: PreparedSubject) -> np.ndarray:
        scan, s = Scan.of(subject), self.settings
        smooth = smoother(scan.brain, s.smoothing_mm / scan.edges)
        surplus = [guided(smooth(difference(scan, i)), one, smooth, s.edge) for i, one in enumerate(scan.image)]
        return scan.back(sided(np.stack(surplus), self.modalities))


def difference(scan: Scan, modality: int = 0) -> np.ndarray:
    """A scan less its reflection, [slice, row, column], 0 where only one of the two is brain."""
    one, brain = scan.image[modality], scan.brain.astype(np.float32)
    shared = scan.brain & (reflect(brain, scan.plane, scan.edges) > 0.5)
    return (one - reflect(one, scan.plane, scan.edges)) * shared


def smoother(weight: np.ndarray, sigma: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What takes the Gaussian mean of values [slice, row, column] where they have weight (normalised convolution;
    Knutsson and Westin, CVPR 1993); 0 where no weight is near. `sigma`: standard deviation in voxels by axis."""
    weight = np.asarray(weight, np.float32)
    total = ndimage.gaussian_filter(weight, sigma, truncate=3)
    scale = (total > ENOUGH) / np.maximum(total, ENOUGH)
    return lambda values: ndimage.gaussian_filter(values * weight, sigma, truncate=3) * scale


def guided(values: np.ndarray, image: np.ndarray, smooth: Callable, edge: float) -> np.ndarray:
    """Values [slice, row, column] as a line in the scan's intensity around each voxel: smooth, but for its edges.

    `smooth`: the mean over a window; `edge`: contrast in the scan below which it is flattened.
    """
    mean, level = smooth(image), smooth(values)
    spread = smooth(image**2) - mean**2
    slope = (smooth(image * values) - mean * level) / (spread + edge**2)
    return smooth(slope) * image + smooth(level - slope * mean)


def symmetry_plane(image: np.ndarray, brain: np.ndarray, edges: np.ndarray) -> Plane:
    """The plane in which a scan [slice, row, column], 0 outside `brain`, agrees best with its own reflection.

    `edges`: of a voxel in mm. Searched on a coarse and a finer grid; normal within 20° of the column axis.
    """
    centre = tuple(float(c) for c in ndimage.center_of_mass(brain) * np.asarray(edges))
    found = min((Plane(0, 0, d, centre) for d in STARTS_MM), key=_Disagreement(image, edges, LEVELS_MM[0]))
    for level in LEVELS_MM:
        found = _Disagreement(image, edges, level).least(found)
    return found


def reflect(volume: np.ndarray, plane: Plane, edges: np.ndarray) -> np.ndarray:
    """A volume [slice, row, column] reflected in a plane, linear interpolation, 0 where nothing is."""
    normal, edges = plane.normal, np.asarray(edges)
    turn = np.eye(3) - 2 * np.outer(normal, normal)
    shift = plane.centre - turn @ plane.centre + 2 * plane.offset_mm * normal
    return ndimage.affine_transform(volume, turn * edges / edges[:, None], shift / edges, order=1)


def sided(difference: np.ndarray, modalities: tuple[str, ...]) -> np.ndarray:
    """The side of a difference [modality, …] on which lesions lie, mean over the modalities that are there, ≥ 0: above
    0 in FLAIR, T2 and PD, below in T1, elsewhere both."""
    sides = [
        (LESION_SIGN[m] * one).clip(0) if m in LESION_SIGN else abs(one)
        for m, one in zip(modalities, difference, strict=True)
    ]
    return np.sum(sides, axis=0, dtype=np.float32) / max(1, sum(one.any() for one in difference))


@lru_cache(maxsize=512)
def _plane_in(folder: Path, edges: tuple[float, float, float]) -> Plane:
    """The plane of a prepared subject's folder, found once and kept there."""
    path = folder / "plane.json"
    if not path.exists():
        image, brain = _cut(folder)
        write_bytes(path, json.dumps(asdict(symmetry_plane(image.mean(axis=0), brain, np.array(edges)))).encode())
    kept = json.loads(path.read_bytes())
    return Plane(**kept | {"centre": tuple(kept["centre"])})


def _cut(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    (place, _), brain = _place(folder), np.load(folder / "brain.npy", mmap_mode="r")
    image = np.load(folder / "image.npy", mmap_mode="r")
    return image[:, *place].astype(np.float32) * brain[place], np.array(brain[place])


def _place(folder: Path) -> tuple[tuple[slice, ...], tuple[int, ...]]:
    brain = np.load(folder / "brain.npy")
    return bounding_box(brain), brain.shape


class _Disagreement:
    """1 − correlation of a scan with its reflection, on a grid of `level` mm with a margin of one voxel."""

    def __init__(self, image: np.ndarray, edges: np.ndarray, level: float):
        step = level / np.asarray(edges)
        shape = tuple(int(n) for n in np.ceil(image.shape / step))
        smooth = ndimage.gaussian_filter(image, step / 2)
        self.scan = np.pad(ndimage.affine_transform(smooth, step, output_shape=shape, order=1), 1)
        self.edges = np.full(3, level)

    def __call__(self, plane: Plane) -> float:
        reflection = reflect(self.scan, plane.moved(self.edges), self.edges)
        one, other = (a - a.mean() for a in (self.scan, reflection))
        return float(1 - (one * other).sum() / max(np.sqrt((one**2).sum() * (other**2).sum()), 1e-9))

    def least(self, start: Plane) -> Plane:
        first = (start.yaw, start.roll, start.offset_mm)
        options = {"xtol": 0.1, "ftol": 1e-4, "maxiter": 4}
        found = optimize.minimize(
            lambda p: self(Plane(*p, start.centre)), first, method="Powell", bounds=BOUNDS, options=options
        )
        return Plane(*(float(v) for v in found.x), start.centre, 1 - float(found.fun))
