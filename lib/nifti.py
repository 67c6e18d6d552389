"""NIfTI files byte by byte: whole, unchanged, and with a header that agrees with itself and with the file's size."""

import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError

from lib.refusals import refusal

VOXEL_MM = (0.1, 10.0)
LEAST_UPRIGHT = 0.1  # a gantry tilted by 30 degrees gives 0.87
MOST_CODE = 5  # of the meanings of an affine that NIfTI knows
UNITS = {1: "metres", 3: "micrometres"}
GZIP, GZIP_FORMAT = b"\x1f\x8b", 31
MOST_PACKED = 1032  # times that deflate makes anything smaller, at most
HEAD, PIECE = 540, 2**16  # bytes of the longer header; of a file's beginning, which hold it compressed


def load(path: Path, channel: int | None = None) -> tuple[nibabel.Nifti1Header, bytes]:
    """Header and decompressed content of a NIfTI file; what the header promises is held against the file's size before
    memory is taken; `channel` as in `check_volume`. Raises CourseError naming the file for all that is wrong."""
    try:
        if not path.is_file():
            raise refusal("S01", path=path)
        with path.open("rb") as file, _unchanged(path, file):
            return _load(path, file, channel)
    except OSError as error:
        raise refusal("S02", path=path, reason=error.strerror) from error


