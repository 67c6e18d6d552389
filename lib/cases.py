"""What a viewer looks at: scans with anomaly maps, what a threshold promises, and what it finds."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial

import numpy as np

from lib import components, judging, models, postprocessing, run_folder, scoring
from lib.cohort import Cohort, PreparedSubject
from lib.errors import CourseError
from lib.metrics import codes, value_of, values_of
from lib.models.detector import Detector

KEPT = 4  # maps or redrawn volumes
LOWEST = int(codes(np.array([-np.inf]))[0])


class Lazy(Mapping):
    """What `make(key)` gives for each of some keys, made when asked for; the latest `kept` are kept, None: all."""

    def __init__(self, keys: Sequence[Hashable], make: Callable, kept: int | None = KEPT):
        self._keys, self._make = tuple(keys), lru_cache(kept)(make)

    def __contains__(self, key) -> bool:
        return key in self._keys

    def __getitem__(self, key):
        if key not in self._keys:
            raise KeyError(key)
        return self._make(key)

    def __iter__(self) -> Iterator:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass(frozen=True)
class Case:
    """One scan to look at.

    `image` [modality, slice, row, column], prepared intensity; `brain` and `lesion` (None: not known), bool [slice,
    row, column]; `voxel_mm`: edges of a voxel along these; `maps`: anomaly maps [slice, row, column] by method;
    `redraws`: by method, what gives the healthy slice expected in place of one by its number, [modality, row, column].
    Both may be Lazy. Raises CourseError where these do not fit each other.
    """

    name: str
    modalities: tuple[str, ...]
    image: np.ndarray
    brain: np.ndarray
    voxel_mm: Sequence[float]
    maps: Mapping[str, np.ndarray]
    lesion: np.ndarray | None = None
    redraws: Mapping[str, Callable[[int], np.ndarray]] = field(default_factory=dict)

    def __post_init__(self):
        shape = np.shape(self.brain)
        lesion = shape if self.lesion is None else np.shape(self.lesion)
        if len(shape) != 3 or np.shape(self.image) != (len(self.modalities), *shape) or lesion != shape:
            raise CourseError(
                f"{self.name}: an image {np.shape(self.image)}, a brain {shape} and a lesion {lesion} do not fit.",
                "Give an image [modality, slice, row, column], and masks [slice, row, column].",
            )
        edges = np.asarray(self.voxel_mm, float)
        if edges.shape != (3,) or not (np.isfinite(edges) & (edges > 0)).all():
            raise CourseError(f"{self.name}: the voxel's edges are {self.voxel_mm} mm.", "Give three lengths above 0.")
        if not len(self.maps) or not np.any(self.brain):
            raise CourseError(f"{self.name} has no map, or no brain.", "Give a map by its method, and a brain mask.")

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel in mm³."""
        return float(np.prod(self.voxel_mm))

    def codes(self, method: str, step: str) -> np.ndarray:
        """A method's map after a step of post-processing, as codes uint16 [slice, row, column], 0 outside the brain."""
        found, brain = np.asarray(self.maps[method]), np.asarray(self.brain)
        if found.shape != brain.shape:
            raise CourseError(
                f"{self.name}: the map of {method} is {found.shape}, the brain {brain.shape}.",
                "Give a map on the voxels of the brain mask.",
            )
        with np.errstate(over="ignore"):
            within = np.where(brain, found, 0).astype(np.float16)
        if not np.isfinite(within).all():
            raise CourseError(
                f"{self.name}: the map of {method} holds values that are no numbers, or beyond 65504.",
                "Make the map again.",
            )
        return postprocessing.scores(codes(within), brain, step)

    def detected(self, code: np.ndarray, threshold: float, step: str) -> np.ndarray:
        """The voxels of the brain whose value reaches a threshold, after a step, bool [slice, row, column]."""
        smallest = postprocessing.voxels(postprocessing.SMALLEST_MM3, self.voxel_mm3)
        return postprocessing.detected(code, np.asarray(self.brain), code_of(threshold), step, smallest)

    def figures(self, found: np.ndarray) -> dict[str, float]:
        """Of a detection: `ml`, `components`; `truth_ml` and `truth_components` where the truth is known; `dice` where
        there is a lesion. Voxels inside the brain."""
        ml, voxels = self.voxel_mm3 / 1000, int(np.count_nonzero(found))
        result = {"ml": voxels * ml, "components": components.number(found)}
        if self.lesion is None:
            return result
        truth, size, number = self._truth
        result |= {"truth_ml": size * ml, "truth_components": number}
        return result | ({"dice": 2 * int(np.count_nonzero(found & truth)) / (voxels + size)} if size else {})

    @cached_property
    def _truth(self) -> tuple[np.ndarray, int, int]:
        """The lesion inside the brain, its voxels and its components."""
        truth = np.asarray(self.lesion) & self.brain
        return truth, int(np.count_nonzero(truth)), components.number(truth)


