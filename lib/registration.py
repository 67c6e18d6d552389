"""Scanner's shading taken off, and a brain laid over the MNI152 template: SimpleITK, an optional package.

Everything runs on one thread, so that the same scan gives the same bytes on every machine with the same packages.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import ModuleType

import nibabel
import numpy as np
from scipy import ndimage
from scipy.linalg import polar

from lib.boxes import sample
from lib.components import bounding_box
from lib.errors import CourseError
from lib.volumes import Volume

KINDS = ("", "rigid", "affine")
FIELD_MM = 4.0  # grid on which the shading is looked for: that of 1 mm voxels shrunk by 4
FIELD_STEPS = (50, 50, 50)  # at most, by level; a fourth level bends so finely that it takes tissue for shading
TEMPLATE_MM = 2
COARSE, FINE = ((4, 6.0),), ((4, 6.0), (2, 2.0))  # levels: the template shrunk by, both images smoothed by so many mm
STEP = 0.25  # of the optimiser, the first; longer ones have left the brain
MARGIN = 3  # voxels of the template around its brain that are compared too, so that outlines count
ROOM = 20  # empty voxels about a brain: places beyond an image do not count, and an optimiser would flee there
BINS = 32
LEAST_DICE = 0.7  # brains that are whole and lie well overlap the template's by more, small ones too
SCALES = (0.5, 2.5)  # of volume: from brains of 0.75 to 3.8 litres
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # from RAS+, which nibabel speaks, to SimpleITK's axes, and back


def toolkit() -> ModuleType:
    """SimpleITK on one thread; raises CourseError where it is not installed."""
    try:
        import SimpleITK
    except ImportError as error:
        raise CourseError(
            "Bias correction and registration need SimpleITK, which is not installed.",
            "Install it by `pip install -r requirements-extra.txt`, or leave bias and register off.",
        ) from error
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    return SimpleITK


def bias_corrected(volume: Volume, brain: np.ndarray) -> Volume:
    """A scan divided by its smooth shading, as N4 finds it inside the brain (Tustison 2010), the mean logarithm of the
    brain's intensities kept. `brain`: bool [i, j, k]; voxels at 0 or below say nothing."""
    itk = toolkit()
    box = bounding_box(brain)
    usable = (brain & (volume.voxels > 0))[box]
    image = _image(volume.voxels[box], volume.affine)
    mask = itk.Cast(_image(usable, volume.affine), itk.sitkUInt8)
    shrink = [max(1, min(round(FIELD_MM / mm), n // 4)) for mm, n in zip(volume.voxel_mm, usable.shape, strict=True)]
    corrector = itk.N4BiasFieldCorrectionImageFilter()
    corrector.SetNumberOfThreads(1)
    corrector.SetMaximumNumberOfIterations(FIELD_STEPS)
    with _in_words("N4 finds no shading to correct in this brain.", "Look at the scan, or leave bias off."):
        corrector.Execute(itk.Shrink(image, shrink), itk.Shrink(mask, shrink))
    log_field = itk.GetArrayFromImage(corrector.GetLogBiasFieldAsImage(image)).transpose(2, 1, 0)
    corrected = volume.voxels.astype(np.float32)
    corrected[box] /= np.exp(log_field - log_field[usable].mean())
    return replace(volume, voxels=corrected)


def to_template(volume: Volume, brain: np.ndarray, kind: str) -> np.ndarray:
    """The "rigid" or "affine" transform, [4, 4], from mm of a scan to mm of the MNI152 template, both in RAS+.

    Mattes' mutual information around the template's brain, from coarse to fine, started where the brains' middles
    agree. The rigid transform is the affine one without its scaling and shear: sought for itself, it would leave a
    brain smaller than the template's room to rock in. `brain`: bool [i, j, k] of the scan.
    """
    itk = toolkit()
    inside, affine = template_brain()
    (moving, moving_mask), fixed_mask = _coarse(volume, brain), _image(inside, affine)
    start = itk.CenteredTransformInitializer(
        fixed_mask, moving_mask, itk.Euler3DTransform(), itk.CenteredTransformInitializerFilter.MOMENTS
    )
    turned, wider = _optimised(moving, itk.Euler3DTransform(start), COARSE), itk.AffineTransform(3)
    wider.SetMatrix(turned.GetMatrix())
    wider.SetTranslation(turned.GetTranslation())
    wider.SetCenter(turned.GetCenter())
    found = np.linalg.inv(LPS @ _matrix(_optimised(moving, wider, FINE)) @ LPS)
    middle = nibabel.affines.apply_affine(volume.affine, np.argwhere(brain).mean(axis=0))
    return found if kind == "affine" else _rigid(found, middle)


def template_dice(volume: Volume, brain: np.ndarray, transform: np.ndarray) -> float:
    """Overlap (Dice) of the template's brain with that of a scan, bool [i, j, k], after a transform as `to_template`
    gives it."""
    inside, _ = template_brain()
    there = on_template(replace(volume, voxels=brain.astype(np.float32)), transform) > 0.5
    return float(2 * (there & inside).sum() / (there.sum() + inside.sum()))


def on_template(volume: Volume, transform: np.ndarray) -> np.ndarray:
    """A scan as it lies on the template's 2 mm grid after a transform, float32 [i, j, k]: for looking at."""
    inside, affine = template_brain()
    place = np.linalg.inv(transform @ volume.affine) @ affine
    return sample(volume.voxels.astype(np.float32), place[:3, :3], place[:3, 3], inside.shape)


def doubt(transform: np.ndarray, dice: float) -> str:
    """What makes a registration doubtful, in words; "" where nothing does."""
    scale = float(np.linalg.det(transform[:3, :3]))
    if not SCALES[0] <= scale <= SCALES[1]:
        return f"the registration scales the brain's volume by {scale:.2f}"
    if dice < LEAST_DICE:
        return f"the brain overlaps the template's by {dice:.2f} only (Dice; whole brains exceed {LEAST_DICE:g})"
    return ""


@cache
def template_brain() -> tuple[np.ndarray, np.ndarray]:
    """The template's brain, bool [i, j, k] at 2 mm, and its affine to mm in RAS+."""
    from nilearn import datasets

    mask = datasets.load_mni152_brain_mask(resolution=TEMPLATE_MM)
    return mask.get_fdata() > 0, mask.affine


@cache
def template_middle() -> np.ndarray:
    """The middle of the box around the template's brain in mm, [3]."""
    inside, affine = template_brain()
    return nibabel.affines.apply_affine(affine, [(s.start + s.stop - 1) / 2 for s in bounding_box(inside)])


@cache
def _template() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The template's brain, 0 outside, [i, j, k]; where it is compared, bool; its affine."""
    from nilearn import datasets

    image = datasets.load_mni152_template(resolution=TEMPLATE_MM)
    inside, affine = template_brain()
    return image.get_fdata() * inside, ndimage.binary_dilation(inside, iterations=MARGIN), affine


def _coarse(volume: Volume, brain: np.ndarray) -> tuple:
    """A scan about as coarse as the template, its middle 98 % of intensities kept, and its mask."""
    low, high = np.percentile(volume.voxels[brain], (1, 99))
    step = np.maximum(1, TEMPLATE_MM / volume.voxel_mm)
    box = bounding_box(brain)
    start = np.array([s.start for s in box]) - ROOM * step
    shape = tuple(int(n) for n in np.ceil((np.array([s.stop for s in box]) - start) / step) + ROOM)
    affine = volume.affine @ nibabel.affines.from_matvec(np.diag(step), start)
    values = 0.1 + (np.clip(volume.voxels, low, high) - low) / max(high - low, 1e-6)  # what is dark is not outside
    return tuple(_image(sample(np.float32(one), step, start, shape), affine) for one in (values * brain, brain))


def _optimised(moving, transform, levels: tuple[tuple[int, float], ...]):
    """A transform of SimpleITK, improved in place, from the template's mm to those of `moving`."""
    itk, (template, around, affine) = toolkit(), _template()
    method = itk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricFixedMask(itk.Cast(_image(around, affine), itk.sitkUInt8))
    method.SetInterpolator(itk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(STEP, 1e-3, 200, relaxationFactor=0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([shrink for shrink, _ in levels])
    method.SetSmoothingSigmasPerLevel([mm for _, mm in levels])
    method.SetInitialTransform(transform, inPlace=True)
    with _in_words("The brain cannot be laid over the template.", "Look at the scan, or leave register off."):
        method.Execute(_image(template, affine), moving)
    return transform


@contextmanager
def _in_words(what: str, cure: str) -> Iterator[None]:
    """What SimpleITK gives up on, as an error for people."""
    try:
        yield
    except RuntimeError as error:
        raise CourseError(what, cure) from error


def _rigid(affine: np.ndarray, middle_mm: np.ndarray) -> np.ndarray:
    """An affine transform without scaling and shear, [4, 4]; where it brings the brain's middle stays."""
    turn, _ = polar(affine[:3, :3])
    return nibabel.affines.from_matvec(turn, nibabel.affines.apply_affine(affine, middle_mm) - turn @ middle_mm)


def _image(voxels: np.ndarray, affine: np.ndarray):
    """SimpleITK's view of an array [i, j, k] with its affine to RAS+."""
    itk = toolkit()
    image = itk.GetImageFromArray(np.ascontiguousarray(voxels.transpose(2, 1, 0), np.float32))
    there, edges = LPS @ affine, nibabel.affines.voxel_sizes(affine)
    image.SetSpacing(edges.tolist())
    image.SetDirection((there[:3, :3] / edges).ravel().tolist())
    image.SetOrigin(there[:3, 3].tolist())
    return image


def _matrix(transform) -> np.ndarray:
    """A linear transform of SimpleITK about its centre, as [4, 4]."""
    turn, centre = np.array(transform.GetMatrix()).reshape(3, 3), np.array(transform.GetCenter())
    return nibabel.affines.from_matvec(turn, np.array(transform.GetTranslation()) + centre - turn @ centre)
