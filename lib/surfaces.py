"""A closed surface that grows outward until what lies behind it turns dark (Smith, Human Brain Mapping 2002)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage, sparse
from skimage.draw import polygon2mask

GOLDEN = (1 + 5**0.5) / 2
ICOSAHEDRON = np.array(
    [
        (0, 11, 5), (0, 5, 1), (0, 1, 7), (0, 7, 10), (0, 10, 11), (1, 5, 9), (5, 11, 4), (11, 10, 2), (10, 7, 6),
        (7, 1, 8), (3, 9, 4), (3, 4, 2), (3, 2, 6), (3, 6, 8), (3, 8, 9), (4, 9, 5), (2, 4, 11), (6, 2, 10), (8, 6, 7),
        (9, 8, 1),
    ]
)  # fmt: skip
CORNERS = [(-1, GOLDEN, 0), (1, GOLDEN, 0), (-1, -GOLDEN, 0), (1, -GOLDEN, 0)]
SMOOTHEST, ROUGHEST = 10.0, 3.33  # radii of curvature in mm between which smoothing sets in (Smith 2002)
DEEP, SHALLOW, STEP = 20.0, 10.0, 2.0  # mm inward where darkness and brightness are looked for, and of their samples
FILL_MM = 1.5  # edge of the voxels that a surface is filled on


@dataclass(frozen=True)
class Surface:
    """Points [point, axis] in mm and the cells between them: triangles [cell, 3] of a surface in space, or edges
    [cell, 2] of a curve in the plane, turned so that their normals point outward."""

    points: np.ndarray
    cells: np.ndarray

    def finer(self) -> "Surface":
        """Every edge halved."""
        if self.cells.shape[1] == 2:
            middle = self.points[self.cells].mean(axis=1)
            new = len(self.points) + np.arange(len(middle))
            cells = np.concatenate([np.c_[self.cells[:, 0], new], np.c_[new, self.cells[:, 1]]])
            return Surface(np.concatenate([self.points, middle]), cells)
        edges = np.sort(self.cells[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
        unique, inverse = np.unique(edges, axis=0, return_inverse=True)
        x, y, z = len(self.points) + inverse.reshape(-1, 3).T
        a, b, c = self.cells.T
        cells = np.concatenate([np.c_[a, x, z], np.c_[b, y, x], np.c_[c, z, y], np.c_[x, y, z]])
        return Surface(np.concatenate([self.points, self.points[unique].mean(axis=1)]), cells)

    def normals(self) -> np.ndarray:
        """Unit normals [point, axis], outward."""
        first, second, *third = (self.points[one] for one in self.cells.T)
        along = second - first
        across = np.cross(along, third[0] - first) if third else along[:, ::-1] * (1, -1)
        total = np.stack([_summed(self.cells, one, len(self.points)) for one in across.T], axis=1)
        return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-9)

    def neighbours(self) -> sparse.csr_matrix:
        """What averages over a point's neighbours, [point, point]."""
        pairs = np.concatenate([self.cells[:, [i, j]] for i in range(self.cells.shape[1]) for j in range(i)])
        there = np.concatenate([pairs, pairs[:, ::-1]]).T
        joined = sparse.csr_matrix((np.ones(there.shape[1]), there), shape=[len(self.points)] * 2)
        joined.data[:] = 1
        return sparse.diags(1 / np.asarray(joined.sum(axis=1)).ravel()) @ joined

    def edge(self) -> float:
        """Mean length of an edge in mm."""
        return float(np.linalg.norm(np.diff(self.points[self.cells[:, :2]], axis=1), axis=2).mean())

    def filled(self, shape: tuple[int, ...], voxel_mm: np.ndarray) -> np.ndarray:
        """The voxels inside, bool of a shape of 3 or 2 axes, on a grid that begins at 0 mm."""
        if self.cells.shape[1] == 2:
            following = dict(self.cells.tolist())
            order = [0]
            while (after := following[order[-1]]) != 0:
                order.append(after)
            return polygon2mask(shape, self.points[order] / voxel_mm)
        corner = self.points.min(axis=0) - 3 * FILL_MM
        grid = np.zeros(np.ceil((self.points.max(axis=0) - corner) / FILL_MM + 4).astype(int), bool)
        parts = 2 + int(1.3 * np.linalg.norm(np.ptp(self.points[self.cells], axis=1), axis=1).max() / FILL_MM)
        weights = np.array([(i, j, parts - i - j) for i in range(parts + 1) for j in range(parts + 1 - i)]) / parts
        on = np.einsum("wc,fca->wfa", weights, self.points[self.cells]).reshape(-1, 3)
        grid[tuple(np.round((on - corner) / FILL_MM).astype(int).T)] = True
        inside = ndimage.binary_fill_holes(grid).astype(np.float32)
        placed = {"output_shape": shape, "order": 1}
        return ndimage.affine_transform(inside, voxel_mm / FILL_MM, -corner / FILL_MM, **placed) > 0.5


