"""Whose scans lie in a folder: subjects, and how files are gathered into them."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lib import privacy
from lib.errors import CourseError
from lib.refusals import check_name, refusal

MODALITIES = ("T1", "T1ce", "T2", "FLAIR", "PD", "CT")
UNNAMED = "unknown"  # the modality of scans whose names and headers do not say it
LESION, BRAIN = "lesion", "brain"  # what a file may be beside a scan of a modality
MASK_FOLDERS = re.compile(r"masks?|labels?(tr)?|seg(mentation)?s?|lesions?", re.IGNORECASE)
SCAN_FOLDERS = re.compile(rf"images?(tr)?|imgs?|scans?|nii|nifti|{MASK_FOLDERS.pattern}", re.IGNORECASE)


@dataclass(frozen=True)
class Subject:
    """One person's scans. `channels`: which volume of a 4D file, or colour of a stack of pictures, a modality is,
    where its file holds several; `brain`: a mask of the brain that came with the scans; `healthy` is None where it is
    not known; `origin`: the folder it came from, where there are two; `hidden`: names of folders and files that lead
    to the person, never to be written."""

    id: str
    scans: Mapping[str, Path]
    lesion_mask: Path | None = None
    healthy: bool | None = None
    site: str | None = None
    kind: str | None = None
    hidden: frozenset[str] = frozenset()
    channels: Mapping[str, int] = field(default_factory=dict)
    brain: Path | None = None
    origin: str = ""

    def having(self, modalities: Sequence[str]) -> tuple[str, ...]:
        """Those of some modalities that it has, in their order."""
        return tuple(m for m in modalities if m in self.scans)

    def hiding(self, text: str) -> str:
        """A text as it may be written."""
        return privacy.without(text, self.hidden)


@dataclass(frozen=True)
class Found:
    """What a layout makes of a folder: `notes` are for people, `understood` counts the files that it can place with
    a subject who has a scan; `clash`: two of them that claim to be the same."""

    subjects: tuple[Subject, ...] = ()
    notes: tuple[str, ...] = ()
    understood: int = 0
    clash: CourseError | None = None


def files_below(folder: Path, odd: re.Pattern) -> list[Path]:
    """All files below a folder but hidden ones, behind links to folders too; no folder twice, so that links in a ring
    end. Folders with an `odd` name, that of a scan, are among them: the examination refuses them by name."""
    seen, files = set(), []
    for place, below, names in os.walk(folder, onerror=_locked, followlinks=True):
        real = os.path.realpath(place)
        below[:] = [] if real in seen else sorted(below)
        odd_folders = [name for name in below if odd.fullmatch(name)]
        files += [] if real in seen else [Path(place, n) for n in names + odd_folders if not n.startswith(".")]
        seen.add(real)
    return sorted(files)


def _locked(error: OSError) -> None:
    """A folder that cannot be listed is refused: the scans in it would be lost in silence."""
    raise refusal("F01", path=privacy.shown(Path(error.filename), ()), reason=error.strerror) from error


def grouped(
    folder: Path,
    files: Iterable[Path],
    meaning: Callable[[Path], tuple[Path, str] | None],
    shown: Callable[[Path], str] = str,
) -> Found:
    """Subjects from what each scan means: a path that ends in the subject's name, and a modality, LESION or BRAIN;
    `shown`: a path for people."""
    by_subject: dict[Path, dict[str, Path]] = {}
    odd, clash = [], None
    for path in files:
        check_name(path)
        known = meaning(path)
        if not known:
            odd.append("/".join(Path(shown(path)).parts[len(folder.parts) :]))
            continue
        there = by_subject.setdefault(known[0], {})
        if known[1] in there and not clash:
            both = f"{shown(there[known[1]])} and {Path(shown(path)).name}"
            clash = CourseError(f"{both} both claim to be {known[1]}.", "Keep one of them.")
        there[known[1]] = path
    understood = sum(len(there) for there in by_subject.values() if there.keys() - {LESION, BRAIN})
    subjects = tuple(
        Subject(
            place.name,
            {m: p for m, p in there.items() if m not in (LESION, BRAIN)},
            there.get(LESION),
            brain=there.get(BRAIN),
        )
        for place, there in by_subject.items()
    )
    return Found(subjects, (f"Not understood and left alone: {some(odd)}.",) if odd else (), understood, clash)


def kinds_of(files: Iterable[Path]) -> str:
    """The three most frequent kinds of names, digits as #."""
    kinds = Counter(re.sub(r"\d+", "#", privacy.UID.sub(privacy.HIDDEN, path.name)) for path in files)
    return ", ".join(f"{name} ({count})" for name, count in kinds.most_common(3))


def some(names: Sequence[str], shown: int = 5) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
