"""One scan under a saved detector of a run: prepared as its cohort was, its map brought back to the scan's own grid."""

import json
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage, special

from lib import (
    RESEARCH,
    cohort,
    datasets,
    dicom,
    domain,
    judging,
    metrics,
    models,
    preparation,
    privacy,
    scan_page,
    scoring,
    volumes,
)
from lib.baselines import SLICE_LABELS
from lib.cohort import Cohort, PreparedSubject
from lib.components import TOUCHING, bounding_box
from lib.errors import CourseError
from lib.judging import SMALLEST_MM3
from lib.metrics import PROMISED_FPR
from lib.models.detector import Detector, NetworkDetector
from lib.pictures import NO_SIZE
from lib.preprocessing import Recipe, resampled
from lib.training import choose_device

PACKAGES = ("numpy", "scipy", "nibabel", "torch", "monai")
FILES = ("anomaly.nii.gz", "mask.nii.gz", "summary.json", "report.html")
FALSE_WARNINGS = 0.01  # share of scans like those of training that each kind of warning is given for
LEAST_SPREAD = 4  # training scans, fewer of which have no spread to speak of
ROUNDING = 1e-3  # of prepared intensities, which are kept in 16 bits
OTHER_VOXELS = 1.5  # how many times finer or coarser than any in training
MIDLINE_MM = 5.0  # components nearer to it are on neither side


@dataclass(frozen=True)
class Found:
    """What a method finds in a scan.

    `anomaly` float32 and `brain` bool lie on the scan's own grid, [i, j, k] as its file has it, with its `affine` to mm
    in RAS+; `prepared`, float32 [slice, row, column], is the map on the grid of `subject`. Voxels that reach
    `threshold` count as found, which `promised` is the share of healthy voxels of; None for a threshold of one's own.
    `marks`: checksums of the cohort and the model; `seconds` by stage.
    """

    subject: PreparedSubject
    anomaly: np.ndarray = field(repr=False)
    brain: np.ndarray = field(repr=False)
    affine: np.ndarray
    threshold: float
    promised: float | None
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    method: str
    run: Path
    prepared: np.ndarray = field(repr=False)
    marks: dict[str, str] = field(default_factory=dict)
    source: str = "given"

    def mask(self, threshold: float | None = None) -> np.ndarray:
        """Voxels of the brain that reach a threshold, bool [i, j, k]."""
        return self.brain & (self.anomaly >= (self.threshold if threshold is None else threshold))

    def components(self, threshold: float | None = None) -> list[dict]:
        """What touches at a threshold and has at least 20 mm³, the largest first: `voxels`, `ml`, `highest` anomaly,
        `centre_mm` in RAS+ and `side` of the patient's brain."""
        mask = self.mask(threshold)
        if not mask.any():
            return []
        box = bounding_box(mask)
        label, _ = ndimage.label(mask[box], TOUCHING)
        at = np.nonzero(label)
        label, highest = label[at] - 1, np.zeros(label.max(), np.float32)
        voxels = np.bincount(label)
        np.maximum.at(highest, label, self.anomaly[box][at])
        centres = [np.bincount(label, along) / voxels + part.start for along, part in zip(at, box, strict=True)]
        places, middle = self._mm(np.stack(centres, axis=1)), self._mm(_middle(self.brain))
        large = [n for n in (-voxels).argsort(kind="stable") if voxels[n] * self.voxel_ml * 1000 >= SMALLEST_MM3]
        return [
            {"voxels": int(voxels[n]), "ml": self._ml(voxels[n]), "highest": float(highest[n]),
             "centre_mm": places[n].round(1).tolist(), "side": _side(float(places[n, 0] - middle[0]))}
            for n in large
        ]  # fmt: skip

    def summary(self, threshold: float | None = None) -> dict:
        """Figures of the scan at a threshold; volumes in ml on its own grid, None for a picture, `scan_score` the mean
        of the highest 1 % of the prepared map."""
        own = threshold is not None and threshold != self.threshold
        limit = self.threshold if threshold is None else threshold
        found, mask = self.components(limit), self.mask(limit)
        inside = np.sort(self.prepared[np.asarray(self.subject.brain)])
        return {
            "scan": self.subject.id, "method": self.method, "run": self.run.name,
            "modalities": self.subject.facts["modality"], "missing": self.subject.facts["missing"],
            "threshold": limit if np.isfinite(limit) else None, "promised_fpr": None if own else self.promised,
            "threshold_from": "given" if own else self.source,
            "found_ml": self._ml(int(mask.sum())), "brain_ml": self._ml(int(self.brain.sum())),
            "found_share": float(mask.sum() / self.brain.sum()),
            "scan_score": float(inside[-max(1, round(metrics.HIGHEST * len(inside))) :].mean()),
            "highest": float(self.anomaly.max()), "components": len(found), "largest": found[:20],
            "voxel_mm": nibabel.affines.voxel_sizes(self.affine).round(4).tolist(), "shape": list(self.anomaly.shape),
            "warnings": list(self.warnings), "seconds": self.seconds, **self.marks,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "note": RESEARCH,
        }  # fmt: skip

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel of the scan in ml."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    def _ml(self, number: int) -> float | None:
        return None if NO_SIZE in self.warnings else round(float(number * self.voxel_ml), 3)

    def _mm(self, places: np.ndarray) -> np.ndarray:
        return nibabel.affines.apply_affine(self.affine, places)


