"""Can a label be told without looking for a lesion? Histogram, header and size of a scan against that label.

A scan-level claim between two groups is worth what it adds to this.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lib import datasets, metrics
from lib.cohort import Cohort, PreparedSubject
from lib.components import bounding_box
from lib.subjects import Subject
from lib.training import derived_seed

QUANTILES = (5, 25, 50, 75, 95)  # percentiles of the brain's voxels
FOLDS = 5
LEAST = 4  # subjects of each class
STRENGTH = 0.1  # inverse of the L2 penalty: few subjects, more features


@dataclass(frozen=True)
class DomainClassifier:
    """AUROC of held-out subjects with its 95 % interval, and the share of shuffled labels that reach it."""

    auroc: float
    low: float
    high: float
    p_value: float
    n: int
    n_positive: int

    def __str__(self) -> str:
        return (f"AUROC {self.auroc:.2f}, 95 % interval {self.low:.2f} to {self.high:.2f}, p = {self.p_value:.2g} "
                f"({self.n_positive} against {self.n - self.n_positive} subjects)")  # fmt: skip


def domain_classifier(
    prepared: Cohort, groups: Mapping[str, bool], *, seed: int = 0, permutations: int = 99
) -> DomainClassifier | None:
    """Predict a label of subjects (by id) by logistic regression on `features`, each subject held out once.

    `p_value` is (1 + shuffled labels that reach the AUROC) / (1 + permutations). None where either class has fewer
    than 4 subjects.
    """
    from sklearn.metrics import roc_auc_score

    members = [s for s in prepared.subjects if s.id in groups]
    labels = np.array([groups[s.id] for s in members], bool)
    scores = held_out_scores(members, labels, seed)
    if scores is None:
        return None
    table = np.stack([features(s) for s in members])
    random = np.random.default_rng(derived_seed(seed, "domain"))
    auroc, low, high = auroc_interval(scores, labels, np.arange(len(members)), seed)
    shuffled = [random.permutation(labels) for _ in range(permutations)]
    reached = sum(roc_auc_score(one, _held_out(table, one, seed)) >= auroc for one in shuffled)
    return DomainClassifier(auroc, low, high, (1 + reached) / (1 + permutations), len(labels), int(labels.sum()))


def held_out_scores(members: Sequence[PreparedSubject], labels: Sequence[bool], seed: int = 0) -> np.ndarray | None:
    """Scores for the label, float [subject], each subject held out once; None with fewer than 4 of either class."""
    labels = np.asarray(labels, bool)
    if min(labels.sum(), (~labels).sum()) < LEAST:
        return None
    return _held_out(np.stack([features(s) for s in members]), labels, seed)


def features(subject: PreparedSubject) -> np.ndarray:
    """What a scanner leaves in a scan, float [feature]: `histogram`, `size` and `header`."""
    return np.concatenate([histogram(subject), size(subject), header(subject)])


def histogram(subject: PreparedSubject) -> np.ndarray:
    """For each modality percentiles of the brain outside the lesion (of all of it, where that is not outlined), then
    the logarithms of the scales that were divided out: float [feature]."""
    healthy = np.asarray(subject.brain) & ~np.asarray(subject.lesion)
    percentiles = np.percentile(subject.image[:, healthy].astype(np.float32), QUANTILES, axis=1)
    return np.concatenate([percentiles.ravel(), np.log(subject.facts["scales"])])


def size(subject: PreparedSubject) -> np.ndarray:
    """The brain's litres and the edges of its box in mm, float [4]."""
    brain = np.asarray(subject.brain)
    box = [s.stop - s.start for s in bounding_box(brain)]
    return np.array([brain.sum() * subject.voxel_mm3 / 1e6, *(box * subject.voxel_mm[::-1])])


def header(subject: PreparedSubject) -> np.ndarray:
    """The prepared voxel's edges in mm and the shape, float [6]."""
    return np.concatenate([subject.voxel_mm, subject.brain.shape])


def by_health(prepared: Cohort) -> dict[str, bool]:
    """Label of each subject: True for a patient."""
    return {s.id: not s.healthy for s in prepared.subjects}


