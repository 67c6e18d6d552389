"""Volumes of very different shapes before one network: all squeezed to one shape, each squeezed to the usual shape of
its group ("clustered reshape"), or resampled to one voxel size and cropped about the brain.

Figures are taken on the grid that the clinic acquired: what a way loses counts, what the protocol had lost before does
not, and all ways are judged on the same voxels of the same size.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from monai.networks.nets import AutoEncoder
from sklearn.cluster import KMeans

from lib import metrics, single_scan
from lib.boxes import Box, extent_mm, middle_of
from lib.cohort import Cohort, PreparedSubject
from lib.components import bounding_box
from lib.errors import CourseError, check_least, check_multiple
from lib.models import cae3d
from lib.models.detector import residual
from lib.preprocessing import HALVINGS
from lib.training import History, Items, Plan, choose_device, derived_seed, mixed_precision, train

RADII_MM = (5, 10)  # of the spheres that are taken through each way
LEAST_SIDE = 2 * HALVINGS  # so that a code has more than one place, which normalising one volume needs
LEAST_COVER = 0.1  # of brain in what comes back to a voxel: at the edges values are divided by their share of brain
REACH = 4  # network voxels that a mask can spread over
BENT = tuple(f"{name}_{radius}" for radius in RADII_MM for name in ("kept", "dice", "aspect", "voxels"))
FIGURES = ("mse", "mae", "mse_way", "mse_grey", "network_voxels", "ap", "ap_grey", "prevalence", *BENT)


@dataclass(frozen=True)
class Protocol:
    """How a clinic scans: edges of a voxel and the least field of view in mm, [slice, row, column] of an axial view;
    the field grows where a brain needs more, and is 0 along the axis on which slices are added head by head."""

    name: str
    edges_mm: tuple[float, float, float]
    field_mm: tuple[float, float, float]


PROTOCOLS = (
    Protocol("isotropic 2 mm", (2, 2, 2), (160, 192, 160)),
    Protocol("axial, 6 mm thick", (6, 2, 2), (0, 208, 208)),
    Protocol("sagittal, 6 mm thick", (2, 2, 6), (176, 208, 0)),
    Protocol("coronal, 6 mm thick", (2, 6, 2), (176, 0, 176)),
    Protocol("isotropic 3 mm, wide", (3, 3, 3), (240, 240, 240)),
)


@dataclass(frozen=True)
class Settings:
    """`side`: a network sees about side³ voxels of every volume; `groups`: of shapes, at most; `width` and `code` as in
    cae3d.Settings; `epochs` passes over the training volumes, one at a step, for every way."""

    side: int = 48
    groups: int = 4
    width: int = 8
    code: int = 64
    epochs: int = 10
    learning_rate: float = 5e-3

    def __post_init__(self):
        check_least("groups", self.groups, 1)
        check_least("side", self.side, LEAST_SIDE)
        for name, unit in (("side", HALVINGS), ("width", cae3d.GROUPS), ("code", cae3d.GROUPS)):
            check_multiple(name, getattr(self, name), unit)


@dataclass(frozen=True)
class Acquired:
    """A subject as its protocol shows it, with voxels of `edges_mm`: `image` float32 [modality, slice, row, column], 0
    outside what is `kept` of the brain; `brain`, `kept`, `lesion` bool [slice, row, column]."""

    id: str
    protocol: str
    edges_mm: np.ndarray
    image: np.ndarray
    brain: np.ndarray
    kept: np.ndarray
    lesion: np.ndarray


@dataclass(frozen=True)
class Clinics:
    """A prepared cohort as if each subject had been scanned in one of several clinics: `protocols` by subject."""

    prepared: Cohort
    protocols: Mapping[str, Protocol]

    @classmethod
    def dealt(cls, prepared: Cohort, seed: int = 0, protocols: Sequence[Protocol] = PROTOCOLS) -> "Clinics":
        """Protocols in turn over the subjects of each split, the healthy and the ill apart, in an order by lot: the
        protocol tells nothing of health."""
        order = sorted(prepared.subjects, key=lambda s: (s.split, s.healthy, derived_seed(seed, "protocol", s.id)))
        return cls(prepared, {s.id: protocols[i % len(protocols)] for i, s in enumerate(order)})

    def grid(self, subject: PreparedSubject) -> Box:
        """The acquired grid over the prepared one, smoothed as thick slices are; never finer than what was prepared."""
        protocol, prepared_mm = self.protocols[subject.id], subject.voxel_mm[::-1]
        edges = np.maximum(protocol.edges_mm, prepared_mm)
        shape = np.ceil(np.maximum(protocol.field_mm, extent_mm(subject.brain, prepared_mm)) / edges - 1e-6)
        return Box.centred(subject.brain, prepared_mm, tuple(shape.astype(int).tolist()), edges)

    def scan(self, subject: PreparedSubject, keep: np.ndarray | None = None) -> Acquired:
        """What the clinic has of a subject; of prepared slices that are not to `keep` [slice], the image is 0."""
        box, brain = self.grid(subject), np.asarray(subject.brain)
        inside = box.cut(brain) > 0.5
        seen = brain if keep is None or keep[brain.any(axis=(1, 2))].all() else brain & keep[:, None, None]
        kept = inside if seen is brain else inside & (box.cut(seen) > 0.5)
        lesion = inside & (box.cut(subject.lesion) > 0.5) if subject.lesion.any() else np.zeros_like(inside)
        image = np.stack([box.cut(one * seen) for one in subject.image]) * kept
        edges = box.step * subject.voxel_mm[::-1]
        return Acquired(subject.id, self.protocols[subject.id].name, edges, image, inside, kept, lesion)

    def healthy(self, *splits: str) -> Iterator[Acquired]:
        """The healthy material of splits, scan by scan."""
        for split in splits:
            for subject, keep in self.prepared.healthy_material(split):
                if keep.any() and (scan := self.scan(subject, keep)).kept.any():
                    yield scan

    def shapes(self) -> pd.DataFrame:
        """A row a subject: `subject`, `split`, `healthy`, `protocol`, and `shape` (slices, rows, columns)."""
        rows = [(s.id, s.split, s.healthy, self.protocols[s.id].name, self.grid(s).shape)
                for s in self.prepared.subjects]  # fmt: skip
        return pd.DataFrame(rows, columns=["subject", "split", "healthy", "protocol", "shape"])


@dataclass(frozen=True)
class Groups:
    """Volumes grouped by the logarithm of their shapes: the most common shape of each group, and what it is squeezed
    to."""

    clusters: KMeans
    modal: tuple[tuple[int, int, int], ...]
    target: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, int, int]], groups: int, voxels: float) -> "Groups":
        """At most so many groups of these shapes, each to be squeezed to about so many voxels."""
        clusters = KMeans(min(groups, len(set(shapes))), n_init=10, random_state=0).fit(np.log(shapes))
        members = [[s for s, g in zip(shapes, clusters.labels_, strict=True) if g == group]
                   for group in range(clusters.n_clusters)]  # fmt: skip
        modal = tuple(Counter(sorted(one)).most_common(1)[0][0] for one in members)
        return cls(clusters, modal, tuple(halvable(one, voxels) for one in modal))

    def group(self, shape: tuple[int, int, int]) -> int:
        """The group that a shape belongs to, also one that was not there before."""
        return int(self.clusters.predict(np.log([shape]))[0])


Way = Callable[[Acquired], Box]


@dataclass(frozen=True)
class Learnt:
    """A way to the network, and the network that learnt from what came along it."""

    way: Way
    network: AutoEncoder
    history: History
    device: torch.device

    @torch.inference_mode()
    def look(self, scan: Acquired) -> tuple[Box, np.ndarray, np.ndarray, np.ndarray]:
        """The network's grid; on it the scan and what is kept of it, as `cut` gives them, and what the network expects,
        float32 [modality, slice, row, column]."""
        box = self.way(scan)
        image, inside = cut(scan, box)
        self.network.eval()
        forward = mixed_precision(self.network, self.device)
        drawn = forward(torch.from_numpy(image[None]).to(self.device))[0].cpu().numpy()
        return box, image, inside, drawn * inside


def halvable(shape: Sequence[float], voxels: float) -> tuple[int, int, int]:
    """The shape of sides that halve four times which is nearest to the proportions of a shape and to so many voxels."""
    wanted = np.log(shape) + (np.log(voxels) - np.log(shape).sum()) / 3
    sides = np.arange(HALVINGS, np.exp(wanted.max()) + 2 * HALVINGS, HALVINGS).astype(int).tolist()
    choices = np.array(list(product(sides, repeat=3)))
    off = np.log(choices) - wanted
    return tuple(choices[((off**2).sum(axis=1) + off.sum(axis=1) ** 2).argmin()].tolist())


def groups(clinics: Clinics, settings: Settings) -> Groups:
    """The groups of the healthy training volumes' shapes."""
    return Groups.of([clinics.grid(s).shape for s in _material(clinics, "train")], settings.groups, settings.side**3)


