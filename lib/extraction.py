"""The brain in a scan of the whole head, in any modality and of any slice thickness; no lesion may be cut away.

A surface grows from the middle of the head until what lies behind it turns dark (`surfaces`). A template's brain,
scaled to the head, says where to begin and how far to look; dim end slices are brightened before; bridges to muscle and
eyes are cut after, and the slices' hulls are filled where the template has brain, so that a dark lesion at the edge
stays in. T1, whole volumes, is left to deepbet where that package is there (its weights lie in its wheel).

What was tried, on four glioma patients with 20 to 40 thick slices of FLAIR (% of the lesion voxels kept, over all and
in the worst patient; mean voxel AP of `intensity_median`, .09 on the whole head), and as Dice with deepbet on a T1 head
of 0.9 mm and a PD head of 7 mm slices. The share was chosen on these two; brightening, cutting and hulls after looking
at all six.

|                                              | kept | worst | AP  | T1  | PD  |
|----------------------------------------------|------|-------|-----|-----|-----|
| head's outline eroded by 18 of 256 pixels    | 99.0 | 97.0  | .34 |     |     |
| Smith's surface, share .5, no template       | 99.6 | 99.4  |     | .68 | .78 |
| the same within the template's reach         | 97.9 | 96.7  | .37 | .90 | .86 |
| share .6                                     | 97.8 | 96.7  | .43 | .92 | .94 |
| share .7                                     | 97.4 | 96.5  | .51 | .95 | .97 |
| and dim slices brightened, hulls filled      | 99.2 | 95.3  | .49 | .93 | .96 |
| so, with share .8                            | 91.7 | 52.2  | .53 | .82 | .93 |
| as settled, on T1 instead of FLAIR           | 96.0 | 72.7  | .47 |     |     |
| on T1 after contrast agent                   | 95.6 | 84.6  | .39 |     |     |
| any of the three masks                       | 99.3 | 95.5  | .39 |     |     |
| at least two of them                         | 97.7 | 84.6  | .47 |     |     |
| deepbet on their T1                          | 99.1 | 98.7  | .53 | 1   | 1   |

So FLAIR is extracted from where it is there. Known to be lost: a lesion at the brain's surface that is as dark as the
fluid outside, as in T1 (a tenth of one made so, a quarter of a real one).
"""

import hashlib
import io
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec

import nibabel
import numpy as np
from scipy import ndimage

from lib import data_folder, pictures, surfaces, volumes
from lib.preprocessing import AIR_HU, brain_mask, canonical, signal
from lib.volumes import Volume

CHOICES = ("auto", "never")
SURFACE, DEEPBET, BACKGROUND = "a growing surface", "deepbet", "its own background"
PREFERRED = ("FLAIR", "PD", "T1", "T2", "T1ce", "CT")  # the order of the modalities to extract from
HEAD_LITRES = 1.8, 3.0  # what is smaller is no head, what is larger no brain
RAYS = 120  # from the middle of a slice
GAP_RAYS, GAP = 0.8, 0.5  # share of the rays that meet a gap, and its brightness as a share of its sides'
BONE_HU, MOST_BONE = 300, 0.02  # share of voxels; calcifications and blood are less
SOFT_HU = (-20, 110)
VERSION = 1  # raised whenever masks come out differently
WORK_MM = 2.0  # edge that finer voxels are averaged to
SHARE = 0.7  # of the way from air to brain that the darkest must lie above, see surfaces.grown
TISSUE = 0.1  # share of the way from the 2nd to the 98th percentile above which there is a head (Smith 2002)
SCALP_MM = np.array([12.0, 13.0, 12.0])  # between brain and air: at the sides, at front and back, above
TEMPLATE = np.array([[-70.0, 70.0], [-106.0, 72.0], [-72.0, 80.0]])  # box of the template's brain in mm
MARGIN_MM = 15.0  # how far the brain may lie outside the template's, scaled to the head
CORE_MM, HULL_MM = 6.0, 10.0  # half the width of bridges that are cut, and of bays that are filled
LEVELS = 0.25, 1.0  # how dim a slice or a side may be, as a share of the usual; none is made dimmer
ENOUGH, FIELD_MM = 50, 30.0  # voxels that tell a slice's level; standard deviation of what blurs the sides'
THICK_MM = 3.0  # slices further apart are looked at one by one where shapes are concerned


