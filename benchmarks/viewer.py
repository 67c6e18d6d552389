"""What a move of the viewer's controls costs: `python -m benchmarks.viewer`.

Milliseconds from a control's move to the new picture, its PNG included, at two sizes of slices; beside them the same
view plotted anew by matplotlib, and how many times as long that takes. The scans are made up: a brain with a lesion,
and a noisy map.
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy import ndimage

from lib.cases import Case, Promise
from lib.colours import FOUND, MAP_COLOURS
from lib.metrics import CODES, codes, values_of
from lib.plots import outline
from lib.viewer import SliceViewer

SIZES = {96: (75, 2.0), 240: (155, 1.0)}  # rows and columns of a slice: slices, mm of a voxel's edge
MOVES = 20


def made_up(size: int, seed: int = 0) -> SliceViewer:
    """A viewer of one scan of this size, its threshold where 1 % of the noise lies above."""
    slices, mm = SIZES[size]
    random = np.random.default_rng(seed)
    places = [(np.arange(n) - n / 2) * mm for n in (slices, size, size)]
    z, y, x = np.meshgrid(*places, indexing="ij", sparse=True)
    brain = (z / 62) ** 2 + (y / 82) ** 2 + (x / 66) ** 2 < 1
    lesion = (z - 10) ** 2 + (y - 20) ** 2 + (x - 25) ** 2 < 18**2
    noise = ndimage.gaussian_filter(random.standard_normal(brain.shape).astype(np.float32), 1.5 / mm)
    noise /= noise.std()
    image = (0.6 + 0.1 * noise + 0.3 * lesion).clip(0, 1.5) * brain
    anomaly = ((0.1 + 0.03 * noise + 0.1 * lesion).clip(0, None) * brain).astype(np.float16)
    healthy = np.bincount(codes(anomaly[brain & ~lesion]), minlength=CODES)
    case = Case("made up", ("FLAIR",), image.astype(np.float16)[None], brain, (mm,) * 3, {"noise": anomaly}, lesion,
                {"noise": lambda number: image[None, number]})  # fmt: skip
    promises = {("noise", "none"): Promise.of(healthy)}
    return SliceViewer([case], promises).show(reconstruction=True)


def milliseconds(move: Callable[[int], object], moves: int) -> float:
    """The median of so many moves, after one that is not counted."""
    taken = []
    for i in range(moves + 1):
        started = time.perf_counter()
        move(i)
        taken.append(1000 * (time.perf_counter() - started))
    return statistics.median(taken[1:])


def replotted(viewer: SliceViewer, number: int) -> bytes:
    """The viewer's three panels of an axial slice in as many pixels, by matplotlib."""
    case, at = viewer.case, viewer["threshold"]
    height, width = viewer.view.pixels.shape[:2]
    figure, axes = plt.subplots(1, 3, figsize=(width / 100, height / 100), layout="constrained")
    anomaly = values_of(viewer.code[number]).astype(np.float32)
    pictures = (case.image[0, number], case.redraws["noise"](number)[0], anomaly)
    kinds = (("gray", 1.2, "scan"), ("gray", 1.2, "redrawn"), (MAP_COLOURS, viewer.top, "noise"))
    for axis, picture, (colours, top, title) in zip(axes, pictures, kinds, strict=True):
        shown = axis.imshow(picture.astype(np.float32), cmap=colours, vmin=0, vmax=top)
        outline(axis, case.lesion[number])
        outline(axis, anomaly >= at, FOUND)
        axis.set_title(title)
        axis.axis("off")
        figure.colorbar(shown, ax=axis, orientation="horizontal")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    plt.close(figure)
    return content.getvalue()


def measured(size: int, moves: int) -> dict[str, float]:
    """Milliseconds by move, at one size."""
    viewer = made_up(size)
    control, middle, limit = viewer.controls, SIZES[size][0] // 2, viewer["threshold"]

    def set_to(name: str, value: Callable[[int], object]) -> Callable[[int], None]:
        return lambda i: setattr(control[name], "value", value(i))

    found = {
        "slice": milliseconds(set_to("slice", lambda i: middle - moves // 2 + i), moves),
        "threshold": milliseconds(set_to("threshold", lambda i: limit * (1 + 0.01 * (i + 1))), moves),
        "arrangement": milliseconds(set_to("arrangement", lambda i: ("overlaid", "side by side")[i % 2]), moves),
        "matplotlib": milliseconds(lambda i: replotted(viewer, middle - moves // 2 + i), moves),
    }
    viewer.show(plane="coronal", slice=size // 2)  # draws every slice anew
    found["coronal slice"] = milliseconds(set_to("slice", lambda i: size // 2 - moves // 2 + i), moves)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer moves")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    given = parser.parse_args()
    rows = {size: measured(size, 5 if given.quick else MOVES) for size in SIZES}
    names = list(rows[min(SIZES)])
    print("milliseconds of a move, median")
    print(f"{'':>16}" + "".join(f"{f'{size} × {size}':>14}" for size in rows))
    for name in names:
        print(f"{name:>16}" + "".join(f"{row[name]:14.1f}" for row in rows.values()))
    ratios = {size: row["matplotlib"] / row["slice"] for size, row in rows.items()}
    print("; ".join(f"{size} × {size}: matplotlib takes {ratio:.1f} times as long" for size, ratio in ratios.items()))
    if given.json:
        figures = {str(size): row | {"speedup_vs_matplotlib": ratios[size]} for size, row in rows.items()}
        given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
