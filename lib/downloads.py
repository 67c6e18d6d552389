"""Files of the net: resumed where they stopped, not believed before their checksum is right, and never fetched unasked.

MONAI's downloader (`monai.apps.utils.download_url`) checks as well, but begins anew after every interruption; only
addresses and checksums are taken from MONAI (`lib.sources`).
"""

import fcntl
import hashlib
import http.client
import json
import re
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lib import volumes
from lib.errors import CourseError
from lib.progress import bar

PIECE = 2**20
LARGE = 2**26  # bytes from which checking has a bar
TIMEOUT = 60  # seconds without a byte
ATTEMPTS = 5  # connections one after the other that bring nothing, before it is given up
PAUSE = 2.0  # seconds before the next attempt, doubled each time
SLACK = 2**28  # bytes of a disk that are left free
AGENT = {"User-Agent": "brain-mri-course", "Accept-Encoding": "identity"}
ON = "The same command goes on from there."
LATER = "See whether this machine reaches the net, and give the same command again later."


@dataclass(frozen=True)
class Remote:
    """A file of the net. `checksum`: `md5:…`, or `git:…`, the SHA-1 by which git knows a file's content."""

    url: str
    name: str
    checksum: str
    size: int = 0  # bytes, 0 where not known


def fetch(remote: Remote, folder: Path, copies: int = 0) -> str:
    """Bring a file into a folder under its name; returns the SHA-256 of what came.

    A file that is there and right is not fetched again; a part that is there (`NAME.part`) is gone on with, as long as
    the server's file is the same by its ETag or time. `copies`: how often its size must be free on the disk besides.
    Raises CourseError for a file or server that does not answer, a full disk, and a wrong checksum (what came is kept
    aside as `NAME.refused`).
    """
    target = folder / remote.name
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target if target.exists() else target.with_name(f"{target.name}.part")
    if part != target:
        _download(remote, part, copies)
    found, sha256 = _digests(part, remote.checksum.partition(":")[0])
    if found != remote.checksum:
        aside = part.replace(target.with_name(f"{target.name}.refused"))
        what = (
            f"{remote.url} came with the wrong checksum: {found} instead of {remote.checksum}. It is kept as {aside}."
        )
        raise CourseError(what, "Give the same command again; if it stays wrong, the file at its source has changed.")
    part.replace(target)
    _beside(part).unlink(missing_ok=True)
    return sha256


def read_json(url: str) -> dict:
    """A small JSON answer of a server; CourseError where there is none."""
    try:
        with _ask(url) as answer:
            return json.load(answer)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise CourseError(f"{url} gives no answer that can be read: {_why(error)}.", LATER) from error


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin where a disk has less room than is needed, in bytes."""
    folder = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(folder).free
    if free < needed + SLACK:
        what = f"{folder} has {gigabytes(free)} free, and {gigabytes(needed + SLACK)} are needed."
        raise CourseError(what, "Make room, or give a folder on another disk by --to.")


def gigabytes(size: float) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _download(remote: Remote, part: Path, copies: int) -> None:
    """Connect until the part is whole; a connection that breaks off is no reason to stop while something comes."""
    with open(part, "ab", buffering=0) as file:
        _claim(file, part)
        failures, came = 0, False
        while True:
            before = part.stat().st_size
            try:
                if _receive(remote, file, part, copies):
                    return
                why = "the connection broke off"
            except (OSError, http.client.HTTPException) as error:
                why = _why(error)
            progress = part.stat().st_size > before
            failures, came = 0 if progress else failures + 1, came or progress
            if failures == (ATTEMPTS if came else 1):
                have = part.stat().st_size
                kept = f" {gigabytes(have)} are kept as {part}." if have else ""
                raise CourseError(f"{remote.url} did not come whole: {why}.{kept}", f"{LATER} {ON}" if have else LATER)
            time.sleep(PAUSE * 2**failures)


def _claim(file, part: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CourseError(f"{part} is being fetched by another process.", "Wait for it.") from None


def _receive(remote: Remote, file, part: Path, copies: int) -> bool:
    """One connection: what is missing is appended, or all of it fetched anew where the server's file is another or the
    server gives no parts; returns whether the file is whole."""
    known, have = _known(part, remote.url), part.stat().st_size
    if known and have == known["size"]:
        return True
    going_on = known and 0 < have < known["size"]
    asked = {"Range": f"bytes={have}-", "If-Range": known["validator"]} if going_on else {}
    with _ask(remote.url, asked) as answer:
        start, size = _extent(answer)
        if start not in (0, have):
            raise http.client.HTTPException("the server sends another part than was asked for")
        if not start:
            file.truncate(0)
        check_space(part.parent, max(size - start, 0) + copies * size)
        _note(part, remote.url, answer, size)
        told = {"total": size or None, "initial": start}
        with bar(what=Path(remote.name).name[:30], **told, unit="B", unit_scale=True) as shown:
            for piece in iter(partial(answer.read, PIECE), b""):
                _write(file, piece, part)
                shown.update(len(piece))
    return not size or part.stat().st_size == size


def _ask(url: str, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    """A server's answer; CourseError where it says that there is nothing for us."""
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=AGENT | (headers or {})), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code >= 500:
            raise
        what = f"{url} cannot be had: the server says {error.code} {error.reason}."
        raise CourseError(what, "Try again later, or see on the page of the data set whether it has moved.") from None


def _extent(answer: http.client.HTTPResponse) -> tuple[int, int]:
    """Where an answer begins in the file, and the size of the whole file in bytes, 0 where it is not told."""
    told = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    if answer.status == http.client.PARTIAL_CONTENT and told:
        return int(told[1]), int(told[2])
    return 0, int(answer.headers.get("Content-Length", 0))


def _note(part: Path, url: str, answer: http.client.HTTPResponse, size: int) -> None:
    """Keep what tells this file of the server from a later one: its ETag, unless that is a weak one, or its time."""
    tag = answer.headers.get("ETag", "")
    validator = tag if tag.startswith('"') else answer.headers.get("Last-Modified", "")
    note = {"url": url, "validator": validator, "size": size}
    volumes.write_bytes(_beside(part), json.dumps(note).encode())


def _known(part: Path, url: str) -> dict:
    """What `_note` kept of this address, {} where a part cannot be gone on with."""
    try:
        note = json.loads(_beside(part).read_bytes())
        return note if note["url"] == url and note["validator"] and note["size"] else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _beside(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _write(file, piece: bytes, part: Path) -> None:
    left = memoryview(piece)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        kept = gigabytes(part.stat().st_size)
        what = f"{part} cannot be written on after {kept}: {error.strerror}."
        raise CourseError(what, f"Make room on the disk. {ON}") from error


def _digests(path: Path, kind: str) -> tuple[str, str]:
    """A file's checksum as Remote gives it, and its SHA-256."""
    size = path.stat().st_size
    ours = hashlib.new("sha1" if kind == "git" else kind, usedforsecurity=False)
    ours.update(b"blob %d\0" % size if kind == "git" else b"")
    sha256 = hashlib.sha256()
    told = {"total": size, "disable": size < LARGE}
    with open(path, "rb") as file, bar(what="checking", **told, unit="B", unit_scale=True) as shown:
        for piece in iter(partial(file.read, PIECE), b""):
            ours.update(piece)
            sha256.update(piece)
            shown.update(len(piece))
    return f"{kind}:{ours.hexdigest()}", sha256.hexdigest()


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return str(getattr(reason, "strerror", "") or reason or type(error).__name__).rstrip(".")
