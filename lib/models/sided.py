"""The sided ensemble: a network taught synthetic lesions, the smoothed scan, and its surplus over its reflection.

Each of the three fails where another does not: the network where a lesion looks unlike what was painted, the smoothed
scan where healthy tissue is as bright, the mirror where a lesion is alike on both sides. Their orders of the voxels are
averaged (Borda count; Ho et al., IEEE Transactions on Pattern Analysis and Machine Intelligence 16, 1994). Of a lesion
that crosses the midline the mirror sees one side; from there its finding spreads through what network and scan hold for
lesion (reconstruction by dilation; Vincent, IEEE Transactions on Image Processing 2, 1993). Assumed are the side on
which lesions lie, bright in FLAIR, T2 and PD, dark in T1, and that a lesion is of one piece and somewhere unlike its
reflection. It cannot see a lesion of the other side, and loses small scattered ones in the coarse scale; what is
healthy, as bright and touches a lesion joins it.
"""

import numpy as np
import torch
from scipy.stats import rankdata
from skimage.morphology import reconstruction

from lib.cohort import PreparedSubject
from lib.components import bounding_box
from lib.models.mirror import Mirror, smoother
from lib.models.single import SidedMedian
from lib.models.synthetic import SyntheticLesions

SCALES_MM = (3.0, 12.0)  # of the network's log-odds, smoothed in 3D: it sees one slice at a time
SPREAD = 2  # weight of what spreads, beside the mean of the orders


class SidedEnsemble(SyntheticLesions):
    """Voxels in an order that network, smoothed scan and mirror agree on; as values −log(1 − p) of the network's
    probabilities p in that order, so that maps of different scans compare. Trained as `synthetic_lesions` is, once for
    both."""

    learns_as = "synthetic_lesions"

    def maps(self, subject: PreparedSubject) -> np.ndarray:
        brain, found = np.asarray(subject.brain), super().maps(subject)
        fine, coarse = (smoother(brain, mm / subject.voxel_mm[::-1])(found)[brain] for mm in SCALES_MM)
        others = (kind(self.name, self.modalities).maps(subject)[brain] for kind in (SidedMedian, Mirror))
        values = np.empty(len(fine), np.float32)
        order = agreed(*map(ranks, (fine, coarse, *others)), brain)
        values[order.argsort(kind="stable")] = np.logaddexp(0, np.sort(fine))
        result = np.zeros(brain.shape, np.float32)
        result[brain] = values
        return result

    def anomaly(self, image: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
        """Log-odds of a lesion."""
        return self.forward(self.seen(image))[:, 0]


def agreed(fine: np.ndarray, coarse: np.ndarray, scan: np.ndarray, mirror: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """One order of the brain's voxels [voxel] from the ranks of four: their mean, and what spreads.

    It spreads from where coarse network and mirror rank a voxel high, through what the other three rank high together.
    """
    without_mirror = fine + coarse + scan
    return ranks(without_mirror + mirror) + SPREAD * spread((coarse * mirror) ** 2, ranks(without_mirror), brain)


def spread(seeds: np.ndarray, level: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """How high each voxel of the brain is joined to seeds: the most that its best path from one keeps all along.

    `seeds`, `level`: [voxel of the brain], ≥ 0; a path starts at its seed and is cut to the lowest level on its way.
    """
    volumes = np.zeros((2, *brain.shape))
    volumes[:, brain] = np.minimum(seeds, level), level
    place = bounding_box(brain)
    volumes[0][place] = reconstruction(*volumes[:, *place])
    return volumes[0][brain]


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks as shares of all, in (0, 1]; equal values share their mean rank."""
    return rankdata(values) / len(values)
