"""What people send: taken by its content, bounded, unpacked inside its own folder, refused in sentences."""

import gzip
import io
import os
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from PIL import Image
from test_dicom import MEANT, series, write

from lib import dicom, uploads, volumes
from lib.errors import CourseError

REAL = Path(__file__).parents[2] / "shared" / "data" / "dicom_sag_t1"
NIFTI = nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.diag([2.0, 2, 2, 1])).to_bytes()


def send(folder, content, name="scan of mine", size=None, piece=100):
    upload = uploads.Upload(folder, name, len(content) if size is None else size)
    for start in range(0, len(content), piece):
        upload.add(content[start : start + piece])
    return upload.finish()


def zipped(files, compression=zipfile.ZIP_DEFLATED):
    """An archive of contents by name; a ZipInfo may stand for a name."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return target.getvalue()


def entry(name, **values):
    info = zipfile.ZipInfo("x")
    info.filename = name
    for key, value in values.items():
        setattr(info, key, value)
    return info


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The files of a DICOM series as bytes."""
    folder = write(tmp_path_factory.mktemp("series"), series())
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def picture(kind, size=(30, 20)):
    target = io.BytesIO()
    Image.fromarray(np.arange(size[0] * size[1], dtype=np.uint8).reshape(size[::-1])).save(target, kind)
    return target.getvalue()


def test_a_nifti_file_arrives_in_pieces_and_reads_as_it_was(tmp_path):
    for content, name in ((NIFTI, "scan.nii"), (gzip.compress(NIFTI), "scan.nii.gz")):
        received = send(tmp_path, content)
        assert (received.kind, received.path.name) == ("NIfTI", name)
        assert received.path.read_bytes() == content
        assert volumes.read(received.path).voxels.ravel().tolist() == list(range(60))


def test_a_series_in_an_archive_is_the_volume_that_the_folder_is(tmp_path, images):
    files = [(f"a/b/{i}", content) for i, content in enumerate(images)]
    extra = [("a/README.txt", b"words"), ("DICOMDIR", b"\0" * 128 + b"DICM"), ("a/empty/", b"")]
    received = send(tmp_path, zipped(files + extra), piece=10_000)
    assert received.kind == "DICOM"
    assert len(list(received.path.iterdir())) == len(images)
    assert np.array_equal(dicom.read(received.path).voxels, MEANT)
    assert not (received.path.parent / "sent").exists()


@pytest.mark.skipif(not REAL.exists(), reason="needs the DICOM series in ../shared/data")
def test_a_scanner_s_series_is_the_same_volume_from_an_archive_of_it(tmp_path):
    files = [(path.name, path.read_bytes()) for path in sorted(REAL.iterdir()) if path.is_file()]
    received = send(tmp_path, zipped(files, zipfile.ZIP_STORED), piece=2**22)
    sent, original = dicom.read(received.path), dicom.read(REAL)
    assert np.array_equal(sent.voxels, original.voxels)
    assert np.array_equal(sent.affine, original.affine)


def test_one_dicom_file_is_a_series(tmp_path, images):
    received = send(tmp_path, images[0])
    assert received.kind == "DICOM"
    assert len(dicom.find_series(received.path)[0].frames) == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_is_known_by_its_content(tmp_path, kind):
    received = send(tmp_path, picture(kind), name="scan.nii.gz")
    assert (received.kind, received.path.name) == ("picture", f"scan.{kind.lower()}")
    assert Image.open(received.path).size == (30, 20)


