"""Scans one by one: average precision by patient, methods paired on the same patients, how symmetric a lesion is."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lib import metrics
from lib.cohort import Cohort, PreparedSubject
from lib.datasets import modality_of, parse_modalities
from lib.models.detector import LESION_SIGN
from lib.models.mirror import Scan, reflect
from lib.preparation import prepare_scan
from lib.preprocessing import Recipe

ENDS = ("", "_low", "_high")


def precision(subject: PreparedSubject, anomaly: np.ndarray) -> float:
    """Voxel average precision of a map [slice, row, column] inside the brain; NaN without lesion."""
    brain = np.asarray(subject.brain)
    truth = np.asarray(subject.lesion)[brain]
    _, counts = metrics.count(metrics.codes(anomaly[brain]), truth, ~truth)
    return float(metrics.average_precision(*counts))


def against(found: Mapping[str, Mapping[str, float]], baseline: str, seed: int = 0) -> pd.DataFrame:
    """A row a method: mean over patients with its 95 % interval, and the paired difference to a baseline with its own.

    `found`: a figure by method and patient. Columns ap, ap_low, ap_high, difference, difference_low, difference_high,
    n; the highest mean first. All NaN where no patient has a figure.
    """
    table = pd.DataFrame(found).dropna()
    if table.empty:
        columns = [f"{name}{end}" for name in ("ap", "difference") for end in ENDS]
        return pd.DataFrame(np.nan, list(found), columns).assign(n=0)
    weights = metrics.resampled(len(table), seed)
    rows = {}
    for name in table:
        pairs = (("ap", table[name].to_numpy()), ("difference", (table[name] - table[baseline]).to_numpy()))
        figures = {c: metrics.bootstrap(lambda w, v=values: w @ v / len(v), weights) for c, values in pairs}
        rows[name] = {f"{c}{end}": v for c, three in figures.items() for end, v in zip(ENDS, three, strict=True)}
    return pd.DataFrame(rows).T.assign(n=len(table)).sort_values("ap", ascending=False, kind="stable")


def symmetric_share(subject: PreparedSubject) -> float:
    """Share of the lesion whose mirrored place is lesion too, 0 to 1; 0 without lesion. It looks at the truth."""
    scan = Scan.of(subject)
    lesion = np.asarray(subject.lesion)[scan.place]
    mirrored = reflect(lesion.astype(np.float32), scan.plane, scan.edges) > 0.5
    return float((lesion & mirrored).sum() / max(lesion.sum(), 1))


def contrast(subject: PreparedSubject, modality: str) -> float:
    """How far the lesion lies beyond the rest of the brain in the first modality, given by name, on the side where its
    lesions are expected (dark in T1, else bright), in prepared intensity. It looks at the truth."""
    image, lesion, brain = subject.image[0].astype(np.float32), np.asarray(subject.lesion), np.asarray(subject.brain)
    return float(LESION_SIGN.get(modality, 1) * (image[lesion].mean() - image[brain & ~lesion].mean()))


def draw_plane(axis: Axes, scan: Scan, view: tuple) -> None:
    """The symmetry plane as a line on a view of a scan: an index of (slice, row, column), one of them a number."""
    places = np.moveaxis(np.indices(scan.brain.shape), 0, -1)[view] * scan.edges
    axis.contour(scan.plane.distance_mm(places), [0], colors="#ff9f1c", linewidths=1)


def scan_on_disk(path: str, modality: str, prepared: Cohort) -> PreparedSubject:
    """One brain-extracted NIfTI file prepared by a cohort's recipe; modality "" is read from the file's name."""
    named = parse_modalities(modality or modality_of(Path(path)))[0]
    recipe = Recipe(**(prepared.manifest["recipe"] | {"modalities": (named,)}))
    return prepare_scan({named: Path(path)}, recipe, standard=prepared.manifest.get("standard"))
