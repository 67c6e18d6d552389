"""Archives from elsewhere: no member may lead out of the folder that it is unpacked into."""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from lib.errors import CourseError
from lib.progress import bar

UNSAFE = re.compile(r"^[/\\]|^[a-z]:|(^|[/\\])\.\.([/\\]|$)|[\0-\x1f]", re.IGNORECASE)
DEVICE = re.compile(r"(^|[/\\])(con|prn|aux|nul|com\d|lpt\d)(\.[^/\\]*)?([/\\]|$)", re.IGNORECASE)


def check_member(archive: str, member: str, plain: bool, cure: str) -> None:
    """Refuse a path out of the folder, a name that is a device somewhere, and what is no `plain` file or folder."""
    if UNSAFE.search(member) or DEVICE.search(member):
        raise CourseError(f"{archive} holds a path that is not safe: {shown(member)}.", cure)
    if not plain:
        raise CourseError(f"{archive} holds a link or a device: {shown(member)}.", cure)


def shown(member: str) -> str:
    """A name from an archive as it may be shown."""
    return ascii(member[:80])


def unpack_tar(archive: Path, folder: Path, cure: str) -> Path:
    """All files of a tar archive into a new folder; returns it, or the one folder at its top that holds everything.

    What macOS adds (`._name`) is left out. Raises CourseError, before anything is written, for a member that
    `check_member` refuses and for an archive that breaks off.
    """
    try:
        with tarfile.open(archive) as tar:
            members = list(_checked(tar, archive.name, cure))
            for member in bar(members, "unpacking", unit="file"):
                tar.extract(member, folder, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise CourseError(f"{archive} is damaged, or no tar archive.", cure) from error
    top = list(folder.iterdir())
    return top[0] if len(top) == 1 and top[0].is_dir() else folder


def _checked(tar: tarfile.TarFile, name: str, cure: str) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        check_member(name, member.name, member.isreg() or member.isdir(), cure)
        if not Path(member.name).name.startswith("._"):
            yield member
