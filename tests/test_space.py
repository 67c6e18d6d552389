"""Pictures of volumes: the planes that are cut, their millimetres, volumes in ml, a viewer that loads nothing."""

import base64
import io
import re

import made_cohort
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from lib import components, plots, space  # noqa: F401 (the course's style is set)
from lib.volumes import Volume


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    return made_cohort.write(tmp_path_factory.mktemp("cohort") / "c").split("test")[-1]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_the_middle_of_a_hollow_shape_lies_in_it():
    mask = np.zeros((9, 9, 9), bool)
    mask[1:8, 1:8, 1:8] = True
    mask[4, 4, 2:] = False
    assert mask[components.middle(mask)]


def test_three_planes_meet_in_the_place_and_are_drawn_in_mm(patient):
    place = components.middle(np.asarray(patient.lesion))
    anomaly = np.asarray(patient.lesion, np.float32)
    figure = space.planes(patient, anomaly, 0.5, place)
    figure.canvas.draw()
    top = figure.axes[:3]
    assert [axis.get_title().split(", ")[1] for axis in top] == ["axial", "coronal", "sagittal"]
    image = patient.image[0].astype(np.float32)
    row, column = (np.flatnonzero(np.asarray(patient.brain).any(axis=axes)) for axes in ((0, 2), (0, 1)))
    expected = image[place[0]][row[0] : row[-1] + 1, column[0] : column[-1] + 1]
    np.testing.assert_array_equal(top[0].images[0].get_array(), expected)
    assert top[0].images[0].get_extent() == [0, 2 * len(column), 0, 2 * len(row)]


def test_millilitres_count_voxels(patient):
    assert space.millilitres(patient, np.asarray(patient.lesion)) == pytest.approx(patient.lesion.sum() * 0.008)


def test_surfaces_name_both_volumes_and_draw_nothing_for_nothing(patient):
    figure = space.surfaces(patient, np.zeros(patient.brain.shape, bool))
    figure.canvas.draw()
    titles = [axis.get_title() for axis in figure.axes]
    assert "found: 0.0 ml" in titles[0]
    assert f"truth: {space.millilitres(patient, np.asarray(patient.lesion)):.1f} ml" in titles[1]
    assert [len(axis.collections) for axis in figure.axes] == [1, 2]


def test_the_viewer_loads_nothing_and_its_slices_are_not_upside_down(patient):
    page = space.viewer(patient, np.asarray(patient.lesion, np.float32), 0.5).html
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']https?:", page)
    sprites = [np.asarray(Image.open(io.BytesIO(base64.b64decode(found))).convert("L"), float)
               for found in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)]  # fmt: skip
    sprite = max(sprites, key=np.size)
    half = len(sprite) // 2
    assert sprite[:half].mean() > sprite[half:].mean()  # the last row of the sprite is filled up with nothing


def test_a_scan_is_turned_before_its_planes_are_drawn():
    voxels = np.zeros((10, 20, 30), np.float32)
    voxels[0] = 5.0
    figure = space.scan(Volume(voxels, np.diag([-1.0, 1.0, 1.0, 1.0])))
    axial = np.asarray(figure.axes[0].images[0].get_array())
    assert axial.shape == (20, 10)
    assert axial[:, -1].min() == 5
    assert axial[:, 0].max() == 0
