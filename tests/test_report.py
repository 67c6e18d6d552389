import base64
import io
import json
import os
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote

import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lib import report
from lib.errors import CourseError

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "image": "href"}
BY_METHOD = {
    "ae": (0.214, 0.271, 0.352, 0.741),
    "ae_ssim": (0.287, 0.318, 0.402, 0.768),
    "random": (0.023, 0.041, 0.046, 0.502),
    "intensity_median": (0.301, 0.334, 0.412, 0.779),
    "atlas_z": (0.187, 0.243, 0.300, 0.716),
    "empty": (0.023, 0.000, 0.045, 0.500),
}
RESULTS_HEADER = "method,family,modality,postprocess,stratum,level,metric,value,low,high,n,seed,note"


class Page(HTMLParser):
    """What a page loads, links to, shows and says."""

    def __init__(self, path):
        super().__init__()
        self.path, self.loads, self.links, self.alts, self.ids, self.words, self.styles = path, [], [], [], [], [], []
        self._inside = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self._inside.append(tag)
        self.words += [] if tag in ("a", "b", "code", "em", "span", "strong") else [" "]
        self.loads += [attrs[LOADED[tag]]] if attrs.get(LOADED.get(tag)) else []
        self.links += [attrs["href"]] if tag == "a" and "href" in attrs else []
        self.alts += [attrs.get("alt")] if tag == "img" else []
        self.ids += [attrs["id"]] if "id" in attrs else []

    def handle_data(self, data):
        if self._inside[-1:] == ["style"]:
            self.styles.append(data)
        elif self._inside[-1:] != ["script"]:
            self.words.append(data)

    def handle_endtag(self, tag):
        while self._inside and self._inside.pop() != tag:
            pass

    @property
    def text(self):
        return " ".join("".join(self.words).split())


def png(width=4.0, height=3.0, title="A picture"):
    figure = Figure(figsize=(width, height), dpi=80)
    axes = figure.subplots(1, max(1, round(width / height)), squeeze=False)[0]
    blob = np.exp(-np.add.outer(np.linspace(-2, 2, 64) ** 2, np.linspace(-1.6, 1.6, 64) ** 2))
    for number, one in enumerate(axes):
        one.imshow(np.roll(blob, 6 * number, axis=1), cmap="gray")
        one.set_title(f"{title} {number + 1}", fontsize=8)
        one.axis("off")
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return base64.b64encode(content.getvalue()).decode()


def picture_cell(source="plots.maps(cohort, maps)", tags=(), **shape):
    data = {"image/png": png(**shape), "text/plain": "<Figure size 640x480 with 1 Axes>"}
    return code_cell(source, [new_output("display_data", data=data)], tags=tags)


def code_cell(source, outputs=(), tags=(), status="completed", number=1):
    metadata = {"tags": list(tags), "papermill": {"status": status}}
    return new_code_cell(source, outputs=list(outputs), execution_count=number, metadata=metadata)


