"""What one scan tells about itself beyond its mirror: prediction from its other regions, likeness across hemispheres,
and an ensemble. Nothing is learnt from any other scan.

Masked prediction as in context encoders (Pathak et al., CVPR 2016), in closed form; self-similarity as in patch
memories (Roth et al., CVPR 2022), the memory being the scan's other hemisphere. Both work on cells of about 4 mm. They
cannot see a lesion that both hemispheres have, nor one smaller than a cell.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.stats import rankdata
from skimage.measure import block_reduce
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from lib import metrics, postprocessing
from lib.cohort import PreparedSubject
from lib.errors import check_choice, check_least
from lib.models.detector import LESION_SIGN, Detector
from lib.models.mirror import Mirror, Plane, Scan, reflect, sided, smoother

CELL_MM = 4.0
ALL_AROUND = np.array([d for d in np.ndindex(3, 3, 3) if d != (1, 1, 1)]) - 1
HALF = 0.5  # share of brain that makes a cell one of the brain
LEARNT = 3  # every so manieth cell is learnt from
RIDGE = 1.0  # penalty on squared weights, in units of squared intensity summed over cells


@dataclass(frozen=True)
class Cells:
    """A scan on cells: `values` float32 [slice, row, column], the mean inside the brain; `share` of brain in each;
    `step`: voxels a cell by axis; `edges`: of a cell in mm; `plane` of symmetry in mm of the cells' grid."""

    values: np.ndarray
    share: np.ndarray
    step: np.ndarray
    edges: np.ndarray
    plane: Plane

    @classmethod
    def of(cls, scan: Scan, modality: int = 0) -> "Cells":
        """Cells of one modality of a scan."""
        step = np.maximum(1, np.round(CELL_MM / scan.edges)).astype(int)
        share = block_reduce(scan.brain.astype(np.float32), tuple(step), np.mean)
        values = block_reduce(scan.image[modality], tuple(step), np.mean) / np.maximum(share, 1e-6)
        return cls(values, share, step, step * scan.edges, scan.plane.moved(-(step - 1) / 2 * scan.edges))

    @property
    def inside(self) -> np.ndarray:
        """Cells of the brain, bool [slice, row, column]."""
        return self.share >= HALF

    def distance_mm(self) -> np.ndarray:
        """Signed distance of each cell of the brain from the plane, [cell]."""
        return self.plane.distance_mm(np.argwhere(self.inside) * self.edges)

    def enlarge(self, values: np.ndarray, scan: Scan, smoothing_mm: float) -> np.ndarray:
        """Values [cell of the brain] smoothed inside it and interpolated to the scan's voxels, [slice, row, column]."""
        full = np.zeros(self.share.shape, np.float32)
        full[self.inside] = values
        smooth = smoother(self.share * self.inside, smoothing_mm / self.edges)(full)
        shift = -(self.step - 1) / 2 / self.step
        return ndimage.affine_transform(smooth, 1 / self.step, shift, scan.brain.shape, order=1, mode="nearest")


@dataclass(frozen=True)
class MaskedSettings:
    """`mask_mm`: radius around a cell of which its prediction sees nothing; `smoothing_mm`: standard deviation of the
    smoothing of what was not predicted."""

    mask_mm: float = 16.0
    smoothing_mm: float = 6.0

    def __post_init__(self):
        check_least("mask_mm", self.mask_mm, CELL_MM)
        check_least("smoothing_mm", self.smoothing_mm, 0.1)


class Masked(Detector):
    """The lesion's side of what a scan's other regions and its mirror do not predict."""

    Settings = MaskedSettings
    family = "single"

    def maps(self, subject: PreparedSubject) -> np.ndarray:
        scan, s = Scan.of(subject), self.settings
        surplus = [
            c.enlarge(c.values[c.inside] - predict(c, s.mask_mm), scan, s.smoothing_mm)
            for c in (Cells.of(scan, i) for i in range(len(self.modalities)))
        ]
        return scan.back(sided(np.stack(surplus), self.modalities))


