"""A coarser grid over a volume, cut out at even edges or squeezed to a shape, and the way back."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from lib.components import bounding_box


def sample(voxels: np.ndarray, step: np.ndarray, start: np.ndarray, shape: tuple[int, ...], beyond="constant"):
    """Linear interpolation of [i, j, k] at `start` + `step` × index, after the smoothing that coarser steps ask for;
    `step`: [3], or [3, 3] for a grid that is turned; `beyond` the voxels is 0 ("constant") or what is "nearest"."""
    coarser = np.asarray(step) if np.ndim(step) == 1 else np.linalg.norm(step, axis=1)
    smooth = ndimage.gaussian_filter(voxels, np.maximum(0, (coarser - 1) / 2))
    return ndimage.affine_transform(smooth, step, start, shape, order=1, mode=beyond)


def extent_mm(brain: np.ndarray, edges_mm: np.ndarray) -> np.ndarray:
    """Edges in mm of the box around a brain whose voxels have `edges_mm`, [3]."""
    return np.array([s.stop - s.start for s in bounding_box(np.asarray(brain))]) * edges_mm


def middle_of(brain: np.ndarray) -> np.ndarray:
    """The middle of the box around a brain, bool [slice, row, column], in voxels: [3]."""
    return np.array([(s.start + s.stop - 1) / 2 for s in bounding_box(brain)])


@dataclass(frozen=True)
class Box:
    """`shape` voxels over a volume of `around` [slice, row, column]: the first at `start`, each `step` from the next,
    in voxels of that volume; `beyond` it as in `sample`."""

    shape: tuple[int, int, int]
    step: np.ndarray
    start: np.ndarray
    around: tuple[int, int, int]
    beyond: str = "constant"

    @classmethod
    def centred(
        cls, brain: np.ndarray, edges_mm: np.ndarray, shape: tuple[int, int, int], voxel_mm: float | Sequence[float]
    ) -> "Box":
        """Voxels of one edge (cubic), or one for each axis, about the middle of a brain, bool [slice, row, column] with
        voxels of `edges_mm`: what lies farther out is cut off, what is missing is 0."""
        step = np.asarray(voxel_mm) / np.asarray(edges_mm, float)
        return cls(tuple(shape), step, middle_of(brain) - step * (np.array(shape) - 1) / 2, brain.shape)

    @classmethod
    def squeezed(cls, around: tuple[int, int, int], shape: tuple[int, int, int]) -> "Box":
        """The whole of a volume in another shape, whatever that does to its proportions."""
        step = np.array(around) / shape
        return cls(tuple(shape), step, (step - 1) / 2, tuple(around), "nearest")

    def cut(self, image: np.ndarray) -> np.ndarray:
        """The volume [slice, row, column] on this grid, float32 [*shape]."""
        return sample(np.asarray(image, np.float32), self.step, self.start, self.shape, self.beyond)

    def back(self, values: np.ndarray) -> np.ndarray:
        """What stands on this grid, on the volume's own, float32 [*around]; beyond the box its nearest value."""
        place = -self.start / self.step
        return ndimage.affine_transform(values, 1 / self.step, place, self.around, order=1, mode="nearest")