def _load(path: Path, file: BinaryIO, channel: int | None) -> tuple[nibabel.Nifti1Header, bytes]:
    start = file.read(PIECE)
    packed = _is_packed(path, start)
    header = _header(path, _unpacked(path, start, HEAD, whole=False) if packed else start[:HEAD], channel)
    size, most = os.fstat(file.fileno()).st_size, promised(header)
    if size * (MOST_PACKED if packed else 1) < most:
        raise refusal("S18", path=path)
    if size > (most + most // 100 + PIECE if packed else most):
        raise refusal("S19", path=path)
    try:
        content = start + file.read()
        return header, _unpacked(path, content, most) if packed else content
    except MemoryError as error:
        raise refusal("S20", path=path, gigabytes=most / 2**30) from error


@contextmanager
def _unchanged(path: Path, file: BinaryIO) -> Iterator[None]:
    """Refuse a file that is written, or replaced, while it is read, whatever else is wrong with it then."""
    before = _state(os.fstat(file.fileno()))
    try:
        yield
    finally:
        if _state(path.stat()) != before:
            raise refusal("S04", path=path)


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _is_packed(path: Path, start: bytes) -> bool:
    named, packed = path.name.lower().endswith(".gz"), start[:2] == GZIP
    if not start:
        raise refusal("S03", path=path)
    if named != packed:
        raise refusal("S05" if named else "S06", path=path)
    return packed


def _unpacked(path: Path, packed: bytes, most: int, whole: bool = True) -> bytes:
    """At most so many bytes of a gzip file, whose streams' checksums zlib verifies, nibabel does not; `whole`: they
    must end there."""
    content = b""
    while packed and len(content) < most + whole:
        stream = zlib.decompressobj(GZIP_FORMAT)
        try:
            part = stream.decompress(packed, most + whole - len(content))
        except zlib.error as error:
            raise refusal("S09" if "check" in str(error) else "S08", path=path) from error
        content = content + part if content else part
        if whole and not stream.eof:
            raise refusal("S19" if len(content) > most else "S07", path=path)
        packed = stream.unused_data.lstrip(b"\0")  # padding, as of tapes
        if packed and packed[:2] != GZIP:
            raise refusal("S10", path=path)
    if whole and len(content) != most:
        raise refusal("S19" if len(content) > most else "S18", path=path)
    if not content:
        raise refusal("S07", path=path)
    return content


def _header(path: Path, head: bytes, channel: int | None) -> nibabel.Nifti1Header:
    """The header, examined field by field: nibabel mends silently what is wrong in it."""
    kinds = {header.sizeof_hdr: header for header in (nibabel.Nifti1Header, nibabel.Nifti2Header)}
    lengths = {int.from_bytes(head[:4], order): order for order in ("little", "big")}
    length = next((n for n in lengths if n in kinds), len(head) + 1)
    if len(head) < length:
        raise refusal("S11", path=path)
    kind = kinds[length]
    header = kind(head[:length], endianness=lengths[length], check=False)
    magic = header["magic"].item()
    if magic == kind.pair_magic:
        raise refusal("S12", path=path)
    if magic != kind.single_magic:
        raise refusal("S11", path=path)
    _check_fields(path, header)
    try:
        affine = header.get_best_affine()
    except (HeaderDataError, ValueError) as error:
        raise refusal("S21", path=path) from error
    check_volume(path, header.get_data_shape(), header.get_data_dtype(), affine, channel)
    other = qform(header)
    if other is not None and np.linalg.det(affine[:3, :3]) * np.linalg.det(other[:3, :3]) < 0:
        raise refusal("S24", path=path)
    return header


def _check_fields(path: Path, header: nibabel.Nifti1Header) -> None:
    """Each field by itself."""
    try:
        kind = header.get_data_dtype()
    except (HeaderDataError, KeyError) as error:
        raise refusal("S13", path=path, field="datatype", value=header["datatype"]) from error
    offset = float(header["vox_offset"])
    right = {
        "dim": 1 <= header["dim"][0] <= 7,
        "bitpix": header["bitpix"] == 8 * kind.itemsize,
        "vox_offset": header.single_vox_offset <= offset < 2**31 and offset % 1 == 0,
        "pixdim": all(0 < edge < np.inf for edge in header["pixdim"][1:4]),
        "qform_code": 0 <= header["qform_code"] <= MOST_CODE,
        "sform_code": 0 <= header["sform_code"] <= MOST_CODE,
    }
    for field, holds in right.items():
        if not holds:
            raise refusal("S13", path=path, field=field, value=header[field])
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if math.isinf(slope) or (slope and math.isfinite(slope) and not math.isfinite(intercept)):  # nibabel takes it for 1
        raise refusal("S17", path=path, slope=f"{slope:g} and {intercept:g}")
    if (unit := UNITS.get(int(header["xyzt_units"]) % 8)) is not None:
        raise refusal("S23", path=path, unit=unit)


def check_volume(
    path: Path, shape: Sequence[int], kind: np.dtype, affine: np.ndarray, channel: int | None = None
) -> None:
    """Raise CourseError naming the file for what is no volume of intensities with voxels of a plausible size on a grid
    that is one, whatever the format; `channel`: which volume of a 4D file, counted from 0, else it must be the only
    one."""
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise refusal("S14", path=path, shape=shape)
    if channel is None and any(size != 1 for size in shape[3:]):
        raise refusal("S15", path=path, count=math.prod(shape[3:]))
    if channel is not None and (len(shape) != 4 or not 0 <= channel < shape[3]):
        raise refusal("S28", path=path, number=channel + 1, shape=shape)
    if kind.kind not in "iuf":
        raise refusal("S16", path=path)
    sizes = nibabel.affines.voxel_sizes(affine)
    if not np.isfinite(affine).all() or not sizes.all() or upright(affine) < LEAST_UPRIGHT:
        raise refusal("S21", path=path)
    if sizes.min() < VOXEL_MM[0] or sizes.max() > VOXEL_MM[1]:
        raise refusal("S22", path=path, edges=" × ".join(f"{s:.3g}" for s in sizes))


def upright(affine: np.ndarray) -> float:
    """The volume of a voxel by that of a cuboid with its edges: 1 for right angles, 0 where two axes are one."""
    turned = affine[:3, :3] / nibabel.affines.voxel_sizes(affine)
    return float(abs(np.linalg.det(turned)))


def qform(header: nibabel.Nifti1Header) -> np.ndarray | None:
    """The affine that the header gives beside its sform; None where it gives one only, or none that can be read."""
    if not header["sform_code"] or not header["qform_code"]:
        return None
    try:
        return header.get_qform()
    except (HeaderDataError, ValueError):
        return None


def promised(header: nibabel.Nifti1Header) -> int:
    """Bytes that the file must have."""
    voxels = math.prod(header.get_data_shape())
    return int(header["vox_offset"]) + voxels * header.get_data_dtype().itemsize