def ways(clinics: Clinics, settings: Settings) -> dict[str, Way]:
    """The three ways by name, fitted to the healthy training volumes alone: their groups, and the voxel size at which
    the longest of their brains fills the cube."""
    cube, grouped = (settings.side,) * 3, groups(clinics, settings)
    voxel_mm = max(extent_mm(s.brain, s.voxel_mm[::-1]).max() for s in _material(clinics, "train")) / settings.side
    return {
        "fixed": lambda scan: Box.squeezed(scan.brain.shape, cube),
        "clustered": lambda scan: Box.squeezed(scan.brain.shape, grouped.target[grouped.group(scan.brain.shape)]),
        "resampled": lambda scan: Box.centred(scan.brain, scan.edges_mm, cube, voxel_mm),
    }


def cut(scan: Acquired, box: Box) -> tuple[np.ndarray, np.ndarray]:
    """A scan on a network's grid: the image, float32 [modality, slice, row, column], and what is kept of it, bool."""
    inside = box.cut(scan.kept) > 0.5
    return np.stack([box.cut(one) for one in scan.image]) * inside, inside


def volumes(clinics: Clinics, along: Mapping[str, Way]) -> dict[str, dict[str, Items]]:
    """The healthy material of train and of validation as each way brings it, by way and split, for `training.train`:
    dicts of `image` float32 [modality, slice, row, column] and `brain` bool, of one way in many shapes."""
    found = {name: {"train": [], "validation": []} for name in along}
    for split in ("train", "validation"):
        _material(clinics, split)
        for scan in clinics.healthy(split):
            for name, way in along.items():
                found[name][split].append(dict(zip(("image", "brain"), cut(scan, way(scan)), strict=True)))
    return found


