"""Every slice of a few test subjects beside their maps, for a page on which a slider moves them without a kernel.

Slices lie side by side in one picture a volume (a sprite), of which the page shows one tile at a time. Masks are
pictures of one bit, exact, whose outlines the browser draws. Subjects are chosen by lesion volume alone, methods by
name.
"""

import base64
import io
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from lib import cohort, evaluation, metrics, plots, scoring
from lib.cohort import Cohort, PreparedSubject
from lib.colours import FOUND, MAP_COLOURS, TRUTH
from lib.components import bounding_box
from lib.errors import CourseError
from lib.pages import picture
from lib.slice_views import tiled

RESIDUAL = "residual, in {}"
METHODS = {  # what the values of a map are; of these, the first that a run has are shown
    "sided_ensemble": "−log(1 − p) of the probability p of a lesion, in nats",
    "dae": RESIDUAL, "ae": RESIDUAL, "intensity_median": "median of the scan, in {}", "cae3d": RESIDUAL,
    "f_anogan": RESIDUAL, "vae": RESIDUAL, "vit_masked": RESIDUAL, "diffusion": RESIDUAL,
    "synthetic_lesions": "probability of a lesion", "single_ensemble": "mean rank in the scan, 0 to 1",
    "mirror": "surplus over the reflection, in {}",
}  # fmt: skip
MOST_METHODS = 4
INTENSITIES = {  # ends and unit of the grey scale by normalisation
    "p99": (0, 1.2, "intensity ÷ 99th percentile"),
    "max": (0, 1, "intensity ÷ maximum"),
    "zscore": (-3, 3, "standard deviations of intensity from its mean"),
    "slice_range": (0, 1, "shares of the slice's range of intensity"),
}
COLUMNS = 12  # tiles in a row of a sprite
MOST_PIXELS = 25_000_000  # of all volumes; where there are more, every second pixel is shown, or every third
MOST_BYTES = 2_000_000  # of all sprites; as text a third more
QUALITIES = (85, 75, 60, 45, 30, 15)  # of WebP: the first with which sprites are small enough, or the last
STOPS = 33  # of the colour scale


def read(folder: Path) -> dict | None:
    """What the template `scrubber.html.j2` shows of the run in `folder`; None where nobody is in the test set, or no
    method of METHODS has maps of the run's own cohort and model.

    `subjects`: sprites as data URIs, slices and areas; `methods`: unit, scale and frozen threshold; `left_out`: methods
    whose maps are not whole; `still`: the first subject as a PNG with its size in pixels, for a page that links here.
    """
    run = str(folder.resolve())  # lib.run_folder takes a whole path as well as a name
    try:
        own = cohort.of_run(run)
    except CourseError:
        return None
    subjects, methods, left_out = chosen(own), [], []
    for name in METHODS:
        if (folder / "maps" / name).is_dir() and len(methods) < MOST_METHODS:
            try:
                methods.append(_method(run, name, own, subjects))
            except CourseError:
                left_out.append(name)
    if not subjects or not methods:
        return None
    still = _still(subjects[0], methods)
    shown = [_subject(s, [m["maps"][s.id] for m in methods], methods, own) for s in subjects]
    quality = _encode(shown)
    return {"subjects": shown, "methods": methods, "left_out": left_out, "still": still, "colours": _colours(),
            "outlines": {"truth": TRUTH, "found": FOUND}, "columns": COLUMNS, "quality": quality,
            "rate": metrics.PROMISED_FPR, "training": own.training}  # fmt: skip


