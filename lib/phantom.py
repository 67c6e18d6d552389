"""The embedded cohort: simulated brain MRI for teaching, made from nilearn's bundled MNI152 template.

A subject is the template bent into another head (size, pose, gyri, ventricles, age), its tissues mixed in
every voxel, a lesion painted over them, and the mixture seen by a scanner: the signal equation of each
sequence, blur, coil shading, artefacts, Rician noise. Lesions are tissues with relaxation times of their
own, so T1, T2 and FLAIR agree about them. What real scans have and these lack: skull, contrast agent, any
fold of the brain that the template has not, surprises. Compare no figure on it with the literature.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from nilearn import datasets
from scipy import ndimage
from scipy.spatial.transform import Rotation
from threadpoolctl import threadpool_limits

from lib import acquisition, volumes
from lib.components import bounding_box
from lib.errors import CourseError

VERSION = 1  # part of the folder's name: raise it whenever the same seed gives other voxels
MODALITIES = ("T1", "T2", "FLAIR")
TESLA = 1.5  # the field at which TISSUES relax
BOX_MM = ((-80, 80), (-116, 80), (-80, 92))  # field of view: left to right, back to front, bottom to top

# Proton density (of water), T1 and T2 in ms, BraTS label. Grey and white matter lie near what BrainWeb uses
# for 1.5 T (Kwan, Evans and Pike, IEEE TMI 1999), fluid is as long as measured in vivo; lesions lie in the
# wide ranges that relaxometry gives and were chosen for the looks of clinical scans.
TISSUES = pd.DataFrame.from_records(
    [
        ("csf", 1.00, 4200, 1600, 0),
        ("grey", 0.86, 870, 92, 0),
        ("deep_grey", 0.83, 740, 78, 0),
        ("white", 0.76, 510, 70, 0),
        ("vessel", 0.10, 900, 60, 0),  # flow void
        ("slow_flow", 0.95, 1100, 160, 0),
        ("cap", 0.82, 900, 125, 0),  # harmless brightness beside the ventricles
        ("oedema", 0.88, 1250, 150, 2),
        ("tumour", 0.88, 1150, 125, 1),
        ("rim", 0.86, 950, 115, 4),
        ("necrosis", 0.95, 2300, 260, 1),
        ("plaque", 0.85, 1050, 140, 2),
        ("gliosis", 0.86, 1150, 150, 2),
        ("cavity", 1.00, 4000, 1400, 1),
        ("isointense", 0.83, 800, 82, 1),
    ],
    columns=["tissue", "density", "t1_ms", "t2_ms", "label"],
    index="tissue",
)


@dataclass(frozen=True)
class Scanner:
    """How one site scans: the times of its sequences in ms (TR, TE, TI; TI 0 is no inversion) and its faults."""

    sequences: dict[str, tuple[float, float, float]]
    gain: float  # white matter in arbitrary units
    noise: float  # standard deviation as a share of white matter
    blur_mm: tuple[float, float, float]  # standard deviation; the third is across slices
    shading: float  # standard deviation of the logarithm of the coil's sensitivity


SCANNERS = {
    name: Scanner(dict(zip(MODALITIES, times, strict=True)), *rest)
    for name, times, *rest in [
        ("scanner_a", [(2000, 3, 950), (6500, 100, 0), (9000, 115, 2500)], 420, 0.02, (0.8, 0.8, 0.8), 0.05),
        ("scanner_b", [(600, 12, 0), (5000, 90, 0), (8000, 95, 2350)], 1900, 0.025, (0.8, 0.8, 1.6), 0.08),
        ("scanner_c", [(2200, 4, 1050), (8000, 110, 0), (10000, 130, 2550)], 130, 0.03, (1.1, 0.9, 1.0), 0.11),
    ]
}


@dataclass(frozen=True)
class Growth:
    """How a kind of lesion grows."""

    millilitres: tuple[float, float]
    swelling: tuple[float, float]  # how far it pushes its surroundings, as a share of the distance; negative: pulls
    fingers: float  # how much it prefers white matter
    edge_mm: float
    layers: dict[str, tuple[float, float]]  # tissues from outside in, each with its range of the volume


GROWTHS = {
    "glioma": Growth((10, 80), (0.1, 0.3), 0.6, 5, {"oedema": (1, 1), "rim": (0.25, 0.5), "necrosis": (0.05, 0.16)}),
    "hyper": Growth((2, 40), (0, 0.2), 0.2, 5, {"tumour": (1, 1)}),
    "iso": Growth((3, 40), (0.1, 0.3), 0, 5, {"isointense": (1, 1)}),
    "hypo": Growth((2, 40), (-0.15, 0), 0, 4, {"gliosis": (1, 1), "cavity": (0.6, 0.85)}),
    "pontine": Growth((5, 25), (0.15, 0.35), 0, 6, {"tumour": (1, 1)}),
}
TURNS = ("glioma", "ms", "pontine", "hypo", "glioma", "iso", "hyper", "glioma")  # the kinds as patients take turns
PONS = (0, -26, -34)  # millimetres in the template


@dataclass(frozen=True)
class Scan:
    """One simulated subject.

    `images` int16 [x, y, z] by modality, 0 outside the brain, arbitrary units of the site; `lesion` uint8
    [x, y, z], 1 core, 2 oedema, 4 rim as in BraTS; `affine` float64 [4, 4] to millimetres in RAS+.
    """

    images: dict[str, np.ndarray]
    lesion: np.ndarray
    affine: np.ndarray


@threadpool_limits.wrap(limits=1)  # sums in another order give other voxels
def simulate(
    index: int, *, kind: str | None = None, site: str = "scanner_a", voxel_mm: float = 2.0, seed: int = 0
) -> Scan:
    """Subject `index`, healthy (`kind` None) or with a lesion of a kind in TURNS, scanned at a site of SCANNERS.

    Anatomy, lesion and scanner draw from three streams of (seed, index): the same index with and without a
    lesion is one brain under one noise, but for what the lesion pushes aside.
    Raises CourseError for an unknown kind or site and for a voxel edge outside 1 to 8 mm.
    """
    if kind not in (None, *TURNS) or site not in SCANNERS:
        known = f"Kinds are {', '.join(sorted(set(TURNS)))}, sites {', '.join(SCANNERS)}."
        raise CourseError(f"No subject of kind {kind} can be scanned at site {site}.", known)
    if not 1 <= voxel_mm <= 8:
        raise CourseError(f"Voxels of {voxel_mm:g} mm cannot be simulated.", "Choose an edge of 1 to 8 mm.")
    anatomy, disease, scanning = (np.random.default_rng(s) for s in np.random.SeedSequence([seed, index]).spawn(3))
    axes = [np.arange(low + voxel_mm / 2, high, voxel_mm, dtype=np.float32) for low, high in BOX_MM]
    position = _bend(anatomy, _fine(axes))
    mass = None if kind in (None, "ms") else _place(disease, GROWTHS[kind], kind == "pontine", axes, position)
    head = _grow(anatomy, axes, position)
    if kind == "ms":
        _paint_plaques(head, disease)
    elif mass is not None:
        _paint_mass(head, disease, GROWTHS[kind], *mass)
    images = {modality: _scan(head, SCANNERS[site], modality, scanning) for modality in MODALITIES}
    affine = np.diag([voxel_mm, voxel_mm, voxel_mm, 1.0])
    affine[:3, 3] = [axis[0] for axis in axes]
    return Scan(images, head.lesion, affine)


def plan(healthy: int, patients: int, seed: int = 0) -> pd.DataFrame:
    """Who is in a cohort: `participant_id, index, healthy (1, 0), site, kind` (n/a in the healthy), sorted by id.

    Sites and kinds are dealt in turn, ids are shuffled. Healthy subjects have even indices and patients odd
    ones, so that a larger cohort holds the same people and more, under other ids.
    Raises CourseError for negative numbers or nobody at all.
    """
    if min(healthy, patients) < 0 or healthy + patients == 0:
        raise CourseError(f"{healthy} healthy subjects and {patients} patients are no cohort.", "Ask for one at least.")
    rank = np.concatenate([np.arange(healthy), np.arange(patients)])
    ill = np.repeat([0, 1], [healthy, patients])
    numbers = np.random.default_rng([seed, healthy, patients]).permutation(healthy + patients) + 1
    table = pd.DataFrame({"participant_id": [f"sub-{number:03d}" for number in numbers]})
    table["index"] = 2 * rank + ill
    table["healthy"] = 1 - ill
    table["site"] = np.array(list(SCANNERS))[rank % len(SCANNERS)]
    table["kind"] = np.where(ill, np.array(TURNS)[rank % len(TURNS)], "n/a")
    return table.sort_values("participant_id", ignore_index=True)


def folder_name(healthy: int, patients: int, voxel_mm: float = 2.0, seed: int = 0) -> str:
    """Name that holds all that decides a cohort's voxels, such as `24-healthy-16-patients-2mm-seed0-v1`."""
    return f"{healthy}-healthy-{patients}-patients-{voxel_mm:g}mm-seed{seed}-v{VERSION}"


