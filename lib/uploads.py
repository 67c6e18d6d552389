"""Scans that people send from a browser: bounded in size, recognised by their content, unpacked safely, not kept.

No name that comes with a file is ever a name on the disk, so that none can lead out of the folder of the visit.
"""

import contextlib
import gzip
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from lib import archives
from lib.errors import CourseError

LIMIT = 200 * 2**20  # bytes of one file as it is sent
UNPACKED = 2**30  # bytes of all that it holds; float32 voxels may need four times as much memory
FILES = 5000  # in an archive
PIXELS = 2**26  # of a picture
PIECE = 2**20
FOLDER = "anomaly-visit-"
ACCEPTED = ".nii,.nii.gz,.gz,.zip,.dcm,.png,.jpg,.jpeg"
KINDS = "Send a NIfTI file (.nii, .nii.gz), the DICOM files of one series in a zip archive, or a PNG or JPEG picture."
ZIP_AGAIN = "Put the DICOM files of one series into a new, plain zip archive."
AGAIN = "Send it again; if that does not help, copy it anew from where it comes from."
ENTRY = b"PK\x01\x02"  # begins what a zip archive's directory says of a file
ENCRYPTED = 0x1  # flag of a file in an archive
HEAD = 600  # bytes that tell every kind
ARCHIVES = (b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"BZh", b"\xfd7zXZ\0")
PICTURES = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff"}


@dataclass(frozen=True)
class Received:
    """A scan as detection reads it: a NIfTI file, a folder of DICOM files, or a picture."""

    kind: str  # NIfTI, DICOM, picture
    path: Path


