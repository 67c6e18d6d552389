"""Pictures of whole volumes: three planes through a place, the surface of what was found, a viewer that turns."""

import re

import matplotlib.pyplot as plt
import nibabel
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from nilearn.plotting import view_img
from nilearn.plotting.html_stat_map import StatMapView
from scipy import ndimage
from skimage.measure import marching_cubes

from lib import plots
from lib.boxes import Box, extent_mm
from lib.cohort import PreparedSubject
from lib.colours import FOUND, MAP_COLOURS, TRUTH
from lib.components import bounding_box
from lib.preprocessing import canonical
from lib.volumes import Volume

PLANES = (("axial", 0), ("coronal", 1), ("sagittal", 2))  # with the axis of [slice, row, column] that it cuts
SURFACE_MM = 4.0  # edge of the voxels of a surface: finer ones cost time and show nothing more
VIEW_MM = 2.0  # edge of the viewer's voxels: finer ones make a page of many megabytes
LINK = re.compile(r"<link\b[^>]*>")
VIEW = {"width_view": 480, "cmap": MAP_COLOURS, "black_bg": True, "symmetric_cmap": False}


def planes(subject: PreparedSubject, anomaly: np.ndarray, limit: float, place: tuple[int, int, int]) -> Figure:
    """Axial, coronal and sagittal plane through a place: the scan with the truth outlined, and below it with the map
    [slice, row, column] laid over it and what lies above `limit` outlined.

    Axes are in mm; the patient's left is on the left, the front of a sagittal plane on the right.
    """
    box = bounding_box(np.asarray(subject.brain))
    image, brain, lesion = subject.image[0][box].astype(np.float32), subject.brain[box], subject.lesion[box]
    found = anomaly[box].astype(np.float32)
    edges, inside = subject.voxel_mm[::-1], [at - part.start for at, part in zip(place, box, strict=True)]
    figure, axes = plt.subplots(2, 3, figsize=(8.4, 5.2), layout="constrained")
    for column, (name, axis) in enumerate(PLANES):
        view = tuple(inside[i] if i == axis else slice(None) for i in range(3))
        rest = [i for i in range(3) if i != axis]
        height, width = (edges[i] * image.shape[i] for i in rest)
        placed = {"extent": (0, width, 0, height)}
        for row in axes[:, column]:
            row.imshow(image[view], cmap="gray", vmin=0, vmax=1.2, **placed)
        over = np.ma.masked_where(~brain[view] | (found[view] < limit / 2), found[view])
        shown = axes[1, column].imshow(over, cmap=MAP_COLOURS, vmin=0, vmax=3 * limit, alpha=0.8, **placed)
        plots.outline(axes[0, column], lesion[view], TRUTH, **placed)
        plots.outline(axes[1, column], found[view] > limit, FOUND, **placed)
        axes[0, column].set_title(f"{subject.id}, {name}")
        axes[1, column].set(xlabel="mm")
    figure.colorbar(shown, ax=axes[1], shrink=0.8, label="anomaly, intensity")
    return figure


def scan(volume: Volume) -> Figure:
    """The three middle planes of a scan as it came, in mm, turned to right, anterior, superior."""
    turned = canonical(volume)
    image = turned.voxels.transpose(2, 1, 0)
    edges, top = turned.voxel_mm[::-1], np.percentile(image, 99.5)
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 3), layout="constrained")
    for (name, axis), drawn in zip(PLANES, axes, strict=True):
        shape = [e * n for i, (e, n) in enumerate(zip(edges, image.shape, strict=True)) if i != axis]
        view = image.take(image.shape[axis] // 2, axis)
        drawn.imshow(view, cmap="gray", vmin=min(0, image.min()), vmax=top, extent=(0, shape[1], 0, shape[0]))
        drawn.set(title=name, xlabel="mm")
    return figure


def millilitres(subject: PreparedSubject, mask: np.ndarray) -> float:
    """Volume of a mask [slice, row, column] in ml."""
    return float(mask.sum() * subject.voxel_mm.prod() / 1000)


def surfaces(subject: PreparedSubject, found: np.ndarray) -> Figure:
    """The brain as glass, what was found in it, bool [slice, row, column], and the truth; volumes in ml."""
    figure = plt.figure(figsize=(8.4, 4.2), layout="constrained")
    masks = {"found": (found, FOUND), "truth": (np.asarray(subject.lesion), TRUTH)}
    for number, (name, (mask, colour)) in enumerate(masks.items(), 1):
        axis = figure.add_subplot(1, 2, number, projection="3d")
        _surface(axis, subject, np.asarray(subject.brain), "#9aa5b1", 0.08)
        _surface(axis, subject, mask, colour, 0.9)
        axis.set_title(f"{subject.id}, {name}: {millilitres(subject, mask):.1f} ml")
        axis.set_box_aspect(np.ptp([axis.get_xlim(), axis.get_ylim(), axis.get_zlim()], axis=1), zoom=1.45)
        axis.view_init(elev=20, azim=-60)
        axis.set_axis_off()
    return figure


def viewer(subject: PreparedSubject, anomaly: np.ndarray, limit: float) -> StatMapView:
    """nilearn's viewer of a map [slice, row, column] above `limit` on the scan, to click through; it loads nothing."""
    edges = subject.voxel_mm[::-1]
    shape = np.ceil(extent_mm(np.asarray(subject.brain), edges) / VIEW_MM).astype(int)
    box = Box.centred(np.asarray(subject.brain), edges, tuple(shape.tolist()), VIEW_MM)
    affine = subject.affine @ nibabel.affines.from_matvec(np.diag(box.step[::-1]), box.start[::-1])
    scan, marks = (nibabel.Nifti1Image(np.ascontiguousarray(box.cut(v).transpose(2, 1, 0)), affine)
                   for v in (subject.image[0], anomaly))  # fmt: skip
    with plt.rc_context({"image.origin": "upper"}):  # the viewer counts its rows from the top
        view = view_img(marks, bg_img=scan, threshold=limit, vmax=3 * limit, title=subject.id, **VIEW)
    view.html = LINK.sub("", view.html)
    return view


def _surface(axis: Axes, subject: PreparedSubject, mask: np.ndarray, colour: str, opacity: float) -> None:
    """The outline of a mask in mm, left to right, back to front, bottom to top; nothing for an empty one."""
    edges = subject.voxel_mm[::-1]
    coarse = ndimage.zoom(np.pad(mask, 2).astype(np.float32), edges / SURFACE_MM, order=1)
    if coarse.max() <= 0.5:
        return
    points, faces, _, _ = marching_cubes(coarse, 0.5, spacing=(SURFACE_MM,) * 3)
    z, y, x = points.T
    axis.plot_trisurf(x, y, z, triangles=faces[:, ::-1], color=colour, alpha=opacity, linewidth=0)