def gap(prepared: Cohort, subjects: Sequence[Subject], *, seed: int = 0, permutations: int = 99) -> tuple[str, ...]:
    """A warning where healthy subjects and patients come from different folders, or from sites of their own, with how
    well `domain_classifier` tells one from the other; () where neither is so.

    `subjects`: those of the cohort as they were found.
    """
    members = {s.id: s for s in subjects}
    groups, apart = _apart([members[s.id] for s in prepared.subjects], by_health(prepared))
    if not apart:
        return ()
    found = domain_classifier(prepared, groups, seed=seed, permutations=permutations)
    told = f"{found}." if found else f"not measured, for want of {LEAST} subjects on either side."
    return (
        f"Domain gap: healthy subjects and patients come from different {apart}. Telling the {apart} apart by the "
        f"histogram of tissue outside lesions, brain size and voxels alone, without looking for a lesion: {told} "
        "Figures that set patients against healthy subjects are worth what they exceed this by.",
    )


def _apart(subjects: Sequence[Subject], ill: Mapping[str, bool]) -> tuple[Mapping[str, bool], str]:
    """What keeps the healthy and the patients apart, "folders", "sites" or "", and who is on the patients' side."""
    if len({s.origin for s in subjects}) > 1:
        return {s.id: s.origin != datasets.HEALTHY_FOLDER for s in subjects}, "folders"
    sites = [{s.site for s in subjects if ill[s.id] is side} for side in (False, True)]
    if all(sites) and not sites[0] & sites[1] and None not in sites[0] | sites[1]:
        return ill, "sites"
    return {}, ""


def auroc_interval(
    scores: np.ndarray, labels: np.ndarray, subjects: np.ndarray, seed: int = 0
) -> tuple[float, float, float]:
    """AUROC and its 95 % interval over resampled subjects; those with a positive are drawn apart from the others.

    `scores`, `labels` (bool) and `subjects` (whose each one is): [item]. NaN where a class is empty.
    """
    values, place = np.unique(scores, return_inverse=True)
    owners, owner = np.unique(subjects, return_inverse=True)
    counts = np.zeros((2, len(owners), len(values)))
    np.add.at(counts, (np.asarray(labels, int), owner, place), 1)
    well, sick = counts
    if not (well.any() and sick.any()):
        return float("nan"), float("nan"), float("nan")
    weights = _drawn(sick.any(axis=1), np.random.default_rng(derived_seed(seed, "bootstrap")))
    return metrics.bootstrap(lambda w: metrics.auroc(w @ sick, w @ well), weights)


def auroc_within(
    scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int = 0
) -> tuple[float, float, float]:
    """AUROC of pairs of one group: the mean of the groups' AUROCs, weighted by their pairs, and its 95 % interval over
    resampled subjects, positives drawn apart from the others. `scores` is in a unit of each group's own.

    `scores`, `labels` (bool), `groups`: [subject]. NaN where no group has both.
    """
    labels = np.asarray(labels, bool)
    same = np.equal.outer(groups[labels], groups[~labels]).astype(float)
    won = same * pairs_won(scores, labels)

    def figure(weights: np.ndarray) -> np.ndarray:
        sick, well = weights[:, labels], weights[:, ~labels]
        pairs = (sick @ same * well).sum(axis=1)
        return np.divide((sick @ won * well).sum(axis=1), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)

    return metrics.bootstrap(figure, _drawn(labels, np.random.default_rng(derived_seed(seed, "bootstrap"))))


def pairs_won(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """1 where a positive has the higher score, ½ for a tie, else 0: [positive, negative]; its mean is the AUROC."""
    return (1 + np.sign(np.subtract.outer(scores[labels], scores[~labels]))) / 2


def _drawn(positive: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """How often each subject is drawn, [resample, subject], as many of each stratum as there are."""
    weights = np.zeros((metrics.RESAMPLES, len(positive)))
    for stratum in (positive, ~positive):
        n = stratum.sum()
        if n:
            weights[:, stratum] = random.multinomial(n, np.full(n, 1 / n), metrics.RESAMPLES)
    return weights


def _held_out(table: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression  # half a second that the features alone do without
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = StratifiedKFold(min(FOLDS, labels.sum(), (~labels).sum()), shuffle=True, random_state=seed)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=1000))
    return cross_val_predict(model, table, labels, cv=folds, method="decision_function")