class Upload:
    """A file on its way in, in pieces. Raises CourseError where it is larger than LIMIT, or than was said before."""

    def __init__(self, folder: Path, name: str, size: int):
        if not 0 < size <= LIMIT:
            raise CourseError(*_of_size(name, size))
        self.name, self.size, self.received = name, size, 0
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self.file = open(self.folder / "sent", "xb")  # noqa: SIM115 (closed by finish or drop)

    def add(self, piece: bytes) -> None:
        """Write a piece behind the others."""
        self.received += len(piece)
        if self.received > self.size:
            self.drop()
            raise CourseError(f"{self.name} is longer than the browser said: {self.size} bytes.", AGAIN)
        self.file.write(piece)

    def finish(self) -> Received:
        """What has come, examined; whatever is refused is removed."""
        self.file.close()
        try:
            if self.received != self.size:
                raise CourseError(f"Of {self.name}, {self.received} of {self.size} bytes have arrived.", AGAIN)
            return examine(self.folder / "sent", self.name)
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Remove what there is."""
        self.file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def private_folder() -> tempfile.TemporaryDirectory:
    """A folder that only this user can open, removed with the object or the process; those of processes that were
    killed go now."""
    for path in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        with contextlib.suppress(OSError, ValueError):
            if path.stat().st_uid == os.getuid() and not _alive(int(path.name.split("-")[2])):
                shutil.rmtree(path)
    return tempfile.TemporaryDirectory(prefix=f"{FOLDER}{os.getpid()}-", ignore_cleanup_errors=True)


def examine(sent: Path, name: str) -> Received:
    """Turn a file, `name` to people, into a scan beside it, in the file's own folder.

    Raises CourseError for anything but a NIfTI file, a DICOM file, a zip archive of DICOM files, PNG and JPEG; for
    what is damaged, unsafe or too large once it is unpacked.
    """
    with open(sent, "rb") as file:
        head = file.read(HEAD)
    if _is_nifti(head):
        return Received("NIfTI", sent.rename(sent.with_name("scan.nii")))
    if head.startswith(b"\x1f\x8b"):
        _check_gzip(sent, name)
        return Received("NIfTI", sent.rename(sent.with_name("scan.nii.gz")))
    if _is_dicom(head):
        (sent.parent / "series").mkdir()
        sent.rename(sent.parent / "series" / "00001.dcm")
        return Received("DICOM", sent.parent / "series")
    if head.startswith(ARCHIVES[:2]):
        _unpack(sent, name)
        sent.unlink()
        return Received("DICOM", sent.parent / "series")
    for kind, start in PICTURES.items():
        if head.startswith(start):
            _check_picture(sent, name, kind)
            return Received("picture", sent.rename(sent.with_name(f"scan.{kind.lower()}")))
    raise CourseError(f"{name} is of no kind that is known here.", KINDS)


def _of_size(name: str, size: int) -> tuple[str, str]:
    if size <= 0:
        return f"{name} is empty.", AGAIN
    cure = "Send one scan only, compressed as .nii.gz, or give its path on the disk instead."
    return f"{name} has {size / 2**20:.0f} MB, more than the {LIMIT // 2**20} MB that are taken.", cure


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_nifti(head: bytes) -> bool:
    lengths = [int.from_bytes(head[:4], order) for order in ("little", "big")]
    return (348 in lengths and head[344:348] == b"n+1\0") or (540 in lengths and head[4:8] == b"n+2\0")


def _is_dicom(head: bytes) -> bool:
    return head[128:132] == b"DICM"


def _check_gzip(sent: Path, name: str) -> None:
    """A NIfTI file, whole, and not too large once it is unpacked; what is unpacked is counted, never believed."""
    total, head = 0, b""
    try:
        with gzip.open(sent) as file:
            while piece := file.read(PIECE):
                head, total = head or piece, total + len(piece)
                if not _is_nifti(head):
                    raise CourseError(f"{name} is a gzip archive without a NIfTI image.", KINDS)
                _check_total(total, name)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise CourseError(
            f"{name} is damaged: its gzip stream breaks off or does not match its checksum.", AGAIN
        ) from None
    if not total:
        raise CourseError(f"{name} is empty.", AGAIN)


def _check_total(total: int, name: str) -> None:
    if total > UNPACKED:
        raise CourseError(
            f"{name} holds more than {UNPACKED / 2**30:.2g} GB once it is unpacked.", "Send one scan only."
        )


def _unpack(sent: Path, name: str) -> None:
    """The DICOM files of a zip archive into the folder `series` beside it, named by their number."""
    if sent.read_bytes().count(ENTRY) > FILES:  # before a directory of millions is read
        raise CourseError(f"{name} holds more than {FILES} files.", ZIP_AGAIN)
    folder, total, number = sent.parent / "series", 0, 0
    folder.mkdir()
    try:
        with zipfile.ZipFile(sent) as archive:
            entries = sorted((e for e in archive.infolist() if not e.is_dir()), key=lambda e: e.filename)
            for entry in entries:
                _check_entry(entry, name)
            for entry in entries:
                for i, piece in enumerate(_pieces(archive, entry, name)):
                    number, total = number + (i == 0), total + len(piece)
                    _check_total(total, name)
                    with open(folder / f"{number:05d}.dcm", "ab") as target:
                        target.write(piece)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, OSError) as error:
        raise CourseError(f"{name} is damaged, or no zip archive that can be read.", ZIP_AGAIN) from error
    if not number:
        raise CourseError(f"{name} holds no DICOM image.", KINDS)


def _pieces(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> Iterator[bytes]:
    """A DICOM image of an archive bit by bit; nothing of another file."""
    with archive.open(entry) as file:
        head = file.read(HEAD)
        if head.startswith(ARCHIVES) or head[257:262] == b"ustar":
            raise CourseError(f"{name} holds another archive: {archives.shown(entry.orig_filename)}.", ZIP_AGAIN)
        if _is_dicom(head) and Path(entry.filename).name.upper() != "DICOMDIR":
            yield head
            yield from iter(partial(file.read, PIECE), b"")


def _check_entry(entry: zipfile.ZipInfo, name: str) -> None:
    """No way out of the folder, no link or device, no encryption, no rare compression."""
    plain = stat.S_IFMT(entry.external_attr >> 16) in (0, stat.S_IFREG)
    archives.check_member(name, entry.orig_filename, plain, ZIP_AGAIN)
    if entry.flag_bits & ENCRYPTED:
        raise CourseError(f"{name} is encrypted.", ZIP_AGAIN)
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CourseError(f"{name} is compressed in a way that is not read here.", ZIP_AGAIN)


def _check_picture(sent: Path, name: str, kind: str) -> None:
    try:
        with Image.open(sent, formats=(kind,)) as picture:
            if picture.width * picture.height > PIXELS:
                size = f"{picture.width} × {picture.height}"
                raise CourseError(f"{name} is a picture of {size} pixels.", "Send one slice of a scan.")
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise CourseError(f"{name} is a damaged {kind} picture.", AGAIN) from None
