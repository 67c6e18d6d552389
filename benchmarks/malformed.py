"""Broken scans, and odd ones that are good: one table that the tests assert and `benchmarks.corruption` counts.

Each case writes one file from a good scan, and says what must come of it: refused with a code of `lib.refusals`, or
read as the good scan is, with a note where something in it is not believed.
"""

import gzip
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from unittest import mock

import nibabel
import numpy as np
from scipy import ndimage

from lib import nifti, volumes
from lib.preprocessing import canonical
from lib.volumes import Volume

EDGE_MM = 6.0
SEMI_AXES_MM = (65.0, 80.0, 60.0)  # an ellipsoid of 1.3 litres
NOBODY = 65534


@cache
def scan(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A brain-extracted scan, int16 [i, j, k], the mask of its lesion, uint8, and its affine, left-handed as scanners
    store it."""
    half = np.ceil(np.array(SEMI_AXES_MM) / EDGE_MM).astype(int) + 1
    mm = np.stack(np.mgrid[tuple(slice(-h, h + 1) for h in half)], axis=-1) * EDGE_MM
    brain = ((mm / SEMI_AXES_MM) ** 2).sum(axis=-1) <= 1
    lesion = ((mm - (25, 10, 5)) ** 2).sum(axis=-1) <= 18**2
    texture = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(brain.shape), 1)
    voxels = (500 + 100 * texture / texture.std() + 500 * lesion).clip(50, 3000) * brain
    affine = np.diag([-EDGE_MM, EDGE_MM, EDGE_MM, 1])
    affine[:3, 3] = half * (EDGE_MM, -EDGE_MM, -EDGE_MM)
    return voxels.astype(np.int16), lesion.astype(np.uint8), affine


VOXELS, LESION, AFFINE = scan()


def content(voxels=VOXELS, affine=AFFINE, form=nibabel.Nifti1Image, **header) -> bytes:
    """A NIfTI file whose sform and qform both say where it lies, as a converter from DICOM writes it."""
    image = form(voxels, affine, dtype=voxels.dtype)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm", "sec")
    for name, value in header.items():
        image.header[name] = value
    return image.to_bytes()


def patched(made: bytes = b"", **fields) -> bytes:
    """A file whose header says what nibabel would not write."""
    made = made or content()
    header = np.frombuffer(made[:348], nibabel.nifti1.header_dtype).copy()
    for name, value in fields.items():
        header[name] = value
    return header.tobytes() + made[348:]


def packed(made: bytes = b"") -> bytes:
    return gzip.compress(made or content(), compresslevel=1, mtime=0)


def flipped(made: bytes, bit: int) -> bytes:
    damaged = bytearray(made)
    damaged[bit // 8] ^= 1 << (bit % 8)
    return bytes(damaged)


def _dimensions(*sizes: int, rank: int = 0) -> bytes:
    return patched(dim=[rank or len(sizes), *sizes, *[1] * (7 - len(sizes))])


def _sizes(*sizes: float) -> bytes:
    return patched(pixdim=[-1, *sizes, *[1] * (7 - len(sizes))])


def _sform(affine) -> bytes:
    return patched(sform_code=1, srow_x=affine[0], srow_y=affine[1], srow_z=affine[2])


def _voxel(value: float, kind=np.float32) -> bytes:
    voxels = VOXELS.astype(kind)
    voxels[8, 9, 7] = value
    return content(voxels)


def _filled(value: float, kind=np.int16) -> bytes:
    return content(np.full(VOXELS.shape, value, kind))


def _turned(*axes: int) -> bytes:
    """The same scan, stored along other axes."""
    image = nibabel.Nifti1Image(VOXELS, AFFINE).as_reoriented(np.array([[abs(a) - 1, np.sign(a)] for a in axes]))
    return content(np.asarray(image.dataobj), image.affine)


def oblique() -> np.ndarray:
    """Turned by 0.3 about an axis that is none of the scan's."""
    turn = nibabel.quaternions.angle_axis2mat(0.3, [1, 2, 3], is_normalized=False)
    return nibabel.affines.from_matvec(turn) @ AFFINE


def _moved(mm: float) -> np.ndarray:
    return nibabel.affines.from_matvec(np.eye(3), [mm, 0, 0]) @ AFFINE


def _without_orientation() -> bytes:
    return patched(sform_code=0, qform_code=0)


def _one_affine(name: str) -> bytes:
    return patched(**{f"{name}_code": 0})


def _in_colour() -> bytes:
    return content(np.zeros(VOXELS.shape, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]))