def shows_head(volume: Volume, modality: str) -> bool:
    """Whether a scan shows a head, or an extracted brain: by its litres, and by the dark gap of the skull between two
    bright shells; of a single slice by the gap, or by its grey background; of CT by its bone."""
    voxels = canonical(volume).voxels
    if modality == "CT":
        found = voxels[voxels > AIR_HU]
        return bool(found.size and (found > BONE_HU).mean() > MOST_BONE)
    if voxels.shape[2] == 1:
        return not pictures.on_black(volume) or _gap(voxels[..., 0], volume.voxel_mm[:2]) >= GAP_RAYS
    least, most = HEAD_LITRES
    if (voxels > 0).sum() * volume.millilitres / 1000 < least:
        return False
    litres = brain_mask([signal(modality, voxels)]).sum() * volume.millilitres / 1000
    if not least <= litres <= most:
        return bool(litres > most)
    widest = int((voxels > TISSUE * np.percentile(voxels, 98)).sum(axis=(0, 1)).argmax())
    return _gap(voxels[..., widest], volume.voxel_mm[:2]) >= GAP_RAYS


def chosen(modality: str, slices: int) -> str:
    """What extracts the brain from a scan of so many slices: DEEPBET where it is there and knows such scans."""
    return DEEPBET if modality == "T1" and slices > 1 and find_spec("deepbet") else SURFACE


def source(scans: Mapping[str, Volume]) -> tuple[str, str]:
    """The modality to extract a subject's brain from, and by what."""
    for modality, scan in scans.items():
        if chosen(modality, min(scan.voxels.shape)) == DEEPBET:
            return modality, DEEPBET
    return min(scans, key=PREFERRED.index), SURFACE


def brain(volume: Volume, modality: str, method: str = "") -> np.ndarray:
    """The brain in a head, bool [i, j, k] on the scan's own grid; nothing where none is found.

    `method`: SURFACE or DEEPBET; none: what is `chosen`.
    """
    turned = canonical(volume)
    method = method or chosen(modality, turned.voxels.shape[2])
    found = _by_deepbet(turned.voxels) if method == DEEPBET else _by_surface(turned, modality)
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.io_orientation(volume.affine)
    )
    return nibabel.apply_orientation(found, turn).astype(bool)


def find(scans: Mapping[str, Volume]) -> tuple[np.ndarray, str, str] | None:
    """The brain in one subject's scans, bool [i, j, k] on their grid turned to right, anterior, superior, with the
    modality it is from and by what; None where they are extracted already. Where some are, these tell the brain."""
    scans = {m: canonical(scan) for m, scan in scans.items()}
    alone = {m: scan for m, scan in scans.items() if not shows_head(scan, m)}
    if len(alone) == len(scans):
        return None
    if alone:
        return brain_mask([signal(m, scan.voxels) for m, scan in alone.items()]), " and ".join(alone), BACKGROUND
    modality, method = source(scans)
    return brain(scans[modality], modality, method), modality, method


def keep(identity: str, mask: Volume) -> None:
    """Keep the brain that was found in voxels of this checksum, in `data/prepared/brains`."""
    packed = io.BytesIO()
    np.savez_compressed(packed, brain=mask.voxels > 0, affine=mask.affine)
    volumes.write_bytes(_kept(identity), packed.getvalue())


