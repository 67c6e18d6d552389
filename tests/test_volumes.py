"""Volumes: what is written is what is read, and damage of any kind is one sentence and a cure."""

import gzip
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import volumes
from lib.errors import CourseError

SHAPE = (12, 14, 10)
VOXELS = np.random.default_rng(0).integers(0, 900, SHAPE).astype(np.int16)
AFFINE = np.array([[0, -2, 0, 90], [1.5, 0, 0, -126], [0, 0, 3, -72], [0, 0, 0, 1.0]])


def content(voxels=VOXELS, affine=AFFINE, form=nibabel.Nifti1Image, **header):
    image = form(voxels, affine)
    for name, value in header.items():
        image.header[name] = value
    return image.to_bytes()


def patched(**fields):
    """A file whose header says what nibabel would not write."""
    header = np.frombuffer(content()[:348], nibabel.nifti1.header_dtype).copy()
    for name, value in fields.items():
        header[name] = value
    return header.tobytes() + content()[348:]


def dimensions(*sizes):
    return patched(dim=[len(sizes), *sizes, *[1] * (7 - len(sizes))])


def with_affine(affine):
    return patched(sform_code=1, srow_x=affine[0], srow_y=affine[1], srow_z=affine[2])


def with_voxel(value, kind=np.float32):
    voxels = VOXELS.astype(kind)
    voxels[3, 4, 5] = value
    return content(voxels)


def colours():
    return np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])


BAD_CONTENT = {
    "empty": lambda: b"",
    "one byte": lambda: b"\x5c",
    "header only": lambda: content()[:348],
    "half": lambda: content()[: len(content()) // 2],
    "last byte missing": lambda: content()[:-1],
    "a web page": lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20,
    "zeros": lambda: bytes(4000),
    "noise": lambda: np.random.default_rng(1).bytes(4000),
    "4-D": lambda: content(np.stack([VOXELS] * 3, axis=-1)),
    "5-D": lambda: content(np.stack([VOXELS] * 3, axis=-1)[:, :, :, None]),
    "2-D": lambda: content(VOXELS[:, :, 0]),
    "one slice": lambda: content(VOXELS[:, :, :1]),
    "colours": lambda: content(colours()),
    "complex": lambda: content(VOXELS.astype(np.complex64)),
    "unknown datatype": lambda: patched(datatype=99),
    "negative dimension": lambda: dimensions(12, -14, 10),
    "zero dimension": lambda: dimensions(12, 0, 10),
    "huge dimension": lambda: dimensions(32767, 32767, 32767),
    "huge in seven dimensions": lambda: dimensions(*[32767] * 7),
    "infinite slope": lambda: patched(scl_slope=np.inf),
    "infinite intercept": lambda: patched(scl_slope=1, scl_inter=np.inf),
    "slope that overflows": lambda: patched(scl_slope=3e38),
    "offset beyond the file": lambda: patched(vox_offset=1e9),
    "negative offset": lambda: patched(vox_offset=-400),
    "NaN offset": lambda: patched(vox_offset=np.nan),
    "zero affine": lambda: with_affine(np.zeros((3, 4))),
    "NaN affine": lambda: with_affine(np.full((3, 4), np.nan)),
    "singular affine": lambda: with_affine(np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]])),
    "infinite origin": lambda: with_affine(np.array([[1, 0, 0, np.inf], [0, 1, 0, 0], [0, 0, 1, 0]])),
    "voxels of 1 µm": lambda: content(affine=np.diag([0.001, 0.001, 0.001, 1])),
    "voxels of 20 mm": lambda: content(affine=np.diag([1, 1, 20, 1])),
    "NaN": lambda: with_voxel(np.nan),
    "infinity": lambda: with_voxel(-np.inf),
    "beyond float32": lambda: with_voxel(1e300, np.float64),
    "all NaN": lambda: content(np.full(SHAPE, np.nan, np.float32)),
    "all zero": lambda: content(np.zeros_like(VOXELS)),
    "constant": lambda: content(np.full_like(VOXELS, 7)),
}


