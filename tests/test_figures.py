"""Figures: what is drawn is what is saved, the same bytes every time, or an error and no file."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from paper_lib.results import figures


@pytest.fixture
def ax():
    figures.style()
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    rows = [(x, seed, kind, rng.normal()) for x in range(5) for seed in range(3) for kind in "ab"]
    return pd.DataFrame(rows, columns=["x", "seed", "kind", "y"])


def test_band_draws_mean_and_sample_spread_per_group(ax, data):
    summary = figures.band(ax, data, "x", "y", hue="kind")
    assert [line.get_label() for line in ax.lines] == ["a", "b"]
    part = data[data.kind == "b"].pivot(index="x", columns="seed", values="y").to_numpy()
    np.testing.assert_allclose(ax.lines[1].get_ydata(), part.mean(axis=1))
    drawn = ax.collections[1].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose(drawn.max(), (part.mean(axis=1) + part.std(axis=1, ddof=1)).max())
    assert summary.n.tolist() == [3] * 10


def test_band_of_one_seed_is_a_line(ax, data):
    figures.band(ax, data[(data.seed == 0) & (data.kind == "a")], "x", "y", label="only")
    assert len(ax.lines) == 1
    assert not ax.collections


def test_predictions_have_their_own_style(ax):
    figures.predicted(ax, np.arange(3), np.arange(3))
    (line,) = ax.lines
    assert (line.get_color(), line.get_linestyle(), line.get_label()) == ("black", "--", "model")


def test_a_band_for_a_logarithmic_axis_never_reaches_zero(ax):
    data = pd.DataFrame({"x": [0, 1, 1, 1, 1], "y": [0.0, 1.0, 10.0, 1000.0, 0.0]})
    summary = figures.band(ax, data, "x", "y", log=True)
    (line,) = ax.lines
    np.testing.assert_allclose(
        line.get_xydata(), [[1, 10 ** (4 / 3)]]
    )  # what is not positive is left out
    factor = np.std(np.log([1, 10, 1000]), ddof=1)
    drawn = ax.collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose(
        [drawn.min(), drawn.max()], 10 ** (4 / 3) * np.exp([-factor, factor])
    )
    assert summary.n.tolist() == [3]


def test_dots_has_a_dot_a_seed_and_the_mean_of_each_row(ax):
    table = pd.DataFrame({"y": [1.0, 3.0, 4.0], "name": ["EMA", "EMA", "last"]})
    figures.dots(ax, table, "y", "name")
    np.testing.assert_allclose(ax.collections[0].get_offsets(), [[1, 0], [3, 0], [4, 1]])
    assert [line.get_xdata()[0] for line in ax.lines] == [2, 4]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["EMA", "last"]


@pytest.mark.parametrize(("names", "heights"), [("aabb", {0, 1}), ("abab", {-0.1, 0.1, 0.9, 1.1})])
def test_dots_of_several_hues_in_one_row_stand_apart(ax, names, heights):
    table = pd.DataFrame({"y": range(4), "name": list(names), "hue": list("ssrr")})
    figures.dots(ax, table, "y", "name", hue="hue")
    drawn = np.concatenate([dots.get_offsets()[:, 1] for dots in ax.collections])
    assert {round(float(height), 6) for height in drawn} == heights


def test_annotate_n(ax):
    figures.annotate_n(ax, 3)
    figures.annotate_n(ax, 40, log=True)
    assert [text.get_text() for text in ax.texts] == [
        "mean ± s.d., n = 3 seeds",
        "mean ± s.d. of the logarithm, n = 40 seeds",
    ]


def test_save_writes_three_files_with_the_same_bytes_every_time(tmp_path, data):
    def draw(folder):
        figures.style()
        fig, ax = plt.subplots()
        figures.band(ax, data, "x", "y", hue="kind")
        ax.set_title("a title to search for")
        figures.save(fig, folder, "name", data)
        plt.close(fig)
        return {path.name: path.read_bytes() for path in (folder / "figures").iterdir()}

    first, second = draw(tmp_path / "one"), draw(tmp_path / "two")
    assert set(first) == {"name.png", "name.svg", "name.csv"}
    assert first == second
    assert b"a title to search for" in first["name.svg"]


def test_saved_numbers_come_back(ax, tmp_path, data):
    figures.save(ax.figure, tmp_path, "name", data)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "figures" / "name.csv"), data, rtol=1e-5)


@pytest.mark.parametrize("name", ["a/b", "a.png", ""])
def test_bad_names(ax, tmp_path, data, name):
    with pytest.raises(ValueError, match="letters, digits"):
        figures.save(ax.figure, tmp_path, name, data)


def test_a_figure_needs_its_data(ax, tmp_path, data):
    with pytest.raises(ValueError, match="no data"):
        figures.save(ax.figure, tmp_path, "name", data.iloc[:0])
    assert not (tmp_path / "figures").exists()


def test_an_interrupted_save_leaves_the_old_file(ax, tmp_path, data, monkeypatch):
    figures.save(ax.figure, tmp_path, "name", data)
    png = tmp_path / "figures" / "name.png"
    before = png.read_bytes()

    def interrupted(path, **_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(ax.figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        figures.save(ax.figure, tmp_path, "name", data)
    assert png.read_bytes() == before
    assert len(list(png.parent.iterdir())) == 3


def test_a_title_too_long_for_its_figure_is_made_to_fit(tmp_path):
    sizes = []
    for title in ("short", "a title that is far too long for so small a figure " * 3):
        fig, _ = plt.subplots(figsize=(4, 3))
        fig.suptitle(title, fontsize=12)
        figures.save(fig, tmp_path, "titled", pd.DataFrame({"x": [1]}))
        sizes.append(fig._suptitle.get_fontsize())
        assert fig._suptitle.get_window_extent().width <= fig.bbox.width
        plt.close(fig)
    assert sizes[0] == 12 > sizes[1]


def test_a_figure_whose_ticks_could_not_be_read_is_refused(tmp_path, data):
    figures.style()
    fig, _ = figures.panels(2)
    figures.save(fig, tmp_path, "narrow", data)
    wide, _ = plt.subplots(1, 3, figsize=(18, 5))
    with pytest.raises(ValueError, match=r"8\.\d pixels high at 830 pixels, 11 is the least"):
        figures.save(wide, tmp_path, "wide", data)
    plt.close("all")