def stream(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def good_notebook(title):
    table = {"text/html": "<table><tr><th>patient</th></tr></table>", "text/plain": "patient"}
    links = "[Next](03_conv_autoencoder.ipynb), [gone](99.ipynb)."
    control = {WIDGET_VIEW: {"model_id": "a1"}, "text/plain": "HBox(...)"}
    cells = [
        new_markdown_cell(f"# {title}\n\nYou will see a *reconstruction*. {links}"),
        code_cell("epochs = 20  # passes over the data, 1 to 500", tags=["parameters"]),
        code_cell("epochs = 2", tags=["injected-parameters"]),
        code_cell("from lib import plots\nprint('x')", [stream("AP 0.31 \x1b[31mred\x1b[0m <b>no tag</b>\n")]),
        code_cell("bar()", [stream("10 %\r55 %\r100 %\n", "stderr")]),
        new_markdown_cell("## Look\n\nThe *anomaly map* of **patient 7**, slice 40.\n\nA second paragraph."),
        picture_cell(tags=["main-picture"]),
        picture_cell(width=9.0, height=3.0, tags=["main-picture"]),
        code_cell("frame", [new_output("execute_result", data=table)]),
        code_cell("slider", [new_output("display_data", data=control)]),
    ]
    state = {"a1": {"model_name": "HBoxModel", "model_module": "@jupyter-widgets/controls", "state": {}}}
    widgets = {WIDGET_STATE: {"version_major": 2, "version_minor": 0, "state": state}}
    return notebook(cells, widgets=widgets)


def failing_notebook(title):
    banner = '<span style="color:red">An Exception at <a href="#papermill-error-cell">In [3]</a>.</span>'
    place = '<span id="papermill-error-cell">stopped:</span>'
    traceback = ["\x1b[0;31mValueError\x1b[0m Traceback (most recent call last)", "----> 1 fit(\x1b[1;32m<nan>\x1b[0m)"]
    error = new_output("error", ename="ValueError", evalue="loss is <nan>", traceback=traceback)
    cells = [
        new_markdown_cell(banner, metadata={"tags": ["papermill-error-cell-tag"]}),
        new_markdown_cell(f"# {title}\n\nThe bottleneck decides."),
        code_cell("epochs = 20", tags=["parameters"]),
        new_markdown_cell(place, metadata={"tags": ["papermill-error-cell-tag"]}),
        code_cell("history = fit(x)", [error], status="failed", number=3),
        new_code_cell("print('never reached')", metadata={"papermill": {"status": "pending"}}),
    ]
    return notebook(cells)


def notebook(cells, **metadata):
    return new_notebook(cells=cells, metadata={"language_info": {"name": "python"}, **metadata})


def save(folder, name, content):
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)
    nbformat.write(content, folder / "notebooks" / f"{name}.ipynb")


def entry(title, status="done", **more):
    facts = {"title": title, "status": status, "seconds": 83.2, "peak_memory_gb": 1.234}
    return facts | {"parameters": {"epochs": 2}, "error": None} | more


def write_run(folder, notebooks, **more):
    run = {
        "run": folder.name,
        "status": "done",
        "settings": {"profile": "quick", "modality": "FLAIR"},
        "data": ["Embedded cohort: 24 healthy subjects, 16 patients", "FLAIR; lesion masks of 16"],
        "profile": "quick",
        "device": "cpu",
        "seed": 7,
        "kernel": "python3",
        "commit": "0123abc",
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "started": "2026-01-02T10:00:00+00:00",
        "finished": "2026-01-02T10:02:41+00:00",
        "notebooks": notebooks,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run | more))


def result(method, level, metric, value, stratum="all", n=16, note="", seed=7):
    family = "autoencoder" if method.startswith("ae") else "baseline"
    low, high = (f"{max(0, value - 0.05):.6f}", f"{min(1, value + 0.05):.6f}") if value is not None else ("", "")
    shown = "" if value is None else f"{value:.6f}"
    return f'{method},{family},FLAIR,none,{stratum},{level},{metric},{shown},{low},{high},{n},{seed},"{note}"'


def results_of(method, ap, dice, oracle, auroc):
    note = "intensity_median does as well" if method == "ae_ssim" else ""
    seen = None if method == "empty" else 0.018
    return [
        result(method, "voxel", "ap", ap, note=note),
        result(method, "voxel", "dice", dice, note=note),
        result(method, "voxel", "dice_oracle", oracle),
        result(method, "slice", "auroc", auroc, n=15 if method == "atlas_z" else 16),
        result(method, "slice", "ap", auroc - 0.1),
        result(method, "voxel", "fpr_promised", 0.01),
        result(method, "voxel", "fpr_seen", seen),
        result(method, "voxel", "ap_pooled", ap + 0.02),
        result(method, "voxel", "ap", ap / 2, stratum="load:small", n=5),
        result(method, "voxel", "its_own", 0.5),
    ]


def write_results(folder):
    lines = [line for method, figures in BY_METHOD.items() for line in results_of(method, *figures)]
    (folder / "results.csv").write_text("\n".join([RESULTS_HEADER, *lines]) + "\n")


