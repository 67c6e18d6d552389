"""What holds the house together: floors, stored notebooks, the course's own table."""

import ast
import json
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "errors": 0, "refusals": 0, "nifti": 0, "volumes": 0, "progress": 0, "acquisition": 0, "privacy": 0, "dicom": 1,
    "datasets": 1, "phantom": 1, "pictures": 1, "preprocessing": 2, "examination": 2, "intake": 2, "boxes": 2,
    "cohort": 2, "preparation": 2, "intensities": 1, "registration": 2, "training": 3, "adversarial": 3, "models": 3,
    "baselines": 3, "lesions": 3, "scoring": 4, "evaluation": 4, "plots": 4, "metrics": 1, "components": 1,
    "postprocessing": 2, "judging": 4, "figures": 4, "traps": 4, "slice_traps": 4, "domain": 4, "approaches": 4,
    "single_scan": 4, "probes": 4, "thresholds": 2, "space": 4, "reshape": 4, "transfer": 4, "confounding": 4,
    "slice_views": 4, "cases": 4, "uploads": 1, "detection": 4, "report": 5, "pages": 5, "scrubber": 5, "exchange": 5,
    "viewer": 5, "app": 5, "settings": 6, "runner": 6, "jobs": 6, "runs": 6, "course": 6, "detect": 6, "colours": 0,
    "scan_page": 4, "fetch": 6, "archives": 1, "downloads": 1, "sources": 2, "subjects": 1, "conventions": 1,
    "layouts": 1, "formats": 1, "participants": 1, "workers": 0, "extraction": 2, "surfaces": 2, "quality": 2,
}  # fmt: skip
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
EXPLORE = ROOT / "notebooks" / "explore.ipynb"  # the app's page: no part of the course's sequence


def imported(path):
    """The modules of lib that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "lib":
            yield from (alias.name for alias in node.names if alias.name in FLOORS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lib."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lib."))


def test_a_file_imports_from_its_own_floor_or_lower_ones_only():
    files = [path for path in (ROOT / "lib").rglob("*.py") if path != ROOT / "lib" / "__init__.py"]
    climbs = []
    for path in files:
        own = path.relative_to(ROOT / "lib").parts[0].removesuffix(".py")
        climbs += [f"{own} -> {other}" for other in imported(path) if FLOORS[other] > FLOORS[own]]
    assert len(files) > 15
    assert climbs == []


def test_whatever_lib_imports_is_pinned():
    lines = "".join((ROOT / f"requirements{kind}.txt").read_text() for kind in ("", "-extra")).splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines}
    owners = packages_distributions()
    for path in [*(ROOT / "lib").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            outside = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"lib", "benchmarks"}
            for name in outside:
                assert {owner.lower() for owner in owners[name]} & pinned, f"{path.name} imports {name}"


def test_the_floors_name_every_file():
    files = {path.relative_to(ROOT / "lib").parts[0].removesuffix(".py") for path in (ROOT / "lib").rglob("*.py")}
    assert files - {"__init__"} == FLOORS.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_stored_stripped_short_celled_and_end_in_a_summary(path):
    cells = json.loads(path.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    tagged = [c for c in code if "parameters" in c["metadata"].get("tags", [])]
    sizes = [len([line for line in "".join(c["source"]).splitlines() if line.strip()]) for c in code if c not in tagged]
    prose = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    assert not any(c["outputs"] or c["execution_count"] for c in code)
    assert len(tagged) == 1
    assert max(sizes) <= 15
    assert cells[0]["source"][0].startswith("# ")
    assert "?" in cells[0]["source"][0]
    for heading in ("You will see", "## What to notice", "## Try it", "not for diagnosis"):
        assert heading in prose
    assert "print(" in "".join(code[-1]["source"])


def test_the_app_s_page_is_stored_stripped_with_little_code_of_its_own():
    cells = json.loads(EXPLORE.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    prose = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    assert not any(c["outputs"] or c["execution_count"] for c in code)
    assert sum(len(c["source"]) for c in code) <= 15
    assert cells[0]["source"][0].startswith("# ")
    assert "?" in cells[0]["source"][0]
    assert "For research, not for diagnosis" in prose


def test_there_are_no_other_notebooks():
    assert set((ROOT / "notebooks").glob("*.ipynb")) == {*NOTEBOOKS, EXPLORE}


@pytest.mark.parametrize("path", [*NOTEBOOKS, EXPLORE], ids=lambda p: p.stem)
def test_every_parameter_is_a_literal_with_a_comment(path):
    cells = json.loads(path.read_text())["cells"]
    (parameters,) = (c for c in cells if "parameters" in c["metadata"].get("tags", []))
    for line in parameters["source"]:
        assignment, _, comment = line.partition("#")
        ast.literal_eval(assignment.partition("=")[2].strip())
        assert len(comment.strip()) > 10


def test_the_course_s_table_names_the_notebooks_there_are():
    table = tomllib.loads((ROOT / "notebooks" / "course.toml").read_text())
    assert set(table["notebooks"]) == {path.stem for path in NOTEBOOKS}
    assert set(table["profiles"]) == {"tiny", "quick", "full"}