def sphere(centre: np.ndarray, radius: float, halvings: int) -> Surface:
    """A sphere of 10 × 4^halvings + 2 points about a centre [3] in mm, or a circle about one of [2]."""
    if len(centre) == 2:
        number = 10 * 2**halvings
        angle = 2 * np.pi * np.arange(number) / number
        cells = np.c_[np.arange(number), np.roll(np.arange(number), -1)]
        return Surface(centre + radius * np.c_[np.cos(angle), np.sin(angle)], cells)
    corners = np.concatenate([np.roll(CORNERS, turn, axis=1) for turn in range(3)])
    surface = Surface(corners, ICOSAHEDRON)
    for _ in range(halvings):
        surface = surface.finer()
    away = surface.points / np.linalg.norm(surface.points, axis=1, keepdims=True)
    return Surface(centre + radius * away, surface.cells)


def grown(
    surface: Surface,
    image: np.ndarray,
    voxel_mm: np.ndarray,
    levels: Sequence[float],
    share: float,
    steps: int,
) -> Surface:
    """The surface after so many steps through an image of as many axes.

    `levels`: air, the least that is tissue, and the brain's usual intensity; `share`: how bright, from air to the
    brightest nearby, the darkest inward must be for the surface to go on (0 to 1; a higher one stops earlier).
    """
    air, tissue, usual = levels
    depths = np.arange(0, DEEP + STEP / 2, STEP)
    near, points, average = depths <= SHALLOW, surface.points, surface.neighbours()
    middle, span = (1 / ROUGHEST + 1 / SMOOTHEST) / 2, 6 / (1 / ROUGHEST - 1 / SMOOTHEST)
    for _ in range(steps):
        surface = Surface(points, surface.cells)
        normal, length, toward = surface.normals(), surface.edge(), average @ points - points
        along = (toward * normal).sum(axis=1, keepdims=True)
        bend = 2 * np.abs(along) / length**2
        smoothing = (1 + np.tanh(span * (bend - middle))) / 2
        inward = (points - depths[:, None, None] * normal) / voxel_mm
        seen = ndimage.map_coordinates(image, inward.reshape(-1, image.ndim).T, order=1, mode="nearest")
        seen = seen.reshape(len(depths), -1)
        darkest = np.clip(seen.min(axis=0), air, usual)
        brightest = np.clip(seen[near].max(axis=0), tissue, max(usual, tissue))
        push = 2 * (darkest - air - share * (brightest - air)) / np.maximum(brightest - air, 1e-6)
        points = points + 0.5 * (toward - along * normal) + smoothing * along * normal
        points = points + 0.05 * length * push[:, None] * normal
    return Surface(points, surface.cells)


def _summed(cells: np.ndarray, values: np.ndarray, number: int) -> np.ndarray:
    return sum(np.bincount(one, values, minlength=number) for one in cells.T)
