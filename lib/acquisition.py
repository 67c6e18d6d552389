"""What a scanner says it did, by white list: a header's free text may name a person, so nothing else is kept."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from lib.errors import CourseError

KINDS = ("MR", "CT", "PT")
VENDORS = {
    "GE": "ge",
    "Siemens": "siemens",
    "Philips": "philips",
    "Canon": "canon|toshiba",
    "Hitachi": "hitachi",
    "Fujifilm": "fujifilm",
    "United Imaging": "united imaging|uih",
    "Bruker": "bruker",
}
PLAUSIBLE = {
    "tesla": (0.01, 25),
    "repetition_ms": (0.5, 100_000),
    "echo_ms": (0.01, 2_000),
    "inversion_ms": (1, 20_000),
    "thickness_mm": (0.05, 50),
}
_BIDS = {  # BIDS 1.8, "Magnetic Resonance Imaging": the name here, and what makes its unit ours
    "Modality": ("modality", 1),
    "Manufacturer": ("vendor", 1),
    "MagneticFieldStrength": ("tesla", 1),
    "RepetitionTime": ("repetition_ms", 1000),
    "EchoTime": ("echo_ms", 1000),
    "InversionTime": ("inversion_ms", 1000),
    "SliceThickness": ("thickness_mm", 1),
}


def known(said: Mapping[str, object]) -> dict[str, str | float]:
    """Of facts by name those that can be nothing else: modality in KINDS, vendor in VENDORS, numbers in PLAUSIBLE."""
    words = {"modality": _kind(said.get("modality")), "vendor": _vendor(said.get("vendor"))}
    numbers = {name: _number(said.get(name), *limits) for name, limits in PLAUSIBLE.items()}
    return {name: value for name, value in (words | numbers).items() if value is not None}


def sidecar(path: Path) -> Path:
    """Where the sidecar of a NIfTI file lies: `X.nii.gz` has `X.json`."""
    return path.with_name(re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE) + ".json")


def of_sidecar(path: Path) -> dict[str, str | float]:
    """Facts of a BIDS sidecar, where times are in seconds; CourseError for a file that is none."""
    try:
        said = json.loads(path.read_text(encoding="utf-8-sig"))
        given = {ours: said[theirs] for theirs, (ours, _) in _BIDS.items() if said.get(theirs) is not None}
    except (OSError, ValueError, AttributeError, RecursionError):
        raise CourseError(
            f"{path} is no BIDS sidecar: no object in JSON.", "Write it again, or take it out of the folder."
        ) from None
    factors = dict(_BIDS.values())
    return known({name: _times(value, factors[name]) for name, value in given.items()})


def to_sidecar(facts: Mapping[str, str | float]) -> dict[str, str | float]:
    """The content of a BIDS sidecar that says these facts."""
    entries = {theirs: (facts[ours], factor) for theirs, (ours, factor) in _BIDS.items() if ours in facts}
    return {name: value if factor == 1 else value / factor for name, (value, factor) in entries.items()}


def _times(value, factor: int):
    return value * factor if type(value) in (int, float) else value


def _kind(value) -> str | None:
    return str(value) if str(value) in KINDS else None


def _vendor(value) -> str | None:
    text = str(value).lower()
    matches = (name for name, words in VENDORS.items() if re.search(rf"(?<![a-z])({words})(?![a-z])", text))
    return next(matches, None)


def _number(value, least: float, most: float) -> float | None:
    try:
        number = round(float(value), 6)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if least <= number <= most and not isinstance(value, bool) else None
