import nbformat
import pytest

from lib import settings
from lib.errors import CourseError


@pytest.mark.parametrize(
    ("text", "default", "meant"),
    [
        ("1e-4", 0.1, 1e-4),
        ("3", 0.1, 3.0),
        (3, 0.1, 3.0),
        ("1", "FLAIR", "1"),
        ("true", "FLAIR", "true"),
        ("Yes", False, True),
        ("false", True, False),
        ("-5", 1, -5),
        ("1,2", [8], [1, 2]),
        ("[1, 2]", (8,), (1, 2)),
        ("a, b", ["x"], ["a", "b"]),
        ("", ["x"], []),
        ("1e-4", None, 1e-4),
        ("none", None, None),
        ("some text", None, "some text"),
    ],
)
def test_a_value_means_what_the_default_is(text, default, meant):
    found = settings.convert(text, default)
    assert found == meant
    assert type(found) is type(meant)


@pytest.mark.parametrize(("text", "default"), [("", 1), ("1.0", 1), ("none", True), ("x,1", [1]), (["a"], "text")])
def test_a_value_of_another_type_is_refused(text, default):
    with pytest.raises(ValueError, match=r"^a |^true"):
        settings.convert(text, default)


@pytest.mark.parametrize("source", ["epochs = 3 * 4", "import os", "epochs", "epochs ="])
def test_parameters_must_be_literals(tmp_path, source):
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "x.ipynb")
    with pytest.raises(CourseError, match=r"x\.ipynb"):
        settings.read_parameters(tmp_path / "x.ipynb")
