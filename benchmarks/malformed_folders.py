"""Broken folders of subjects and DICOM series, and odd ones that are good; `benchmarks.malformed` has single files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from benchmarks.malformed import EDGE_MM, LESION, content, flipped, packed, patched, scan
from lib import volumes

GOOD = ("p0", "p2", "p3", "p4")  # beside p1, to which everything happens
PLANES = np.arange(6 * 8 * 10, dtype=np.uint16).reshape(6, 8, 10)  # slice, row, column
GAP_MM = 4.0


def write_subjects(folder: Path, outside: int = 0) -> Path:
    """Five patients in the layout of BraTS; as CT as well, with this value outside the brain."""
    for seed, name in enumerate(sorted((*GOOD, "p1"))):
        voxels, lesion, affine = scan(seed)
        units = np.where(voxels > 0, 35 + (voxels - 500) / 50, outside).astype(np.float32)
        for ending, image in {"flair": voxels, "ct": units, "seg": lesion}.items():
            volumes.write(folder / name / f"{name}_{ending}.nii.gz", image, affine)
    return folder


def _rewritten(ending: str, change: Callable[[np.ndarray], np.ndarray] = np.asarray, edges=(1, 1, 1), mm=0.0):
    """p1's file with other voxels, other edges or moved."""

    def make(folder: Path) -> None:
        path = folder / "p1" / f"p1_{ending}.nii.gz"
        volume = volumes.read(path, constant_allowed=True)
        affine = nibabel.affines.from_matvec(np.diag(edges), [mm, 0, 0]) @ volume.affine
        volumes.write(path, change(volume.voxels).astype(np.float32), affine)

    return make