def kept(identity: str) -> Volume | None:
    """The brain that was found in voxels of this checksum."""
    try:
        with np.load(_kept(identity), allow_pickle=False) as file:
            return Volume(file["brain"].astype(np.float32), file["affine"])
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _kept(identity: str):
    name = hashlib.sha256(f"{VERSION} {bool(find_spec(DEEPBET))} {identity}".encode()).hexdigest()[:32]
    return data_folder("prepared", "brains", f"{name}.npz")


def _by_deepbet(voxels: np.ndarray) -> np.ndarray:
    from deepbet.bet import BrainExtraction

    network = BrainExtraction(no_gpu=True)
    return network.postprocess(network.run_model(voxels.astype(np.float32)) > 0.5)


def _by_surface(turned: Volume, modality: str) -> np.ndarray:
    grey = _grey(turned.voxels, modality)
    factor = np.maximum(1, np.round(WORK_MM / turned.voxel_mm)).astype(int)
    small, mm = _coarser(grey, factor), turned.voxel_mm * factor
    found = _in_slice(small[..., 0], mm[:2])[..., None] if grey.shape[2] == 1 else _in_volume(small, mm)
    placed = {"output_shape": grey.shape, "order": 1, "mode": "nearest"}
    fine = ndimage.affine_transform(found.astype(np.float32), 1 / factor, -(factor - 1) / (2 * factor), **placed)
    return fine > 0.5