@threadpool_limits.wrap(limits=1)  # systems of equations this small are slower shared
def predict(cells: Cells, mask_mm: float) -> np.ndarray:
    """Each cell of the brain from cells at least `mask_mm` away and from its mirrored place, [cell].

    Ridge regressions, one an octant of the brain, learnt on cells that neither lie in that octant nor look at it: what
    a cell holds has no part in its own prediction. Where the mirrored place lies within the mask, it is not used.
    """
    around = np.hstack([_surround(cells, mask_mm), np.ones((cells.inside.sum(), 1))])
    target, octant = cells.values[cells.inside], octants(cells)
    far = 2 * abs(cells.distance_mm()) >= mask_mm + 2 * CELL_MM
    result = np.zeros(len(target), np.float32)
    both = np.hstack([around, _mirrored(cells)])
    for one in np.unique(octant):
        here = octant == one
        learnt = np.flatnonzero(~_looks_at(here, cells, mask_mm))[::LEARNT]
        result[here] = _fitted(around, target, learnt, here)
        result[here & far] = _fitted(both, target, learnt[far[learnt]], here & far)
    return result


@dataclass(frozen=True)
class SimilaritySettings:
    """`neighbours`: patches of the other hemisphere that a patch is compared with; `place_mm`: how far away one lies
    that counts as unlike as one spread of intensity; `fine_mm`, `coarse_mm`: scales of a patch's descriptors."""

    neighbours: int = 5
    place_mm: float = 20.0
    fine_mm: float = 3.0
    coarse_mm: float = 8.0

    def __post_init__(self):
        check_least("neighbours", self.neighbours, 1)
        for name in ("place_mm", "fine_mm", "coarse_mm"):
            check_least(name, getattr(self, name), 0.1)


class Similarity(Detector):
    """How far, on the lesion's side, a patch lies from its most similar ones in the other hemisphere."""

    Settings = SimilaritySettings
    family = "single"

    def maps(self, subject: PreparedSubject) -> np.ndarray:
        scan = Scan.of(subject)
        cells = [(Cells.of(scan, i), m) for i, m in enumerate(self.modalities)]
        return scan.back(np.mean([c.enlarge(self.unlike(c, m), scan, CELL_MM) for c, m in cells], axis=0))

    def unlike(self, cells: Cells, modality: str) -> np.ndarray:
        """Difference of each cell's descriptors from the mean of their neighbours', summed over scales, [cell]."""
        s, sign = self.settings, LESION_SIGN.get(modality)
        seen = descriptors(cells, (s.fine_mm, s.coarse_mm))
        places = folded(cells) / s.place_mm
        side = cells.distance_mm() < 0
        result = np.zeros(len(seen), np.float32)
        for here in (side, ~side):
            near = nearest(np.hstack([seen, places]), here, s.neighbours)
            gap = seen[here] - seen[near].mean(axis=1) if len(near) else seen[here]
            result[here] = (abs(gap) if sign is None else (sign * gap).clip(0)).sum(axis=1)
        return result


def descriptors(cells: Cells, scales_mm: tuple[float, ...]) -> np.ndarray:
    """Mean intensity around each cell of the brain at each scale, in spreads of that scale, [cell, scale]."""
    smooth = [smoother(cells.share, mm / cells.edges)(cells.values)[cells.inside] for mm in scales_mm]
    return np.stack([one / max(one.std(), 1e-6) for one in smooth], axis=1)


def folded(cells: Cells) -> np.ndarray:
    """Places of the brain's cells in mm, those on one side of the plane reflected to the other, [cell, 3]."""
    places = np.argwhere(cells.inside) * cells.edges
    return places - 2 * np.outer(np.minimum(cells.distance_mm(), 0), cells.plane.normal)


def nearest(points: np.ndarray, here: np.ndarray, neighbours: int) -> np.ndarray:
    """For each point `here` the indices of its nearest ones elsewhere, [point, neighbour]; none where there are few."""
    elsewhere = np.flatnonzero(~here)
    if len(elsewhere) < neighbours or not here.any():
        return np.zeros((0, neighbours), int)
    search = NearestNeighbors(n_neighbors=neighbours, algorithm="kd_tree").fit(points[elsewhere])
    return elsewhere[search.kneighbors(points[here], return_distance=False)]


@dataclass(frozen=True)
class EnsembleSettings:
    """`members`: names, joined by commas, of intensity_median and single-scan detectors whose ranks are averaged."""

    members: str = "intensity_median,mirror"

    def __post_init__(self):
        for name in self.members.split(","):
            check_choice("members", name, MEMBERS)


