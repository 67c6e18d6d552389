"""The pictures that more than one notebook draws, in one quiet style.

Slices are shown as axial views with the front of the head at the top and the patient's left on the left.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter

from lib import evaluation, metrics
from lib.cohort import PreparedSubject
from lib.colours import FOUND, MAP_COLOURS, TRUTH
from lib.components import bounding_box
from lib.models.detector import SliceDetector

plt.rcParams.update({
    "figure.dpi": 90, "savefig.dpi": 90, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 8, "legend.frameon": False, "image.origin": "lower", "image.interpolation": "nearest",
})  # fmt: skip

BARS = ("#00b3a4", "#9aa5b1", "#ff9f1c")
RIM = [withStroke(linewidth=2.2, foreground="black", alpha=0.6)]
BAND_RESAMPLES = 300
GALLERY_COLUMNS, GALLERY_STEPS = 10, 20  # pictures in a row; colours of a scale
GALLERY_EDGES = {"left": 0.01, "right": 0.99, "bottom": 0.01, "top": 0.95, "wspace": 0.04, "hspace": 0.3}


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


def outline(axis: Axes, mask: np.ndarray, colour: str = TRUTH, **placed) -> None:
    """Draw the edge of a mask [row, column], with a dark rim that shows it on bright colours too; nothing for an empty
    one. `placed`: as matplotlib's contour takes it."""
    if mask.any():
        axis.contour(mask, [0.5], colors=colour, linewidths=1, **placed).set_path_effects(RIM)


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
        row[0].set_title(f"{title}\nslice {number}{', truth outlined' if truth.any() else ''}")
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
    values = metrics.values_of(np.arange(2**15, evaluation.CODES)).astype(float)
    kept = np.isfinite(values)
    for name, label, colour in (("healthy_material", "healthy", "grey"), ("lesion", "lesion", TRUTH)):
        weights = sum(getattr(s, name) for s in subjects)[2**15 :][kept]
        if weights.any():
            top = values[kept][weights > 0].max()
            axis.hist(
                values[kept],
                60,
                range=(0, max(top, 1e-6)),
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


def forest(differences: pd.DataFrame, unit: str) -> Figure:
    """Paired differences with their 95 % intervals, a line a pair; those whose interval holds 0 are grey: a tie.

    Columns `method_a`, `method_b`, `difference`, `low`, `high`, as `evaluation.paired_differences` returns.
    """
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.26 * len(differences)), layout="constrained")
    for place, row in enumerate(differences.itertuples()):
        colour = "grey" if row.low <= 0 <= row.high else TRUTH
        axis.plot([row.low, row.high], [place, place], color=colour)
        axis.plot(row.difference, place, "o", color=colour, markersize=4)
    axis.axvline(0, color="grey", linestyle=":")
    pairs = differences.method_a + " − " + differences.method_b
    axis.set(yticks=range(len(pairs)), yticklabels=pairs, xlabel=f"difference in {unit}, 95 % interval over patients")
    axis.set_ylim(len(pairs) - 0.5, -0.5)
    return figure