def chosen(own: Cohort) -> list[PreparedSubject]:
    """Test patients of large, medium and small lesion volume, the middles of its thirds, and a healthy test subject."""
    test = sorted(own.split("test"), key=lambda s: s.id)
    sick = sorted((s for s in test if _lesion_ml(s)), key=_lesion_ml, reverse=True)
    places = dict.fromkeys((2 * third + 1) * len(sick) // 6 for third in range(3) if sick)
    return [sick[i] for i in places] + [s for s in test if s.healthy][:1]


def grey(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values as uint8, `low` and less 0, `high` and more 255."""
    return np.rint(np.clip((values.astype(np.float32) - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _lesion_ml(subject: PreparedSubject) -> float:
    return subject.facts["prepared_lesion_ml"]


def _method(run: str, name: str, own: Cohort, subjects: list[PreparedSubject]) -> dict:
    """Name, unit, frozen threshold (`code` and `limit`) and `top` of the colour scale, the highest 99.5th percentile
    inside the brains that are shown, or the threshold; `maps` by subject.

    Raises CourseError as scoring.read_map does, and for values that are not finite.
    """
    maps = {s.id: scoring.read_map(run, name, s, own)[0] for s in subjects}
    code = evaluation.frozen_threshold(run, name, own)
    limit = metrics.value_of(min(code, metrics.CODES - 1))  # the last code is no number
    tops = [float(np.percentile(maps[s.id][s.brain].astype(np.float32), 99.5)) for s in subjects]
    top = max([1e-6, limit, *tops])
    if not np.isfinite([limit, *tops]).all():
        raise CourseError(f"The maps of {name} hold values that are not finite.", "Train it again.")
    unit = METHODS[name].format(_intensity(own, own.modalities[0])[2])
    return {"name": name, "unit": unit, "code": code, "limit": limit, "top": top, "maps": maps}


def _intensity(own: Cohort, modality: str) -> tuple[float, float, str]:
    """Ends and unit of the grey scale of a modality."""
    normalisation = own.manifest["recipe"]["normalisation"]
    windowed = modality == "CT" and normalisation == "p99"
    return (0, 1, "shares of the CT window") if windowed else INTENSITIES[normalisation]


def _subject(subject: PreparedSubject, maps: list[np.ndarray], methods: list[dict], own: Cohort) -> dict:
    """A subject's slices in the box of its brain: `layers` (stacks to become sprites) by name, areas by slice."""
    box = bounding_box(np.asarray(subject.brain))
    number = next((i for i, m in enumerate(own.modalities) if m not in subject.facts["missing"]), 0)
    low, high, unit = _intensity(own, own.modalities[number])
    truth, brain = np.asarray(subject.lesion[box]), np.asarray(subject.brain[box])
    layers = {"scan": grey(subject.image[number][box], low, high), "truth": truth}
    pixel, marked, hits = subject.voxel_mm[:2].prod(), {}, {}
    for method, anomaly in zip(methods, maps, strict=True):
        name, found = method["name"], (metrics.codes(anomaly[box]) >= method["code"]) & brain
        layers |= {name: grey(anomaly[box], 0, method["top"]), f"{name} found": found}
        marked[name], hits[name] = _areas(found, pixel), _areas(found & truth, pixel)
    slices = {"first": box[0].start, "last": box[0].stop - 1, "start": plots.most_lesion(subject), "columns": COLUMNS}
    slices |= {"id": subject.id, "truth": _areas(truth, pixel), "marked": marked, "hits": hits}
    return {"id": subject.id, "healthy": subject.healthy, "ml": _lesion_ml(subject), "voxel_mm": subject.voxel_mm,
            "modality": own.modalities[number], "low": low, "high": high, "unit": unit, "layers": layers,
            "slices": slices}  # fmt: skip


def _areas(mask: np.ndarray, pixel: float) -> list[int]:
    return np.rint(mask.sum(axis=(1, 2)) * pixel).astype(int).tolist()


def _encode(subjects: list[dict]) -> int:
    """Turn each subject's layers into `sprites`, together small enough for a page, and return their quality; `tile`: a
    tile's width and height in pixels, every `step`-th of the slice's."""
    volumes = [layer for s in subjects for layer in s["layers"].values()]
    step = max(1, math.ceil(math.sqrt(sum(v.size for v in volumes if v.dtype == np.uint8) / MOST_PIXELS)))
    drawn = [{name: tiled(layer, COLUMNS, step) for name, layer in s.pop("layers").items()} for s in subjects]
    for quality in QUALITIES:
        coded = [{name: _coded(sprite, quality) for name, sprite in of.items()} for of in drawn]
        if sum(len(content) for of in coded for content in of.values()) <= MOST_BYTES:
            break
    for subject, of, sprites in zip(subjects, coded, drawn, strict=True):
        rows = -(-len(subject["slices"]["truth"]) // COLUMNS)
        height, width = sprites["scan"].shape
        subject |= {"sprites": {name: _uri(content) for name, content in of.items()}, "step": step}
        subject["tile"] = (width // COLUMNS, height // rows)
    return quality


def _coded(sprite: np.ndarray, quality: int) -> bytes:
    """A mask as PNG, transparent where it is not; anything else as WebP."""
    content = io.BytesIO()
    if sprite.dtype == bool:
        Image.fromarray(sprite).save(content, "PNG", optimize=True, transparency=0)
    else:
        Image.fromarray(sprite).save(content, "WEBP", quality=quality, method=2)
    return content.getvalue()


def _uri(content: bytes) -> str:
    kind = "png" if content.startswith(b"\x89PNG") else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _colours() -> dict[str, str]:
    """The colour scale of maps as the tables of an SVG filter, by channel."""
    table = plt.get_cmap(MAP_COLOURS)(np.linspace(0, 1, STOPS))
    return {channel: " ".join(f"{v:.3f}" for v in table[:, i]) for i, channel in enumerate("RGB")}


def _still(subject: PreparedSubject, methods: list[dict]) -> dict:
    """The subject's slice with most lesion and its maps."""
    maps = {m["name"]: m["maps"][subject.id] for m in methods}
    figure = plots.cases([subject], [maps], {m["name"]: m["limit"] for m in methods}, [subject.id])
    content = io.BytesIO()
    figure.savefig(content, format="png")
    plt.close(figure)
    return picture(base64.b64encode(content.getvalue()).decode())