def _big_endian() -> bytes:
    header = nibabel.Nifti1Image.from_bytes(content()).header.as_byteswapped(">")
    return nibabel.Nifti1Image(VOXELS, None, header).to_bytes()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Without permission to read it; the superuser, who may read everything, becomes nobody."""
    mode, user = path.stat().st_mode, os.geteuid()
    path.chmod(0)
    try:
        if not user:
            os.seteuid(NOBODY)
        yield
    finally:
        os.seteuid(user)
        path.chmod(mode)


def _changing(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """While the file is open, something happens to it."""

    @contextmanager
    def around(path: Path) -> Iterator[None]:
        really, done = os.fstat, []

        def fstat(number: int) -> os.stat_result:
            status = really(number)
            done or done.append(change(path))
            return status

        with mock.patch.object(nifti.os, "fstat", fstat):
            yield

    return around


def _longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(100))


def _replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(packed(content(VOXELS + 1)))
    os.replace(other, path)


@dataclass(frozen=True)
class Case:
    """A file: `made` gives its bytes, or `placed` writes it; `code`: its refusal, "" where it is read as the good scan;
    `note`: what must be said of it then; `affine`: where it lies then; `mask`, `channel`: how it is read; `around`:
    what holds while it is read."""

    code: str
    made: Callable[[], bytes] = content
    name: str = "x_flair.nii"
    note: str = ""
    affine: np.ndarray | None = None
    oriented: bool = True
    mask: bool = False
    channel: int | None = None
    placed: Callable[[Path], object] | None = None
    around: Callable[[Path], object] = nullcontext

    def write(self, folder: Path) -> Path:
        """The file, in a folder that is there."""
        path = folder / self.name
        if self.placed:
            self.placed(path)
        else:
            path.write_bytes(self.made())
        return path

    def right(self, volume: Volume) -> bool:
        """Whether what was read is the good scan, each voxel where it belongs, and what must be said is said."""
        if volume.oriented != self.oriented or (self.note and self.note not in volume.notes):
            return False
        return same(volume.voxels, volume.affine, AFFINE if self.affine is None else self.affine)


def same(voxels: np.ndarray, affine: np.ndarray, meant: np.ndarray = AFFINE) -> bool:
    """Whether an image is the good scan at the affine that is meant, along whichever axes it is stored."""
    if voxels.ndim != 3 or not np.isfinite(affine).all() or np.isnan(nibabel.io_orientation(affine)).any():
        return False
    found, good = canonical(Volume(voxels, affine)), canonical(Volume(VOXELS.astype(np.float32), meant))
    alike = found.voxels.shape == good.voxels.shape and np.allclose(found.voxels, good.voxels, rtol=1e-4)
    return alike and volumes.same_grid(good.voxels.shape, good.affine, found.voxels.shape, found.affine)


_packed = partial(Case, name="x_flair.nii.gz")
_GZ = len(packed())
NO_FORM = np.diag([-EDGE_MM, EDGE_MM, EDGE_MM, 1]) @ nibabel.affines.from_matvec(
    np.eye(3), -(np.array(VOXELS.shape) - 1) / 2
)  # NIfTI's method 1 as nibabel has it: the middle is the origin
CASES: dict[str, Case] = {
    "missing": Case("S01", placed=lambda path: None),
    "a folder": Case("S01", placed=lambda path: path.mkdir()),
    "a dangling link": Case("S01", placed=lambda path: path.symlink_to("nowhere")),
    "a link to itself": Case("S01", placed=lambda path: path.symlink_to(path.name)),
    "a pipe": Case("S01", placed=lambda path: os.mkfifo(path)),
    "unreadable": Case("S02", around=locked),
    "a name too long": Case("S02", placed=lambda path: None, name="x" * 300 + ".nii"),
    "empty": Case("S03", bytes),
    "empty, named gzip": _packed("S03", bytes),
    "growing while it is read": _packed("S04", packed, around=_changing(_longer)),
    "shrinking while it is read": Case("S04", around=_changing(lambda path: os.truncate(path, 5000))),
    "replaced while it is read": _packed("S04", packed, around=_changing(_replaced)),
    "plain NIfTI named gzip": _packed("S05"),
    "a web page named gzip": _packed("S05", lambda: b"<!DOCTYPE html><html>Sign in</html>"),
    "gzip named plain": Case("S06", packed),
    "gzip header only": _packed("S07", lambda: packed()[:9]),
    "gzip cut in the header's part": _packed("S07", lambda: packed()[:60]),
    "gzip cut at a quarter": _packed("S07", lambda: packed()[: _GZ // 4]),
    "gzip cut before the end": _packed("S07", lambda: packed()[:-3]),
    "gzip of half a file": _packed("S18", lambda: packed(content()[: len(content()) // 2])),
    "gzip's compression flipped": _packed("S08", lambda: flipped(packed(), 8 * 10 + 1)),
    "a flipped bit in the checksum": _packed("S09", lambda: flipped(packed(), 8 * (_GZ - 6))),
    "a flipped bit in the length": _packed("S09", lambda: flipped(packed(), 8 * (_GZ - 2))),
    "a page behind the gzip stream": _packed("S10", lambda: packed() + b"<html>"),
    "a web page": Case("S11", lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20),
    "one byte": Case("S11", lambda: b"\x5c"),
    "zeros": Case("S11", lambda: bytes(4000)),
    "noise": Case("S11", lambda: np.random.default_rng(1).bytes(4000)),
    "wrong magic": Case("S11", lambda: patched(magic=b"n+9")),
    "an Analyze header": Case("S11", lambda: patched(magic=b"")),
    "the header of a pair": Case("S12", lambda: patched(magic=b"ni1")[:352]),
    "unknown datatype": Case("S13", lambda: patched(datatype=99)),
    "bits that are not those of the type": Case("S13", lambda: patched(bitpix=8)),
    "no dimensions": Case("S13", lambda: _dimensions(*VOXELS.shape, rank=-1)),
    "nine dimensions": Case("S13", lambda: _dimensions(*VOXELS.shape, rank=9)),
    "offset NaN": Case("S13", lambda: patched(vox_offset=np.nan)),
    "offset below 0": Case("S13", lambda: patched(vox_offset=-400)),
    "voxel size 0": Case("S13", lambda: _sizes(6, 0, 6)),
    "voxel size below 0": Case("S13", lambda: _sizes(6, -6, 6)),
    "voxel size NaN": Case("S13", lambda: _sizes(6, 6, np.nan)),
    "unknown kind of affine": Case("S13", lambda: patched(sform_code=77)),
    "a dimension of 0": Case("S14", lambda: _dimensions(22, 0, 20)),
    "a dimension below 0": Case("S14", lambda: _dimensions(22, -27, 20)),
    "2-D": Case("S14", lambda: content(VOXELS[:, :, 0])),
    "one slice": Case("S14", lambda: content(VOXELS[:, :, :1])),
    "three volumes": Case("S15", lambda: content(np.stack([VOXELS] * 3, axis=-1))),
    "5-D": Case("S15", lambda: content(np.stack([VOXELS] * 3, axis=-1)[:, :, :, None])),
    "RGB": Case("S16", _in_colour),
    "complex": Case("S16", lambda: content(VOXELS.astype(np.complex64))),
    "infinite slope": Case("S17", lambda: patched(scl_slope=np.inf, scl_inter=0)),
    "NaN intercept": Case("S17", lambda: patched(scl_slope=1, scl_inter=np.nan)),
    "header only": Case("S18", lambda: content()[:348]),
    "cut in half": Case("S18", lambda: content()[: len(content()) // 2]),
    "last byte missing": Case("S18", lambda: content()[:-1]),
    "huge": Case("S18", lambda: _dimensions(32767, 32767, 32767)),
    "huge, in seven dimensions of one": Case("S18", lambda: _dimensions(32767, 32767, 32767, 1, 1, 1, 1)),
    "huge, in gzip": _packed("S18", lambda: packed(_dimensions(2000, 2000, 2000))),
    "offset beyond the file": Case("S18", lambda: patched(vox_offset=1e9)),
    "a dimension too small": Case("S19", lambda: _dimensions(22, 27, 10)),
    "bytes behind the voxels": Case("S19", lambda: content() + b"more"),
    "a gzip bomb": _packed("S19", lambda: packed(content() + bytes(2**24))),
    "affine of zeros": Case("S21", lambda: _sform(np.zeros((3, 4)))),
    "NaN affine": Case("S21", lambda: _sform(np.full((3, 4), np.nan))),
    "singular affine": Case("S21", lambda: _sform(np.array([[6, 6, 0, 0], [6, 6, 0, 0], [0, 0, 6, 0]]))),
    "infinite origin": Case("S21", lambda: _sform(np.array([[6, 0, 0, np.inf], [0, 6, 0, 0], [0, 0, 6, 0]]))),
    "a quaternion that is none": Case("S21", lambda: patched(sform_code=0, quatern_b=3)),
    "voxels of 1 µm": Case("S22", lambda: content(affine=np.diag([0.001, 0.001, 0.001, 1]))),
    "voxels of 20 mm": Case("S22", lambda: content(affine=np.diag([1, 1, 20, 1]))),
    "lengths in metres": Case("S23", lambda: patched(xyzt_units=1)),
    "lengths in micrometres": Case("S23", lambda: patched(xyzt_units=3)),
    "two affines, left and right exchanged": Case("S24", lambda: _sform(np.diag([-1, 1, 1, 1]) @ AFFINE)),
    "a NaN voxel": Case("S25", lambda: _voxel(np.nan)),
    "an infinite voxel": Case("S25", lambda: _voxel(-np.inf)),
    "beyond float32": Case("S25", lambda: _voxel(1e300, np.float64)),
    "a slope that overflows": Case("S25", lambda: patched(scl_slope=3e38, scl_inter=0)),
    "all NaN": Case("S25", lambda: _filled(np.nan, np.float32)),
    "all zero": Case("S26", lambda: _filled(0)),
    "constant": Case("S26", lambda: _filled(7)),
    "labels of 2**40": Case("S27", lambda: content(LESION.astype(np.int64) << 40), mask=True),
    "no third volume": Case("S28", lambda: content(np.stack([VOXELS, VOXELS], axis=-1)), channel=2),
    "no volumes to choose from": Case("S28", channel=0),
    "good": Case(""),
    "good, in gzip": _packed("", packed),
    "gzip in two streams": _packed("", lambda: packed(content()[:9000]) + packed(content()[9000:])),
    "zeros behind the gzip stream": _packed("", lambda: packed() + bytes(512)),
    "a name with spaces and letters": _packed("", packed, name="Frau Müller 脳 (2)_flair.nii.gz"),
    "letters of a name taken apart": _packed("", packed, name="Mu\u0308ller_flair.nii.gz"),
    "capitals in the ending": _packed("", packed, name="X_FLAIR.NII.GZ"),
    "a link to a file": Case(
        "", placed=lambda path: (path.with_name("real").write_bytes(content()), path.symlink_to("real"))
    ),
    "big-endian": Case("", _big_endian),
    "NIfTI-2": Case("", lambda: content(form=nibabel.Nifti2Image)),
    "one volume in 4-D": Case("", lambda: content(VOXELS[..., None])),
    "the second of two volumes": Case("", lambda: content(np.stack([VOXELS // 2, VOXELS], axis=-1)), channel=1),
    "float64": Case("", lambda: content(VOXELS.astype(np.float64))),
    "int64": Case("", lambda: content(VOXELS.astype(np.int64))),
    "halved, with a slope of 2": Case("", lambda: patched(content(VOXELS / 2), scl_slope=2, scl_inter=0)),
    "NaN slope": Case("", lambda: patched(scl_slope=np.nan, scl_inter=np.nan)),
    "right-handed": Case("", lambda: _turned(-1, 2, 3)),
    "sagittal": Case("", lambda: _turned(2, 3, 1)),
    "upside down": Case("", lambda: _turned(1, -2, -3)),
    "oblique": Case("", lambda: content(affine=oblique()), affine=oblique()),
    "qform alone": Case("", lambda: _one_affine("sform")),
    "sform alone": Case("", lambda: _one_affine("qform")),
    "no orientation": Case("", _without_orientation, oriented=False, affine=NO_FORM),
    "two affines, two voxels apart": Case("", lambda: _sform(_moved(12)), note=volumes.DIFFER, affine=_moved(12)),
    "a quaternion that is none beside an sform": Case("", lambda: patched(quatern_b=3), note=volumes.DIFFER),
    "another voxel size beside an sform": Case(
        "", lambda: patched(_sizes(5, 6, 6), qform_code=0), note=volumes.SIZES_DIFFER
    ),
}