def finished_run(folder):
    """A run as the course leaves it."""
    save(folder, "01_preprocessing", good_notebook("What does a scan look like to a network?"))
    save(folder, "03_conv_autoencoder", good_notebook("Can a network that only knows healthy brains find a tumour?"))
    names = {"01_preprocessing": "Preprocessing", "03_conv_autoencoder": "Convolutional autoencoder"}
    write_run(folder, {name: entry(title) for name, title in names.items()})
    write_results(folder)
    (folder / "timings.csv").write_text(
        "notebook,method,stage,seconds,peak_memory_gb\n03_conv_autoencoder,ae,fit,61.5,1.2\n01_preprocessing,,prepare,9.1,\n"
    )
    left_out = [{"subject": "sub-09", "why": "has no FLAIR <script>alert(1)</script>"}]
    cohort = {"path": "/data/x", "hash": "9f3c", "notes": ["<b>2</b> sites"], "left_out": left_out}
    (folder / "cohort.json").write_text(json.dumps(cohort | {"training": "healthy subjects"}))
    (folder / "logs").mkdir()
    (folder / "logs" / "03 conv.log").write_text("a line\n")
    return folder


def failed_run(folder):
    """A run that stopped in its second notebook; the third never started."""
    save(folder, "01_preprocessing", good_notebook("What does a scan look like to a network?"))
    save(folder, "03_conv_autoencoder", failing_notebook("Can a network find a tumour?"))
    error = {"cell": 3, "name": "ValueError", "message": "loss is <nan>"}
    notebooks = {
        "01_preprocessing": entry("Preprocessing"),
        "03_conv_autoencoder": entry("Convolutional autoencoder", "failed", error=error),
        "08_comparison": entry("Comparison", "waiting", seconds=None, peak_memory_gb=None, parameters={}),
    }
    write_run(folder, notebooks, status="failed")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = finished_run(tmp_path_factory.mktemp("reports") / "first run")
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    folder = failed_run(tmp_path_factory.mktemp("reports") / "broken")
    report.write(folder)
    return folder


def pages(folder):
    return [Page(folder / "index.html"), *(Page(path) for path in sorted(folder.glob("notebooks/*.html")))]


def assert_offline(page, folder):
    for address in page.loads:
        assert address.startswith("data:"), f"{page.path.name} loads {address[:80]}"
    assert not any("url(" in style or "@import" in style for style in page.styles)


def assert_links_lead_somewhere(page, folder):
    for address in page.links:
        path, _, place = address.partition("#")
        target = (page.path.parent / unquote(path)).resolve() if path else page.path
        assert target.is_relative_to(folder.resolve())
        assert target.is_file(), f"{page.path.name} links to {address}"
        assert not place or place in Page(target).ids, f"{page.path.name} links to {address}"


@pytest.mark.parametrize("run", ["finished", "failed"])
def test_every_page_opens_without_a_network(run, request):
    folder = request.getfixturevalue(run)
    for page in pages(folder):
        assert_offline(page, folder)
        assert_links_lead_somewhere(page, folder)
        assert all(page.alts)
        assert "For research, not for diagnosis." in page.text


def test_pages_lead_to_their_neighbours_and_the_index(finished):
    first = Page(finished / "notebooks" / "01_preprocessing.html")
    assert {"../index.html", "03_conv_autoencoder.html"} <= set(first.links)
    assert "99.ipynb" not in first.links
    assert "01_preprocessing.html" in Page(finished / "notebooks" / "03_conv_autoencoder.html").links


def test_index_says_what_ran_on_what(finished):
    text = Page(finished / "index.html").text
    facts = ["Done.", "2 min 41 s", "24 healthy subjects, 16 patients", "quick", "cpu", "0123abc"]
    facts += ["torch 2.13.0", "python3", "2026-01-02 10:00:00", "1 min 23 s", "1.23 GB", "9f3c"]
    facts += ["healthy subjects", "epochs", "9.1 s", "never compared"]
    assert [fact for fact in facts if fact not in text] == []


