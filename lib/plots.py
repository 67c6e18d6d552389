"""The pictures that more than one notebook draws, in one quiet style.

Slices are shown as axial views with the front of the head at the top and the patient's left on the left.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib import evaluation
from lib.cohort import PreparedSubject
from lib.models.detector import SliceDetector

plt.rcParams.update({
    "figure.dpi": 90, "savefig.dpi": 90, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 8, "legend.frameon": False, "image.origin": "lower", "image.interpolation": "nearest",
})  # fmt: skip

TRUTH, FOUND = "#00b3a4", "#ff9f1c"
MAP_COLOURS = "inferno"


def slices(images: Sequence[np.ndarray], titles: Sequence[str], *, unit: str = "", columns: int = 6, limits=(0, 1.2),
           colours: str = "gray", truths: Sequence[np.ndarray] | None = None) -> Figure:  # fmt: skip
    """Slices [row, column] side by side, all on one scale with its unit; `truths` are drawn as outlines."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.55 * columns + 0.6, 1.75 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, image, title) in enumerate(zip(axes.flat, images, titles, strict=False)):
        shown = axis.imshow(image, cmap=colours, vmin=limits[0], vmax=limits[1])
        axis.set_title(title)
        if truths is not None:
            outline(axis, truths[i])
    figure.colorbar(shown, ax=axes, shrink=0.8, aspect=30 * rows, label=unit)
    return figure


def outline(axis: Axes, mask: np.ndarray, colour: str = TRUTH) -> None:
    """Draw the edge of a mask [row, column]; nothing for an empty one."""
    if mask.any():
        axis.contour(mask, [0.5], colors=colour, linewidths=1)


def cases(
    subjects: Sequence[PreparedSubject],
    maps: Sequence[Mapping[str, np.ndarray]],
    thresholds: Mapping[str, float],
    titles: Sequence[str],
) -> Figure:
    """A row a subject at its slice with most lesion: the scan with the truth, then each method's map and detection.

    `maps`: for each subject the maps [slice, row, column] by method; `thresholds`: a value by method. One colour
    scale a method, from 0 to the highest 99.5th percentile of its maps.
    """
    names = list(maps[0])
    shape = (len(subjects), 1 + len(names))
    figure, axes = plt.subplots(*shape, figsize=(2.1 * shape[1], 2.15 * shape[0]), squeeze=False, layout="constrained")
    tops = {
        name: max(np.percentile(of[name][s.brain], 99.5) for s, of in zip(subjects, maps, strict=True))
        for name in names
    }
    for row, subject, of, title in zip(axes, subjects, maps, titles, strict=True):
        number = most_lesion(subject)
        truth = np.asarray(subject.lesion[number])
        row[0].imshow(subject.image[0, number].astype(np.float32), cmap="gray", vmin=0, vmax=1.2)
        row[0].set_title(f"{title}\nslice {number}, truth outlined")
        outline(row[0], truth)
        for axis, name in zip(row[1:], names, strict=True):
            one = of[name][number].astype(np.float32)
            axis.imshow(one, cmap=MAP_COLOURS, vmin=0, vmax=max(tops[name], 1e-6))
            outline(axis, one >= thresholds[name], FOUND)
            outline(axis, truth)
            axis.set_title(f"{name}\nscale 0 to {tops[name]:.2g}")
    for axis in axes.flat:
        axis.axis("off")
    return figure


def redrawn(detector: SliceDetector, places: Sequence[tuple[PreparedSubject, int]]) -> Figure:
    """A row a slice, the truth outlined: the first modality, what the network redraws, and the absolute residual."""
    figure, axes = plt.subplots(len(places), 3, figsize=(6.6, 2.0 * len(places)), squeeze=False, layout="constrained")
    for row, (subject, number) in zip(axes, places, strict=True):
        image, expected = subject.image[0, number].astype(np.float32), detector.redraw(subject, number)[0]
        scan = row[0].imshow(image, cmap="gray", vmin=0, vmax=1.2)
        row[1].imshow(expected, cmap="gray", vmin=0, vmax=1.2)
        left = row[2].imshow(np.abs(image - expected), cmap=MAP_COLOURS, vmin=0, vmax=0.6)
        for axis, title in zip(row, (f"{subject.id}, slice {number}", "redrawn", "absolute residual"), strict=True):
            axis.set_title(title)
            outline(axis, np.asarray(subject.lesion[number]))
    for axis in axes.flat:
        axis.axis("off")
    figure.colorbar(scan, ax=axes[:, :2], shrink=0.8, aspect=30, label="intensity ÷ 99th percentile")
    figure.colorbar(left, ax=axes[:, 2], shrink=0.8, aspect=30, label="difference of these")
    return figure