def learn(
    clinics: Clinics, settings: Settings, *, out: Path, seed: int = 0, device: str = "auto", resume: bool = True
) -> dict[str, Learnt]:
    """Train a 3D autoencoder along each of the three `ways`, by name, on healthy volumes; checkpoints in `out`.

    One volume a step, for no two need have one shape. Every network starts from the same weights, sees the same
    volumes in the same order and takes as many steps.
    """
    along, learnt, place = ways(clinics, settings), {}, choose_device(device)
    plan = Plan(settings.epochs, 1, settings.learning_rate, settings.epochs, cosine=True)
    how = [asdict(clinics.protocols[s.id]) for s in clinics.prepared.subjects]
    for name, brought in volumes(clinics, along).items():
        torch.manual_seed(derived_seed(seed, "reshape", "weights"))
        network = cae3d.network(len(clinics.prepared.modalities), settings.width, settings.code)
        history = train(
            network, cae3d.squared_error, clinics.prepared, plan, items=brought.get,
            checkpoint=out / f"reshape_{name}.checkpoint",
            seed=derived_seed(seed, "reshape", asdict(settings), how), device=place, resume=resume,
        )  # fmt: skip
        learnt[name] = Learnt(along[name], network, history, place)
    return learnt


def sphere(scan: Acquired, radius_mm: float) -> np.ndarray:
    """A ball about the middle of the brain, bool [slice, row, column]: at least the voxels nearest to it."""
    place = np.indices(scan.brain.shape, sparse=True)
    mm = [(i - m) * edge for i, m, edge in zip(place, middle_of(scan.brain), scan.edges_mm, strict=True)]
    squared = sum(one**2 for one in mm)
    return squared <= max(radius_mm**2, squared.min() + 1e-6)


def distortion(ball: np.ndarray, box: Box) -> dict[str, float]:
    """What a network's grid makes of a mask [slice, row, column]: `kept`, the share of its volume that comes back, and
    its `dice` then; on that grid its `voxels` and its `aspect`, the longest by the shortest axis (second moments)."""
    window, near = _around(ball, box)
    ball = ball[window]
    there = np.clip(near.cut(ball), 0, 1)
    back = near.back(there) > 0.5
    places = np.argwhere(there > 0)
    spread = np.cov(places.T, aweights=there[there > 0], ddof=0) + np.eye(3) / 12  # a voxel is a box, not a point
    axes = np.sqrt(np.linalg.eigvalsh(spread))
    return {
        "kept": back.sum() / ball.sum(),
        "dice": 2 * (back & ball).sum() / (back.sum() + ball.sum()),
        "aspect": axes[-1] / axes[0],
        "voxels": float(there.sum()),
    }


def measure(clinics: Clinics, learnt: Mapping[str, Learnt]) -> pd.DataFrame:
    """A row for each scan and way: `subject`, `protocol`, `material`, `way`, and FIGURES (NaN where none is due).

    Of healthy material of validation and test, inside the brain: squared and absolute error of what the network expects
    (`mse`, `mae`), squared error of the way there and back without a network (`mse_way`) and of one grey, the brain's
    mean (`mse_grey`); `network_voxels`; the spheres' `distortion`. Of test patients: average precision of the signed
    residual (`ap`), of that to one grey in place of what the network expects (`ap_grey`), and of a random map, which is
    the `prevalence`.
    """
    rows = []
    for scan in clinics.healthy("validation", "test"):
        rows += [_about(scan, "healthy", way) | _redrawn(scan, one) for way, one in learnt.items()]
    for subject in clinics.prepared.split("test"):
        if subject.lesion.any() and (scan := clinics.scan(subject)).lesion.any():
            rows += [_about(scan, "patient", way) | _found(scan, one, clinics.prepared.modalities)
                     for way, one in learnt.items()]  # fmt: skip
    return pd.DataFrame(rows).reindex(columns=["subject", "protocol", "material", "way", *FIGURES])