@dataclass(frozen=True)
class Promise:
    """What healthy scans promise: at most `rates` of their voxels reach `thresholds`; float [n] each, the thresholds
    rising."""

    thresholds: Sequence[float]
    rates: Sequence[float]

    @classmethod
    def of(cls, counts: np.ndarray) -> "Promise":
        """Exact, from the numbers of healthy voxels by code, int [65 536]."""
        there = np.flatnonzero(counts)
        above = np.append(np.cumsum(counts[there][::-1])[::-1], 0)  # fewer from the next code on
        starts = np.insert(there + 1, 0, LOWEST)
        return cls(values_of(starts).astype(float), above / above[0])

    def rate(self, threshold: float) -> float:
        """The share promised at a threshold; NaN below the lowest."""
        place = np.searchsorted(self.thresholds, threshold, side="right") - 1
        return float(self.rates[place]) if place >= 0 else float("nan")

    def threshold(self, rate: float) -> float:
        """The lowest threshold that promises a rate; infinite where none does."""
        low = np.flatnonzero(np.asarray(self.rates) <= rate)
        return float(self.thresholds[low[0]]) if len(low) else float("inf")


def code_of(threshold: float) -> int:
    """The lowest code whose value reaches a threshold."""
    with np.errstate(over="ignore"):
        code = int(codes(np.array([threshold]))[0])
    return code + (value_of(code) < threshold)


def of_subject(
    subject: PreparedSubject,
    modalities: tuple[str, ...],
    maps: Mapping[str, np.ndarray],
    redraws: Mapping | None = None,
) -> Case:
    """A prepared subject with its maps by method; its truth is not known where it is neither healthy nor has a
    lesion."""
    known = subject.healthy or bool(subject.facts["lesion_slices"])
    lesion = subject.lesion if known else None
    return Case(
        subject.id, modalities, subject.image, subject.brain, subject.voxel_mm[::-1], maps, lesion, redraws or {}
    )


def of_run(run: str, cohort: Cohort) -> list[Case]:
    """The test and validation subjects of a run that have maps; maps are read, and models loaded, when asked for.

    Raises CourseError where there is none.
    """
    names = scoring.methods(run)
    load = lru_cache(2)(lambda method: models.load(run_folder(run) / "models" / f"{method}.safetensors"))
    found = []
    for subject in (s for split in reversed(scoring.SCORED) for s in cohort.split(split)):
        having = [name for name in names if scoring.has_map(run, name, subject)]
        maps = Lazy(having, partial(_map, run, cohort, subject))
        drawn = Lazy([n for n in having if models.draws(n)], lambda n, s=subject: _redraws(load(n), s))
        if having:
            found.append(of_subject(subject, cohort.modalities, maps, drawn))
    if not found:
        cure = "Run a notebook that makes some with this run's name first, such as 03_conv_autoencoder."
        raise CourseError(f"The run {run!r} has no anomaly maps of this cohort.", cure)
    return found


def promises_of_run(run: str, cohort: Cohort) -> Lazy:
    """By (method, step of the map) the Promise of the run's healthy validation material, None where there is none;
    prepared voxels are counted, for these are shown."""
    cohort = replace(cohort, grid="prepared")

    def make(key: tuple[str, str]) -> Promise | None:
        counts = judging.healthy_counts(run, key[0], cohort, key[1])
        return Promise.of(counts) if counts.any() else None

    steps = [step for step in postprocessing.STEPS if step not in postprocessing.OF_DETECTIONS]
    return Lazy([(name, step) for name in scoring.methods(run) for step in steps], make, kept=None)


def _map(run: str, cohort: Cohort, subject: PreparedSubject, method: str) -> np.ndarray:
    return scoring.read_map(run, method, subject, cohort)[0]


def _redraws(detector: Detector, subject: PreparedSubject) -> Callable[[int], np.ndarray]:
    """What redraws a subject slice by slice; a detector of whole volumes looks once."""
    if hasattr(detector, "expected"):
        volume = detector.expected(subject)
        return lambda number: volume[:, number]
    return partial(detector.redraw, subject)