def test_index_links_the_files_beside_it(finished):
    links = Page(finished / "index.html").links
    assert {"results.csv", "timings.csv", "run.json", "cohort.json", "logs/03%20conv.log"} <= set(links)


def test_results_stand_with_interval_and_n(finished):
    text = Page(finished / "index.html").text
    assert "0.214 0.164 to 0.264" in text
    assert "Voxel AP n = 16" in text
    assert "0.716 0.666 to 0.766 n = 15" in text
    assert "Slice AUROC n = 16" in text
    assert "Oracle Dice: threshold chosen on the test labels, an upper bound" in text
    assert "its own (voxel)" in text


def test_detectors_come_before_baselines_each_by_falling_ap(finished):
    table, further, small = Page(finished / "index.html").text.split("Detectors")[1:]
    for one in (table, further, small):
        places = [one.index(f" {name} 0.") for name in ("ae_ssim", "ae", "intensity_median", "atlas_z")]
        assert places == sorted(places)
    order = sorted(BY_METHOD, key=lambda method: table.index(f" {method} 0."))
    assert order[:4] == ["ae_ssim", "ae", "intensity_median", "atlas_z"]
    assert set(order[4:]) == {"random", "empty"}
    assert table.index(" ae 0.") < table.index("Baselines") < table.index("intensity_median 0")


def test_main_table_holds_all_patients_and_strata_are_folded(finished):
    before, after = Page(finished / "index.html").text.split(
        "By group of patients, and after post-processing: load: small"
    )
    assert "0.107" not in before
    assert "0.107" in after


def test_note_stands_once_in_its_row_with_the_figures_that_it_speaks_of(finished):
    text = Page(finished / "index.html").text
    assert text.count("Voxel AP, Dice: intensity_median does as well") == 1


def test_note_of_every_figure_is_said_once_in_the_caption(tmp_path):
    write_run(tmp_path / "r", {})
    material = "healthy material: lesion-free slices of patients"
    rows = [result("random", "voxel", metric, 0.1, note=material) for metric in ("ap", "dice")]
    rows.append(result("ae", "voxel", "ap", 0.2, note=f"random does as well; {material}"))
    (tmp_path / "r" / "results.csv").write_text("\n".join([RESULTS_HEADER, *rows]))
    text = Page(report.write(tmp_path / "r")).text
    assert text.count(material) == 1
    assert f"Every figure: {material}." in text
    assert "Voxel AP: random does as well" in text


def test_value_that_is_missing_is_a_dash_not_nan(finished):
    text = Page(finished / "index.html").text
    assert "nan" not in text.lower()
    assert "–" in text


def test_table_without_any_figure_still_gives_a_page(tmp_path):
    write_run(tmp_path / "r", {})
    rows = [result("ae", "voxel", "ap", None, n="")]
    (tmp_path / "r" / "results.csv").write_text("\n".join([RESULTS_HEADER, *rows]))
    assert "Method" in Page(report.write(tmp_path / "r")).text


def test_rows_are_told_apart_by_what_varies(tmp_path):
    write_run(tmp_path / "r", {})
    rows = [result("ae", "voxel", "ap", value, seed=seed) for seed, value in ((1, 0.2), (2, 0.4))]
    (tmp_path / "r" / "results.csv").write_text("\n".join([RESULTS_HEADER, *rows]))
    text = Page(report.write(tmp_path / "r")).text
    assert "Method Seed Voxel AP" in text
    assert text.index("ae 2 0.400") < text.index("ae 1 0.200")
    assert "modality FLAIR, post-processing none." in text


def test_caption_says_when_training_used_patients(tmp_path):
    folder = finished_run(tmp_path / "r")
    assert "on healthy subjects." in Page(report.write(folder)).text
    (folder / "cohort.json").write_text('{"training": "lesion-free slices of patients"}')
    text = Page(report.write(folder)).text
    assert text.count("Trained, and thresholds frozen before the test, on lesion-free slices of patients.") == 3
    assert "on healthy subjects." not in text