def curve_bands(counts: Mapping[str, Sequence[metrics.SubjectCounts]], seed: int = 0) -> Figure:
    """Precision over recall, and recall over false-positive rate, of all test voxels inside the brain, by method.

    Bands hold 95 % of the curves of resampled test subjects.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    grid = np.linspace(0, 1, 201)
    for method, subjects in counts.items():
        lesion, other = metrics.coarse(subjects)
        weights = metrics.resampled(len(subjects), seed)[:BAND_RESAMPLES]
        for axis, curve in zip(axes, (_precision, _recall), strict=True):
            drawn = [curve(w @ lesion, w @ other, grid) for w in weights if (w @ lesion).any()]
            (line,) = axis.plot(grid, curve(lesion.sum(axis=0), other.sum(axis=0), grid), label=method)
            low, high = np.percentile(drawn, metrics.INTERVAL, axis=0)
            axis.fill_between(grid, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes[0].axhline(lesion.sum() / (lesion.sum() + other.sum()), color="grey", linestyle=":", label="chance")
    axes[1].plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes[0].set(xlabel="recall (share of lesion voxels found)", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes[1].set(xlabel="false-positive rate inside the brain", ylabel="recall", xlim=(0, 1), ylim=(0, 1.02))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def froc(points: pd.DataFrame) -> Figure:
    """Share of lesions found over false positives per volume, by method; the columns are those of `froc.csv`.

    The axis is linear up to one false positive and logarithmic from there.
    """
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for method, rows in points.groupby("method", sort=False):
        axis.plot(rows.false_positives_per_volume, rows.recall, ".-", label=method)
    axis.set_xscale("symlog", linthresh=1)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="false positives per volume", ylabel="recall (share of lesions found)", ylim=(0, 1.02))
    axis.set_xlim(left=0)
    axis.legend(fontsize=8)
    return figure


def against(x: Sequence[float], figures: Mapping[str, Sequence[float]], labels: tuple[str, str], style="o") -> Figure:
    """Figures in [0, 1] over a quantity on a logarithmic axis, a colour each; `labels` of both axes, with units."""
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for name, values in figures.items():
        axis.plot(x, values, style, label=name, alpha=0.8, markersize=5)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set(xlabel=labels[0], ylabel=labels[1], ylim=(0, 1.02))
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def gallery(places: Sequence[tuple[PreparedSubject, int]], maps: Sequence[Mapping[str, np.ndarray]]) -> Figure:
    """A few rows a slice: the scan, then the heat map of every method with the truth; one colour scale a method.

    `maps`: for each place the maps [slice, row, column] by method. Scales run from 0 to the highest 99.5th percentile
    inside the brain of the slices shown, in few steps, so that a page with many methods stays light.
    """
    names = list(maps[0])
    columns = min(GALLERY_COLUMNS, 1 + len(names))
    rows = -(-(1 + len(names)) // columns)
    shape, size = (len(places) * rows, columns), (0.88 * columns, 1.2 * len(places) * rows)
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, gridspec_kw=GALLERY_EDGES, layout="none")
    shown = [(row, subject, number, of) for row, (subject, number), of in
             zip(axes.reshape(len(places), -1), places, maps, strict=True)]  # fmt: skip
    tops = {name: max(np.percentile(of[name][i][s.brain[i]], 99.5) for _, s, i, of in shown) for name in names}
    for row, subject, number, of in shown:
        box = bounding_box(np.asarray(subject.brain))[1:]
        row[0].imshow(subject.image[0, number][box].astype(np.float32), cmap="gray", vmin=0, vmax=1.2)
        row[0].set_title(f"{subject.id}\nslice {number}", fontsize=6, pad=2)
        for axis, name in zip(row[1:], names, strict=False):
            one = of[name][number][box].astype(np.float32)
            axis.imshow(one, cmap=plt.get_cmap(MAP_COLOURS, GALLERY_STEPS), vmin=0, vmax=max(tops[name], 1e-6))
            axis.set_title(f"{name}\n0 to {tops[name]:.2g}", fontsize=6, pad=2)
        for axis in row[: 1 + len(names)]:
            outline(axis, np.asarray(subject.lesion[number])[box])
        for axis in row:
            axis.axis("off")
    return figure


def bars(table: pd.DataFrame, columns: Mapping[str, str], label: str, *, chance: float | None = None) -> Figure:
    """Columns of a table as bars, a group a row; `columns`: their legend by name. Intervals are drawn where the table
    has `<column>_low` and `<column>_high`."""
    figure, axis = plt.subplots(figsize=(7, 0.9 + 0.3 * len(table) * len(columns)), layout="constrained")
    height = 0.8 / len(columns)
    for i, (column, legend) in enumerate(columns.items()):
        places = np.arange(len(table)) + (i - (len(columns) - 1) / 2) * height
        axis.barh(places, table[column], height * 0.9, label=legend, color=BARS[i % len(BARS)])
        if f"{column}_low" in table:
            axis.hlines(places, table[f"{column}_low"], table[f"{column}_high"], color="black", linewidth=1)
    if chance is not None:
        axis.axvline(chance, color="grey", linestyle=":", label="chance")
    names = [", ".join(name) if isinstance(name, tuple) else name for name in table.index]
    axis.set(yticks=range(len(table)), yticklabels=names, xlabel=label)
    axis.invert_yaxis()
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def flagged(table: pd.DataFrame) -> Figure:
    """Share of an image's pixels above its own mean + kσ, for slices without and with lesion, as
    `traps.mean_plus_sigma` returns: means, with 5th and 95th percentiles, and the bound that holds for any image."""
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for (truth, rows), colour, shift in zip(table.groupby("truth"), (TRUTH, "grey"), (0.02, -0.02), strict=False):
        spread = 100 * np.abs(rows[["low", "high"]].to_numpy().T - rows.share.to_numpy())
        axis.errorbar(rows.k + shift, 100 * rows.share, spread, fmt="o", color=colour, label=truth, capsize=3)
    k = np.linspace(table.k.min(), table.k.max(), 50)
    axis.plot(k, 100 / (1 + k**2), ":", color="grey", label="most that any image can have")
    axis.axhline(5, color=FOUND, label="cut that calls an image ill")
    axis.set(xlabel="k: standard deviations above the image's own mean", ylabel="pixels above, % of the image")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    return figure


def by_lot(null: np.ndarray, observed: float, label: str) -> Figure:
    """How often each figure comes about by lot, and the one observed (NaN: none)."""
    figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
    axis.hist(null, 30, range=(0, 1), color="grey", alpha=0.6, label="labels by lot")
    low, high = np.percentile(null, metrics.INTERVAL)
    axis.axvspan(low, high, color="grey", alpha=0.15, linewidth=0, label="95 % of the draws")
    if np.isfinite(observed):
        axis.axvline(observed, color=FOUND, label="true labels")
    axis.set(xlabel=label, ylabel="draws")
    axis.legend(fontsize=8)
    return figure


def _precision(lesion: np.ndarray, other: np.ndarray, recall: np.ndarray) -> np.ndarray:
    hits, alarms = np.cumsum(lesion[::-1]), np.cumsum(other[::-1])
    called = hits + alarms > 0
    return np.interp(recall, hits[called] / hits[-1], hits[called] / (hits + alarms)[called])


def _recall(lesion: np.ndarray, other: np.ndarray, rate: np.ndarray) -> np.ndarray:
    hits, alarms = np.cumsum(lesion[::-1]), np.cumsum(other[::-1])
    return np.interp(rate, np.append(0, alarms / max(alarms[-1], 1)), np.append(0, hits / hits[-1]))