class Ensemble(Detector):
    """The mean over members of a voxel's rank inside its own brain, 0 to 1; no other scan is needed to compare them."""

    Settings = EnsembleSettings
    family = "single"

    def maps(self, subject: PreparedSubject) -> np.ndarray:
        brain = np.asarray(subject.brain)
        members = [MEMBERS[name](name, self.modalities).maps(subject) for name in self.settings.members.split(",")]
        result = np.zeros(brain.shape, np.float32)
        result[brain] = np.mean([rankdata(one[brain]) / brain.sum() for one in members], axis=0)
        return result


class SidedMedian(Detector):
    """The scan after a median over 5 × 5 × 5 voxels, from the side of its range on which lesions do not lie; of a
    modality with both sides, the distance from the scan's own median."""

    def maps(self, subject: PreparedSubject) -> np.ndarray:
        scan, sides = Scan.of(subject), []
        for one, modality in zip(scan.image, self.modalities, strict=True):
            if not one.any():
                continue
            code = postprocessing.median(metrics.codes(one), scan.brain)
            smooth = metrics.values_of(code).astype(np.float32)
            inside = smooth[scan.brain]
            floor = {1: 0.0, -1: inside.max()}.get(LESION_SIGN.get(modality), np.median(inside))
            sides.append(abs(smooth - floor))
        return scan.back(np.mean(sides, axis=0))


MEMBERS = {"intensity_median": SidedMedian, "mirror": Mirror, "single_masked": Masked, "single_similarity": Similarity}


def _surround(cells: Cells, mask_mm: float) -> np.ndarray:
    """Values and shares of brain in 26 directions at two distances beyond the mask, [cell, feature]."""
    directions = ALL_AROUND / np.linalg.norm(ALL_AROUND, axis=1, keepdims=True)
    offsets = [np.round(d * (mask_mm + n * CELL_MM) / cells.edges).astype(int) for n in (1, 3) for d in directions]
    return np.hstack([_shifted(one * cells.inside, cells.inside, offsets) for one in (cells.values, cells.share)])


def _mirrored(cells: Cells) -> np.ndarray:
    """The mirrored cell and its 26 neighbours, and the share of brain there, [cell, feature]."""
    share = reflect(cells.share, cells.plane, cells.edges)
    values = reflect(cells.values * cells.share, cells.plane, cells.edges) / np.maximum(share, HALF)
    offsets = [np.zeros(3, int), *ALL_AROUND]
    return np.hstack([_shifted(values, cells.inside, offsets), _shifted(share, cells.inside, offsets[:1])])


def _shifted(volume: np.ndarray, inside: np.ndarray, offsets: list[np.ndarray]) -> np.ndarray:
    """What lies at each offset from each cell of the brain, 0 beyond the edge: [cell, offset]."""
    margin = int(np.abs(offsets).max())
    padded, places = np.pad(volume, margin), np.argwhere(inside) + margin
    return np.stack([padded[tuple((places + offset).T)] for offset in offsets], axis=1)


def octants(cells: Cells) -> np.ndarray:
    """Which eighth of the brain each cell lies in: its side of the plane, lower or upper, back or front half."""
    slices, rows, _ = np.argwhere(cells.inside).T
    return 4 * (cells.distance_mm() < 0) + 2 * (slices < np.median(slices)) + (rows < np.median(rows))


def _looks_at(part: np.ndarray, cells: Cells, mask_mm: float) -> np.ndarray:
    """Which cells of the brain lie in a part of it, have it in their surround, or in their mirrored place."""
    there = np.zeros(cells.share.shape, bool)
    there[cells.inside] = part
    away = ndimage.distance_transform_edt(~there, sampling=cells.edges)
    mirrored = reflect((away <= 3 * CELL_MM).astype(np.float32), cells.plane, cells.edges) > 0
    return ((away <= mask_mm + 5 * CELL_MM) | mirrored)[cells.inside]


def _fitted(features: np.ndarray, target: np.ndarray, learnt: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """What a ridge regression learnt on some cells predicts for others."""
    x = features[learnt]
    weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ target[learnt])
    return features[wanted] @ weights
