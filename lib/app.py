"""The detection app: a run and a method are chosen, a scan is given, what was found is looked at and taken along.

Widgets for JupyterLab and Voilà. Nothing slow is imported before the first scan; what people send is kept for their
visit only.
"""

import json
import tempfile
from dataclasses import replace
from html import escape
from pathlib import Path
from time import perf_counter

import ipywidgets
import numpy as np

import lib
from lib import uploads, volumes
from lib.errors import CourseError
from lib.exchange import FileDownload, FileUpload

NO_RUN = "There is no finished run yet. Make one: ./run_all.sh"
WIDE = {"layout": ipywidgets.Layout(width="min(40em, 95%)"), "style": {"description_width": "6em"}}
LONG = {**WIDE, "style": {"description_width": "initial"}}
ROW = {"flex_flow": "row wrap", "grid_gap": "8px"}
PREFERRED = ("sided_ensemble", "dae")
SCORE_SLICES = ("brain_area", "slice_index")
BRAIN = "brain"
OPTIONS = {" by --mask": ""}


def finished_runs() -> list[Path]:
    """The folders of runs that are done and hold models, the newest first."""
    records = sorted(lib.run_folder(".").glob("*/run.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent for path in records if _is_done(path) and methods(path.parent)]


def _is_done(record: Path) -> bool:
    try:
        return json.loads(record.read_bytes())["status"] == "done"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def modalities(run: Path) -> tuple[tuple[str, ...], bool]:
    """The modalities of the cohort that a run learnt from, and whether all of them are needed; raises CourseError where
    it is not there any more."""
    try:
        cohort = lib.ROOT / json.loads((run / "cohort.json").read_bytes())["path"]
        manifest = json.loads((cohort / "manifest.json").read_bytes())
        return tuple(manifest["recipe"]["modalities"]), not any(s["missing"] for s in manifest["subjects"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CourseError(f"The cohort of the run {run.name} is not there.", "Choose another run.") from error


def methods(run: Path) -> list[str]:
    """The methods that a run has a model of, those that mark voxels, without importing what makes them."""
    names = sorted(path.stem for path in run.glob("models/*.safetensors"))
    return [name for name in names if "@" not in name and name not in SCORE_SLICES]


class App(ipywidgets.VBox):
    """The page and what happens on it. `run`: the run chosen at first, else the newest; `device` as in training."""

    def __init__(self, run: str = "", device: str = "auto"):
        super().__init__()
        self.device, self.kept = device, uploads.private_folder()
        self.folder = Path(self.kept.name)
        runs = finished_runs()
        chosen = next((path for path in runs if path.name == run), runs[0] if runs else None)
        self.run = ipywidgets.Dropdown(
            description="Run", options=[(path.name, path) for path in runs], value=chosen, **WIDE
        )
        self.method = ipywidgets.Dropdown(description="Method", **WIDE)
        self.rows: dict[str, tuple[FileUpload, ipywidgets.Text]] = {}
        self.brain = self._row("brain mask", ", only where the scan shows more than the brain")
        self.scans, self.result = ipywidgets.VBox(), ipywidgets.VBox()
        self.start = ipywidgets.Button(description="Find anomalies", button_style="primary", disabled=not runs)
        self.said = ipywidgets.HTML()
        self.run.observe(self._run_chosen, "value")
        self.start.on_click(self._started)
        note = _paragraph(
            f"<b>{lib.RESEARCH}</b> Scans stay on this machine; what you send is removed after your visit."
        )
        self.children = [
            note, _heading("1. What looks"), self.run, self.method,
            _heading("2. A scan"), self.scans, self.start, self.said, self.result,
        ]  # fmt: skip
        if runs:
            self._run_chosen()
        else:
            self._say(NO_RUN)

    def _run_chosen(self, *_) -> None:
        """Offer the methods of the run, and a place for each of its modalities."""
        names = methods(self.run.value)
        self.method.options = names
        self.method.value = next((name for name in PREFERRED if name in names), names[0])
        try:
            there, self.all_needed = modalities(self.run.value)
            self.rows = {one: self.rows.get(one) or self._row(f"{one} scan") for one in there}
            self._say("")
        except CourseError as error:
            self.rows = {}
            self._say(str(error))
        self.scans.children = [widget for row in (*self.rows.values(), self.brain) for widget in row]

    def _row(self, what: str, when: str = "") -> tuple[FileUpload, ipywidgets.Text]:
        """Places for a file that is sent and for a path."""
        upload = FileUpload(self.folder, label=f"Send a {what}{when} (at most {uploads.LIMIT // 2**20} MB)")
        path = ipywidgets.Text(description=f"or path of {what}", placeholder="/path/on/this/machine.nii.gz", **LONG)
        return upload, path

    def _given(self) -> tuple[dict[str, Path], Path | None, dict[str, str]]:
        """The scans by modality, the mask of their brain, and what to call the paths of those that were sent."""
        paths, names = {}, {}
        for what, (upload, path) in {**self.rows, BRAIN: self.brain}.items():
            if text := path.value.strip():
                paths[what] = Path(text).expanduser()
            elif upload.received:
                paths[what] = upload.received.path
                names[str(upload.received.path)] = upload.name
        brain = paths.pop(BRAIN, None)
        missing = [what for what in self.rows if what not in paths]
        if missing and (self.all_needed or not paths):
            raise CourseError(f"There is no {' and no '.join(missing)} scan yet.", "Send one, or give its path.")
        return paths, brain, names

    def _started(self, _) -> None:
        self.start.disabled = True
        self.result.children, names = (), {}
        try:
            scans, brain, names = self._given()
            self._say("Loading the libraries …")
            self._detect(scans, brain, names)
        except CourseError as error:
            self._say(_named(str(error), names))
        except Exception as error:  # the page lives on, whatever a scan does to a library
            self._say(f"The scan could not be examined: {type(error).__name__}.\nTry another method or another scan.")
        finally:
            self.start.disabled = False

    def _detect(self, scans: dict[str, Path], brain: Path | None, names: dict[str, str]) -> None:
        from lib import detection

        run, method = self.run.value, self.method.value
        if len(self.rows) == 1:  # a run of one modality: another may stand in, and is said to
            ((modality, path),) = scans.items()
            scans = {detection.modality_of(Path(names.get(str(path), path))) or modality: path}
        keep = self.folder if names else None
        found = detection.detect(scans, run, method, device=self.device, brain=brain, keep=keep, tell=self._say)
        begin = perf_counter()
        self.result.children = [Result(found, self.folder)]
        seconds = {**found.seconds, "picture": perf_counter() - begin}
        times = ", ".join(f"{stage} {took:.1f} s" for stage, took in seconds.items())
        self._say("\n".join([f"{method} of the run {run.name}: {times}.", *(_named(w, names) for w in found.warnings)]))

    def _say(self, text: str) -> None:
        lines = "<br>".join(escape(line) for line in text.splitlines())
        self.said.value = f'<p role="status" style="max-width: 50em; line-height: 1.4">{lines}</p>'


class Result(ipywidgets.VBox):
    """What was found: a viewer, figures that follow its threshold, and downloads that are made when asked for.
    `folder`: where files are made."""

    def __init__(self, found, folder: Path):
        super().__init__()
        self.found, self.folder, self.figures = found, folder, ipywidgets.HTML()
        self.viewer = _viewer(found)
        self.threshold = self.viewer.controls["threshold"]
        self.threshold.value = found.threshold
        self.first, self.snapped = self.threshold.value, False
        self.threshold.observe(self._slid, "value")
        self.downloads = [
            FileDownload("Anomaly map (NIfTI)", lambda: self._image("anomaly", found.anomaly)),
            FileDownload("Mask (NIfTI)", lambda: self._image("mask", found.mask(self.limit).astype(np.uint8))),
            FileDownload("Report (one page)", self._report),
        ]
        self.children = [
            _heading("3. What was found"), self.figures, self.viewer,
            _heading("4. Take it along"), ipywidgets.HBox(self.downloads, layout=ROW),
            _paragraph("Map and mask lie on the grid of the scan that you gave."), _paragraph(lib.RESEARCH),
        ]  # fmt: skip
        self._count()

    @property
    def limit(self) -> float:
        """The threshold that the slider is at; the run's own where it has not been moved."""
        return self.threshold.value if self.moved else self.found.threshold

    @property
    def moved(self) -> bool:
        """Whether the slider is elsewhere than at first."""
        return self.threshold.value != self.first

    def _slid(self, change) -> None:
        """A browser puts the slider on its nearest step when it shows it; all further moves are a person's."""
        if not self.snapped and abs(change.new - self.first) <= self.threshold.step / 2:
            self.first = change.new
        self.snapped = True
        self._count()

    def _count(self) -> None:
        said, promise = self.found.summary(self.limit), ""
        share = f"{100 * said['found_share']:.2f} % of the brain"
        much = share if said["found_ml"] is None else f"<b>{said['found_ml']:.1f} ml</b>, {share},"
        if said["promised_fpr"] is not None:
            promise = f", which {100 * said['promised_fpr']:g} % of healthy voxels reach"
        self.figures.value = (
            f'<p role="status">On the grid of the scan: {much} in <b>{said["components"]}</b> components of 20 mm³ or '
            f"more, at the threshold {self.limit:.4g}{promise}.</p>"
        )

    def _image(self, what: str, voxels: np.ndarray) -> tuple[str, bytes]:
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            path = Path(place) / f"{self.found.subject.id}_{self.found.method}_{what}.nii.gz"
            volumes.write(path, voxels, self.found.affine)
            return path.name, path.read_bytes()

    def _report(self) -> tuple[str, bytes]:
        from lib import detection

        found = self.found
        if self.moved:
            found = replace(found, threshold=self.limit, promised=None, source="given")
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            detection.write(found, Path(place) / "result")
            return f"{found.subject.id}_{found.method}.html", (Path(place) / "result" / "report.html").read_bytes()


def _viewer(found):
    """A viewer of the map as the method made it, which is what the files hold; figures are shown elsewhere."""
    from lib import cases, cohort
    from lib.viewer import SliceViewer

    subject, run = found.subject, str(found.run)
    case = cases.Case(
        subject.id, tuple(subject.facts["modality"].split("+")), subject.image, subject.brain,
        subject.voxel_mm[::-1], {found.method: found.prepared},
    )  # fmt: skip
    viewer = SliceViewer([case], cases.promises_of_run(run, cohort.of_run(run)))
    hidden = [viewer.controls[name] for name in ("scan", "method", "step", "truth", "reconstruction")]
    for widget in (*hidden, viewer.read_out):
        widget.layout.display = "none"
    return viewer


def _named(text: str, names: dict[str, str]) -> str:
    """A text with what people call their files in place of where they are kept, and without a command's options."""
    for path, name in {**names, **OPTIONS}.items():
        text = text.replace(path, name)
    return text


def _heading(text: str) -> ipywidgets.HTML:
    return ipywidgets.HTML(f"<h2>{escape(text)}</h2>")


def _paragraph(text: str) -> ipywidgets.HTML:
    return ipywidgets.HTML(f"<p>{text}</p>")
