"""DICOM series to volumes: which images belong together, where each lies, and what the scanner says it did.

After DICOM PS3.3: C.7.6.2 (image plane), C.7.6.16 (functional groups of enhanced images), C.11.1 (modality LUT). Of a
header, nothing that names a person, place or day is kept or said: of `FACTS` what `acquisition` knows, and the grid.
"""

import struct
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from pydicom.dataset import Dataset as Header
from pydicom.errors import BytesLengthException, InvalidDicomError

from lib import acquisition, privacy
from lib.errors import CourseError
from lib.nifti import LEAST_UPRIGHT, VOXEL_MM, upright
from lib.refusals import refusal
from lib.volumes import Volume, check_voxels

FACTS = {
    "Modality": "modality",
    "Manufacturer": "vendor",
    "MagneticFieldStrength": "tesla",
    "RepetitionTime": "repetition_ms",
    "EchoTime": "echo_ms",
    "InversionTime": "inversion_ms",
    "SliceThickness": "thickness_mm",
}
SAME_MM = 0.01  # positions closer than this are one
MOST_FRAMES = 20_000
EVEN = 0.02  # share of a gap by which gaps may differ from the usual one
MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
LONG_ECHO_MS, LONG_REPETITION_MS, FLUID_NULLED_MS = 60, 1500, 1500
SUFFIXES = (".dcm", ".ima", ".dicom")
UNREADABLE = (
    *(InvalidDicomError, OSError, EOFError, ValueError, TypeError, AttributeError, KeyError, ArithmeticError),
    *(RuntimeError, NotImplementedError, struct.error, BytesLengthException),
)


@contextmanager
def _quietly():
    """The warnings of pydicom quote values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Frame:
    """One slice: its file and number there, where it lies (DICOM's patient coordinates, LPS, mm), its rescaling."""

    path: Path
    number: int
    shape: tuple[int, int]
    spacing: tuple[float, float]  # of rows, of columns, in mm
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    slope: float
    intercept: float

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.orientation[:3], self.orientation[3:])

    @property
    def height(self) -> float:
        """Along the normal, in mm."""
        return float(self.normal @ self.position)


@dataclass(frozen=True)
class Series:
    """Slices that belong together, in their order; `facts` by the names in `FACTS`; `notes` are for people."""

    frames: tuple[Frame, ...]
    facts: dict[str, str | float]
    notes: tuple[str, ...]
    affine: np.ndarray
    oriented: bool


def is_series(path: Path) -> bool:
    """Whether a folder holds DICOM files itself."""
    return next(_files(Path(path)), None) is not None


def facts(folder: Path) -> dict[str, str | float]:
    """What the scanner did, by the names in `FACTS`, from the first file of a folder that can be read; CourseError
    where there is none."""
    refused: CourseError | None = None
    for path in _files(Path(folder)):
        try:
            return _facts(_header(path))
        except CourseError as error:
            refused = refused or error
    raise refused or refusal("D01", path=shown(folder))


def identifiers(files: Iterable[Path]) -> frozenset[str]:
    """What in the headers of files leads to a person, as `privacy.identifiers`; files that are damaged say nothing."""
    return frozenset(one for path in files for one in _identifiers(path))


def patient(folder: Path) -> frozenset[str]:
    """What leads to the person of a series, from its first file, or of the series in the folders of a folder."""
    folder = Path(folder)
    below = sorted(folder.iterdir()) if folder.is_dir() and not is_series(folder) else []
    return identifiers(path for place in (folder, *below) for path in islice(_files(place), 1))


def shown(path: Path) -> str:
    """A path to or beside DICOM files as people may see it, without what leads to their patient."""
    path = Path(path)
    place = path if path.is_dir() else path.parent
    text = privacy.shown(path, identifiers(_files(place)))
    if path.is_dir() or text.endswith(path.name):
        return text
    return f"{text} (file {1 + sorted(place.iterdir()).index(path)} there by name)"


@_quietly()
def find_series(folder: Path) -> list[Series]:
    """Every series among the DICOM files of a folder, by falling number of slices.

    Raises CourseError naming the file for a damaged one, one without an image or in colour, images of one series that
    differ in size or orientation, a slice that is missing or there twice.
    """
    headers: dict[str, list[tuple[Path, Header]]] = {}
    for path in _files(Path(folder)):
        header = _header(path)
        headers.setdefault(str(_said(header, "SeriesInstanceUID")), []).append((path, header))
    if not headers:
        raise refusal("D01", path=shown(folder))
    found = [_series(images) for images in headers.values()]
    return sorted(found, key=lambda series: -len(series.frames))


def read(folder: Path) -> Volume:
    """The one series of a folder as a volume; CT is in Hounsfield units.

    Raises CourseError as `find_series` does, and where the folder holds several series or pixels cannot be decoded.
    """
    found = find_series(folder)
    if len(found) > 1:
        each = ", ".join(f"{len(series.frames)} slices" for series in found)
        raise refusal("D02", path=shown(folder), count=len(found), each=each)
    return volume(found[0])


