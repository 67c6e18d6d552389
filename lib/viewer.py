"""A viewer of scans and their anomaly maps for notebooks: one picture, renewed in place as controls move.

It looks at cases (lib.cases), of a run or of anything else. Where no browser listens, as under papermill, a still
picture stays.
"""

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path

import anywidget
import ipywidgets as widgets
import numpy as np
import traitlets

from lib import ROOT, cases, postprocessing, run_folder, slice_views
from lib.cases import Case, Promise
from lib.cohort import Cohort
from lib.colours import FOUND, TRUTH
from lib.errors import CourseError, check_choice
from lib.metrics import PROMISED_FPR, values_of
from lib.models.detector import highest_means
from lib.slice_views import PLANES, Panel
from lib.volumes import write_bytes

ARRANGEMENTS = ("side by side", "overlaid")
SCALE_PERCENTILE = 99.5  # of a map inside the brain: the top of its colours
SLIDER_STEPS = 500
PAGE = 10  # slices
KEYS = {"ArrowUp": 1, "ArrowRight": 1, "ArrowDown": -1, "ArrowLeft": -1, "PageUp": PAGE, "PageDown": -PAGE}
KEPT_MAPS, KEPT_SLICES = 4, 256
UNIT = "intensity ÷ 99th percentile"


class Picture(anywidget.AnyWidget):
    """A PNG that is replaced in place. `pointer`: x and y in its pixels, empty outside; keys and clicks come as
    messages."""

    _esm = Path(__file__).with_name("viewer.js")
    content = traitlets.Bytes().tag(sync=True)
    alt = traitlets.Unicode().tag(sync=True)
    pointer = traitlets.List(traitlets.Float()).tag(sync=True)


