"""Pictures of slices as volumes: one alone, or a folder of them. They say neither how large a pixel is nor which side
is left."""

import re
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from lib.errors import CourseError
from lib.refusals import AGAIN
from lib.volumes import Volume, check_voxels

SUFFIXES = (".png", ".jpg", ".jpeg")
BRAIN_MM = 170.0  # longest edge of an adult's brain in the axial slices that show most of it
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, MemoryError, RuntimeError, TypeError, LookupError, ArithmeticError),
    *(AttributeError, struct.error, zlib.error, Image.DecompressionBombError),
)
NO_SIZE = (
    f"A picture has no voxel size: its brain is taken to be {BRAIN_MM:.0f} mm long, and nothing in it is measured."
)
NOTES = (
    NO_SIZE,
    "What is above 0 in the picture is taken to be brain.",
    "It is taken as an axial slice with the front of the head up and the patient's left on the right.",
)
STACK_SUFFIXES = (".tif", ".tiff")
STACK_MM, FIELD_MM = 160.0, 240.0  # from the lowest slice of a head to the highest; usual field of view
STACK_NOTES = (
    f"A stack of pictures has no voxel size: its slices are taken to cover {STACK_MM:.0f} mm of height and "
    f"{FIELD_MM:.0f} mm in plane, so that millimetres and millilitres are guesses.",
    "Its slices are taken as axial, the lowest first, the front of the head up and the patient's left on the right.",
)
_SLICE = re.compile(r"(?P<stem>.+)_(?P<number>\d+)(?P<mask>_mask)?\.tiff?", re.IGNORECASE)


def is_picture(path: Path) -> bool:
    """Whether a name is that of a PNG or JPEG file."""
    return Path(path).suffix.lower() in SUFFIXES


def read(path: Path) -> Volume:
    """A PNG or JPEG file of an axial slice: voxels [column, row, 1], grey from colour; notes say what is assumed.
    Raises CourseError naming the file for a damaged one, and one of several frames."""
    path = Path(path)
    image = _grey(path, _decoded(path))
    check_voxels(path, image)
    rows, columns = np.nonzero(image)
    pixel_mm = BRAIN_MM / (1 + max(np.ptp(rows), np.ptp(columns)))
    return Volume(np.ascontiguousarray(image.T)[..., None], _affine(image.shape, pixel_mm), True, NOTES)


def on_black(volume: Volume) -> bool:
    """Whether most of the edge of a single slice is 0."""
    image = volume.voxels[..., 0]
    return float(np.median(np.concatenate([image[[0, -1]].ravel(), image[:, [0, -1]].ravel()]))) <= 0


def is_slice(path: Path) -> bool:
    """Whether a name is that of a slice, X_12.tif, or of its mask, X_12_mask.tif."""
    return bool(_SLICE.fullmatch(Path(path).name))


def is_stack(path: Path) -> bool:
    """Whether a folder holds slices as TIFF files itself."""
    path = Path(path)
    return path.is_dir() and any(map(is_slice, path.iterdir()))


def has_masks(folder: Path) -> bool:
    """Whether a stack has a mask of any slice."""
    return any(match and match["mask"] for match in (_SLICE.fullmatch(path.name) for path in Path(folder).iterdir()))


def read_stack(folder: Path, channel: int) -> Volume:
    """A colour (0 red, 1 green, 2 blue) of the slices of a folder, X_1.tif, X_2.tif, …, in the order of their numbers:
    voxels [column, row, slice]; notes say what is assumed.

    Raises CourseError naming the file for one that is damaged, of another size or without that colour, and for numbers
    that are missing between the first and the last or there twice.
    """
    slices = {path: _colour(path, _decoded(path), channel) for path in _numbered(Path(folder)).values()}
    return _stacked(Path(folder), slices, constant_allowed=False)


def read_stack_mask(folder: Path) -> Volume:
    """The masks of the slices of a folder, X_1_mask.tif, …, as `read_stack`; a slice without one is refused."""
    slices, masks = _numbered(Path(folder)), _by_number(Path(folder), mask=True)
    for number, path in slices.items():
        if number not in masks:
            raise CourseError(f"{path} has no mask.", "Add it, black where there is no lesion.")
    images = {masks[number]: _grey(masks[number], _decoded(masks[number])) for number in slices}
    return _stacked(Path(folder), images, constant_allowed=True)


def repeated_colours(folder: Path, of: int) -> tuple[int, ...]:
    """The colours of a stack that are copies of another, by its middle slice; () where that cannot be read."""
    try:
        slices = list(_numbered(Path(folder)).values())
        pixels = _decoded(slices[len(slices) // 2])
    except CourseError:
        return ()
    if pixels.ndim != 3:
        return ()
    return tuple(i for i in range(pixels.shape[2]) if i != of and (pixels[..., i] == pixels[..., of]).all())


def _numbered(folder: Path) -> dict[int, Path]:
    """The slices of a folder by number, in their order, none missing."""
    found = _by_number(folder, mask=False)
    if not found:
        raise CourseError(f"{folder} holds no slices.", "Give the folder of X_1.tif, X_2.tif, ….")
    missing = sorted(set(range(min(found), max(found))) - found.keys())
    if missing:
        raise CourseError(f"{folder} lacks slice {missing[0]} of {min(found)} to {max(found)}.", AGAIN)
    return {number: found[number] for number in sorted(found)}


def _by_number(folder: Path, mask: bool) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = _SLICE.fullmatch(path.name)
        if not match or bool(match["mask"]) != mask or path.name.startswith("."):
            continue
        number = int(match["number"])
        if number in found:
            raise CourseError(f"{found[number]} and {path.name} both claim to be slice {number}.", "Keep one of them.")
        found[number] = path
    return found


def _colour(path: Path, pixels: np.ndarray, channel: int) -> np.ndarray:
    if pixels.ndim != 3 or pixels.shape[2] <= channel:
        raise CourseError(f"{path} has no colour {channel + 1}: its shape is {pixels.shape}.", AGAIN)
    return pixels[..., channel].astype(np.float32)


def _stacked(folder: Path, slices: dict[Path, np.ndarray], constant_allowed: bool) -> Volume:
    shape = next(iter(slices.values())).shape
    for path, image in slices.items():
        if image.shape != shape:
            raise CourseError(f"{path} has another size than the first slice.", AGAIN)
    voxels = np.ascontiguousarray(np.stack(list(slices.values())).transpose(2, 1, 0))
    check_voxels(folder, voxels, constant_allowed)
    affine = _affine(shape, FIELD_MM / max(shape), STACK_MM / len(slices))
    return Volume(voxels, affine, True, STACK_NOTES)


def _affine(shape: tuple[int, int], pixel_mm: float, slice_mm: float = 1.0) -> np.ndarray:
    """Voxel [column, row, slice] to mm in RAS+; the middle of a slice is the origin."""
    affine = np.diag([-pixel_mm, -pixel_mm, slice_mm, 1.0])
    affine[:2, 3] = pixel_mm * (np.array(shape[::-1]) - 1) / 2
    return affine


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
