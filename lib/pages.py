"""Executed notebooks as parts of pages that need no network, the failure shown where it happened."""

import struct
import textwrap
from base64 import b64decode
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mistune
import nbformat
from bs4 import BeautifulSoup
from nbconvert import HTMLExporter
from traitlets.config import Config

TEMPLATES = Path(__file__).with_name("templates")
PAPERMILL_BANNER = "papermill-error-cell-tag"
WIDGET = "application/vnd.jupyter.widget-view+json"
SHOWN = ["text/html", "image/svg+xml", "image/png", "image/jpeg", "text/markdown", "text/plain"]
FOLDED = {"parameters": "Parameters and their defaults", "injected-parameters": "Parameters as set for this run"}


def read(folder: Path, run: dict) -> list[dict]:
    """A dictionary for each executed notebook of a run's folder: `name`, `title`, `status`, `error`, `failure` (whether
    it has a place), `cells` (HTML that loads nothing from elsewhere) and `pictures` (those for the index)."""
    there = {path.stem: path for path in sorted((folder / "notebooks").glob("[!.]*.ipynb"))}
    names = [name for name in run["notebooks"] if name in there]
    names += [name for name in there if name not in run["notebooks"]]
    merged = {"enabled": True}  # streams in one piece, a progress bar as its last state
    exporter = HTMLExporter(
        config=Config(NbConvertBase={"display_data_priority": SHOWN}, CoalesceStreamsPreprocessor=merged),
        template_name="course",
        extra_template_basedirs=[str(TEMPLATES)],
        exclude_anchor_links=True,
    )
    return [_page(there[name], run["notebooks"].get(name, {}), exporter) for name in names]


def _page(path: Path, entry: dict, exporter: HTMLExporter) -> dict:
    notebook = _read_notebook(path)
    page = {"name": path.stem, "status": entry.get("status"), "error": entry.get("error")}
    page["failure"] = _annotate(notebook, page["status"], page["error"])
    headings = (_plain(cell.source, "h1") for cell in notebook.cells if cell.cell_type == "markdown")
    page["title"] = entry.get("title") or next(filter(None, headings), path.stem)
    page["pictures"] = [picture for cell in notebook.cells for picture in _main_pictures(cell, page)]
    page["cells"] = _offline(exporter.from_notebook_node(notebook)[0], path.parent)
    return page


def _read_notebook(path: Path) -> nbformat.NotebookNode:
    try:
        return nbformat.read(path, as_version=4)
    except ValueError:
        words = f"{path.name} cannot be read: it was not written to its end."
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(words)])


def _annotate(notebook: nbformat.NotebookNode, status: str | None, error: dict | None) -> bool:
    """Leave in each cell's metadata what the template asks for; return whether there is a cell that failed."""
    notebook.metadata.pop("widgets", None)
    notebook.cells = [cell for cell in notebook.cells if PAPERMILL_BANNER not in _tags(cell)]
    failed = None if status == "done" else _failed_cell(notebook)
    above, passed = "A picture of this notebook", False
    for number, cell in enumerate(notebook.cells, 1):
        if cell.cell_type == "markdown":
            above = _plain(cell.source, "p") or _plain(cell.source) or above
        fold = next((FOLDED[tag] for tag in _tags(cell) if tag in FOLDED), None)
        notes = {"anchor": f"cell-{number}", "caption": above, "alt": textwrap.shorten(above, 300, placeholder=" …")}
        cell.metadata["report"] = notes | {"fold": fold, "failed": cell is failed, "not_run": passed}
        passed = passed or cell is failed
        _without_widgets(cell)
    if failed and error and not _raised(failed):
        failed.outputs.append(nbformat.v4.new_output("error", ename=error["name"], evalue=error["message"]))
    return failed is not None


def _failed_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """The cell that raised, or the one that ran when its kernel ended."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    raised = [cell for cell in cells if _raised(cell) and "raises-exception" not in _tags(cell)]
    running = [cell for cell in cells if cell.metadata.get("papermill", {}).get("status") in ("running", "failed")]
    return next(iter(raised + running), None)


def _tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def _raised(cell: nbformat.NotebookNode) -> bool:
    return any(output.output_type == "error" for output in cell.outputs)


def _without_widgets(cell: nbformat.NotebookNode) -> None:
    for output in cell.get("outputs", []):
        if output.get("data", {}).pop(WIDGET, None):
            output.data["text/plain"] = "An interactive control: open the notebook in JupyterLab to use it."


def _plain(markdown: str, tag: str | None = None) -> str:
    """The text of a Markdown cell, or of its first element `tag`, in one line without markup."""
    soup = BeautifulSoup(mistune.html(markdown), "html.parser")
    part = soup.find(tag) if tag else soup
    return " ".join(part.get_text().split()) if part else ""


def _main_pictures(cell: nbformat.NotebookNode, page: dict) -> list[dict]:
    if "main-picture" not in _tags(cell):
        return []
    notes = cell.metadata.report
    place = f"notebooks/{page['name']}.html#{notes.anchor}"
    shared = {"place": place, "title": page["title"], "caption": notes.caption, "alt": notes.alt}
    shown = (output.get("data", {}).get("image/png") for output in cell.outputs)
    return [shared | picture(png.replace("\n", "")) for png in shown if png]


def picture(png: str) -> dict:
    """Source and size in pixels of a base64-coded PNG; the size stands in bytes 16 to 24 of its header."""
    width, height = struct.unpack(">II", b64decode(png)[16:24])
    return {"source": f"data:image/png;base64,{png}", "width": width, "height": height, "wide": width > 2 * height}


def _offline(html: str, here: Path) -> str:
    """Cut what would be loaded from elsewhere, and lead links between notebooks to their pages."""
    soup = BeautifulSoup(html, "html.parser")
    for tag in soup.select("[src], [srcset], link[href], object[data]"):
        target = tag.get("src") or tag.get("href") or ""
        if not target.startswith("data:") and not _beside(target, here):
            tag.replace_with(tag.get("alt", ""))
    for link in soup.select("a[href]"):
        parts = urlsplit(link["href"])
        if parts.path.endswith(".ipynb") and _beside(parts.path, here):
            link["href"] = parts._replace(path=parts.path.removesuffix("ipynb") + "html").geturl()
        elif parts.scheme not in ("http", "https") and parts.path and not _beside(parts.path, here):
            link.unwrap()
    return str(soup)


def _beside(target: str, here: Path) -> bool:
    """Whether a relative address names a file of the run's folder."""
    path = (here / unquote(target)).resolve()
    return ":" not in target and path.is_relative_to(here.parent.resolve()) and path.is_file()