class SliceViewer(widgets.VBox):
    """Cases under `controls`, widgets by name: scan, modality, method, step (of post-processing), plane, slice,
    threshold, arrangement, truth, detection, reconstruction.

    `promises`: what thresholds promise by (method, step of the map), where it is known; `folder`: where pictures are
    saved, None: they are offered as downloads. `figures` are the numbers shown, as Case.figures gives them.
    """

    def __init__(
        self,
        shown: Sequence[Case],
        promises: Mapping[tuple[str, str], Promise | None] | None = None,
        folder: Path | None = None,
    ):
        self.cases, self.promises, self.folder = {case.name: case for case in shown}, promises or {}, folder
        if not shown or len(self.cases) < len(shown):
            raise CourseError("There is no scan to look at, or two of one name.", "Give cases, each with its own name.")
        self.rate, self.figures, self.place = PROMISED_FPR, {}, None
        self.settling, self.failed = False, None
        self.codes = lru_cache(KEPT_MAPS)(lambda name, method, step: self.cases[name].codes(method, step))
        self.redrawn = lru_cache(KEPT_SLICES)(self._redrawn)
        self.controls = _controls(list(self.cases))
        self.picture = Picture()
        self.promised, self.read_out, self.under, self.notice = (widgets.HTML() for _ in range(4))
        self.jump = _button("Most anomalous slice", "of this plane, by its highest 1 %")
        self.save = _button("Save picture", "as PNG")
        super().__init__(self._rows(), _dom_classes=("slice-viewer",))
        self._settle("scan")
        for name, control in self.controls.items():
            control.observe(lambda _, name=name: self._moved(name), "value")
        self.picture.observe(lambda change: self._point(change.new), "pointer")
        self.picture.on_msg(lambda _, message, __: self._heard(message))
        self.jump.on_click(lambda _: self.to_most_anomalous())
        self.save.on_click(lambda _: self._save())

    def __getitem__(self, name: str):
        return self.controls[name].value

    @property
    def case(self) -> Case:
        return self.cases[self["scan"]]

    def show(self, **chosen) -> "SliceViewer":
        """Set controls by name, in the order given; returns the viewer. Raises CourseError for what is not there."""
        for name, value in chosen.items():
            check_choice("A control", name, self.controls)
            control = self.controls[name]
            if hasattr(control, "options"):
                check_choice(name, value, control.options)
            elif hasattr(control, "max") and not control.min <= value <= control.max:
                raise CourseError(f"{name} is {value}.", f"Give a number from {control.min:g} to {control.max:g}.")
            control.value = value
        if self.failed:
            raise self.failed
        return self

    def to_most_anomalous(self) -> None:
        """Go to the slice of this plane whose highest 1 % inside the brain have the highest mean."""
        values = values_of(self.code).astype(np.float32)
        values, brain = (np.moveaxis(v, PLANES[self["plane"]], 0) for v in (values, np.asarray(self.case.brain)))
        means = np.where(brain.any(axis=(1, 2)), highest_means(values, brain), -np.inf)
        self.controls["slice"].value = int(means.argmax())

    def export(self, folder: Path) -> Path:
        """Write the view as PNG and return its path; the name says scan, method, plane and slice."""
        if self.failed:
            raise self.failed
        path = Path(folder) / self._file_name()
        write_bytes(path, self.picture.content)
        return path

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The widget, and the picture for whoever shows no widgets."""
        return {**super()._repr_mimebundle_(**kwargs), "image/png": b64encode(self.picture.content).decode()}

    def _rows(self) -> list[widgets.Widget]:
        c = self.controls
        rows = [("scan", "modality", "method", "step"), ("plane", "slice"), ("threshold",),
                ("arrangement", "truth", "detection", "reconstruction")]  # fmt: skip
        beside = [[], [self.jump], [self.promised], [self.save]]
        return [
            *(widgets.HBox([*(c[name] for name in names), *more], layout={"flex_flow": "row wrap"})
              for names, more in zip(rows, beside, strict=True)),
            self.read_out, self.picture, self.under, self.notice,
        ]  # fmt: skip

    def _moved(self, name: str) -> None:
        if not self.settling:
            try:
                self._settle(name)
            except CourseError as error:
                self.failed = error
                self._say(f"{error.what} {error.cure}")

    def _settle(self, name: str) -> None:
        """Bring what depends on a control up to date; after a failure, everything."""
        name = "scan" if self.failed else name
        self.settling, self.failed = True, None
        self._say("")
        try:
            if name == "scan":
                self._take_case()
            if name in ("scan", "plane"):
                self._fit_slices()
            if name in ("scan", "method", "step"):
                self._take_map(keeping=name == "step")
            if name == "threshold" and self.promise and np.isfinite(rate := self.promise.rate(self["threshold"])):
                self.rate = rate
            if name in ("scan", "method", "step", "threshold"):
                self._detect()
            self.place[PLANES[self["plane"]]] = self["slice"]
            self._draw()
        finally:
            self.settling = False

    def _take_case(self) -> None:
        case = self.case
        there = [m for m, one in zip(case.modalities, case.image, strict=True) if np.any(one)]
        for name, options in (("modality", there or case.modalities), ("method", tuple(case.maps))):
            before = self[name]
            self.controls[name].options = options
            self.controls[name].value = before if before in options else options[0]
        brain = np.asarray(case.brain)
        if self.place is None or any(at >= n for at, n in zip(self.place, brain.shape, strict=True)):
            self.place = [int(brain.sum(axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3)]

    def _fit_slices(self) -> None:
        axis, control = PLANES[self["plane"]], self.controls["slice"]
        control.max = self.case.brain.shape[axis] - 1
        control.value = self.place[axis]

    def _take_map(self, keeping: bool) -> None:
        """The map after its step; the threshold moves to where it promises what the one before did. Without a promise
        it stays if `keeping`, or else is the top of the colours."""
        method, step = self["method"], self["step"]
        self.code = self.codes(self["scan"], method, step)
        values = values_of(self.code[self.case.brain]).astype(float)
        self.top = float(np.percentile(values, SCALE_PERCENTILE)) or float(values.max()) or 1.0
        self.promise = self._promise(method, "none" if step in postprocessing.OF_DETECTIONS else step)
        control, highest = self.controls["threshold"], float(np.nextafter(np.float16(values.max()), np.float16(np.inf)))
        unpromised = control.value if keeping else self.top
        limit = self.promise.threshold(self.rate) if self.promise else unpromised
        limit = limit if np.isfinite(limit) else highest
        with control.hold_trait_notifications():  # or the old range would cut the new value
            control.min, control.max = min(0.0, float(values.min()), limit), max(highest, limit)
            control.value, control.step = limit, (control.max - control.min) / SLIDER_STEPS
        self.controls["reconstruction"].disabled = method not in self.case.redraws

    def _promise(self, method: str, step: str) -> Promise | None:
        try:
            return self.promises.get((method, step))
        except CourseError:  # a healthy scan without a whole map
            return None

    def _detect(self) -> None:
        self.found = self.case.detected(self.code, self["threshold"], self["step"])
        self.figures = self.case.figures(self.found)
        share = self.promise.rate(self["threshold"]) if self.promise else float("nan")
        self.promised.value = f"promised: {_share(share)}"
        self.read_out.value = f'<div role="status" aria-live="polite">{escape(_words(self.figures))}</div>'

    def _draw(self) -> None:
        plane, number, truth = self["plane"], self["slice"], self.case.lesion
        lines = [(f"{self['scan']}, {plane} slice {number} (0 to {self.controls['slice'].max}), bar: 50 mm", "")]
        outlines = []
        if self["truth"] and truth is not None:
            outlines.append((slice_views.plane(truth, plane, number), TRUTH))
            lines.append(("truth" if self.figures["truth_ml"] else "truth: no lesion", TRUTH))
        if self["detection"]:
            outlines.append((slice_views.plane(self.found, plane, number), FOUND))
            lines.append((f"detected: {self['method']} ≥ {self['threshold']:.4g}", FOUND))
        lines.append((_words(self.figures), ""))
        self.view = slice_views.compose(self._panels(outlines), plane, self.case.voxel_mm, lines)
        self.picture.alt = ". ".join(self.view.words)
        self.picture.content = self.view.png()

    def _panels(self, outlines: list) -> list[Panel]:
        plane, number, modality, method = (self[name] for name in ("plane", "slice", "modality", "method"))
        image = slice_views.plane(self.case.image[self._channel()], plane, number)
        anomaly = values_of(slice_views.plane(self.code, plane, number))
        after = "" if self["step"] == "none" else f", {self['step']}"
        named, limit = f"{method}{after}: anomaly, 0 to {self.top:.3g}", self["threshold"]
        drawn = []
        if self["reconstruction"] and method in self.case.redraws:
            title = f"{modality} as {method} redraws it, 0 to {slice_views.TOP:g}"
            drawn = [slice_views.scan_panel(title, self._reconstruction(), outlines)]
        if self["arrangement"] == "overlaid":
            over = slice_views.overlay_panel(f"{named}, over {modality}", image, anomaly, self.top, outlines, limit)
            return [over, *drawn]
        scan = slice_views.scan_panel(f"{modality}, {UNIT}, 0 to {slice_views.TOP:g}", image, outlines)
        return [scan, *drawn, slice_views.map_panel(named, anomaly, self.top, outlines, limit)]

    def _channel(self) -> int:
        return self.case.modalities.index(self["modality"])

    def _reconstruction(self) -> np.ndarray:
        """The plane of what the method redraws [row, column]; all slices are drawn for one across them."""
        of_slice = [self["slice"]] if self["plane"] == "axial" else range(len(self.case.brain))
        volume = np.stack([self.redrawn(self["scan"], self["method"], i)[self._channel()] for i in of_slice])
        return slice_views.plane(volume, self["plane"], 0 if self["plane"] == "axial" else self["slice"])

    def _redrawn(self, name: str, method: str, number: int) -> np.ndarray:
        case = self.cases[name]
        if not np.any(case.brain[number]):
            return np.zeros((len(case.modalities), *case.brain.shape[1:]), np.float16)
        return np.asarray(case.redraws[method](number), np.float16)

    def _voxel(self, x: float, y: float) -> tuple[int, int, int] | None:
        under = self.view.voxel(x, y)
        return under and slice_views.place(self["plane"], self["slice"], *under, self.case.brain.shape)

    def _point(self, where: Sequence[float]) -> None:
        """Read out intensity and map under the pointer."""
        voxel = self._voxel(*where) if where and not self.failed else None
        if voxel is None:
            self.under.value = ""
            return
        intensity, anomaly = self.case.image[self._channel()][voxel], values_of(self.code[voxel])
        at = "slice {}, row {}, column {}".format(*voxel)
        outside = "" if self.case.brain[voxel] else ", outside the brain"
        self.under.value = escape(
            f"{self['modality']} {intensity:.3f} ({UNIT}), {self['method']} {anomaly:.4g} at {at}{outside}"
        )

    def _heard(self, message: dict) -> None:
        """Keys step through slices; a click is where the other planes will cut."""
        control = self.controls["slice"]
        if message.get("key") in KEYS:
            control.value = min(max(control.value + KEYS[message["key"]], 0), control.max)
        elif message.get("key") in ("Home", "End"):
            control.value = 0 if message["key"] == "Home" else control.max
        elif not self.failed and message.get("click") and (voxel := self._voxel(*message["click"])):
            self.place = list(voxel)

    def _save(self) -> None:
        if self.failed:
            return
        if self.folder:
            path = self.export(self.folder)
            self._say(f"Saved as {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}.")
        else:
            address = f"data:image/png;base64,{b64encode(self.picture.content).decode()}"
            self.notice.value = f'<a download="{self._file_name()}" href="{address}">Download {self._file_name()}</a>'

    def _file_name(self) -> str:
        name = f"{self['scan']}_{self['method']}_{self['plane']}_{self['slice']:03d}"
        return re.sub(r"[^\w.-]", "_", name) + ".png"

    def _say(self, words: str) -> None:
        self.notice.value = f'<div role="status" aria-live="polite">{escape(words)}</div>' if words else ""


def of_run(run: str, cohort: Cohort) -> SliceViewer:
    """The viewer of a run's maps: its test and validation subjects, thresholds with what its healthy validation
    material promises; pictures are saved in the run's folder `views`."""
    return SliceViewer(cases.of_run(run, cohort), cases.promises_of_run(run, cohort), run_folder(run) / "views")