def _gap(pixels: np.ndarray, mm: np.ndarray) -> float:
    """The share of rays from the middle of a slice [i, j] that meet a dark gap between two bright shells."""
    from skimage.transform import rescale, warp_polar  # slow to import, and extracted brains do without

    pixels = rescale(pixels, mm / WORK_MM, order=1, preserve_range=True)
    if not (pixels > 0).any():
        return 0.0
    tissue = pixels > TISSUE * np.percentile(pixels[pixels > 0], 98)
    head = _largest(ndimage.binary_fill_holes(tissue))
    about = {"center": [axis.mean() for axis in np.nonzero(head)], "radius": np.hypot(*pixels.shape) / 2}
    rays, within = (warp_polar(one, output_shape=(RAYS, max(pixels.shape)), **about) for one in (pixels, head * 1.0))
    usual, met = np.median(pixels[head & tissue]), 0
    for ray, inside in zip(rays, within > 0.5, strict=True):
        last = np.flatnonzero(inside).max(initial=0)
        outer = ray[last // 2 : last + 1] / usual
        around = np.minimum(np.maximum.accumulate(outer), np.maximum.accumulate(outer[::-1])[::-1])
        met += bool(((outer < GAP * around) & (around > GAP)).any())
    return met / RAYS


def _grey(voxels: np.ndarray, modality: str) -> np.ndarray:
    """Intensities in which skull and air are dark: of CT, the window of soft tissue."""
    if modality != "CT":
        return voxels
    low, high = SOFT_HU
    return np.where((voxels > low) & (voxels < high), voxels - low, 0).astype(np.float32)


def _coarser(voxels: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Means of blocks of so many voxels."""
    beyond = [(0, -n % f) for n, f in zip(voxels.shape, factor, strict=True)]
    padded = np.pad(voxels, beyond, mode="edge")
    shape = [k for n, f in zip(padded.shape, factor, strict=True) for k in (n // f, f)]
    return padded.reshape(shape).mean(axis=(1, 3, 5), dtype=np.float32)


def _in_volume(voxels: np.ndarray, mm: np.ndarray) -> np.ndarray:
    low, high = np.percentile(voxels, [2, 98])
    tissue = low + TISSUE * (high - low)
    away = _from_template(voxels > tissue, mm)
    if not ((away < -10) & (voxels > tissue)).any():
        return np.zeros(voxels.shape, bool)
    voxels = _levelled(voxels, away, mm, tissue)
    usual = float(np.median(voxels[(away < -10) & (voxels > tissue)]))
    smooth = ndimage.gaussian_filter(np.where(away < MARGIN_MM, voxels, low), np.minimum(0.7 / mm, 1.4))
    deep = away < -5
    centre = np.array([axis.mean() for axis in np.nonzero(deep)]) * mm
    surface = surfaces.sphere(centre, 0.6 * (3 * deep.sum() * mm.prod() / (4 * np.pi)) ** (1 / 3), 3)
    levels = low, tissue, usual
    surface = surfaces.grown(surface, smooth, mm, levels, SHARE, 250)
    surface = surfaces.grown(surface.finer(), smooth, mm, levels, SHARE, 100)
    inside = surface.filled(voxels.shape, mm) & (away < MARGIN_MM)
    core = _shaped(inside, inside & (smooth > low + (usual - low) / 2), mm)
    hull = np.stack([_hull(core[..., k]) for k in range(core.shape[2])], axis=2)
    return (core | (hull & (away < 0))) & (away < MARGIN_MM)


def _in_slice(pixels: np.ndarray, mm: np.ndarray) -> np.ndarray:
    """The same of a single slice [i, j], which says nothing of its height in the head."""
    low, high = np.percentile(pixels, [2, 98])
    tissue = low + TISSUE * (high - low)
    head = _largest(ndimage.binary_fill_holes(pixels > tissue))
    if not head.any():
        return head
    depth = ndimage.distance_transform_edt(np.pad(head, 1), sampling=mm)[1:-1, 1:-1]
    deep = depth > depth.max() / 2
    usual = float(np.median(pixels[deep & (pixels > tissue)]))
    smooth = ndimage.gaussian_filter(pixels, np.minimum(0.7 / mm, 1.4))
    circle = surfaces.sphere(np.array([axis.mean() for axis in np.nonzero(deep)]) * mm, depth.max() / 2, 3)
    levels = low, tissue, usual
    circle = surfaces.grown(circle, smooth, mm, levels, SHARE, 250)
    inside = surfaces.grown(circle.finer(), smooth, mm, levels, SHARE, 100).filled(pixels.shape, mm)
    return _shaped(inside, inside & (smooth > low + (usual - low) / 2), mm)


@lru_cache(maxsize=1)
def _template() -> tuple[np.ndarray, np.ndarray]:
    """How far in mm each voxel lies outside the template's brain, negative inside, and its affine."""
    from nilearn import datasets

    image = datasets.load_mni152_brain_mask(resolution=2)
    mask = image.get_fdata() > 0
    outside, inside = (ndimage.distance_transform_edt(one, sampling=2) for one in (~mask, mask))
    return (outside - inside).astype(np.float32), image.affine


def _from_template(tissue: np.ndarray, mm: np.ndarray) -> np.ndarray:
    """How far in mm each voxel [i, j, k] lies outside the template's brain, which is scaled to the head and hung below
    its top: a rough guess of where to look, for the neck and the face are larger than the brain."""
    filled = np.stack([ndimage.binary_fill_holes(tissue[..., k]) for k in range(tissue.shape[2])], axis=2)
    head = _largest(ndimage.binary_opening(filled))
    area = head.sum(axis=(0, 1))
    if not head.any():
        return np.full(head.shape, np.inf)
    last = int(np.flatnonzero(area > 0.02 * area.max()).max())
    wide, long = (_longest(head, axis, last, reach / mm[2]) * mm[axis] for axis, reach in ((0, 80), (1, 70)))
    cut = 1 - np.sqrt(1 - area[last] / area.max())  # of the radius, where the scan ends below the head's top
    top = (last + 0.5) * mm[2] + cut * (np.ptp(wide) + np.ptp(long)) / 4
    sides, ends, above = SCALP_MM
    size = TEMPLATE[:, 1] - TEMPLATE[:, 0]
    scale = np.clip([(np.ptp(wide) - 2 * sides) / size[0], (np.ptp(long) - 2 * ends) / size[1], 0], 0.7, 1.25)
    scale[2] = np.sqrt(scale[0] * scale[1])
    middle = TEMPLATE[:2].mean(axis=1) - np.array([wide.mean(), long.mean()]) / scale[:2]
    start = np.append(middle, TEMPLATE[2, 1] - (top - above) / scale[2])
    distance, affine = _template()
    step = np.diag(affine)[:3]
    found = ndimage.affine_transform(
        distance, mm / scale / step, (start - affine[:3, 3]) / step, output_shape=head.shape, order=1, mode="nearest"
    )
    return found * scale[2]


def _longest(head: np.ndarray, axis: int, last: int, reach: float) -> np.ndarray:
    """First and last voxel of the head along an axis in the slice where they are furthest apart, of those down to so
    many slices below the last: there is neither nose nor ear."""
    slices = [head[:, :, k].any(axis=1 - axis) for k in range(max(0, int(last - reach)), last + 1)]
    return max((np.flatnonzero(one)[[0, -1]] for one in slices if one.any()), key=np.ptp)


def _levelled(voxels: np.ndarray, away: np.ndarray, mm: np.ndarray, tissue: float) -> np.ndarray:
    """Without what the coils add: the end slices of a stack are dim, and one side of a head brighter than the other."""
    inner = (away < 0) & (voxels > tissue / 2)
    usual, known = np.median(voxels[inner]), np.flatnonzero(inner.sum(axis=(0, 1)) > ENOUGH)
    if not len(known):
        return voxels
    medians = [np.median(voxels[..., k][inner[..., k]]) / usual for k in known]
    voxels = voxels / np.clip(np.interp(np.arange(voxels.shape[2]), known, medians), *LEVELS)
    inner &= voxels < 2 * usual
    wide = FIELD_MM / mm
    weight = ndimage.gaussian_filter(inner.astype(np.float32), wide)
    field = ndimage.gaussian_filter(voxels * inner, wide) / np.maximum(weight, 1e-6) / usual
    return voxels / np.where(weight > 1e-3, np.clip(field, *LEVELS), 1)


def _shaped(inside: np.ndarray, bright: np.ndarray, mm: np.ndarray) -> np.ndarray:
    """The largest part of what is bright after thin bridges are cut, its bays and holes filled: a dark lesion at the
    brain's edge is such a bay."""
    if inside.ndim == 3 and mm[2] > THICK_MM:
        core = _largest(_slicewise(_eroded, bright, mm, CORE_MM))
        core = _slicewise(_dilated, core, mm, CORE_MM + 1) & inside
        return _largest(_slicewise(_closed, core, mm, HULL_MM))
    core = _dilated(_largest(_eroded(bright, mm, CORE_MM)), mm, CORE_MM + 1) & inside
    return _closed(core, mm, HULL_MM)


def _hull(mask: np.ndarray) -> np.ndarray:
    from skimage.morphology import convex_hull_image

    return convex_hull_image(mask) if mask.any() else mask


def _slicewise(change, mask: np.ndarray, mm: np.ndarray, by: float) -> np.ndarray:
    return np.stack([change(mask[..., k], mm[:2], by) for k in range(mask.shape[2])], axis=2)


def _eroded(mask: np.ndarray, mm: np.ndarray, by: float) -> np.ndarray:
    return ndimage.distance_transform_edt(mask, sampling=mm) > by


def _dilated(mask: np.ndarray, mm: np.ndarray, by: float) -> np.ndarray:
    return ndimage.distance_transform_edt(~mask, sampling=mm) <= by if mask.any() else mask


def _closed(mask: np.ndarray, mm: np.ndarray, by: float) -> np.ndarray:
    beyond = [(int(by / edge) + 2,) * 2 for edge in mm]
    closed = _eroded(_dilated(np.pad(mask, beyond), mm, by), mm, by)
    return ndimage.binary_fill_holes(closed[tuple(slice(a, -b) for a, b in beyond)])


def _largest(mask: np.ndarray) -> np.ndarray:
    parts, number = ndimage.label(mask)
    return parts == 1 + np.bincount(parts.ravel())[1:].argmax() if number else mask
