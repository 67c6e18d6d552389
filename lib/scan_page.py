"""One scan's page: figures, three planes through what was found, and every slice under a slider. It loads nothing."""

from base64 import b64encode
from io import BytesIO
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from lib.cohort import PreparedSubject
from lib.colours import FOUND
from lib.components import bounding_box, largest, middle
from lib.slice_views import PLANES, compose, enlarged, overlay_panel, plane, scan_panel, tiled

TEMPLATES = Path(__file__).with_name("templates")
COLUMNS = 12  # tiles in a row of a sprite
TILE = 160  # pixels: the least height of a tile that fewer are enlarged for
QUALITY = 85  # of JPEG
LEAST = 1e-3  # of a colour scale's end


def page(summary: dict, subject: PreparedSubject, anomaly: np.ndarray, threshold: float) -> str:
    """HTML of a scan's figures and a map [slice, row, column] on its prepared grid; `summary` as `Found.summary`."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    box = bounding_box(np.asarray(subject.brain))
    image, brain, anomaly = (np.asarray(a)[box] for a in (subject.image[0], subject.brain, anomaly))
    image, anomaly = image.astype(np.float32), np.where(brain, anomaly, 0)
    limit = threshold if 0 < threshold < np.inf else max(float(anomaly.max()), LEAST)
    found = brain & (anomaly >= limit)
    place = middle(largest(found) if found.any() else brain)
    edges = subject.voxel_mm[::-1]
    views = [] if len(brain) == 1 else [_plane(image, anomaly, found, limit, edges, name, place) for name in PLANES]
    slices = _sprites(image, anomaly, found, limit) | {"first": box[0].start, "shown": place[0], "count": len(brain)}
    template = environment.get_template("scan.html.j2")
    return template.render(summary=summary, planes=views, slices=slices, limit=limit, top=_top(limit), colour=FOUND)


def _top(limit: float) -> float:
    """The end of the colour scale, of which the threshold is a third."""
    return 3 * limit


def _plane(image, anomaly, found, limit: float, edges, name: str, place: tuple[int, int, int]) -> dict[str, str]:
    at = (name, place[PLANES[name]])
    outlines = [(plane(found, *at), FOUND)]
    panel = overlay_panel(f"{name}", plane(image, *at), plane(anomaly, *at), _top(limit), outlines, limit)
    return {"name": name, "picture": _uri("png", compose([panel], name, edges, []).png())}


def _sprites(image: np.ndarray, anomaly: np.ndarray, found: np.ndarray, limit: float) -> dict:
    """All slices side by side in one picture, without and with the map; a tile's width and height in pixels."""
    scan, over, mask = (tiled(stack, COLUMNS) for stack in (image, anomaly, found))
    rows = -(-len(image) // COLUMNS)
    times = max(1, -(-TILE * rows // len(scan)))
    size = (scan.shape[0] * times, scan.shape[1] * times)
    panels = {"scan": scan_panel("", scan), "map": overlay_panel("", scan, over, _top(limit), [(mask, FOUND)])}
    pictures = {name: _uri("jpeg", _jpeg(enlarged(panel, size))) for name, panel in panels.items()}
    return pictures | {"columns": COLUMNS, "rows": rows, "width": size[1] // COLUMNS, "height": size[0] // rows}


def _jpeg(pixels: np.ndarray) -> bytes:
    content = BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=QUALITY)
    return content.getvalue()


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{b64encode(content).decode()}"