@pytest.mark.parametrize(
    "path",
    [
        "/etc/x",
        "../x",
        "a/../../x",
        "a/..",
        "..\\x",
        "\\x",
        "C:x",
        "c:\\x",
        "//host/x",
        "a\x07b",
        "CON",
        "a/nul.dcm",
        "LPT1/x",
    ],
)
def test_an_archive_with_a_path_that_is_not_safe_is_refused_whole(tmp_path, images, path):
    with pytest.raises(CourseError, match=r"mine holds a path that is not safe(.|\n)*new, plain zip"):
        send(tmp_path, zipped([("fine", images[0]), (entry(path), images[1])]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_are_refused(tmp_path, images, kind):
    with pytest.raises(CourseError, match="link or a device"):
        send(tmp_path, zipped([("fine", images[0]), (entry("x", external_attr=(kind | 0o777) << 16), b"/etc/passwd")]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Duplicate name")
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=some.lists(some.text(min_size=1, max_size=30), min_size=1, max_size=4))
def test_whatever_the_names_nothing_is_written_outside_the_visit(images, names):
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "visit"
        folder.mkdir()
        try:
            received = send(folder, zipped([(entry(name), images[0]) for name in names]), piece=10**6)
            assert {path.name for path in received.path.iterdir()} <= {f"{i:05d}.dcm" for i in range(1, 5)}
        except CourseError:
            assert list(folder.iterdir()) == []
        assert os.listdir(root) == ["visit"]


def test_a_bomb_is_stopped_while_it_unpacks_whatever_it_says_of_itself(tmp_path, images, monkeypatch):
    monkeypatch.setattr(uploads, "UNPACKED", 2**20)
    large = images[0] + bytes(2**22)
    bomb = bytearray(zipped([("x", large)]))
    place = bomb.index(uploads.ENTRY)
    honest = bytes(bomb)
    bomb[place + 24 : place + 28] = (1000).to_bytes(4, "little")
    with pytest.raises(CourseError, match="once it is unpacked"):
        send(tmp_path, honest)
    with pytest.raises(CourseError, match=r"once it is unpacked|damaged"):
        send(tmp_path, bytes(bomb))
    with pytest.raises(CourseError, match="once it is unpacked"):
        send(tmp_path, gzip.compress(NIFTI + bytes(2**22)))
    assert list(tmp_path.iterdir()) == []


def test_many_small_files_are_too_many(tmp_path, images, monkeypatch):
    monkeypatch.setattr(uploads, "FILES", 5)
    with pytest.raises(CourseError, match="more than 5 files"):
        send(tmp_path, zipped([(str(i), b"x") for i in range(6)]))
    assert send(tmp_path, zipped([(str(i), images[0]) for i in range(5)])).kind == "DICOM"


INNER = {
    "gzip": gzip.compress(NIFTI),
    "zip": zipped([("x", b"")]),
    "7z": b"7z\xbc\xaf\x27\x1c",
    "tar": b"x" * 257 + b"ustar",
}


@pytest.mark.parametrize("kind", INNER)
def test_an_archive_in_an_archive_is_refused(tmp_path, images, kind):
    with pytest.raises(CourseError, match="another archive"):
        send(tmp_path, zipped([("fine", images[0]), ("inner", INNER[kind])]))


def test_an_encrypted_archive_is_refused(tmp_path, images):
    content = bytearray(zipped([("x", images[0])]))
    for start, flags in ((0, 6), (content.index(uploads.ENTRY), 8)):
        content[start + flags] |= 1
    with pytest.raises(CourseError, match="encrypted"):
        send(tmp_path, bytes(content))


def test_a_rare_compression_is_refused(tmp_path, images):
    with pytest.raises(CourseError, match="compressed in a way"):
        send(tmp_path, zipped([("x", images[0])], zipfile.ZIP_LZMA))


PAIR = NIFTI[:344] + b"ni1\0" + NIFTI[348:]


DAMAGED = {
    "words": (b"hello", "no kind that is known"),
    "a header without voxels": (PAIR, "no kind that is known"),
    "tar": (b"x" * 257 + b"ustar", "no kind"),
    "cut gzip": (gzip.compress(NIFTI)[:-9], "breaks off"),
    "altered gzip": (gzip.compress(NIFTI)[:-8] + bytes(8), "checksum"),
    "gzip of words": (gzip.compress(b"words"), "without a NIfTI"),
    "gzip of nothing": (gzip.compress(b""), "is empty"),
    "zip of words": (zipped([("x", b"words")]), "no DICOM image"),
    "zip of nothing": (zipped([]), "no DICOM image"),
    "cut zip": (zipped([("x", b"words")])[:40], "no zip archive"),
    "zeros as zip": (b"PK\x03\x04" + bytes(500), "no zip archive"),
    "cut png": (picture("PNG")[:60], "damaged PNG"),
    "cut jpeg": (b"\xff\xd8\xff" + bytes(90), "damaged JPEG"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_other_files_and_damaged_ones_get_a_sentence_and_leave_nothing(tmp_path, kind):
    content, what = DAMAGED[kind]
    with pytest.raises(CourseError, match=what) as error:
        send(tmp_path, content)
    assert error.value.what.startswith("scan of mine")
    assert error.value.cure.endswith(".")
    assert str(tmp_path) not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=some.data())
def test_an_altered_archive_unpacks_or_is_refused(images, data):
    content = bytearray(zipped([("a", images[0]), ("b", images[1])]))
    for _ in range(data.draw(some.integers(1, 4))):
        content[data.draw(some.integers(0, len(content) - 1))] = data.draw(some.integers(0, 255))
    with tempfile.TemporaryDirectory() as root:
        try:
            assert send(Path(root), bytes(content), piece=10**6).path.exists()
        except CourseError:
            assert os.listdir(root) == []


def test_a_picture_of_very_many_pixels_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "PIXELS", 599)
    with pytest.raises(CourseError, match="30 × 20 pixels"):
        send(tmp_path, picture("PNG"))


def test_sizes_are_held_against_what_comes(tmp_path, monkeypatch):
    with pytest.raises(CourseError, match=rf"{len(NIFTI)} of 1000 bytes"):
        send(tmp_path, NIFTI, size=1000)
    with pytest.raises(CourseError, match="longer than the browser said"):
        send(tmp_path, NIFTI, size=400)
    with pytest.raises(CourseError, match="is empty"):
        uploads.Upload(tmp_path, "x", 0)
    monkeypatch.setattr(uploads, "LIMIT", 2**20)
    with pytest.raises(CourseError, match="x has 2 MB, more than the 1 MB"):
        uploads.Upload(tmp_path, "x", 2**21)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are those of POSIX")
def test_the_folder_is_private_and_goes_with_the_visit(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = uploads.private_folder()
    assert stat.S_IMODE(Path(folder.name).stat().st_mode) == 0o700
    send(Path(folder.name), NIFTI)
    folder.cleanup()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_at_the_next_visit_and_what_a_living_one_has_stays(monkeypatch, tmp_path):
    code = "import os; from lib import uploads; print(uploads.private_folder().name, flush=True); os._exit(9)"
    code = code.replace("print(", "f = uploads.private_folder(); print(").replace(
        "uploads.private_folder().name", "f.name"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    left = Path(done.stdout.strip())
    assert left.is_dir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine, second = uploads.private_folder(), uploads.private_folder()
    assert not left.exists()
    assert Path(mine.name).is_dir()
    assert Path(second.name).is_dir()
