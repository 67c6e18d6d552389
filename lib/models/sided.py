"""The sided ensemble: a network taught synthetic lesions, the smoothed scan, and its surplus over its reflection.

Each of the three fails where another does not: the network where a lesion looks unlike what was painted, the smoothed
scan where healthy tissue is as bright, the mirror where a lesion is alike on both sides. Their orders of the voxels are
averaged (Borda count; Ho et al., IEEE Transactions on Pattern Analysis and Machine Intelligence 16, 1994). All three
assume the side on which lesions lie: bright in FLAIR, T2 and PD, dark in T1. It cannot see a lesion of the other side.
"""

import numpy as np
import torch
from scipy.stats import rankdata

from lib.cohort import PreparedSubject
from lib.models.mirror import Mirror, smoother
from lib.models.single import SidedMedian
from lib.models.synthetic import SyntheticLesions

SMOOTHING_MM = 3.0  # of the network's log-odds, in 3D: it sees one slice at a time
WEIGHTS = (2, 1, 1)  # of network, smoothed scan and mirror


class SidedEnsemble(SyntheticLesions):
    """Voxels in the order of the mean rank of the three; as values −log(1 − p) of the network's probabilities p in that
    order, so that maps of different scans compare. Trained as `synthetic_lesions` is, once for both."""

    learns_as = "synthetic_lesions"

    def maps(self, subject: PreparedSubject) -> np.ndarray:
        brain = np.asarray(subject.brain)
        log_odds = smoother(brain, SMOOTHING_MM / subject.voxel_mm[::-1])(super().maps(subject))[brain]
        others = (kind(self.name, self.modalities).maps(subject)[brain] for kind in (SidedMedian, Mirror))
        ranks = [weight * rankdata(one) for weight, one in zip(WEIGHTS, (log_odds, *others), strict=True)]
        values = np.empty(len(log_odds), np.float32)
        values[np.sum(ranks, axis=0).argsort(kind="stable")] = np.logaddexp(0, np.sort(log_odds))
        result = np.zeros(brain.shape, np.float32)
        result[brain] = values
        return result

    def anomaly(self, image: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
        """Log-odds of a lesion."""
        return self.forward(self.seen(image))[:, 0]
