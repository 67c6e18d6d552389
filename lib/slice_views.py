"""Views of slices as colour pictures, composed by NumPy and Pillow so that they keep up with a slider.

The patient's left is on the left; up is the front of an axial plane and the head's top elsewhere; a sagittal plane has
its front on the right.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from lib import RESEARCH
from lib.colours import MAP_COLOURS
from lib.postprocessing import eroded

PLANES = {"axial": 0, "coronal": 1, "sagittal": 2}  # the axis of [slice, row, column] that each cuts
EDGES = {"axial": "LRA", "coronal": "LRS", "sagittal": "PAS"}  # what lies on the left, on the right and on top
TOP = 1.2  # prepared intensity that is white
OPACITY = 0.8  # of a map's highest colour over the scan
SIDE = 480  # pixels of a panel's longer side at most, where a voxel has one or more
HEAD, BAR, LINE, GAP = 22, 8, 19, 12  # pixels: title, scale, line of the legend, between panels
BAR_MM = 50
BLOCK = 8  # pixels, to multiples of which tiles are filled up
PAPER, INK, FAINT = (255, 255, 255), (34, 34, 34), (190, 190, 190)


@dataclass(frozen=True)
class Panel:
    """One picture of a view: uint8 [row, column, 3], top row first; the colours of its scale, uint8 [256, 3]; outlines
    as masks bool [row, column] with a colour each; `mark`: a place on the scale, 0 to 1, that gets a line."""

    title: str
    pixels: np.ndarray
    scale: np.ndarray
    outlines: Sequence[tuple[np.ndarray, str]] = ()
    mark: float | None = None


@dataclass(frozen=True)
class View:
    """A composed view: uint8 [y, x, 3], and where its panels lie: corners (left, top), size (height, width) in pixels
    and shape (rows, columns) in voxels of each; `words`: the lines of its legend."""

    pixels: np.ndarray
    corners: tuple[tuple[int, int], ...]
    size: tuple[int, int]
    shape: tuple[int, int]
    words: tuple[str, ...]

    def voxel(self, x: float, y: float) -> tuple[int, int] | None:
        """The row and column of a plane, as `plane` cuts it, under a pixel of the view; None beside the panels."""
        for left, top in self.corners:
            if 0 <= x - left < self.size[1] and 0 <= y - top < self.size[0]:
                return int((y - top) * self.shape[0] / self.size[0]), int((x - left) * self.shape[1] / self.size[1])
        return None

    def png(self) -> bytes:
        content = io.BytesIO()
        Image.fromarray(self.pixels).save(content, "PNG", compress_level=1)
        return content.getvalue()


def plane(volume: np.ndarray, name: str, number: int) -> np.ndarray:
    """A plane of a volume [slice, row, column], top row first: [row, column]."""
    return np.moveaxis(volume, PLANES[name], 0)[number][::-1]


def place(name: str, number: int, row: int, column: int, shape: Sequence[int]) -> tuple[int, int, int]:
    """The voxel (slice, row, column) of a volume of this shape that lies at a row and column of a plane."""
    rest = [axis for axis in range(3) if axis != PLANES[name]]
    found = [number] * 3
    found[rest[0]], found[rest[1]] = shape[rest[0]] - 1 - row, column
    return tuple(found)


def scan_panel(title: str, image: np.ndarray, outlines: Sequence = ()) -> Panel:
    """Prepared intensities [row, column] in grey."""
    grey = _colours("gray")
    return Panel(title, grey[_steps(image, TOP)], grey, outlines)


def map_panel(title: str, anomaly: np.ndarray, top: float, outlines: Sequence = (), limit: float = np.inf) -> Panel:
    """A map [row, column] in colours from 0 to `top`; `limit` is marked on the scale."""
    colours = _colours(MAP_COLOURS)
    return Panel(title, colours[_steps(anomaly, top)], colours, outlines, _mark(limit, top))


def overlay_panel(title: str, image: np.ndarray, anomaly: np.ndarray, top: float, outlines: Sequence = (),
                  limit: float = np.inf) -> Panel:  # fmt: skip
    """A map over the scan, the more opaque the higher its value."""
    over, under = map_panel(title, anomaly, top, outlines, limit), scan_panel(title, image)
    opacity = OPACITY * _steps(anomaly, top)[..., None] / 255
    mixed = under.pixels + opacity * (over.pixels.astype(np.float32) - under.pixels)
    return Panel(title, mixed.astype(np.uint8), over.scale, outlines, over.mark)


def compose(panels: Sequence[Panel], name: str, edges: Sequence[float], lines: Sequence[tuple[str, str]]) -> View:
    """Panels of one plane side by side at the scale of the head, with titles, scales, a bar of 50 mm and a legend.

    `edges` of a voxel of [slice, row, column] in mm; `lines`: words with the colour of their swatch, "" for none.
    """
    shape = panels[0].pixels.shape[:2]
    size, pixel_mm = _size(shape, [mm for axis, mm in enumerate(edges) if axis != PLANES[name]])
    font = _font()
    wide = max(size[1], *(int(font.getlength(panel.title)) + 1 for panel in panels))
    lines = [*lines, (RESEARCH, "")]
    width = max(len(panels) * (wide + GAP) - GAP, *(int(font.getlength(words)) + 2 * LINE for words, _ in lines))
    height = HEAD + size[0] + 2 * BAR + LINE * len(lines)
    picture = Image.new("RGB", (width, height), PAPER)
    corners = tuple((i * (wide + GAP), HEAD) for i in range(len(panels)))
    draw = ImageDraw.Draw(picture)
    for panel, (left, top) in zip(panels, corners, strict=True):
        picture.paste(Image.fromarray(enlarged(panel, size)), (left, top))
        draw.text((left, 3), panel.title, INK, font)
        _letters(draw, EDGES[name], left, top, size)
        _scale(picture, draw, panel, left, top + size[0] + BAR // 2, size[1])
    bar = round(BAR_MM / pixel_mm)
    draw.line([(8, HEAD + size[0] - 8), (8 + bar, HEAD + size[0] - 8)], FAINT, 2)
    for i, (words, colour) in enumerate(lines):
        y = height - LINE * (len(lines) - i)
        if colour:
            draw.line([(2, y + 9), (LINE - 5, y + 9)], colour, 3)
        draw.text((LINE if colour else 0, y + 1), words, INK, font)
    return View(np.asarray(picture), corners, size, shape, tuple(words for words, _ in lines))


def tiled(stack: np.ndarray, columns: int, step: int = 1) -> np.ndarray:
    """Slices [slice, row, column] side by side, so many in a row, the front of the head at the top: [row, column].

    Of each slice every `step`-th pixel, in a tile with an empty edge and sides that are multiples of BLOCK.
    """
    slices = stack[:, ::-1][:, ::step, ::step]
    count, height, width = slices.shape
    rows, high, wide = (-(-n // unit) for n, unit in ((count, columns), (height + 2, BLOCK), (width + 2, BLOCK)))
    tiles = np.zeros((rows * columns, high * BLOCK, wide * BLOCK), stack.dtype)
    tiles[:count, 1 : 1 + height, 1 : 1 + width] = slices
    return tiles.reshape(rows, columns, *tiles.shape[1:]).swapaxes(1, 2).reshape(-1, columns * tiles.shape[2])


def _steps(values: np.ndarray, top: float) -> np.ndarray:
    """Values from 0 to `top` as 0 to 255."""
    return (values.astype(np.float32) * (255 / max(top, 1e-6))).clip(0, 255).astype(np.uint8)


def _mark(limit: float, top: float) -> float | None:
    return limit / top if 0 <= limit <= top and top > 0 else None


def _size(shape: tuple[int, int], edges: Sequence[float]) -> tuple[tuple[int, int], float]:
    """Height and width of a panel, a whole number of pixels to the shortest edge, and the mm of a pixel."""
    extent = [n * mm for n, mm in zip(shape, edges, strict=True)]
    pixel_mm = min(edges) / max(1, int(SIDE * min(edges) / max(extent)))
    return (round(extent[0] / pixel_mm), round(extent[1] / pixel_mm)), pixel_mm


def enlarged(panel: Panel, size: tuple[int, int]) -> np.ndarray:
    """A panel at its size, each pixel the nearest voxel's colour, the outlines two pixels wide with a rim."""
    result = _nearest(panel.pixels, size)
    for mask, colour in panel.outlines:
        if mask.any():
            large = _nearest(mask.astype(np.uint8), size) > 0
            result[_beside(large)] = 0  # a dark rim, or the line is lost on a map's bright colours
            result[large & ~eroded(large[None])[0]] = _bytes(colour)
    return result


