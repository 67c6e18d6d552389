"""What a detector must beat: maps that need no learning, or only an average."""

from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from lib import metrics, postprocessing
from lib.cohort import Cohort, PreparedSubject
from lib.components import bounding_box
from lib.models.detector import Detector, residual
from lib.training import History, derived_seed

ATLAS_SHAPE = (48, 64, 56)  # slices, rows, columns of the box that every brain is scaled to
ATLAS_SMOOTHING = 1.0  # standard deviation in voxels of that box
BLUR = 3.0  # standard deviation in pixels
SLICE_LABELS = ("brain_area", "slice_index")  # baselines that score slices and mark no voxel
PRIOR_WEIGHT = 4  # how many subjects the overall spread counts for in every voxel's spread


class Empty(Detector):
    """Marks nothing: average precision is the prevalence, pixel accuracy is high all the same."""

    def maps(self, subject: PreparedSubject) -> np.ndarray:
        return np.zeros(subject.brain.shape, np.float32)


class Random(Detector):
    """Uniform noise, the same for the same subject."""

    def maps(self, subject: PreparedSubject) -> np.ndarray:
        noise = np.random.default_rng(derived_seed(0, subject.id)).random(subject.brain.shape, np.float32)
        return noise * subject.brain


class Intensity(Detector):
    """The scan itself, mean over modalities (Meissen et al., BrainLes 2021): bright is anomalous."""

    def maps(self, subject: PreparedSubject) -> np.ndarray:
        return mean_of_present(subject.image) * subject.brain


class IntensityMedian(Intensity):
    """The scan after a median over 5 × 5 × 5 voxels."""

    def maps(self, subject: PreparedSubject) -> np.ndarray:
        code = metrics.codes(super().maps(subject).astype(np.float16))
        return metrics.values_of(postprocessing.median(code, subject.brain)).astype(np.float32)


class Blur(Detector):
    """What a scan has beyond its own blur, on the side where lesions lie: the residual of an autoencoder that can only
    blur."""

    def maps(self, subject: PreparedSubject) -> np.ndarray:
        image = subject.image.astype(np.float32)
        blurred = ndimage.gaussian_filter(image, (0, 0, BLUR, BLUR))
        pair = (torch.from_numpy(one.swapaxes(0, 1).copy()) for one in (image, blurred))
        return residual(*pair, self.modalities, "signed").numpy() * subject.brain


class BrainArea(Empty):
    """A slice's score is its brain area in pixels: large slices more often hold a lesion."""

    def slice_scores(self, subject: PreparedSubject, maps: np.ndarray) -> np.ndarray:
        return np.sum(subject.brain, axis=(1, 2), dtype=np.float32)


class SliceIndex(Empty):
    """A slice's score is its closeness to the middle of the brain, 0 at the ends to 1."""

    def slice_scores(self, subject: PreparedSubject, maps: np.ndarray) -> np.ndarray:
        seen = np.flatnonzero(np.any(subject.brain, axis=(1, 2)))
        middle, half = (seen[0] + seen[-1]) / 2, max((seen[-1] - seen[0]) / 2, 1)
        return np.maximum(1 - np.abs(np.arange(len(maps)) - middle) / half, 0).astype(np.float32)


class AtlasZ(Detector):
    """Distance of each voxel from the healthy mean at its place, in healthy standard deviations (Saase et al., 2020).

    Places are compared after scaling every brain's box to one box, which stands in for a registration. A spread that
    rests on few subjects is drawn toward the overall one; where no subject was healthy, overall mean and spread serve.
    """

    def fit(self, cohort: Cohort, *, out: Path, device: str = "auto", resume: bool = True, seed: int = 0) -> History:
        shape = (len(self.modalities), *ATLAS_SHAPE)
        total, squares, count = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        for subject, usable in cohort.healthy_material("train"):
            there = subject.image.any(axis=(1, 2, 3))[:, None, None, None]
            weight = there * _to_atlas((subject.brain & usable[:, None, None])[None].astype(np.float32), subject)
            image = _to_atlas(subject.image.astype(np.float32), subject)
            total, squares, count = total + weight * image, squares + weight * image**2, count + weight
        total, squares, count = (
            ndimage.gaussian_filter(a, (0, *[ATLAS_SMOOTHING] * 3)) for a in (total, squares, count)
        )
        known, centre = count > 0.5, total.sum() / count.sum()
        mean = total / np.maximum(count, 1e-6)
        summed = np.maximum(squares - count * mean**2, 0)
        spread = np.sqrt((summed + PRIOR_WEIGHT * summed.sum() / count.sum()) / (count + PRIOR_WEIGHT))
        self.mean = np.where(known, mean, centre).astype(np.float32)
        self.spread = np.where(known, spread, np.sqrt(squares.sum() / count.sum() - centre**2)).astype(np.float32)
        return History()

    def maps(self, subject: PreparedSubject) -> np.ndarray:
        mean, spread = _from_atlas(self.mean, subject), _from_atlas(self.spread, subject)
        image = subject.image.astype(np.float32)
        distance = np.abs(image - mean) / np.maximum(spread, 1e-3) * image.any(axis=(1, 2, 3), keepdims=True)
        return mean_of_present(distance) * subject.brain

    def state(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(getattr(self, name)) for name in ("mean", "spread")}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.mean, self.spread = state["mean"].numpy(), state["spread"].numpy()


def mean_of_present(values: np.ndarray) -> np.ndarray:
    """Mean over the modalities of [modality, …] that are there, float32 […]: one that is missing is 0 everywhere."""
    there = max(1, sum(one.any() for one in values))
    return values.sum(axis=0, dtype=np.float32) / np.float32(there)


def _box(subject: PreparedSubject) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of the subject for one voxel of the atlas, and where the atlas starts."""
    box = bounding_box(subject.brain)
    edges = np.array([s.stop - s.start for s in box])
    step = edges / ATLAS_SHAPE
    return step, np.array([s.start for s in box]) + (step - 1) / 2


def _to_atlas(channels: np.ndarray, subject: PreparedSubject) -> np.ndarray:
    step, start = _box(subject)
    return np.stack([ndimage.affine_transform(c, step, start, ATLAS_SHAPE, order=1, mode="nearest") for c in channels])


def _from_atlas(channels: np.ndarray, subject: PreparedSubject) -> np.ndarray:
    step, start = _box(subject)
    shape = subject.brain.shape
    return np.stack(
        [ndimage.affine_transform(c, 1 / step, -start / step, shape, order=1, mode="nearest") for c in channels]
    )