def summary(measured: pd.DataFrame) -> pd.DataFrame:
    """What `measure` found, a row a way: the mean of each of FIGURES over scans with its 95 % interval (`_low`,
    `_high`), and the numbers of healthy scans and patients, `n_healthy` and `n_patients`."""
    rows = {}
    for way, table in measured.groupby("way", sort=False):
        counts = {"n_healthy": table.mse.count(), "n_patients": table.ap.count()}
        rows[way] = {
            k: v for name in FIGURES for k, v in metrics.mean(name, table[name].dropna().to_numpy()).items()
        } | counts
    return pd.DataFrame.from_dict(rows, orient="index")


def differences(measured: pd.DataFrame, figures: Sequence[str] = ("mse", "mae", "mse_way", "ap")) -> pd.DataFrame:
    """Each way less each other on the same scans: a row a pair, the mean difference of each figure with its 95 %
    interval."""
    rows = {}
    for other, way in combinations(measured.way.unique(), 2):
        pairs = measured.set_index(["subject", "material"])
        left = pairs[pairs.way == way][list(figures)] - pairs[pairs.way == other][list(figures)]
        rows[f"{way} − {other}"] = {
            k: v for name in figures for k, v in metrics.mean(name, left[name].dropna().to_numpy()).items()
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def compare(
    prepared: Cohort, settings: Settings | None = None, *, out: Path, seed: int = 0, device: str = "auto",
    resume: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """All of it in one table, `summary`: clinics dealt, three networks learnt (checkpoints in the folder `out`), every
    scan judged."""
    settings, clinics = settings or Settings(), Clinics.dealt(prepared, seed)
    learnt = learn(clinics, settings, out=out, seed=seed, device=device, resume=resume)
    return summary(measure(clinics, learnt))


def _material(clinics: Clinics, split: str) -> list[PreparedSubject]:
    """The subjects of a split that have healthy slices; CourseError where none has."""
    found = [s for s, keep in clinics.prepared.healthy_material(split) if keep.any()]
    if not found:
        raise CourseError(f"The split {split} has no healthy slice.", "Give more healthy subjects, or other splits.")
    return found


def _around(ball: np.ndarray, box: Box) -> tuple[tuple[slice, ...], Box]:
    """The part of a volume that a mask reaches through smoothing and interpolation, and a box over that part alone."""
    reach = np.ceil(REACH * box.step).astype(int)
    window = tuple(slice(max(s.start - r, 0), min(s.stop + r, n))
                   for s, r, n in zip(bounding_box(ball), reach, ball.shape, strict=True))  # fmt: skip
    start, shape = np.array([s.start for s in window]), tuple(s.stop - s.start for s in window)
    return window, replace(box, start=box.start - start, around=shape)


def _about(scan: Acquired, material: str, way: str) -> dict[str, str]:
    return {"subject": scan.id, "protocol": scan.protocol, "material": material, "way": way}


def _redrawn(scan: Acquired, learnt: Learnt) -> dict[str, float]:
    box, image, inside, drawn = learnt.look(scan)
    covered = np.maximum(box.back(inside.astype(np.float32))[scan.kept], LEAST_COVER)
    expected, alone = (np.stack([box.back(one)[scan.kept] for one in volume]) / covered for volume in (drawn, image))
    truth = scan.image[:, scan.kept]
    figures = {
        "mse": ((expected - truth) ** 2).mean(),
        "mae": abs(expected - truth).mean(),
        "mse_way": ((alone - truth) ** 2).mean(),
        "mse_grey": truth.var(axis=1).mean(),
        "network_voxels": inside.sum(),
    }
    for radius in RADII_MM:
        bent = distortion(sphere(scan, radius), box)
        figures |= {f"{name}_{radius}": value for name, value in bent.items()}
    return {name: float(value) for name, value in figures.items()}


def _found(scan: Acquired, learnt: Learnt, modalities: tuple[str, ...]) -> dict[str, float]:
    box, image, inside, drawn = learnt.look(scan)
    grey = image[:, inside].mean(axis=1)[:, None, None, None] * inside
    pairs = ((torch.from_numpy(image[None]), torch.from_numpy(one[None])) for one in (drawn, grey))
    maps = [box.back(residual(*pair, modalities, "signed")[0].numpy()) for pair in pairs]
    network, nothing = (single_scan.precision(scan, one) for one in maps)
    return {"ap": network, "ap_grey": nothing, "prevalence": float(scan.lesion.sum() / scan.brain.sum())}