def _beside(mask: np.ndarray) -> np.ndarray:
    """The pixels that touch a mask [row, column] from outside, by an edge."""
    wide = np.pad(mask, 1)
    return (wide[2:, 1:-1] | wide[:-2, 1:-1] | wide[1:-1, 2:] | wide[1:-1, :-2]) & ~mask


def _nearest(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.array(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.NEAREST))


def _letters(draw: ImageDraw.ImageDraw, edges: str, left: int, top: int, size: tuple[int, int]) -> None:
    """What lies on the left, on the right and on top."""
    height, width = size
    for letter, x, y, anchor in zip(
        edges, (4, width - 4, width // 2), (height // 2, height // 2, 2), ("lm", "rm", "ma"), strict=True
    ):
        draw.text((left + x, top + y), letter, FAINT, _font(), anchor=anchor)


def _scale(picture: Image.Image, draw: ImageDraw.ImageDraw, panel: Panel, left: int, top: int, width: int) -> None:
    colours = panel.scale[np.arange(width) * 256 // width]
    picture.paste(Image.fromarray(np.repeat(colours[None], BAR, axis=0)), (left, top))
    if panel.mark is not None:
        x = left + round(panel.mark * (width - 1))
        draw.line([(x, top - 2), (x, top + BAR + 1)], INK, 5)
        draw.line([(x, top - 2), (x, top + BAR + 1)], PAPER, 1)


@lru_cache
def _colours(name: str) -> np.ndarray:
    """256 colours of a map of matplotlib, uint8 [256, 3]."""
    return (255 * matplotlib.colormaps[name](np.arange(256))[:, :3]).round().astype(np.uint8)


@lru_cache
def _bytes(colour: str) -> np.ndarray:
    return np.uint8(ImageColor.getrgb(colour))


@lru_cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 13)