def test_data_is_told_once_and_who_is_left_out_in_a_table(tmp_path):
    lines = ["Data: /scans.", "Split test: 5 patients.", "Left out: sub-09. It has no FLAIR."]
    write_run(tmp_path / "r", {}, data=lines)
    assert "Left out: sub-09." in Page(report.write(tmp_path / "r")).text
    left_out = [{"subject": "sub-09", "why": "It has no FLAIR."}]
    (tmp_path / "r" / "cohort.json").write_text(json.dumps({"notes": lines, "left_out": left_out}))
    text = Page(report.write(tmp_path / "r")).text
    assert [text.count(said) for said in ("/scans.", "Split test", "sub-09", "It has no FLAIR.")] == [1, 1, 1, 1]


def test_embedded_cohort_is_warned_of_and_real_scans_are_not(tmp_path):
    write_run(tmp_path / "r", {}, data=["BraTS: 12 patients"])
    assert "never compared" not in Page(report.write(tmp_path / "r")).text


def test_warnings_of_the_cohort_come_before_anything_else(tmp_path):
    write_run(tmp_path / "r", {}, data=["BraTS: 12 patients"])
    (tmp_path / "r" / "cohort.json").write_text(json.dumps({"warnings": ["Domain gap: AUROC <1.00>."]}))
    text = Page(report.write(tmp_path / "r")).text
    assert 0 < text.index("Domain gap: AUROC <1.00>.") < text.index("What ran on what")


def test_main_pictures_stand_on_the_index_with_their_caption(finished):
    page = Page(finished / "index.html")
    assert len(page.alts) == 4
    assert set(page.alts) == {"The anomaly map of patient 7, slice 40."}
    assert page.text.count("The anomaly map of patient 7, slice 40.") == 4


def test_parameters_are_folded_and_progress_and_colour_codes_are_gone(finished):
    path = finished / "notebooks" / "01_preprocessing.html"
    page = Page(path)
    assert path.read_text().count("<details>") == 2
    assert "Parameters as set for this run" in page.text
    assert "AP 0.31 red <b>no tag</b>" in page.text
    assert "\x1b" not in path.read_text()
    assert "frame patient" in page.text
    assert "100 %" in page.text
    assert "55 %" not in page.text


def test_widget_becomes_a_sentence(finished):
    text = (finished / "notebooks" / "01_preprocessing.html").read_text()
    assert "An interactive control" in text
    assert "HBox" not in text


def test_what_a_notebook_would_load_from_the_web_is_cut(tmp_path):
    html = '<p>kept</p><script src="https://cdn.org/x.js"></script><img src="//cdn.org/a.png" alt="a chart">'
    html += '<link rel="stylesheet" href="/abs.css"><iframe src="../../secret.html"></iframe><script>inline()</script>'
    shown = new_output("display_data", data={"text/html": html})
    cells = [code_cell("x", [shown]), new_markdown_cell("![m](http://a.b/c.png)")]
    folder = tmp_path / "r"
    (tmp_path / "secret.html").write_text("outside")
    save(folder, "01", notebook(cells))
    write_run(folder, {"01": entry("One")})
    report.write(folder)
    page = Page(folder / "notebooks" / "01.html")
    assert page.loads == []
    assert "kept" in page.text
    assert "a chart" in page.text
    assert "inline()" in page.path.read_text()


def test_failure_is_shown_where_it_happened_and_linked(failed):
    index = Page(failed / "index.html")
    assert "Failed in Convolutional autoencoder, cell 3: ValueError: loss is <nan>" in index.text
    assert "notebooks/03_conv_autoencoder.html#failure" in index.links
    assert "no results yet" in index.text
    assert "not started" in index.text
    page = Page(failed / "notebooks" / "03_conv_autoencoder.html")
    assert "This notebook failed in cell 3." in page.text
    assert page.links.count("#failure") == 1
    assert page.ids.count("failure") == 1
    assert "----> 1 fit(<nan>)" in page.text
    assert page.text.index("no cell below has run") < page.text.index("never reached")
    assert "papermill" not in page.path.read_text()


