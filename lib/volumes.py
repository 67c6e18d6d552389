"""A volume with its affine, read and written so that damage is seen."""

import gzip
import hashlib
import io
import os
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from lib.errors import CourseError

SUFFIXES = (".nii", ".nii.gz")
VOXEL_MM = (0.1, 10.0)
AGAIN = "Copy or download it again."


@dataclass(frozen=True)
class Volume:
    """Voxels of one scan with the grid they lie on.

    `voxels` float32 [i, j, k]; `affine` float64 [4, 4], voxel indices to millimetres in RAS+; `oriented`: whether
    the header says where the axes point, or the affine is only assumed; `notes`: sentences for people about what was
    done to read it.
    """

    voxels: np.ndarray
    affine: np.ndarray
    oriented: bool = True
    notes: tuple[str, ...] = ()

    @property
    def voxel_mm(self) -> np.ndarray:
        """Edge lengths of a voxel in mm, [3]."""
        return nibabel.affines.voxel_sizes(self.affine)

    @property
    def millilitres(self) -> float:
        """Volume of one voxel in ml."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000


def read(path: Path, *, constant_allowed: bool = False, channel: int | None = None) -> Volume:
    """Read a NIfTI file whole, its gzip checksum, header and voxels examined.

    `constant_allowed`: an image of one value is a fault in a scan, not in a lesion mask; `channel`: which volume of a
    4D file, counted from 0.
    Raises CourseError naming the file for any damage: a missing, empty, truncated or altered
    file, more than one volume, a colour or complex image, an affine that is no affine, a voxel
    edge outside 0.1 to 10 mm, NaN or infinite voxels, a constant image.
    """
    path = Path(path)
    image = _parse(path, _read_bytes(path))
    check_header(path, image, channel)
    try:
        stored = image.dataobj if channel is None else image.dataobj[..., channel]
        voxels = np.asarray(stored, dtype=np.float32).reshape(image.shape[:3])
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise CourseError(
            f"{path} is truncated: its header promises more voxels than the file holds.", AGAIN
        ) from error
    check_voxels(path, voxels, constant_allowed)
    return Volume(voxels, image.affine, bool(image.header["sform_code"] or image.header["qform_code"]))


def write(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Write a NIfTI file in one move: same voxels, same bytes; a kill leaves no half file."""
    path = Path(path)
    image = nibabel.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    if path.name.endswith(".gz"):
        content = gzip.compress(content, compresslevel=1, mtime=0)
    write_bytes(path, content)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and move it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        half.write_bytes(content)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def checksum(voxels: np.ndarray) -> str:
    """Identity of the voxel values, whatever the file's name, header or compression."""
    content = np.ascontiguousarray(voxels, dtype=np.float32)
    return hashlib.sha256(str(content.shape).encode() + content.tobytes()).hexdigest()[:32]


def same_grid(shape, affine, other_shape, other_affine, tolerance: float = 0.1) -> bool:
    """Whether two grids agree: equal shape, and no corner further apart than `tolerance` voxels."""
    if tuple(shape) != tuple(other_shape):
        return False
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1).T
    apart = nibabel.affines.apply_affine(affine, corners) - nibabel.affines.apply_affine(other_affine, corners)
    return bool(np.linalg.norm(apart, axis=1).max() <= tolerance * nibabel.affines.voxel_sizes(affine).min())


def _read_bytes(path: Path) -> bytes:
    """The decompressed content; `gzip.decompress` verifies the stream's checksum, nibabel does not."""
    try:
        if not path.is_file():
            raise CourseError(f"{path} is not a file.", "Give the path of a NIfTI file (.nii or .nii.gz).")
        content = path.read_bytes()
    except OSError as error:
        raise CourseError(
            f"{path} cannot be read: {error.strerror}.", "Check the file's permissions and the disk."
        ) from error
    if not content:
        raise CourseError(f"{path} is empty.", AGAIN)
    if not path.name.lower().endswith(".gz"):
        return content
    try:
        return gzip.decompress(content)
    except gzip.BadGzipFile as error:
        what = "is damaged: its checksum does not match" if content[:2] == b"\x1f\x8b" else "is not a gzip file"
        raise CourseError(f"{path} {what}.", AGAIN) from error
    except (EOFError, zlib.error) as error:
        what = "truncated" if isinstance(error, EOFError) else "damaged"
        raise CourseError(f"{path} is {what}: its gzip stream does not decompress.", AGAIN) from error


def _parse(path: Path, content: bytes) -> nibabel.Nifti1Image:
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        try:
            image = kind.from_bytes(content)
            if np.isinf(kind.header_class.from_fileobj(io.BytesIO(content))["scl_slope"]):  # nibabel takes it for 1
                raise CourseError(f"{path} scales its voxels by infinity.", "Repair the header's scl_slope.")
            return image
        except (ImageFileError, WrapStructError, HeaderDataError, ValueError, OverflowError, KeyError, OSError):
            continue
    raise CourseError(f"{path} is not a NIfTI image.", "Convert the scan to NIfTI, or copy it again.")


def check_header(path: Path, image: nibabel.spatialimages.SpatialImage, channel: int | None = None) -> None:
    """Raise CourseError naming the file for what is no grey volume with a plausible grid; `channel` as in `read`."""
    shape = image.shape
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise CourseError(f"{path} is no volume: its shape is {shape}.", "Give three-dimensional scans.")
    if channel is not None and (len(shape) != 4 or channel >= shape[3]):
        raise CourseError(f"{path} has no volume {channel + 1}: its shape is {shape}.", "Give the file that has it.")
    if channel is None and np.prod(shape[3:], dtype=int) != 1:
        raise CourseError(
            f"{path} holds {np.prod(shape[3:], dtype=int)} volumes, not one.", "Split it into a file a modality."
        )
    if image.get_data_dtype().kind not in "iuf":
        raise CourseError(
            f"{path} holds colours or complex numbers, not intensities.", "Export the scan as grey values."
        )
    affine = image.affine
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise CourseError(
            f"{path} has an affine that is not finite or not invertible.",
            "Repair the header, or convert the scan again.",
        )
    sizes = nibabel.affines.voxel_sizes(affine)
    if sizes.min() < VOXEL_MM[0] or sizes.max() > VOXEL_MM[1]:
        edges = " × ".join(f"{s:.3g}" for s in sizes)
        raise CourseError(
            f"{path} has voxels of {edges} mm.", "Repair the header: edges of 0.1 to 10 mm are plausible."
        )


def check_voxels(path: Path, voxels: np.ndarray, constant_allowed: bool = False) -> None:
    """Raise CourseError naming the file for NaN or infinite voxels, and for an image of one value unless allowed."""
    finite = np.isfinite(voxels)
    if not finite.all():
        raise CourseError(
            f"{path} has {100 * (1 - finite.mean()):.2g} % NaN or infinite voxels.",
            "Export the scan again, or mend the step that wrote it.",
        )
    if not constant_allowed and voxels.min() == voxels.max():
        raise CourseError(
            f"{path} is constant: every voxel is {voxels.flat[0]:g}.", "Leave it out, or export the scan again."
        )
