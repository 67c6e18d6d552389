"""Names of files and folders that lead to a person, recognised by what the headers of their DICOM files say."""

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from pydicom.dataset import Dataset as Header

UID = re.compile(r"\d+(\.\d+){4,}|2\.25\.\d{9,}")
HIDDEN = "…"
LEAST = 3  # letters of a name that are looked for within a word; fewer must be a word of their own
_NAMES = ("PatientName", "OtherPatientNames", "PatientBirthName")
_NUMBERS = (
    *("PatientID", "OtherPatientIDs", "AccessionNumber", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"),
    *("PatientBirthDate", "StudyDate", "SeriesDate", "AcquisitionDate"),
)
TAGS = (*_NAMES, *_NUMBERS)


def identifiers(header: Header) -> frozenset[str]:
    """What leads to the person of a header, in small letters and digits alone: the words of each name, each number."""
    names = [_words(text) for keyword in _NAMES for text in _texts(header, keyword)]
    numbers = ["".join(_words(text)) for keyword in _NUMBERS for text in _texts(header, keyword)]
    words = [word for name in names for word in name if len(word) > 1]
    whole = ["".join(name) for name in names] + ["".join(name[::-1]) for name in names]
    return frozenset(filter(None, [*words, *whole, *numbers]))


def leads(name: str, known: Iterable[str]) -> bool:
    """Whether a file's or folder's name is or holds a unique identifier of DICOM, or one of the known identifiers."""
    words, whole = _words(name), "".join(_words(name))
    return bool(UID.search(name)) or any(k in words or k == whole or (len(k) >= LEAST and k in whole) for k in known)


def shown(path: Path, known: Iterable[str]) -> str:
    """A path for people, its parts that lead to a person replaced."""
    parts = (UID.sub(HIDDEN, part) for part in path.parts)
    return str(Path(*(HIDDEN if leads(part, known) else part for part in parts)))


def without(text: str, names: Iterable[str]) -> str:
    """A text without names of files and folders that may stand in it as words or in paths."""
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", HIDDEN, text)
    return text


def _texts(header: Header, keyword: str) -> list[str]:
    value = header.get(keyword)
    several = isinstance(value, Iterable) and not isinstance(value, str) and keyword != "PatientName"
    return [str(one) for one in value] if several else [] if value is None else [str(value)]


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", text.casefold())
    return re.findall(r"[^\W_]+", "".join(c for c in plain if not unicodedata.combining(c)))