@_quietly()
def volume(series: Series) -> Volume:
    """Voxels of a series, rescaled as its headers say; brighter is more, also where a film would show it dark."""
    decoded: dict[Path, np.ndarray] = {}
    planes = []
    for frame in series.frames:
        if frame.path not in decoded:
            decoded = {frame.path: _pixels(frame.path)}
        planes.append(decoded[frame.path][frame.number] * frame.slope + frame.intercept)
    voxels = np.stack(planes).transpose(2, 1, 0).astype(np.float32)
    voxels = _evened(voxels, series.frames) if series.oriented else voxels
    place = series.frames[0].path.parent
    check_voxels(Path(privacy.shown(place, patient(place))), voxels)
    return Volume(voxels, series.affine, series.oriented, series.notes)


def weighting(facts: dict[str, str | float]) -> str | None:
    """The modality that times of repetition, echo and inversion make; None where they do not tell."""
    if facts.get("modality") == "CT":
        return "CT"
    repetition, echo, inversion = (facts.get(f"{name}_ms") for name in ("repetition", "echo", "inversion"))
    if not repetition or not echo or facts.get("modality") != "MR":
        return None
    if echo >= LONG_ECHO_MS:
        return "FLAIR" if inversion and inversion >= FLUID_NULLED_MS else "T2"
    return "T1" if inversion or repetition < LONG_REPETITION_MS else "PD"


def _files(folder: Path) -> Iterator[Path]:
    """The DICOM files of a folder in the order of their names."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return (path for path in files if path.is_file() and _is_dicom(path))


def _is_dicom(path: Path) -> bool:
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR":
        return False
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


@_quietly()
def _identifiers(path: Path) -> frozenset[str]:
    try:
        return privacy.identifiers(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(privacy.TAGS)))
    except UNREADABLE:
        return frozenset()


@_quietly()
def _header(path: Path) -> Header:
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        grey = header.get("PhotometricInterpretation") in MONOCHROME and header.get("SamplesPerPixel", 1) == 1
    except UNREADABLE:
        raise refusal("D03", path=shown(path)) from None
    if "Rows" not in header or "Columns" not in header:
        raise refusal("D04", path=shown(path))
    if not grey:
        raise refusal("D05", path=shown(path))
    return header


def _series(images: list[tuple[Path, Header]]) -> Series:
    frames = [frame for path, header in images for frame in _frames(path, header)]
    _check_alike(frames)
    first = images[0][1]
    oriented = all(frame.position and frame.orientation for frame in frames)
    if oriented:
        frames.sort(key=lambda frame: frame.height)
        notes = _check_gaps(frames)
    else:
        notes = ["The headers do not say where the slices lie; their order in the file is taken."]
    try:
        affine = _affine(frames, _step(frames, first, oriented), oriented)
    except UNREADABLE:
        raise refusal("D06", path=shown(frames[0].path)) from None
    _check_affine(frames[0].path, affine)
    return Series(tuple(frames), _facts(first), tuple(notes), affine, oriented)


def _check_affine(path: Path, affine: np.ndarray) -> None:
    """Voxels of a plausible size, along axes that are three."""
    sizes = nibabel.affines.voxel_sizes(affine)
    if not (np.isfinite(affine).all() and sizes.min() >= VOXEL_MM[0] and sizes.max() <= VOXEL_MM[1]):
        raise refusal("D11", path=shown(path.parent), edges=" × ".join(f"{s:.3g}" for s in sizes))
    if upright(affine) < LEAST_UPRIGHT:
        raise refusal("D12", path=shown(path.parent))


@_quietly()
def _facts(header: Header) -> dict[str, str | float]:
    return acquisition.known({ours: _said(header, theirs) for theirs, ours in FACTS.items()})


def _said(header: Header, keyword: str):
    """A value, or None where it cannot be read."""
    try:
        return _look_up(header, keyword)
    except UNREADABLE:
        return None


def _frames(path: Path, header: Header) -> list[Frame]:
    try:
        return list(_each_frame(path, header))
    except UNREADABLE:
        raise refusal("D06", path=shown(path)) from None


def _each_frame(path: Path, header: Header) -> Iterator[Frame]:
    count, shape = int(header.get("NumberOfFrames") or 1), (int(header.Rows), int(header.Columns))
    if not 1 <= count <= MOST_FRAMES or min(shape) < 1:
        raise ValueError(f"{count} frames of {shape}")
    for number in range(count):
        groups = _groups(header, number)
        yield Frame(
            path, number, shape,
            _numbers(groups, "PixelSpacing", 2) or (1.0, 1.0),
            _numbers(groups, "ImagePositionPatient", 3), _numbers(groups, "ImageOrientationPatient", 6),
            *(_numbers(groups, "RescaleSlope", 1) or (1.0,)), *(_numbers(groups, "RescaleIntercept", 1) or (0.0,)),
        )  # fmt: skip


def _groups(header: Header, number: int) -> list[Header]:
    """Where the values of a frame may stand: its own functional groups, the shared ones, the header."""
    own = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = header.get("SharedFunctionalGroupsSequence") or []
    places = [*own[number : number + 1], *shared[:1]]
    return [inner for place in places for group in place for inner in (group.value or [])[:1]] + [header]


def _look_up(places: list[Header] | Header, keyword: str):
    """The first value of that name that is not empty."""
    places = _groups(places, 0) if isinstance(places, Header) else places
    values = (place.get(keyword) for place in places if isinstance(place, Header))
    return next((value for value in values if value not in (None, "")), None)


def _numbers(places: list[Header], keyword: str, count: int) -> tuple[float, ...] | None:
    """So many finite numbers, or None where there is no value; anything else is a ValueError."""
    value = _look_up(places, keyword)
    if value is None:
        return None
    numbers = tuple(float(number) for number in np.atleast_1d(value))
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise ValueError(f"{keyword} has {len(numbers)} values")
    return numbers


def _check_alike(frames: list[Frame]) -> None:
    """All of one size, one spacing and one orientation."""
    first = frames[0]
    for frame in frames[1:]:
        same = {
            "size": frame.shape == first.shape,
            "pixel spacing": np.allclose(frame.spacing, first.spacing, atol=SAME_MM),
            "orientation": (frame.orientation is None) == (first.orientation is None)
            and (frame.orientation is None or np.allclose(frame.orientation, first.orientation, atol=1e-3)),
        }
        for what, holds in same.items():
            if not holds:
                raise refusal("D07", path=shown(frame.path), what=what, other=shown(first.path))


def _check_gaps(frames: list[Frame]) -> list[str]:
    """Notes on gaps that vary; CourseError for a slice that is missing or there twice."""
    gaps = np.array([after.height - before.height for before, after in pairwise(frames)])
    if not len(gaps):
        return []
    twice = int(gaps.argmin())
    if gaps[twice] < SAME_MM:
        raise refusal("D08", path=shown(frames[twice].path), other=shown(frames[twice + 1].path))
    usual = np.sort(gaps)[(len(gaps) - 1) // 2]
    for before, gap in zip(frames, gaps, strict=False):
        missing = round(gap / usual) - 1
        if missing >= 1 and abs(gap / usual - missing - 1) < EVEN * (missing + 1):
            count = f"{missing} of the slices {'is' if missing == 1 else 'are'}"
            raise refusal("D09", path=shown(before.path), missing=count, gap=gap, usual=usual)
    if _uneven(gaps):
        return [f"Gaps between slices vary from {gaps.min():.2f} to {gaps.max():.2f} mm; slices are interpolated."]
    return []


def _uneven(gaps: np.ndarray) -> bool:
    return bool(len(gaps)) and np.abs(gaps - np.median(gaps)).max() > EVEN * np.median(gaps) + SAME_MM


def _step(frames: list[Frame], header: Header, oriented: bool) -> np.ndarray:
    """From a slice to the next, in patient coordinates; a tilted gantry's is not along the normal."""
    if oriented and len(frames) > 1:
        return (np.array(frames[-1].position) - frames[0].position) / (len(frames) - 1)
    distance = _said(header, "SpacingBetweenSlices") or _said(header, "SliceThickness") or 1.0
    return float(distance) * (frames[0].normal if oriented else np.array([0.0, 0.0, 1.0]))