def _controls(scans: list[str]) -> dict[str, widgets.Widget]:
    plain = {"style": {"description_width": "initial"}}
    wide = plain | {"layout": {"width": "480px"}}
    buttons = {"style": {"description_width": "initial", "button_width": "auto"}, "layout": {"width": "max-content"}}
    box = {"indent": False, "layout": {"width": "auto", "margin": "2px 12px"}}
    return {
        "scan": widgets.Dropdown(options=scans, description="Scan", **plain),
        "modality": widgets.Dropdown(description="Modality", **plain),
        "method": widgets.Dropdown(description="Method", **plain),
        "step": widgets.Dropdown(options=postprocessing.STEPS, description="Post-processing", **plain),
        "plane": widgets.ToggleButtons(options=tuple(PLANES), description="Plane", **buttons),
        "slice": widgets.IntSlider(description="Slice", **wide),
        "threshold": widgets.FloatSlider(description="Threshold, value of the map", readout_format=".4g", **wide),
        "arrangement": widgets.ToggleButtons(options=ARRANGEMENTS, description="Scan and map", **buttons),
        "truth": widgets.Checkbox(True, description="Truth", **box),
        "detection": widgets.Checkbox(True, description="Detection", **box),
        "reconstruction": widgets.Checkbox(False, description="Reconstruction", **box),
    }


def _button(words: str, more: str) -> widgets.Button:
    return widgets.Button(description=words, tooltip=more, layout={"width": "auto"})


def _share(rate: float) -> str:
    if np.isnan(rate):
        return "nothing, no healthy validation voxels stand behind this threshold"
    return f"at most {100 * rate:.3g} % of healthy validation voxels"


def _words(figures: Mapping[str, float]) -> str:
    """The figures of a whole scan in a sentence."""
    said = f"Whole scan: detected {figures['ml']:.1f} ml in {_pieces(figures['components'])}"
    if figures.get("truth_components"):
        said += f"; truth {figures['truth_ml']:.1f} ml in {_pieces(figures['truth_components'])}"
    return said + (f"; Dice {figures['dice']:.2f}" if "dice" in figures else "")


def _pieces(number: int) -> str:
    return f"{number} component{'' if number == 1 else 's'}"
