"""Pictures: what is on the axes, which limits are shared, and what the lines are."""

import made_cohort
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lib import evaluation, metrics, plots

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def drawn(figure):
    """The axes of a figure; drawing it must not fail."""
    figure.canvas.draw()
    assert figure.get_size_inches()[0] * figure.dpi <= 900
    return figure.axes


def labelled(figure):
    axes = drawn(figure)
    assert all(axis.get_xlabel() for axis in axes)
    return axes


def counts(good, subjects=4):
    random = np.random.default_rng(0)
    truth = np.arange(400) < 40
    found = []
    for i in range(subjects):
        values = metrics.codes((random.random(400) + good * truth).astype(np.float16))
        code, number = metrics.count(values, truth, ~truth, ~truth)
        found.append(metrics.SubjectCounts(f"s{i}", False, code, number, np.zeros(0), np.zeros(0, bool)))
    return found


def test_a_tie_is_grey_and_a_difference_is_not():
    table = pd.DataFrame({"method_a": ["a", "a"], "method_b": ["b", "c"], "difference": [0.2, 0.01],
                          "low": [0.1, -0.1], "high": [0.3, 0.1]})  # fmt: skip
    (axis,) = labelled(plots.forest(table, "average precision"))
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a − b", "a − c"]
    assert [line.get_color() for line in axis.lines[:4:2]] == [plots.TRUTH, "grey"]
    assert "average precision" in axis.get_xlabel()


def test_bands_hold_their_curve_and_a_perfect_one_has_no_width():
    precision, recall = labelled(plots.curve_bands({"good": counts(0.8), "perfect": counts(2)}))
    (good, perfect), line = precision.collections, precision.lines[0]
    band = good.get_paths()[0].get_extents()
    assert band.height > 0.05
    assert band.ymin <= min(line.get_ydata()) <= band.ymax
    corners = perfect.get_paths()[0].vertices
    assert corners[(corners[:, 0] > 0) & (corners[:, 0] < 0.99), 1] == pytest.approx(1)
    assert precision.lines[1].get_ydata()[:-2] == pytest.approx(1)
    assert (np.diff(recall.lines[0].get_ydata()) >= 0).all()


def test_chance_is_the_prevalence():
    precision, _ = drawn(plots.curve_bands({"noise": counts(0)}))
    assert precision.lines[1].get_ydata()[0] == pytest.approx(0.1)
    assert precision.lines[0].get_ydata()[-1] == pytest.approx(0.1)


def test_froc_goes_by_rising_false_positives():
    (axis,) = labelled(
        plots.froc(pd.DataFrame([("ae", 0, 0.1), ("ae", 1, 0.5), ("ae", 5, 0.9)], columns=evaluation.FROC_COLUMNS))
    )
    assert axis.lines[0].get_xdata().tolist() == [0, 1, 5]
    assert axis.lines[0].get_ydata().tolist() == [0.1, 0.5, 0.9]
    assert "per volume" in axis.get_xlabel()


def test_a_gallery_has_one_scale_a_method(tmp_path):
    prepared = made_cohort.write(tmp_path)
    places = [(s, plots.most_lesion(s)) for s in prepared.split("test")[-2:]]
    maps = [{"a": gain * s.image[0], "b": np.zeros(s.brain.shape)} for gain, (s, _) in zip((1, 3), places, strict=True)]
    axes = np.reshape(drawn(plots.gallery(places, maps)), (2, 3))
    limits = [axis.images[0].get_clim() for axis in axes.flat]
    assert limits[1] == limits[4]
    assert limits[1][0] == 0
    assert limits[1][1] == pytest.approx(
        max(np.percentile(of["a"][i][s.brain[i]], 99.5) for (s, i), of in zip(places, maps, strict=True))
    )
    assert "slice" in axes[0, 0].get_title()


def test_a_gallery_of_many_methods_goes_on_in_the_next_row(tmp_path):
    prepared = made_cohort.write(tmp_path)
    place = (prepared.split("test")[-1], 3)
    maps = {f"method {i}": place[0].image[0] for i in range(14)}
    axes = drawn(plots.gallery([place], [maps]))
    assert len(axes) == 2 * plots.GALLERY_COLUMNS
    assert [axis.get_title().partition("\n")[0] for axis in axes[1:15]] == list(maps)
    assert not any(axis.images for axis in axes[15:])


def test_bars_stand_for_the_table_and_bring_their_intervals():
    table = pd.DataFrame({"auroc": [0.7, 0.5], "auroc_low": [0.6, 0.4], "auroc_high": [0.8, 0.6], "dice": [0.1, 0.2]},
                         index=pd.MultiIndex.from_tuples([("slice", "ae"), ("scan", "ae")]))  # fmt: skip
    (axis,) = labelled(plots.bars(table, {"auroc": "AUROC", "dice": "Dice"}, "figure", chance=0.5))
    assert [bar.get_width() for bar in axis.patches] == [0.7, 0.5, 0.1, 0.2]
    ((low, high), _) = [segment[:, 0] for segment in axis.collections[0].get_segments()]
    assert (low, high) == (0.6, 0.8)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["slice, ae", "scan, ae"]


def test_shares_above_mean_plus_sigma_are_in_percent_under_their_bound():
    table = pd.DataFrame({"k": [1, 1, 2, 2], "truth": ["lesion", "no lesion"] * 2, "share": [0.1, 0.08, 0.05, 0.04],
                          "low": 0.01, "high": 0.12})  # fmt: skip
    (axis,) = labelled(plots.flagged(table))
    bound = next(line for line in axis.lines if line.get_linestyle() == ":")
    assert bound.get_ydata()[[0, -1]].tolist() == [50, 20]
    assert next(line for line in axis.lines if line.get_linestyle() == "None").get_ydata().tolist() == [10, 5]
    assert "%" in axis.get_ylabel()


def test_points_over_a_quantity_carry_both_labels_and_plain_numbers():
    (axis,) = labelled(plots.against([0.5, 20], {"ae": [0.1, 0.4]}, ("lesion volume, ml", "Dice")))
    assert axis.get_ylabel() == "Dice"
    assert {"1", "10"} <= {label.get_text() for label in axis.get_xticklabels()}
    assert list(axis.lines[0].get_ydata()) == [0.1, 0.4]


def test_draws_by_lot_show_the_true_labels_where_there_are_some():
    null = np.linspace(0.2, 0.8, 50)
    (with_truth,) = labelled(plots.by_lot(null, 0.9, "AUROC of a scan"))
    (without,) = labelled(plots.by_lot(null, float("nan"), "AUROC of a scan"))
    assert list(with_truth.lines[0].get_xdata()) == [0.9, 0.9]
    assert len(without.lines) == 0