def _bytes(ending: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = folder / "p1" / f"p1_{ending}.nii.gz"
        path.write_bytes(change(path.read_bytes()))

    return make


def _participants(*rows: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "participants.tsv").write_text("\n".join(["participant_id\thealthy", *rows]))


def _stretched(folder: Path) -> None:
    for ending in ("flair", "seg"):
        _rewritten(ending, edges=(0.5, 1.5, 1))(folder)


def _whole_head(folder: Path) -> None:
    _rewritten("flair", lambda v: np.pad(v + 20, 9, mode="reflect"))(folder)
    _rewritten("seg", lambda v: np.pad(v, 9))(folder)


def _patient_without_mask(folder: Path) -> None:
    (folder / "p1" / "p1_seg.nii.gz").unlink()
    _participants("p1\t0")(folder)


def _called(name: str) -> Callable[[Path], None]:
    """p1's folder and files under another name."""

    def make(folder: Path) -> None:
        (folder / name).mkdir()
        for path in (folder / "p1").iterdir():
            path.rename(folder / name / path.name.replace("p1", name, 1))
        (folder / "p1").rmdir()

    return make


def _doubled(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """p1 a second time, under another name."""

    def make(folder: Path) -> None:
        for path in list((folder / "p1").glob("*.nii.gz")):
            volume = volumes.read(path, constant_allowed=True)
            voxels = volume.voxels if "seg" in path.name else change(volume.voxels)
            volumes.write(folder / name / path.name.replace("p1", name, 1), voxels, volume.affine)

    return make


def _ring(folder: Path) -> None:
    (folder / "p1" / "again").symlink_to(folder, target_is_directory=True)
    (folder / "itself").symlink_to("itself")


def _beside(folder: Path) -> None:
    for name in ("._p1_flair.nii.gz", "p1.hdr", "p1.img", "Thumbs.db", "p1_flair.nii.gz.part"):
        (folder / "p1" / name).write_bytes(b"rubbish")


def _z_score(voxels: np.ndarray) -> np.ndarray:
    return (voxels - voxels[voxels > 0].mean()) / voxels.std() * (voxels > 0)


def _skull(units: np.ndarray) -> np.ndarray:
    return np.where((np.arange(units.shape[2]) % 9 == 0) & (units > -500), 900, units)


@dataclass(frozen=True)
class Folder:
    """What happens to p1 of a good folder; `code`: how it is refused, "" where it is used; `said`: what else stands in
    the refusal or the notes; `whole`: the folder cannot be used even without p1; `settings` of intake.gather."""

    code: str
    make: Callable[[Path], object]
    said: str = ""
    whole: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)


CT, NEVER = {"modalities": "CT"}, {"extraction": "never"}
FOLDERS: dict[str, Folder] = {
    "a truncated scan": Folder("S07", _bytes("flair", lambda made: made[:-200])),
    "a truncated mask": Folder("S07", _bytes("seg", lambda made: made[: len(made) // 2])),
    "a mask with a flipped bit": Folder("S09", _bytes("seg", lambda made: flipped(made, 8 * len(made) - 40))),
    "an empty scan": Folder("S03", _bytes("flair", lambda made: b"")),
    "a mask that is no gzip file": Folder("S05", _bytes("seg", lambda made: b"<html>")),
    "two volumes in the mask": Folder("S15", _rewritten("seg", lambda v: np.stack([v, v], axis=-1))),
    "z-scored": Folder("E01", _rewritten("flair", _z_score)),
    "a label map for a scan": Folder("E02", _rewritten("flair", lambda v: v // 200)),
    "CT that is no CT": Folder("E03", _rewritten("ct", lambda v: v + 1024), settings=CT),
    "CT with a skull": Folder("E04", _rewritten("ct", _skull), settings=CT | NEVER),
    "a mask of another shape": Folder("E05", _rewritten("seg", lambda v: v[:-1])),
    "a mask elsewhere": Folder("E05", _rewritten("seg", mm=EDGE_MM)),
    "a mask of other voxels": Folder("E05", _rewritten("seg", edges=(1, 1, 0.9))),
    "hardly a brain": Folder("E06", _rewritten("flair", lambda v: v * (np.arange(v.shape[0]) < 6)[:, None, None])),
    "no background": Folder("E06", _whole_head, settings=NEVER),
    "a patient without a mask": Folder("", _patient_without_mask),
    "a mask of fractions": Folder("E08", _rewritten("seg", lambda v: v * 0.5)),
    "a scan for a mask": Folder("E08", _rewritten("seg", lambda v: np.arange(v.size).reshape(v.shape) % 999)),
    "a mask with -1": Folder("E09", _rewritten("seg", lambda v: -v)),
    "a mask of the brain": Folder("E10", _rewritten("seg", lambda v: scan(1)[0] > 0)),
    "a mask of everything": Folder("E10", _rewritten("seg", np.ones_like)),
    "a mask outside the brain": Folder("E11", _rewritten("seg", lambda v: np.arange(v.size).reshape(v.shape) < 90)),
    "a healthy subject with a lesion": Folder("E12", _participants("p1\t1")),
    "a subject twice": Folder("E13", _doubled("p5", np.asarray), said="p5 FLAIR has the same voxels as p1 FLAIR"),
    "a brain too long": Folder("E14", _stretched, said="p1: its brain of 2"),
    "ids that differ in case": Folder(
        "", _doubled("P1", lambda v: v + 1), said="differ in case only: P1, p1", whole=True
    ),
    "two files for one scan": Folder(
        "", lambda f: (f / "p1" / "p1_b_flair.nii.gz").write_bytes(packed()), said="both claim to be FLAIR", whole=True
    ),
    "an empty mask": Folder("", _rewritten("seg", np.zeros_like), said="1 healthy"),
    "a mask of 255": Folder("", _rewritten("seg", lambda v: v * 255), said="Lesion labels found: 1, 255"),
    "a mask stored as float": Folder("", _rewritten("seg", lambda v: v * 4.0), said="Lesion labels found: 1, 4"),
    "a mask with two affines": Folder(
        "",
        _bytes("seg", lambda made: packed(patched(content(LESION), qoffset_x=12))),
        said=f"p1 mask: {volumes.DIFFER}",
    ),
    "folders in a ring": Folder("", _ring),
    "files of other kinds beside": Folder("", _beside),
    "a name with spaces and letters": Folder("", _called("Käse 脳 (2)")),
}


def _header(number: int, plane: np.ndarray) -> Dataset:
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = MRImageStorage
    header.SOPInstanceUID, header.SeriesInstanceUID, header.Modality = generate_uid(), "1.2.3", "MR"
    header.Rows, header.Columns = plane.shape
    header.BitsAllocated = header.BitsStored = 16
    header.HighBit, header.PixelRepresentation, header.SamplesPerPixel = 15, 0, 1
    header.PhotometricInterpretation = "MONOCHROME2"
    header.PixelSpacing, header.ImageOrientationPatient = [2.0, 2.0], [1, 0, 0, 0, 1, 0]
    header.ImagePositionPatient = [0, 0, GAP_MM * number]
    header.PixelData = plane.tobytes()
    return header


def write_series(folder: Path) -> Path:
    """PLANES as one axial series, its files in the order of the slices."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, plane in enumerate(PLANES):
        _header(number, plane).save_as(_file(folder, number), enforce_file_format=True)
    return folder


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:03d}.dcm"


def _slice(**values) -> Callable[[Path], None]:
    """The third slice with other values in its header, None for none."""

    def make(folder: Path) -> None:
        header = _header(2, PLANES[2])
        for name, value in values.items():
            if value is None:
                delattr(header, name)
            else:
                setattr(header, name, value)
        header.save_as(_file(folder, 2), enforce_file_format=True)

    return make


def _cut(least: int, most: int | None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        made = _file(folder, 2).read_bytes()
        _file(folder, 2).write_bytes(made[least:most])

    return make


def _all_slices(**values) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for number, plane in enumerate(PLANES):
            header = _header(number, plane)
            for name, value in values.items():
                setattr(header, name, value)
            header.save_as(_file(folder, number), enforce_file_format=True)

    return make


def _another_series(folder: Path) -> None:
    header = _header(0, PLANES[0])
    header.SeriesInstanceUID = "1.2.4"
    header.save_as(_file(folder, 9), enforce_file_format=True)


def _other_size(folder: Path) -> None:
    _header(2, PLANES[2, :4]).save_as(_file(folder, 2), enforce_file_format=True)


def _emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _backwards(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        path.rename(path.with_name(f"{999 - int(path.stem):03d}.dcm"))


SERIES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no file": ("D01", _emptied),
    "two series": ("D02", _another_series),
    "a header cut off": ("D03", _cut(0, 20)),
    "noise": ("D03", lambda folder: _file(folder, 2).write_bytes(np.random.default_rng(0).bytes(3000))),
    "no rows": ("D04", _slice(Rows=None)),
    "in colour": ("D05", _slice(PhotometricInterpretation="RGB", SamplesPerPixel=3)),
    "a position of two numbers": ("D06", _slice(ImagePositionPatient=[0, 0])),
    "a slope that is no number": ("D06", _slice(RescaleSlope="nan")),
    "a direction of five numbers": ("D06", _slice(ImageOrientationPatient=[1, 0, 0, 0, 1])),
    "a billion frames": ("D06", _slice(NumberOfFrames=10**9)),
    "frames below 0": ("D06", _slice(NumberOfFrames=-5)),
    "mixed sizes": ("D07", _other_size),
    "a slice of another direction": ("D07", _slice(ImageOrientationPatient=[0, 1, 0, 0, 0, 1])),
    "a slice of another pixel size": ("D07", _slice(PixelSpacing=[1.0, 2.0])),
    "a slice twice": ("D08", lambda folder: _file(folder, 9).write_bytes(_file(folder, 2).read_bytes())),
    "a missing slice": ("D09", lambda folder: _file(folder, 2).unlink()),
    "truncated pixels": ("D10", _cut(0, -40)),
    "no pixels": ("D10", _slice(PixelData=None)),
    "pixels of 0 mm": ("D11", _all_slices(PixelSpacing=[0.0, 0.0])),
    "pixels of 1 m": ("D11", _all_slices(PixelSpacing=[1000.0, 1000.0])),
    "a direction of zeros": ("D08", _all_slices(ImageOrientationPatient=[0, 0, 0, 0, 0, 0])),
    "two directions that are one": ("D12", _all_slices(ImageOrientationPatient=[1, 0, 0, 1, 0.05, 0])),
    "names against the order": ("", _backwards),
    "files of other kinds beside": ("", lambda folder: (folder / "notes.txt").write_text("of the scan")),
    "a DICOMDIR beside": ("", lambda folder: (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")),
}