def refused(path):
    with pytest.raises(CourseError) as caught:
        volumes.read(path)
    assert str(path) in caught.value.what
    assert caught.value.cure.strip()
    return caught.value


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", BAD_CONTENT)
def test_bad_content_is_refused_by_name(tmp_path, kind, suffix):
    path = tmp_path / f"x_flair{suffix}"
    made = BAD_CONTENT[kind]()
    path.write_bytes(gzip.compress(made) if suffix == ".nii.gz" else made)
    refused(path)


BAD_FILES = {
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a pipe": lambda path: os.mkfifo(path),
    "no bytes": lambda path: path.write_bytes(b""),
    "plain NIfTI": lambda path: path.write_bytes(content()),
    "a web page": lambda path: path.write_bytes(b"<html>Sign in</html>"),
    "cut in half": lambda path: path.write_bytes(gzip.compress(content())[:900]),
    "cut in the checksum": lambda path: path.write_bytes(gzip.compress(content())[:-3]),
    "bytes after the end": lambda path: path.write_bytes(gzip.compress(content()) + b"more"),
    "gzip header only": lambda path: path.write_bytes(gzip.compress(content())[:9]),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "x_flair.nii.gz"
    BAD_FILES[kind](path)
    refused(path)


def test_a_name_that_is_too_long_is_refused(tmp_path):
    refused(tmp_path / ("x" * 300 + ".nii.gz"))


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x_flair.nii"
    path.write_bytes(content())

    def denied(self, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert "Permission denied" in refused(path).what


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
@pytest.mark.parametrize("locked", ["x_flair.nii", "."])
def test_real_permissions(tmp_path, locked):
    place = tmp_path / "place"
    place.mkdir()
    (place / "x_flair.nii").write_bytes(content())
    (place / locked).chmod(0)
    try:
        refused(place / "x_flair.nii")
    finally:
        place.chmod(0o700)


def outcome(path, made, place, flips=1):
    """Read with flipped bits: 'caught', or how what was read compares; any other exception escapes."""
    damaged = bytearray(made)
    for bit in np.atleast_1d(place)[:flips]:
        damaged[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(damaged)
    try:
        volume = volumes.read(path)
    except CourseError:
        return "caught"
    same = volume.voxels.shape == SHAPE and np.array_equal(volume.voxels, VOXELS)
    return "same" if same and np.allclose(volume.affine, AFFINE) else "silent"


def test_no_flipped_bit_of_a_gzip_file_is_read_silently(tmp_path):
    made = gzip.compress(content(), compresslevel=1, mtime=0)
    bits = np.random.default_rng(2).choice(8 * len(made), 600, replace=False)
    places = [*range(8 * 24), *bits.tolist(), *range(8 * len(made) - 64, 8 * len(made))]
    outcomes = [outcome(tmp_path / "x.nii.gz", made, place) for place in places]
    assert "silent" not in outcomes
    assert outcomes.count("caught") > 600


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_flipped_bit_of_a_plain_header_is_a_traceback(tmp_path):
    made = content()
    outcomes = {outcome(tmp_path / "x.nii", made, place) for place in range(8 * 352)}
    assert {"caught", "same"} <= outcomes


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 8 * 352 - 1), min_size=2, max_size=40))
def test_no_garbled_header_is_a_traceback(tmp_path_factory, places):
    path = tmp_path_factory.getbasetemp() / "garbled.nii"
    assert outcome(path, content(), places, flips=40) in ("caught", "same", "silent")


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "X.NII.GZ"])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.float32])
def test_written_is_what_is_read(tmp_path, name, kind):
    voxels = (VOXELS % 200).astype(kind)
    volumes.write(tmp_path / name.lower(), voxels, AFFINE)
    os.replace(tmp_path / name.lower(), tmp_path / name)
    volume = volumes.read(tmp_path / name)
    assert volume.voxels.dtype == np.float32
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_allclose(volume.affine, AFFINE)
    np.testing.assert_allclose(volume.voxel_mm, (1.5, 2, 3))
    assert volume.millilitres == pytest.approx(0.009)


