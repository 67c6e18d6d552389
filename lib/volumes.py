"""A volume with its affine, read and written so that damage is seen."""

import gzip
import hashlib
import io
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel.arrayproxy import ArrayProxy

from lib import nifti
from lib.refusals import refusal

SUFFIXES = (".nii", ".nii.gz")
MOST_LABEL = 2**24  # whole numbers beyond it are rounded in float32
DIFFER = "Its header has two affines, sform and qform, that differ; the sform is taken."
SIZES_DIFFER = "Its header gives voxels another size than its affine; that of the affine is taken."


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

    `constant_allowed`: it is a mask, which may be of one value, and whose labels must come through; `channel`: which
    volume of a 4D file, counted from 0.
    Raises CourseError naming the file for any damage: a missing, empty, truncated, altered or changing
    file, more than one volume, a colour or complex image, a header that contradicts itself or the file's size, an
    affine that is no affine, a voxel edge outside 0.1 to 10 mm, NaN or infinite voxels, a constant image.
    Where the header's sform and qform differ, the sform is taken, as by nibabel and FSL, and a note says so.
    """
    path = Path(path)
    header, content = nifti.load(path, channel)
    voxels = _voxels(path, header, content, channel)
    check_voxels(path, voxels, constant_allowed)
    if constant_allowed and header.get_data_dtype().kind in "iu" and abs(voxels).max() > MOST_LABEL:
        raise refusal("S27", path=path, most=MOST_LABEL)
    oriented = bool(header["sform_code"] or header["qform_code"])
    return Volume(voxels, header.get_best_affine(), oriented, _notes(header))


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


def _notes(header: nibabel.Nifti1Header) -> tuple[str, ...]:
    """What of the header is not believed. Programs differ in which affine they take: nibabel, FSL and newer ITK
    the sform, older ITK and MRtrix the qform."""
    affine, shape = header.get_best_affine(), header.get_data_shape()[:3]
    twice = header["sform_code"] and header["qform_code"]
    other = nifti.qform(header)
    if twice and (other is None or not same_grid(shape, affine, shape, other)):
        return (DIFFER,)
    if not np.allclose(nibabel.affines.voxel_sizes(affine), header["pixdim"][1:4], rtol=0.01):
        return (SIZES_DIFFER,)
    return ()


def _voxels(path: Path, header: nibabel.Nifti1Header, content: bytes, channel: int | None) -> np.ndarray:
    """Scaled as the header says, float32 [i, j, k]."""
    try:
        with np.errstate(over="ignore"):  # what is beyond float32 is refused as infinite
            stored = ArrayProxy(io.BytesIO(content), header)
            scaled = np.asarray(stored if channel is None else stored[..., channel], dtype=np.float32)
    except MemoryError as error:
        raise refusal("S20", path=path, gigabytes=nifti.promised(header) / 2**30) from error
    return scaled.reshape(header.get_data_shape()[:3])


def check_voxels(path: Path, voxels: np.ndarray, constant_allowed: bool = False) -> None:
    """Raise CourseError naming the file for NaN or infinite voxels, and for an image of one value unless allowed."""
    finite = np.isfinite(voxels)
    if not finite.all():
        raise refusal("S25", path=path, percent=100 * (1 - finite.mean()))
    if not constant_allowed and voxels.min() == voxels.max():
        raise refusal("S26", path=path, value=voxels.flat[0])
