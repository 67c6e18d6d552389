"""Connected components of masks that hold few of a volume's voxels, with 26 neighbours.

Neighbours are looked up once, among the voxels of a mask alone, and joined; masks that hold one another,
as those of falling thresholds do, grow out of each other, so that no pair of neighbours is joined twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import ndimage

TOUCHING = np.ones((3, 3, 3), bool)  # 26 neighbours
# half of the neighbours, so that each pair is met once
AHEAD = np.array([step for step in product((-1, 0, 1), repeat=3) if step > (0, 0, 0)])
STRICT = 0.1  # share of a lesion that finds it strictly


@dataclass(frozen=True)
class Lesions:
    """The truth of a scan: the lesion that each voxel belongs to, from 1, or 0, int32 [slice, row, column]; the voxels
    within one voxel of any, bool; voxels by lesion, [lesion]."""

    label: np.ndarray
    near: np.ndarray
    sizes: np.ndarray


def lesions(mask: np.ndarray) -> Lesions:
    """The components of a lesion mask [slice, row, column]."""
    label, near = np.zeros(mask.shape, np.int32), np.zeros(mask.shape, bool)
    if mask.any():
        around = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in bounding_box(mask))
        label[around], _ = ndimage.label(mask[around], TOUCHING)
        near[around] = ndimage.binary_dilation(mask[around], TOUCHING)
    return Lesions(label, near, np.bincount(label[near], minlength=1)[1:])


def bounding_box(mask: np.ndarray) -> tuple[slice, slice, slice]:
    """The smallest box that holds a mask [slice, row, column] with a voxel in it."""
    plane = mask.any(axis=0)
    places = (np.flatnonzero(part) for part in (mask.any(axis=(1, 2)), plane.any(axis=1), plane.any(axis=0)))
    return tuple(slice(int(one[0]), int(one[-1]) + 1) for one in places)


def largest(mask: np.ndarray) -> np.ndarray:
    """The largest component of a mask [slice, row, column] with a voxel in it."""
    label, _ = ndimage.label(mask, TOUCHING)
    return label == 1 + np.bincount(label.ravel())[1:].argmax()


def middle(mask: np.ndarray) -> tuple[int, int, int]:
    """The voxel of a mask [slice, row, column] that lies deepest inside it."""
    box = bounding_box(mask)
    depth = ndimage.distance_transform_edt(np.pad(mask[box], 1))[1:-1, 1:-1, 1:-1]
    return tuple(
        int(i) + part.start for i, part in zip(np.unravel_index(depth.argmax(), depth.shape), box, strict=True)
    )


def number(mask: np.ndarray) -> int:
    """How many components a mask [slice, row, column] has."""
    return int(ndimage.label(mask[bounding_box(mask)], TOUCHING)[1]) if mask.any() else 0


def drop_small(mask: np.ndarray, smallest: int) -> np.ndarray:
    """A mask without its components of fewer than `smallest` voxels."""
    voxels = np.flatnonzero(mask)
    (label,) = _grown(np.zeros(len(voxels), np.uint16), _neighbours(voxels, mask.shape), 1)
    result = np.zeros_like(mask)
    result.ravel()[voxels] = (np.bincount(label) >= smallest)[label]
    return result


def lesion_counts(scores: np.ndarray, thresholds: Sequence[int], truth: Lesions, smallest: int = 1) -> np.ndarray:
    """For each of falling thresholds the lesions found by one voxel, those found by a tenth of theirs, and the false
    components, int [threshold, 3]; voxels are detected whose score, [slice, row, column], reaches it.

    Components of fewer than `smallest` voxels are no detections, and one is false where it does not touch the lesions
    dilated by one voxel.
    """
    voxels = np.flatnonzero(scores >= thresholds[-1])
    reached = np.searchsorted(thresholds[::-1], scores.ravel()[voxels], side="right")
    first = (len(thresholds) - reached).astype(np.uint16)  # short integers sort fastest
    order = np.argsort(first, kind="stable")
    voxels, first = voxels[order], first[order]
    beside = np.flatnonzero(truth.near.ravel()[voxels])
    lesion, found = truth.label.ravel()[voxels[beside]], []
    for label in _grown(first, _neighbours(voxels, scores.shape), len(thresholds)):
        large = np.bincount(label) >= smallest
        met = label[beside[: np.searchsorted(beside, len(label))]]
        overlap = np.bincount(lesion[: len(met)][large[met]], minlength=len(truth.sizes) + 1)[1:]
        strict = overlap >= np.maximum(STRICT * truth.sizes, 1)
        found.append(((overlap > 0).sum(), strict.sum(), large.sum() - len(np.unique(met[large[met]]))))
    return np.array(found, int)


def _neighbours(voxels: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Those of some voxels, places in memory, that touch: as places in that list [2, pair], each pair once."""
    edges = tuple(length + 2 for length in shape)
    places = np.ravel_multi_index([one + 1 for one in np.unravel_index(voxels, shape)], edges)
    number = np.full(edges, -1, np.int32).ravel()
    number[places] = np.arange(len(places))
    beside = [number[places + step] for step in AHEAD @ np.array([edges[1] * edges[2], edges[2], 1])]
    first = [np.flatnonzero(one >= 0) for one in beside]
    second = [one[there] for one, there in zip(beside, first, strict=True)]
    return np.stack([np.concatenate(first), np.concatenate(second)])


def _grown(first: np.ndarray, pairs: np.ndarray, masks: int) -> Iterator[np.ndarray]:
    """The component of each voxel that has entered, after each of so many masks [voxel]. `first`: number of the mask
    that a voxel enters with, rising, uint16 [voxel]."""
    joined = np.maximum(*first[pairs])
    pairs = pairs[:, np.argsort(joined, kind="stable")]
    met, entered = (np.append(0, np.bincount(one, minlength=masks).cumsum()) for one in (joined, first))
    label, number = np.zeros(0, np.int32), 0
    for i in range(masks):
        alone = np.arange(entered[i + 1] - entered[i], dtype=np.int32)
        label, number = np.append(label, alone + number), number + len(alone)
        merged, number = _merged(label[pairs[:, met[i] : met[i + 1]]], number)
        label = merged[label]
        yield label


def _merged(ends: np.ndarray, number: int) -> tuple[np.ndarray, int]:
    """The component of each of so many nodes, and how many there are, from edges [2, edge]: each root hooks on to a
    lower one beside it, and nodes jump to their root's root, until no edge is left (Shiloach and Vishkin, 1982)."""
    root = np.arange(number, dtype=np.int32)
    while ends.size:
        root[np.maximum(*ends)] = np.minimum(*ends)
        while not np.array_equal(further := root[root], root):
            root = further
        ends = root[ends]
        ends = ends[:, ends[0] != ends[1]]
    own = root == np.arange(number)
    return (np.cumsum(own, dtype=np.int32) - 1)[root], int(own.sum())