def write_cohort(
    folder: Path,
    *,
    healthy: int,
    patients: int,
    voxel_mm: float = 2.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the cohort of `plan` as `write_subjects` does, and return its folder."""
    return write_subjects(folder, plan(healthy, patients, seed), voxel_mm=voxel_mm, seed=seed, progress=progress)


def write_subjects(
    folder: Path,
    table: pd.DataFrame,
    *,
    voxel_mm: float = 2.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the subjects of a table such as `plan` gives in a BraTS-like layout and return their folder.

    `sub-001/sub-001_flair.nii.gz`, `_t1`, `_t2`, each with a BIDS sidecar (`.json`) of its times, and, in patients,
    `_seg`; `participants.tsv` (the table without `index`) comes last, so its presence says that the cohort is whole.
    Subjects whose files are there are not made again. `progress(done, total)` is called in this process after each
    subject.
    Raises CourseError where the folder cannot be written or holds another cohort.
    """
    folder = Path(folder)
    listing = table.drop(columns="index").to_csv(sep="\t", index=False, lineterminator="\n").encode()
    _check_folder(folder, listing)
    rows = table.set_index("index").itertuples()
    tasks = [joblib.delayed(_write_subject)(folder, row, voxel_mm, seed) for row in rows]
    workers = joblib.Parallel(n_jobs=min(os.cpu_count() or 1, 4, len(tasks)), return_as="generator_unordered")
    for done, _ in enumerate(workers(tasks), start=1):
        if progress:
            progress(done, len(tasks))
    volumes.write_bytes(folder / "participants.tsv", listing)
    return folder


def _check_folder(folder: Path, listing: bytes) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = folder / "participants.tsv"
        other = there.exists() and there.read_bytes() != listing
    except OSError as error:
        raise CourseError(f"{folder} cannot be written: {error.strerror}.", "Choose another folder.") from error
    if other:
        raise CourseError(f"{folder} holds another cohort.", "Choose another folder, or remove this one.")


def _write_subject(folder: Path, row, voxel_mm: float, seed: int) -> None:
    names = [modality.lower() for modality in MODALITIES] + ([] if row.healthy else ["seg"])
    paths = [folder / row.participant_id / f"{row.participant_id}_{name}.nii.gz" for name in names]
    _write_sidecars(dict(zip(MODALITIES, paths, strict=False)), SCANNERS[row.site])
    if all(path.exists() for path in paths):
        return
    scan = simulate(row.Index, kind=None if row.healthy else row.kind, site=row.site, voxel_mm=voxel_mm, seed=seed)
    for path, voxels in zip(paths, [*scan.images.values(), scan.lesion], strict=False):
        volumes.write(path, voxels, scan.affine)


def _write_sidecars(paths: dict[str, Path], scanner: Scanner) -> None:
    for modality, path in paths.items():
        facts = dict(zip(("repetition_ms", "echo_ms", "inversion_ms"), scanner.sequences[modality], strict=True))
        facts = acquisition.known({"modality": "MR", "tesla": TESLA, **facts})
        beside = acquisition.sidecar(path)
        if not beside.exists():
            volumes.write_bytes(beside, json.dumps(acquisition.to_sidecar(facts), indent=1).encode())


@dataclass
class _Head:
    """A subject as the scanner will see it: the tissues' shares of each voxel add up to 1."""

    axes: list[np.ndarray]  # mm
    position: np.ndarray  # where each voxel lies in the template, mm [3, x, y, z]
    depth: np.ndarray  # mm below the brain's surface
    ventricle: np.ndarray  # mm to the lateral ventricles, negative inside
    shares: dict[str, np.ndarray]
    brain: np.ndarray
    lesion: np.ndarray

    @property
    def voxel_mm(self) -> float:
        return float(self.axes[0][1] - self.axes[0][0])

    def paint(self, tissue: str, share: np.ndarray, strength: np.ndarray | float) -> None:
        """Let `strength` × `share` of a tissue replace what is there; label a lesion where its share is over half."""
        new = np.clip(strength * share, 0, 1)
        self.shares = {name: there * (1 - new) for name, there in self.shares.items()}
        self.shares[tissue] = self.shares.get(tissue, 0) + new
        if TISSUES.label[tissue]:
            self.lesion[(share > 0.5) & self.brain] = TISSUES.label[tissue]


@lru_cache(maxsize=1)
def _template() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Maps of the template at 1 mm, and where their first voxel lies.

    `level`: the T1 image, sharpened, as if the ventricles were white matter; `depth`: mm below the surface;
    `ventricle`: mm into the lateral ventricles.
    """
    image = datasets.load_mni152_template(resolution=1)
    mask = datasets.load_mni152_brain_mask(resolution=1).get_fdata() > 0
    box = tuple(slice(max(s.start - 6, 0), s.stop + 6) for s in bounding_box(mask))
    t1, mask = image.get_fdata(dtype=np.float32)[box], mask[box]
    origin = (image.affine[:3, 3] + [s.start for s in box]).astype(np.float32)
    x, y, z = np.indices(t1.shape, dtype=np.float32) + _column(origin)
    level, depth = _sharpen(t1), _signed_distance(mask)
    ventricle = _signed_distance(_lateral_ventricles((level < 0.5) & (depth > 12), np.abs(x), y, z))
    level = np.where(ventricle > -3, 0.9, level)
    level += 0.07 * _ramp(-20 - z, 12) * _ramp(-42 - y, 12)  # white matter of the cerebellum, thin and averaged away
    return {"level": level, "depth": depth, "ventricle": ventricle}, origin


@lru_cache(maxsize=1)
def _smoothed_template(voxel_mm: float) -> dict[str, np.ndarray]:
    return {name: ndimage.gaussian_filter(values, 0.3 * voxel_mm) for name, values in _template()[0].items()}


def _sharpen(t1: np.ndarray) -> np.ndarray:
    """Gyri and sulci, blurred in an average of 152 heads, brought out at two scales."""
    inside = (t1 > 0).astype(np.float32)
    smooth = [ndimage.gaussian_filter(t1, s) / np.maximum(ndimage.gaussian_filter(inside, s), 1e-3) for s in (2, 5)]
    return np.where(t1 > 0, 3 * t1 - smooth[0] - smooth[1], 0.3)


def _signed_distance(inside: np.ndarray) -> np.ndarray:
    """Voxels to the outline of a region, positive inside."""
    return (ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)).astype(np.float32)


def _lateral_ventricles(fluid: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The two largest lakes of fluid between insula, corpus callosum and cisterns; x is mm from the midline."""
    lakes = fluid & (x > 1) & (x < 22 + np.maximum(0, -15 - y) / 2) & ((y > -18) | (x > 24 - z))
    lakes &= (y < 36) & (y > -34 - x) & (z > -8) & (z < 30 - np.maximum(0, y - 5) / 2)
    labels, _ = ndimage.label(lakes)
    return np.isin(labels, 1 + np.argsort(np.bincount(labels.ravel())[1:])[-2:])


def _noise(rng: np.random.Generator, axes: list[np.ndarray], length_mm: float) -> np.ndarray:
    """Smooth Gaussian field with mean 0 and variance 1 in every voxel, its structures about `length_mm` wide.

    White noise on a lattice, seen through a Gaussian. The lattice is laid in millimetres, so that a subject
    keeps its fields at every voxel size.
    """
    knots = [np.arange(low - 2 * length_mm, high + 2 * length_mm, length_mm) for low, high in BOX_MM]
    field = rng.standard_normal([len(k) for k in knots], dtype=np.float32)
    for axis, knot in zip(axes, knots, strict=True):
        weight = np.exp(-(((axis[:, None] - knot) / (0.7 * length_mm)) ** 2) / 2)
        weight /= np.linalg.norm(weight, axis=1, keepdims=True)
        field = np.tensordot(field, weight.astype(np.float32), (0, 1))
    return field


def _ramp(signed: np.ndarray, width: float) -> np.ndarray:
    """0 to 1 as a signed quantity crosses zero, linear over `width`."""
    return np.clip(0.5 + signed / width, 0, 1)


def _apart(axes: list[np.ndarray], centre) -> np.ndarray:
    """Vectors from a point to every voxel, mm [3, x, y, z]."""
    return np.stack(np.meshgrid(*[a - np.float32(c) for a, c in zip(axes, centre, strict=True)], indexing="ij"))


def _column(vector) -> np.ndarray:
    """A vector that broadcasts over a grid [3, x, y, z]."""
    return np.float32(vector)[:, None, None, None]


def _fine(axes: list[np.ndarray]) -> list[np.ndarray]:
    """Four points in the plane of each voxel."""
    quarter = (axes[0][1] - axes[0][0]) / 4
    return [np.ravel([a - quarter, a + quarter], order="F") for a in axes[:2]] + [axes[2]]


def _voxel_means(fine: np.ndarray) -> np.ndarray:
    """Partial volume: what the four points of each voxel come to, for [map, x, y, z]."""
    maps, x, y, z = fine.shape
    return fine.reshape(maps, x // 2, 2, y // 2, 2, z).mean(axis=(2, 4))


def _bend(rng: np.random.Generator, axes: list[np.ndarray]) -> np.ndarray:
    """Where in the template each point of a subject lies: pose, size and smooth deformation at three scales."""
    middle = np.mean(BOX_MM, axis=1)
    pose = Rotation.from_euler("xyz", rng.normal(0, 3, 3), degrees=True).as_matrix()
    linear = pose / (rng.uniform(0.88, 0.95) * rng.uniform(0.97, 1.03, 3))
    position = np.tensordot(np.float32(linear), _apart(axes, middle), 1) + _column(middle)
    for length_mm, millimetres in ((40, 2.6), (16, 1.6), (8, 0.7)):
        position += millimetres * np.stack([_noise(rng, axes, length_mm) for _ in range(3)])
    return position


def _grow(rng: np.random.Generator, axes: list[np.ndarray], position: np.ndarray) -> _Head:
    """Healthy tissue, from young to old (wide sulci and ventricles), with what is conspicuous and harmless."""
    age = rng.uniform()
    fluid, white, depth, ventricle = _voxel_means(_tissue(rng, age, _fine(axes), position))
    position = _voxel_means(position)
    grey = 1 - fluid - white
    deep = grey * _ramp(1 - np.linalg.norm((position - _column((0, -4, 4))) / _column((36, 32, 24)), axis=0), 0.3)
    brain = depth > 1 + 0.8 * _noise(rng, axes, 6)
    shares = {"csf": fluid, "grey": grey - deep, "deep_grey": deep, "white": white}
    head = _Head(axes, position, depth, -ventricle, shares, brain, np.zeros(brain.shape, np.uint8))
    _paint_harmless(head, rng, age)
    return head


def _tissue(rng: np.random.Generator, age: float, axes: list[np.ndarray], position: np.ndarray) -> np.ndarray:
    """Shares of fluid and white matter, depth and distance into the ventricles at points of the template."""
    index = position - _column(_template()[1])
    maps = _smoothed_template(float(axes[2][1] - axes[2][0]))
    level, depth, ventricle = (ndimage.map_coordinates(m, index, order=1, cval=-10) for m in maps.values())
    left, right = 2.8 * age - 0.5 + rng.normal(0, 0.6, 2)
    dilated = ventricle + left + (right - left) * _ramp(position[0], 16)
    ventricle = np.minimum(dilated, np.abs(position[0]) - 1)  # the septum stays
    level += 0.03 * _noise(rng, axes, 4) + 0.03 * _noise(rng, axes, 9)
    fluid = np.maximum(_ramp(0.34 + 0.1 * age - level, 0.24), _ramp(ventricle, 1.5))
    white = (1 - fluid) * _ramp(level - rng.normal(0.79, 0.012), 0.32)
    return np.stack([fluid, white, depth, ventricle])


def _paint_harmless(head: _Head, rng: np.random.Generator, age: float) -> None:
    """Caps on the horns of the ventricles; vessels, which run where two random fields are both zero."""
    horns = _ramp(np.abs(head.position[1] + 8) - 28, 12)
    reach = (0.5 + 3 * age) * (1 + 0.4 * _noise(rng, head.axes, 12))
    head.paint("cap", horns * _ramp(reach - head.ventricle, 4) * (1 - head.shares["csf"]), 0.25 + 0.4 * age)
    for tissue in ("vessel", "slow_flow"):
        off_axis = 15 * np.hypot(_noise(rng, head.axes, 22), _noise(rng, head.axes, 22))
        head.paint(tissue, _ramp(1 - off_axis, 2) * _ramp(12 - head.depth, 8), 0.8)


def _place(rng: np.random.Generator, growth: Growth, in_pons: bool, axes: list[np.ndarray], position: np.ndarray):
    """Centre (mm) and volume (ml) of a lesion. It shoves the surroundings aside: `position` is changed in place."""
    millilitres = np.exp(rng.uniform(*np.log(growth.millilitres)))
    place = rng.normal(PONS, 2) if in_pons else _white_spot(rng, _radius(millilitres))
    nearest = ((position - _column(place)) ** 2).sum(axis=0).argmin()
    centre = [a[i] for a, i in zip(_fine(axes), np.unravel_index(nearest, position.shape[1:]), strict=True)]
    apart = _apart(_fine(axes), centre)
    reach = 2 * (1.1 * _radius(millilitres)) ** 2
    position -= np.float32(rng.uniform(*growth.swelling)) * apart * np.exp(-(apart**2).sum(axis=0) / np.float32(reach))
    return centre, millilitres


def _radius(millilitres: float) -> float:
    return (750 * millilitres / np.pi) ** (1 / 3)


def _white_spot(rng: np.random.Generator, radius: float) -> np.ndarray:
    """A point in the template's white matter above the tentorium with room for a lesion."""
    maps, origin = _template()
    while True:
        place = rng.uniform((-58, -92, -20), (58, 62, 66))
        level, depth, ventricle = (values[tuple(np.intp(place - origin))] for values in maps.values())
        if level > 0.78 and depth > 4 + 0.35 * radius and ventricle < -2 - 0.3 * radius:
            return place


def _paint_mass(head: _Head, rng: np.random.Generator, growth: Growth, centre, millilitres: float) -> None:
    """A lesion of one piece: an ellipsoid with a disturbed outline, its layers nested, faint or plain."""
    radius, strength = _radius(millilitres), rng.uniform(0.5, 1)
    stretch = Rotation.random(rng=rng).as_matrix() * np.exp(rng.normal(0, 0.2, 3))[:, None]
    distance = np.linalg.norm(np.tensordot(stretch.astype(np.float32), _apart(head.axes, centre), 1), axis=0)
    bumps = 0.25 * _noise(rng, head.axes, 0.9 * radius) + 0.1 * _noise(rng, head.axes, max(0.35 * radius, 3))
    fingers = growth.fingers * (head.shares["white"] + 0.25 * _noise(rng, head.axes, 5))
    side = head.position[0] * head.position[0].flat[distance.argmin()]
    allowed = head.brain & (head.shares["csf"] < 0.5) & ((side > 0) | (head.position[2] < -12))
    for number, (tissue, part) in enumerate(growth.layers.items()):
        score = radius * bumps - distance + (0 if number else radius * fingers)
        count = max(1, round(1000 * millilitres * rng.uniform(*part) / head.voxel_mm**3))
        share = _of_volume(score, count, allowed, growth.edge_mm)
        head.paint(
            tissue, share, strength * (0.9 + 0.12 * _noise(rng, head.axes, 4) + 0.12 * _noise(rng, head.axes, 10))
        )
        allowed = share > 0.5


def _of_volume(score: np.ndarray, count: int, allowed: np.ndarray, edge_mm: float) -> np.ndarray:
    """Share 0 to 1 with a soft edge, over half in the `count` voxels of highest score."""
    best = np.sort(score[allowed])[::-1]
    return _ramp(score - best[min(count, len(best) - 1)], edge_mm) * allowed


def _paint_plaques(head: _Head, rng: np.random.Generator) -> None:
    """Multiple sclerosis: ovoids upright on the ventricles' walls (Dawson's fingers), every fourth under the cortex."""
    white, bumps = head.shares["white"], 0.25 * _noise(rng, head.axes, 6)
    near = np.argwhere((white > 0.6) & (head.ventricle > 1) & (head.ventricle < 9))
    under = np.argwhere((white > 0.4) & (head.shares["grey"] > 0.25) & (head.ventricle > 12) & (head.position[2] > 0))
    outward = np.stack(np.gradient(head.ventricle))
    share = np.zeros_like(white)
    for number in range(rng.integers(8, 30)):
        voxel = tuple(rng.choice(near if number % 4 else under))
        upright = outward[(slice(None), *voxel)] / np.linalg.norm(outward[(slice(None), *voxel)])
        stretch = np.eye(3) - (0.45 if number % 4 else 0) * np.outer(upright, upright)
        apart = _apart(head.axes, [a[i] for a, i in zip(head.axes, voxel, strict=True)])
        distance = np.linalg.norm(np.tensordot(stretch.astype(np.float32), apart, 1), axis=0)
        share = np.maximum(share, _ramp(np.exp(rng.uniform(*np.log((1.5, 5)))) * (1 + bumps) - distance, 2))
    head.paint("plaque", share * (head.shares["csf"] < 0.5), rng.uniform(0.45, 1))


def _scan(head: _Head, scanner: Scanner, modality: str, rng: np.random.Generator) -> np.ndarray:
    """The head through a scanner: signal, texture, blur, shading, artefacts, Rician noise, units."""
    levels = {name: _signal(tissue, *scanner.sequences[modality]) for name, tissue in TISSUES.iterrows()}
    signal = sum(share * (levels[name] / levels["white"]) for name, share in head.shares.items()) * head.brain
    signal *= 1 + 0.02 * _noise(rng, head.axes, 5) + 0.03 * _noise(rng, head.axes, 14)
    signal = ndimage.gaussian_filter(signal, np.array(scanner.blur_mm) / head.voxel_mm)
    signal = _artefacts(signal * np.exp(scanner.shading * _noise(rng, head.axes, 70)), rng, head.voxel_mm)
    real, imaginary = scanner.noise * rng.standard_normal((2, *signal.shape), dtype=np.float32)
    image = scanner.gain * np.exp(rng.normal(0, 0.1)) * np.hypot(signal + real, imaginary)
    return np.where(head.brain, np.maximum(np.round(image), 1), 0).astype(np.int16)


def _signal(tissue: pd.Series, tr: float, te: float, ti: float) -> float:
    """Spin echo, after an inversion if TI is not 0: density × recovery along T1 × decay along T2."""
    late, inverted = np.exp(-tr / tissue.t1_ms), np.exp(-ti / tissue.t1_ms)
    recovery = 1 - 2 * inverted + late if ti else 1 - late
    return float(tissue.density * recovery * np.exp(-te / tissue.t2_ms))


def _artefacts(signal: np.ndarray, rng: np.random.Generator, voxel_mm: float) -> np.ndarray:
    """Ghosts of a moving head, and slices of unequal gain: each in a third of the scans."""
    if rng.uniform() < 1 / 3:
        shift = round(rng.uniform(15, 40) / voxel_mm)
        signal = signal + rng.uniform(0.02, 0.06) * (np.roll(signal, shift, axis=1) - np.roll(signal, -shift, axis=1))
    if rng.uniform() < 1 / 3:
        signal = signal * rng.normal(1, 0.02, signal.shape[2]).astype(np.float32)
    return signal