def methods(run: Path) -> list[str]:
    """The methods that a run's folder has a saved model of, in the order of the table of detectors; not those that look
    at no voxel."""
    folder = Path(run) / "models"
    names = (name for name in models.DETECTORS if name not in SLICE_LABELS)
    return [name for name in names if (folder / f"{name}.safetensors").is_file()]


def check_method(run: Path, method: str) -> None:
    """Refuse a method that a run has no model of."""
    there = methods(run)
    if method not in there:
        cure = f"It has: {', '.join(there)}." if there else "Run the notebook that trains it in this run first."
        raise CourseError(f"The run {Path(run).name} has no model of {method!r}.", cure)


def scans_of(path: Path, run: Path, modality: str = "") -> dict[str, Path]:
    """One person's scans as `detect` takes them: a file or series by itself, of a modality or "" where its name or
    header tells, or those that a run's detectors look at in a folder of several."""
    path = Path(path)
    if not path.is_dir() or dicom.is_series(path):
        return {modality: path}
    wanted = (modality,) if modality else cohort.of_run(str(Path(run).resolve())).modalities
    found: dict[str, Path] = {}
    for one in sorted(path.iterdir()):
        own = modality_of(one) if dicom.is_series(one) or one.name.lower().endswith(volumes.SUFFIXES) else None
        if own in found:
            what = f"{_shown(found[own])} and {_shown(one)} both claim to be {own}."
            raise CourseError(what, "Give the file itself, and others by --with.")
        found |= {own: one} if own in wanted else {}
    if not found:
        what = f"{_shown(path)} holds no {' and no '.join(wanted)} by name."
        raise CourseError(what, f"Name the files _{wanted[0].lower()}.nii.gz and so on, or give the file itself.")
    return found


def modality_of(path: Path) -> str | None:
    """The modality that a scan's name or header tells; None where neither does."""
    try:
        return datasets.modality_of(path)
    except CourseError:
        return None


def detect(
    scans: Mapping[str, Path],
    run: Path,
    method: str,
    *,
    device: str = "auto",
    brain: Path | None = None,
    threshold: float | None = None,
    keep: Path | None = None,
    tell: Callable[[str], object] | None = None,
) -> Found:
    """What a method of a run finds in one person's scans: of the brain, of the head, or with a mask of the `brain`.

    `scans`: the file of each modality of the run; where it has one alone, a scan of another stands in, with a warning.
    `threshold`: one's own instead of the one that healthy validation material fixes; `keep`: as
    `preparation.prepare_scan`. `tell` gets a line a stage.
    Raises CourseError for a run without cohort or model, a modality that is missing, and what is wrong with the scans.
    """
    run, clock = Path(run).resolve(), _Clock(tell or (lambda line: None))
    prepared = cohort.of_run(str(run))
    placed, warnings = _placed(scans, prepared)
    with clock("model"):
        detector = _detector(run, method, device)
    with clock("preparation"):
        recipe = Recipe(**prepared.manifest["recipe"] | {"modalities": prepared.modalities})
        subject = preparation.prepare_scan(placed, recipe, brain, prepared.manifest.get("standard"), keep)
    with clock("map"):
        anomaly = detector.maps(subject).astype(np.float16).astype(np.float32)
    with clock("threshold"):
        marks = {"cohort": prepared.hash, "model": scoring.model_checksum(str(run), method)}
        frozen = _frozen(run, method, prepared, marks) if threshold is None else threshold
    with clock("likeness"):
        warnings += [*scoring.warnings(str(run), method), *_reading(subject), *_unlike(subject, run, prepared)]
    with clock("own grid"):
        on_scan = _on_scan(subject, anomaly)
    source = f"{100 * PROMISED_FPR:g} % of healthy validation voxels reach it ({prepared.training})"
    return Found(
        subject, *on_scan, np.array(subject.facts["scan_affine"]), frozen, PROMISED_FPR if threshold is None else None,
        tuple(warnings), clock.seconds, method, run, anomaly, marks, source if threshold is None else "given",
    )  # fmt: skip