def most_lesion(subject: PreparedSubject) -> int:
    """The slice with most lesion, or with most brain where there is no lesion."""
    mask = subject.lesion if np.any(subject.lesion) else subject.brain
    return int(mask.sum(axis=(1, 2)).argmax())


def curves(counts: Mapping[str, Sequence[evaluation.SubjectCounts]]) -> Figure:
    """Precision over recall, and recall over false-positive rate, of all test voxels inside the brain, by method."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for method, subjects in counts.items():
        lesion, other = (sum(getattr(s, name) for s in subjects)[::-1].astype(float) for name in ("lesion", "other"))
        hits, alarms = np.cumsum(lesion), np.cumsum(other)
        precision = hits / np.maximum(hits + alarms, 1)
        left.step(hits / hits[-1], precision, where="pre", label=method)
        right.plot(alarms / alarms[-1], hits / hits[-1], label=method)
    left.axhline(lesion.sum() / (lesion.sum() + other.sum()), color="grey", linestyle=":", label="chance")
    left.set(xlabel="recall (share of lesion voxels found)", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    right.plot([0, 1], [0, 1], color="grey", linestyle=":")
    right.set(xlabel="false-positive rate inside the brain", ylabel="recall", xlim=(0, 1), ylim=(0, 1.02))
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def losses(histories: Mapping[str, "object"]) -> Figure:
    """Training and healthy validation loss by epoch, a curve a method, the epoch that was kept marked."""
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, history in histories.items():
        epochs = [row["epoch"] + 1 for row in history.rows]
        (line,) = axis.plot(epochs, [row["validation"] for row in history.rows], label=f"{name}, validation")
        axis.plot(
            epochs, [row["train"] for row in history.rows], ":", color=line.get_color(), label=f"{name}, training"
        )
        best = history.rows[history.best_epoch]
        axis.plot(best["epoch"] + 1, best["validation"], "o", color=line.get_color())
    axis.set(xlabel="epoch", ylabel="loss", yscale="log")
    axis.legend(fontsize=8)
    return figure


def score_distribution(axis: Axes, subjects: Sequence[evaluation.SubjectCounts], threshold: int) -> None:
    """Scores of healthy material and of lesion voxels under one method, with its frozen threshold (a code)."""
    values = np.array([evaluation.value_of(code) for code in range(2**15, evaluation.CODES)])
    kept = np.isfinite(values)
    for name, label, colour in (("healthy_material", "healthy", "grey"), ("lesion", "lesion", TRUTH)):
        weights = sum(getattr(s, name) for s in subjects)[2**15 :][kept]
        if weights.any():
            top = values[kept][weights > 0].max()
            axis.hist(
                values[kept],
                60,
                (0, max(top, 1e-6)),
                weights=weights,
                density=True,
                alpha=0.6,
                label=label,
                color=colour,
            )
    if threshold < evaluation.CODES:
        axis.axvline(evaluation.value_of(threshold), color=FOUND, label="threshold")
    axis.set(xlabel="anomaly score of a voxel", ylabel="density", yscale="log")


def confusion(axis: Axes, table: np.ndarray) -> None:
    """A confusion matrix [truth, call] with its numbers."""
    axis.imshow(table / np.maximum(table.sum(axis=1, keepdims=True), 1), cmap="Greys", vmin=0, vmax=1.5, origin="upper")
    for (row, column), number in np.ndenumerate(table):
        axis.text(column, row, f"{number}\n{100 * number / max(table[row].sum(), 1):.0f} %", ha="center", va="center")
    axis.set(
        xticks=[0, 1], xticklabels=["called healthy", "called ill"], yticks=[0, 1], yticklabels=["no lesion", "lesion"]
    )