def big_endian():
    return nibabel.Nifti1Image(VOXELS, AFFINE, nibabel.Nifti1Header(endianness=">")).to_bytes()


GOOD_CONTENT = {
    "NIfTI-2": (lambda: content(form=nibabel.Nifti2Image), VOXELS),
    "one volume in 4-D": (lambda: content(VOXELS[..., None]), VOXELS),
    "big-endian": (big_endian, VOXELS),
    "float64": (lambda: content(VOXELS.astype(np.float64)), VOXELS),
    "scaled": (lambda: patched(scl_slope=0.5, scl_inter=-3), VOXELS / 2 - 3),
}


@pytest.mark.parametrize("kind", GOOD_CONTENT)
def test_other_forms_of_the_same_scan_are_read(tmp_path, kind):
    made, expected = GOOD_CONTENT[kind]
    (tmp_path / "x.nii").write_bytes(made())
    volume = volumes.read(tmp_path / "x.nii")
    np.testing.assert_allclose(volume.voxels, expected)
    np.testing.assert_allclose(volume.affine, AFFINE)


def test_a_mask_may_be_constant_where_that_is_allowed(tmp_path):
    volumes.write(tmp_path / "seg.nii", np.zeros(SHAPE, np.uint8), AFFINE)
    assert not volumes.read(tmp_path / "seg.nii", constant_allowed=True).voxels.any()
    refused(tmp_path / "seg.nii")


def test_the_same_voxels_are_the_same_bytes_and_nothing_else_is_left(tmp_path, monkeypatch):
    volumes.write(tmp_path / "a" / "x.nii.gz", VOXELS, AFFINE)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    volumes.write(tmp_path / "b" / "x.nii.gz", VOXELS, AFFINE)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 2
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    volumes.write_bytes(tmp_path / "x", b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        volumes.write_bytes(tmp_path / "x", b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_threads_may_write_the_same_file_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: volumes.write(tmp_path / "x.nii.gz", VOXELS, AFFINE), range(200)))
    assert [p.name for p in tmp_path.iterdir()] == ["x.nii.gz"]
    np.testing.assert_array_equal(volumes.read(tmp_path / "x.nii.gz").voxels, VOXELS)


def test_checksum_is_of_the_voxels():
    assert volumes.checksum(VOXELS) == volumes.checksum(VOXELS.astype(np.float64)) == volumes.checksum(VOXELS.copy("F"))
    other = VOXELS.copy()
    other[0, 0, 0] += 1
    assert len({volumes.checksum(v) for v in (VOXELS, other, VOXELS.reshape(14, 12, 10), VOXELS[::-1])}) == 4


def moved(mm):
    affine = AFFINE.copy()
    affine[:3, 3] += mm
    return affine


def stretched(by):
    return AFFINE @ np.diag([by, 1, 1, 1])


@pytest.mark.parametrize(
    ("affine", "same"),
    [
        (AFFINE, True),
        (AFFINE.astype(np.float32).round(3), True),
        (moved(0.08), True),
        (moved((1.5, 0, 0)), False),
        (moved((0, 0, -3)), False),
        (stretched(1.001), True),
        (stretched(1.1), False),
        (AFFINE @ np.diag([-1, 1, 1, 1]), False),
    ],
)
def test_grids_agree_within_rounding_but_not_by_a_voxel(affine, same):
    assert volumes.same_grid(SHAPE, AFFINE, SHAPE, affine) is same


def test_grids_of_other_shape_do_not_agree():
    assert not volumes.same_grid(SHAPE, AFFINE, (12, 14, 11), AFFINE)


def test_a_header_without_orientation_is_known_as_such(tmp_path):
    voxels = np.arange(125, dtype=np.float32).reshape(5, 5, 5)
    image = nibabel.Nifti1Image(voxels, None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    image.to_filename(tmp_path / "a.nii")
    volumes.write(tmp_path / "b.nii", voxels, np.eye(4))
    assert not volumes.read(tmp_path / "a.nii").oriented
    assert volumes.read(tmp_path / "b.nii").oriented