def write(found: Found, out: Path, *, overwrite: bool = False) -> list[Path]:
    """Write `anomaly.nii.gz`, `mask.nii.gz`, `summary.json` and `report.html` into a new folder, which appears whole.

    Raises CourseError where the folder holds something already; with `overwrite`, where that is no earlier result.
    """
    out = Path(out).absolute()
    check_free(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    place = out.with_name(f".{out.name}-{uuid.uuid4().hex}")
    try:
        volumes.write(place / "anomaly.nii.gz", found.anomaly, found.affine)
        volumes.write(place / "mask.nii.gz", found.mask().astype(np.uint8), found.affine)
        summary = found.summary()
        (place / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
        page = scan_page.page(summary, found.subject, found.prepared, found.threshold)
        (place / "report.html").write_text(page, encoding="utf-8")
        _swap(place, out)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return [out / name for name in FILES]


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse a folder for results that is no folder, or holds what may not be written over."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise CourseError(f"{out} is a file.", "Give --out a folder.")
    there = sorted(path.name for path in out.iterdir()) if out.exists() else []
    others = [name for name in there if name not in FILES]
    if others:
        raise CourseError(f"{out} holds other files, such as {others[0]}.", "Give --out a folder of its own.")
    if there and not overwrite:
        raise CourseError(f"{out} holds a result already.", "Give another --out, or --overwrite.")


def unlike(known: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Which figures of one more scan, [figure], lie outside the interval that Student's distribution predicts from
    those known, [scan, figure]: in 1 % of scans of the same kind one or more do (Bonferroni)."""
    n = len(known)
    if n < LEAST_SPREAD:
        return np.zeros(len(new), bool)
    quantile = special.stdtrit(n - 1, 1 - FALSE_WARNINGS / 2 / len(new))
    spread = np.maximum(known.std(axis=0, ddof=1), ROUNDING)
    return np.abs(new - known.mean(axis=0)) > quantile * spread * np.sqrt(1 + 1 / n)


@dataclass(frozen=True)
class _Clock:
    tell: Callable[[str], object]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 3)
        self.tell(f"{stage} {self.seconds[stage]:.1f} s")


def _detector(run: Path, method: str, device: str) -> Detector:
    check_method(run, method)
    choose_device(device)
    detector = models.load(run / "models" / f"{method}.safetensors")
    if isinstance(detector, NetworkDetector):
        detector.to(device)
    return detector


def _placed(scans: Mapping[str, Path], prepared: Cohort) -> tuple[dict[str, Path], list[str]]:
    """The scans by the modalities they stand for, and what is odd about that."""
    wanted, named, warnings = prepared.modalities, {}, []
    if not scans:
        raise CourseError("There is no scan.", f"Give one of {' and '.join(wanted)}.")
    for given, path in scans.items():
        own = given or modality_of(path)
        if own is None and len(wanted) > 1:
            what = f"Nothing says which modality {_shown(path)} is."
            raise CourseError(what, f"Name it {', '.join(f'_{m.lower()}' for m in wanted)}, or give --modality.")
        stands_for = wanted[0] if len(wanted) == len(scans) == 1 else own
        own = own if own != stands_for else modality_of(path) or own
        if own is None:
            warnings.append(f"Nothing says which modality the scan is; it is taken as {stands_for}.")
        elif own != stands_for:
            warnings.append(f"The scan seems to be {own}, and stands in for {stands_for}, which the detector learnt.")
        if stands_for in named:
            raise CourseError(f"Two scans are {stands_for}.", "Give one of them, or say what the other is.")
        named[stands_for] = Path(path)
    missing = [m for m in wanted if m not in named]
    if missing and not (prepared.incomplete and len(missing) < len(wanted)):
        what = f"This run's detectors look at {' and '.join(wanted)}; there is no {' and no '.join(missing)}."
        raise CourseError(what, f"Give it by --with {missing[0]}=FILE, or a folder with a person's files.")
    return {m: named[m] for m in wanted if m in named}, warnings


def _shown(path: Path) -> str:
    return privacy.shown(Path(path), dicom.patient(Path(path)))


def _on_scan(subject: PreparedSubject, anomaly: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A prepared map and the brain on the scan's own grid, [i, j, k]."""
    own, shape, affine = subject.own_grid(), subject.facts["scan_shape"], np.array(subject.facts["scan_affine"])
    values = resampled(anomaly, np.asarray(subject.brain), *own.within(subject.affine), own.brain.shape)
    values = values.astype(np.float16).astype(np.float32) * own.brain  # as thresholds are frozen: in 16 bits
    return own.placed(values, shape, affine), own.placed(own.brain, shape, affine)


def _frozen(run: Path, method: str, prepared: Cohort, marks: dict[str, str]) -> float:
    """The frozen threshold, which is kept beside the model as long as model and cohort are the same."""
    code = _kept(
        run / "models" / f"{method}.threshold.json",
        marks,
        lambda: judging.freeze(str(run), method, prepared, ("none",))["none"].code,
    )
    return metrics.value_of(code) if code < metrics.CODES else float("inf")


def _spread(run: Path, prepared: Cohort) -> dict[str, list]:
    """Figures of the training scans, a row each, kept in the run."""

    def look() -> dict[str, list]:
        members = prepared.split("train")
        return {
            "percentiles": [_percentiles(s) for s in members],
            "litres": [[domain.size(s)[0]] for s in members],
            "voxel_mm": [s.own_voxel_mm.tolist() for s in members],
        }

    return _kept(run / "training.json", {"cohort": prepared.hash}, look)


def _percentiles(subject: PreparedSubject) -> list[list[float]]:
    """Those of `domain.histogram`, by modality."""
    number = len(subject.image)
    return domain.histogram(subject)[:-number].reshape(-1, number).T.tolist()


def _kept(path: Path, marks: dict[str, str], make: Callable):
    """What an earlier call with these marks made, or what is made now."""
    try:
        known = json.loads(path.read_bytes())
        if known["marks"] == marks:
            return known["value"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    value = make()
    with suppress(OSError):  # a run may be there to read only
        volumes.write_bytes(path, json.dumps({"marks": marks, "value": value}).encode())
    return value


def _reading(subject: PreparedSubject) -> Iterator[str]:
    """What was assumed in reading the files."""
    yield from dict.fromkeys(note for notes in subject.facts["notes"].values() for note in notes)
    if subject.facts["unoriented"]:
        yield "The header does not say where the axes point; they are taken as right, anterior, superior."
    if subject.facts["extracted"]:
        modality, method = subject.facts["extracted"]
        yield (
            f"It shows the whole head: the brain was extracted from {modality} by {method}. Look whether it is whole; "
            "if not, give a mask of it."
        )
    if subject.facts["flags"]:
        yield f"Its brain is unlike an adult's: {'; '.join(subject.facts['flags'])}."
    if subject.registration_doubt:
        yield f"Registration is doubtful: {subject.registration_doubt}."
    yield from (f"There is no {m}; its channel is 0." for m in subject.facts["missing"])


def _unlike(subject: PreparedSubject, run: Path, prepared: Cohort) -> Iterator[str]:
    """In what a scan differs from those the detector learnt from."""
    known = {name: np.array(rows) for name, rows in _spread(run, prepared).items()}
    scans = f"the {len(known['litres'])} training scans"
    new, percentiles = np.array(_percentiles(subject)), known["percentiles"]
    for i, modality in enumerate(prepared.modalities):
        odd = np.flatnonzero(unlike(percentiles[:, i], new[i])) if modality not in subject.facts["missing"] else []
        if len(odd):
            at = odd[0]
            low, high = percentiles[:, i, at].min(), percentiles[:, i, at].max()
            yield (
                f"The intensities of {modality} are spread unlike those of {scans}: their percentile "
                f"{domain.QUANTILES[at]} is {new[i, at]:.2f}, there {low:.2f} to {high:.2f}. Expect false findings."
            )
    if subject.facts["scan_shape"][2] == 1:  # of one slice, neither size nor distance of slices says anything
        return
    litres, of_training = domain.size(subject)[0], known["litres"][:, 0]
    if unlike(np.log(known["litres"]), np.log([litres])).any():
        span = f"{of_training.min():.2f} to {of_training.max():.2f}"
        yield f"The brain has {litres:.2f} litres, those of {scans} {span}: is it whole, and nothing but brain?"
    edges, low, high = subject.own_voxel_mm, known["voxel_mm"].min(axis=0), known["voxel_mm"].max(axis=0)
    if ((edges > OTHER_VOXELS * high) | (edges < low / OTHER_VOXELS)).any():
        yield f"Its voxels are {_edges(edges)} mm, those of {scans} {_edges(low)} to {_edges(high)} mm."


def _edges(edges_mm: np.ndarray) -> str:
    return " × ".join(f"{edge:.3g}" for edge in edges_mm)


def _side(mm: float) -> str:
    return "middle" if abs(mm) < MIDLINE_MM else "right" if mm > 0 else "left"


def _middle(mask: np.ndarray) -> np.ndarray:
    """Mean place of a mask [i, j, k] in voxels, [3]."""
    along = (mask.sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(3))
    return np.array([np.average(np.arange(len(one)), weights=one) for one in along])


def _swap(place: Path, out: Path) -> None:
    """Move a folder to where an empty one or an earlier one may be."""
    if not out.exists() or not any(out.iterdir()):
        place.rename(out)
        return
    old = out.with_name(f".{out.name}-{uuid.uuid4().hex}")
    out.rename(old)
    place.rename(out)
    shutil.rmtree(old)