def _affine(frames: list[Frame], step: np.ndarray, oriented: bool) -> np.ndarray:
    """Voxel [column, row, slice] to mm in RAS+; the middle is the origin where the headers do not say."""
    first, affine = frames[0], np.eye(4)
    along = np.array(first.orientation if oriented else (1, 0, 0, 0, 1, 0), float).reshape(2, 3)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = along[0] * first.spacing[1], along[1] * first.spacing[0], step
    middle = (np.array([first.shape[1], first.shape[0], len(frames)]) - 1) / 2
    affine[:3, 3] = first.position if oriented else -affine[:3, :3] @ middle * (1, 1, 1)
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _pixels(path: Path) -> np.ndarray:
    """Stored values [frame, row, column]; inverted where a film would show high values dark."""
    try:
        header = pydicom.dcmread(path)
        pixels = header.pixel_array.astype(np.float32)
        most = 2 ** int(header.BitsStored) - 1
    except UNREADABLE:
        raise refusal("D10", path=shown(path)) from None
    pixels = pixels.reshape(-1, *pixels.shape[-2:])
    return most - pixels if header.PhotometricInterpretation == "MONOCHROME1" else pixels


def _evened(voxels: np.ndarray, frames: tuple[Frame, ...]) -> np.ndarray:
    """Slices at even distances, interpolated linearly where those of the scan are not."""
    heights = np.array([frame.height for frame in frames])
    if not _uneven(np.diff(heights)):
        return voxels
    place = np.interp(np.linspace(heights[0], heights[-1], len(heights)), heights, np.arange(len(heights)))
    below = np.minimum(place.astype(int), len(heights) - 2)
    share = (place - below).astype(np.float32)
    return voxels[..., below] * (1 - share) + voxels[..., below + 1] * share
