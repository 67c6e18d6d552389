"""A picture of one slice as a volume of one slice. It says neither how large a pixel is nor which side is left."""

from pathlib import Path

import numpy as np
from PIL import Image

from lib.errors import CourseError
from lib.refusals import AGAIN
from lib.volumes import Volume, check_voxels

SUFFIXES = (".png", ".jpg", ".jpeg")
BRAIN_MM = 170.0  # longest edge of an adult's brain in the axial slices that show most of it
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, MemoryError, RuntimeError, TypeError),
    Image.DecompressionBombError,
)
NO_SIZE = (
    f"A picture has no voxel size: its brain is taken to be {BRAIN_MM:.0f} mm long, and nothing in it is measured."
)
NOTES = (
    NO_SIZE,
    "What is above 0 in the picture is taken to be brain.",
    "It is taken as an axial slice with the front of the head up and the patient's left on the right.",
)


def is_picture(path: Path) -> bool:
    """Whether a name is that of a PNG or JPEG file."""
    return Path(path).suffix.lower() in SUFFIXES


def read(path: Path) -> Volume:
    """A PNG or JPEG file of a brain-extracted axial slice: voxels [column, row, 1], grey from colour; notes say what is
    assumed. Raises CourseError naming the file for a damaged one, one of several frames, and a background that is
    not 0."""
    path = Path(path)
    image = _grey(path, _decoded(path))
    check_voxels(path, image)
    edge = np.concatenate([image[[0, -1]].ravel(), image[:, [0, -1]].ravel()])
    if np.median(edge) > 0:
        raise CourseError(f"{path} has a background that is not 0.", "Give a brain-extracted slice on black.")
    rows, columns = np.nonzero(image)
    pixel_mm = BRAIN_MM / (1 + max(np.ptp(rows), np.ptp(columns)))
    affine = np.diag([-pixel_mm, -pixel_mm, 1.0, 1.0])
    affine[:2, 3] = pixel_mm * (np.array(image.shape[::-1]) - 1) / 2
    return Volume(np.ascontiguousarray(image.T)[..., None], affine, True, NOTES)


def _decoded(path: Path) -> np.ndarray:
    from skimage.io import imread  # slow to import, and few need it

    if not path.is_file():
        raise CourseError(f"{path} is not a file.", "Give the path of a picture (.png or .jpg).")
    try:
        return np.asarray(imread(path))
    except UNREADABLE as error:
        raise CourseError(f"{path} is damaged, or no picture.", AGAIN) from error


def _grey(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Float32 [row, column], by the luminance of BT.709 where there is colour; what is transparent is black."""
    if pixels.ndim == 2:
        return pixels.astype(np.float32)
    if pixels.ndim != 3 or pixels.shape[2] not in (2, 3, 4):
        raise CourseError(f"{path} is no single picture: its shape is {pixels.shape}.", "Give a file a slice.")
    colours = pixels.shape[2] // 2 * 2 - 1  # of grey with transparency 1, else 3
    weights = np.float32([1] if colours == 1 else [0.2126, 0.7152, 0.0722])
    seen = pixels[..., -1:] > 0 if pixels.shape[2] % 2 == 0 else True
    return (pixels[..., :colours] * seen).astype(np.float32) @ weights
