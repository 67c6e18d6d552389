"""Scans in files that are neither NIfTI, DICOM nor pictures: Analyze pairs and MetaImage."""

from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from lib.errors import CourseError
from lib.nifti import check_volume
from lib.refusals import AGAIN
from lib.volumes import Volume, check_voxels

NO_SIDE = (
    "An Analyze header does not say which side is left: its own convention is taken, the first axis to the patient's "
    "left, then anterior, then superior."
)
TRANSVERSE = b"\x00", b""  # values of the header's `orient` for unflipped axial slices


def is_analyze(path: Path) -> bool:
    """Whether a name is that of the image of an Analyze pair."""
    return Path(path).suffix.lower() == ".img"


def is_meta(path: Path) -> bool:
    """Whether a name is that of a MetaImage."""
    return Path(path).suffix.lower() == ".mha"


def read_analyze(path: Path, *, constant_allowed: bool = False) -> Volume:
    """An Analyze 7.5 pair, X.img with X.hdr; a note says what is assumed of its axes.

    Raises CourseError naming the file for a missing or damaged one of the two, slices that are not axial, and whatever
    `volumes.read` refuses in a header and in voxels.
    """
    path = Path(path)
    header = next((h for h in (path.with_suffix(".hdr"), path.with_suffix(".HDR")) if h.is_file()), None)
    if header is None or not path.is_file():
        raise CourseError(f"{path} is not there together with its .hdr file.", "Give both files of the pair.")
    try:
        image = nibabel.load(path)
        turned = not isinstance(image, nibabel.Nifti1Pair) and bytes(image.header["orient"]) not in TRANSVERSE
        check_volume(path, image.shape, image.get_data_dtype(), image.affine)
        voxels = np.asarray(image.dataobj, dtype=np.float32).reshape(image.shape[:3])
    except (ImageFileError, WrapStructError, HeaderDataError, OSError, ValueError, KeyError, OverflowError) as error:
        raise CourseError(f"{path} is damaged, or no Analyze image.", AGAIN) from error
    if turned:
        raise CourseError(f"{path} has slices that are not axial by its header.", "Convert it to NIfTI.")
    check_voxels(path, voxels, constant_allowed)
    return Volume(voxels, image.affine, True, () if isinstance(image, nibabel.Nifti1Pair) else (NO_SIDE,))


def read_meta(path: Path, *, constant_allowed: bool = False) -> Volume:
    """A MetaImage (.mha), as BraTS had them until 2015; read by SimpleITK, an optional package.

    Raises CourseError where that is not installed, and naming the file as `volumes.read` does.
    """
    path = Path(path)
    try:
        import SimpleITK
    except ImportError:
        cure = "Install it: pip install -r requirements-extra.txt, or convert the scans to NIfTI."
        raise CourseError(f"{path} is a MetaImage, which SimpleITK reads; it is not installed.", cure) from None
    if not path.is_file():
        raise CourseError(f"{path} is not a file.", "Give the path of a MetaImage (.mha).")
    try:
        image = SimpleITK.ReadImage(str(path))
        voxels = SimpleITK.GetArrayFromImage(image)
    except RuntimeError as error:
        raise CourseError(f"{path} is damaged, or no MetaImage.", AGAIN) from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise CourseError(f"{path} is no volume: its shape is {voxels.shape}.", "Give three-dimensional scans.")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # from left, posterior, superior
    check_volume(path, voxels.T.shape, voxels.dtype, affine)
    voxels = np.ascontiguousarray(voxels.T, dtype=np.float32)
    check_voxels(path, voxels, constant_allowed)
    return Volume(voxels, affine)