def test_cell_whose_kernel_died_carries_the_error_of_the_run(tmp_path):
    ran = code_cell("fit()", [stream("epoch 1\n")], status="running")
    save(tmp_path / "r", "03", notebook([new_markdown_cell("# Q"), ran, new_code_cell("later()")]))
    error = {"cell": 1, "name": "Kernel died", "message": "probably out of memory: 7.9 GB"}
    write_run(tmp_path / "r", {"03": entry("Three", "failed", error=error)}, status="failed")
    report.write(tmp_path / "r")
    page = Page(tmp_path / "r" / "notebooks" / "03.html")
    assert page.text.count("probably out of memory: 7.9 GB") == 2
    assert page.text.index("epoch 1") < page.text.rindex("probably out of memory") < page.text.index("later()")


def test_error_shown_on_purpose_is_no_failure(tmp_path):
    error = new_output("error", ename="CourseError", evalue="a trap", traceback=[])
    save(tmp_path / "r", "03", notebook([code_cell("trap()", [error], tags=["raises-exception"])]))
    write_run(tmp_path / "r", {"03": entry("Three")})
    report.write(tmp_path / "r")
    page = Page(tmp_path / "r" / "notebooks" / "03.html")
    assert "a trap" in page.text
    assert "failure" not in page.ids


def test_interrupted_run_names_resume_and_survives_half_a_notebook(tmp_path):
    folder = failed_run(tmp_path / "r")
    (folder / "notebooks" / "03_conv_autoencoder.ipynb").write_text('{"cells": [')
    write_run(folder, {"03_conv_autoencoder": entry("Three", "interrupted")}, status="interrupted", finished=None)
    index = Page(report.write(folder))
    assert "Interrupted." in index.text
    assert "--resume" in index.text
    assert "cannot be read" in Page(folder / "notebooks" / "03_conv_autoencoder.html").text
    assert "notebooks/01_preprocessing.html" in index.links[0] or any("01_pre" in link for link in index.links)


@pytest.mark.parametrize("status", ["running", "done", "failed", "interrupted"])
def test_run_json_alone_is_enough(tmp_path, status):
    write_run(tmp_path / "r", {}, status=status)
    index = Page(report.write(tmp_path / "r"))
    assert "There are no results yet" in index.text
    assert_links_lead_somewhere(index, tmp_path / "r")


def test_run_json_of_the_first_second_is_enough(tmp_path):
    (tmp_path / "run.json").write_text('{"run": "r", "status": "running"}')
    (tmp_path / "results.csv").write_text("")
    assert "Not finished." in Page(report.write(tmp_path)).text


@pytest.mark.parametrize("content", [None, "{"])
def test_folder_without_a_readable_run_json_is_refused(tmp_path, content):
    if content:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(CourseError, match=r"run\.json is missing or damaged"):
        report.write(tmp_path)
    assert not (tmp_path / "index.html").exists()


def test_words_of_the_user_are_escaped(tmp_path):
    attack = "<script>alert(1)</script>"
    folder = finished_run(tmp_path / "r")
    lines = (folder / "results.csv").read_text() + result("ae", "scan", "auroc", 0.7, note=attack)
    (folder / "results.csv").write_text(lines)
    notebooks = {"01_preprocessing": entry(attack, "failed", error={"cell": 1, "name": attack, "message": attack})}
    write_run(folder, notebooks, status="failed", data=[attack], settings={"data": attack}, device=attack)
    report.write(folder)
    for page in pages(folder):
        assert attack not in page.path.read_text()
    assert Page(folder / "index.html").text.count(attack) >= 7


def test_same_folder_gives_the_same_bytes(tmp_path, finished):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    before = {path: path.read_bytes() for path in copy.rglob("*.html")}
    report.write(copy)
    assert {path: path.read_bytes() for path in copy.rglob("*.html")} == before
    assert len(before) == 3


def test_page_of_large_pictures_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(report, "PAGE_MB", 0.001)
    write_run(tmp_path / "r", {})
    report.write(tmp_path / "r")
    assert "index.html is" in caplog.text
    assert not [name for name in os.listdir(tmp_path / "r") if name.startswith(".")]
