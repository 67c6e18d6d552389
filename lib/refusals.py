"""Every refusal of scans and folders, by its code: what is wrong, and the cure. `docs/refusals.md` is this table."""

import os
import re
from pathlib import Path

from lib.errors import CourseError

AGAIN = "Copy or download it again."
REPAIR = "Repair the header, or convert the scan again."
TITLE = """# What is refused, and what to do

Scans are examined before any work starts; whatever is wrong with one is a sentence that names it and a sentence of the
cure. With `--skip-broken` the subject is left out, and the report says so. S: files of scans; D: DICOM series; F:
folders; E: what the examination finds in scans that can be read. This page is written by `python -m lib.refusals`.
"""
REFUSALS: dict[str, tuple[str, str]] = {
    "S01": ("{path} is not a file.", "Give the path of a NIfTI file (.nii or .nii.gz)."),
    "S02": ("{path} cannot be read: {reason}.", "Check the file's permissions and the disk."),
    "S03": ("{path} is empty.", AGAIN),
    "S04": ("{path} changed while it was read.", "Wait until nothing writes to it any more, then start again."),
    "S05": (
        "{path} is not a gzip file.",
        "Name it .nii if it is not compressed, or copy it again.",
    ),
    "S06": ("{path} is a gzip file, and its name does not say so.", "Let its name end in .nii.gz."),
    "S07": ("{path} is truncated: its gzip stream does not decompress.", AGAIN),
    "S08": ("{path} is damaged: its gzip stream does not decompress.", AGAIN),
    "S09": ("{path} is damaged: its checksum does not match.", AGAIN),
    "S10": ("{path} is damaged: something else stands behind its gzip stream.", AGAIN),
    "S11": ("{path} is not a NIfTI image.", "Convert the scan to NIfTI, or copy it again."),
    "S12": (
        "{path} is one half of a pair of files (.hdr and .img).",
        "Convert both to one file, .nii or .nii.gz.",
    ),
    "S13": ("{path} has a damaged header: {field} is {value}.", f"{AGAIN} If that does not help, convert it again."),
    "S14": ("{path} is no volume: its shape is {shape}.", "Give three-dimensional scans."),
    "S15": ("{path} holds {count} volumes, not one.", "Split it into a file a modality."),
    "S16": ("{path} holds colours or complex numbers, not intensities.", "Export the scan as grey values."),
    "S17": ("{path} scales its voxels by {slope}.", "Repair the header's scl_slope and scl_inter."),
    "S18": ("{path} is truncated: its header promises more voxels than the file holds.", AGAIN),
    "S19": ("{path} holds more than its header promises.", AGAIN),
    "S20": ("{path} needs {gigabytes:.1f} GB, more than there is memory.", "Use a machine with more memory."),
    "S21": ("{path} has an affine that is not finite, or two of whose axes are one.", REPAIR),
    "S22": ("{path} has voxels of {edges} mm.", "Repair the header: edges of 0.1 to 10 mm are plausible."),
    "S23": ("{path} gives its lengths in {unit}.", "Convert the scan with lengths in millimetres."),
    "S24": (
        "{path} has two affines, sform and qform, that differ in which side is left.",
        "Find out which of them is right, and write it into both.",
    ),
    "S25": (
        "{path} has {percent:.2g} % NaN or infinite voxels.",
        "Export the scan again, or mend the step that wrote it.",
    ),
    "S26": ("{path} is constant: every voxel is {value:g}.", "Leave it out, or export the scan again."),
    "S27": ("{path} has labels above {most}, which are not kept apart.", "Number its labels from 1."),
    "S28": ("{path} has no volume {number}: its shape is {shape}.", "Give the file that has it."),
    "D01": ("{path} holds no DICOM image.", "Give the folder of one series."),
    "D02": ("{path} holds {count} series: {each}.", "Put each into a folder of its own."),
    "D03": ("{path} is damaged, or no DICOM file.", AGAIN),
    "D04": ("{path} holds no image.", "Take it out of the folder."),
    "D05": ("{path} is in colour.", "Give the original grey images, not a picture of them."),
    "D06": ("{path} does not say what its slices are: a value is damaged.", AGAIN),
    "D07": ("{path} differs in {what} from {other} of the same series.", "Put each kind into a folder of its own."),
    "D08": ("{path} and {other} lie in one place.", "Keep one of them, or part the series."),
    "D09": ("Behind {path}, {missing} missing: a gap of {gap:.1f} mm where others are {usual:.1f} mm.", AGAIN),
    "D10": ("The pixels of {path} cannot be decoded.", f"{AGAIN} Or convert it to NIfTI."),
    "D11": (
        "{path} has voxels of {edges} mm.",
        "Give the original images: edges of 0.1 to 10 mm are plausible.",
    ),
    "D12": ("{path} says of two axes of its slices that they are one.", AGAIN),
    "F01": ("{path} cannot be opened: {reason}.", "Check the folder's permissions and the disk."),
    "F02": ("The name of {path} is not written in UTF-8.", "Rename it, in plain letters."),
    "E01": (
        "{path} has negative intensities, as after a z-score.",
        "Give the scan from before, or shift its brain above 0.",
    ),
    "E02": ("{path} has fewer than {least} grey levels.", "Give a scan, not a mask or a label map."),
    "E03": (
        "{path} has a median of {middle:.0f}, and a brain in Hounsfield units has some 35.",
        "Give a brain-extracted CT in Hounsfield units.",
    ),
    "E04": (
        "{path} shows a skull: {percent:.0f} % of it is above {bone} Hounsfield units.",
        "Give brain-extracted scans with one value outside the brain.",
    ),
    "E05": (
        "{path} lies on another grid than {other}.",
        "Resample it to that grid, or give the file that belongs to it.",
    ),
    "E06": (
        "{subject}: {litres:.2f} litres are {above}, and a brain has {least} to {most}.",
        "Give brain-extracted scans with {outside} outside the brain.",
    ),
    "E07": ("{path} has a background that is not 0.", "Give a brain-extracted slice on black."),
    "E08": ("{path} holds no labels but {count} values.", "Give a mask of whole numbers, above 0 in the lesion."),
    "E09": (
        "{path} has labels below 0, down to {least:g}.",
        "Give a mask of whole numbers, above 0 in the lesion and 0 elsewhere.",
    ),
    "E10": ("{path} covers the whole brain.", "Give the lesion's mask, not the brain's."),
    "E11": ("{path} lies mostly outside the brain.", "Check that it belongs to this scan."),
    "E12": ("{path} has a lesion in a subject declared healthy.", "Correct participants.tsv or the mask."),
    "E13": ("{scan} has the same voxels as {other}.", "Keep one of the two."),
    "E14": (
        "{subject}: its brain of {longest:.0f} mm does not fit slices of {side:.0f} mm.",
        "Raise size or pixel_mm.",
    ),
    "E15": (
        "{subject} has changed since it was examined, or can no longer be read.",
        "Wait until nothing writes to its files any more, then start again.",
    ),
    "E16": (
        "{subject}: {litres:.2f} litres were extracted from its {modality} by {method}; a brain has {least} to {most}.",
        "Give brain-extracted scans.",
    ),
}


def words(code: str, **fields) -> tuple[str, str]:
    """What is wrong and the cure, as people read it."""
    what, cure = REFUSALS[code]
    return what.format(**fields), cure.format(**fields)


def refusal(code: str, **fields) -> CourseError:
    """The error to raise, by its code in REFUSALS."""
    return CourseError(*words(code, **fields), code)


def check_name(path: Path) -> None:
    """Refuse a path that cannot be written into a report or a table."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise refusal("F02", path=os.fsencode(path).decode(errors="backslashreplace")) from error


def page() -> str:
    """The table for people, in Markdown."""
    rows = [f"| {code} | {_plain(what)} | {_plain(cure)} |" for code, (what, cure) in REFUSALS.items()]
    return "\n".join([TITLE, "| | What is wrong | Cure |", "|---|---|---|", *rows, ""])


def _plain(text: str) -> str:
    """Fields by their names alone, without how numbers are written."""
    return re.sub(r"\{(\w+)[^}]*\}", r"*\1*", text)


if __name__ == "__main__":
    print(page(), end="")
