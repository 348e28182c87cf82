"""Drawings and small pictures."""

import base64
import io
import re
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from fusenorm_openood import ood_metrics
from fusenorm_openood.errors import DataError
from fusenorm_openood.report import gallery, plots
from fusenorm_openood.report.gallery import PICTURES, SIDE, Shown, data_uri, thumbnail, varied
from fusenorm_openood.report.page import SMALL, Figure, svg
from fusenorm_openood.report.plots import POINTS, bin_edges, mean_roc, overlaid, where

DOTS = partial(plots.dots, axis="AUROC")
NORM = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_the_area_below_a_mean_curve_is_the_mean_auroc(rng):
    known = rng.normal(1, 1, 5_000)
    others = [rng.normal(0, 1, 3_000), rng.normal(-2, 1, 500)]
    fpr, tpr = mean_roc(known, others)
    assert len(fpr) <= POINTS + 1
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    area = np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2)
    assert area == pytest.approx(np.mean([ood_metrics(known, o).auroc for o in others]), abs=2e-3)


def test_far_images_do_not_hide_the_distribution_of_id_images(rng):
    known = rng.normal(0, 1, 1_000)
    edges = bin_edges(known, [np.full(1_000, -1e9)])
    inside = np.histogram(known, edges)[0]
    assert np.count_nonzero(inside) > 10


@pytest.mark.parametrize("values", [[0.0], [3.5] * 9, [1e12] * 3])
def test_equal_values_can_be_drawn(values):
    edges = bin_edges(np.array(values), [np.array(values)])
    assert np.all(np.diff(edges) > 0)
    assert edges[0] <= values[0] <= edges[-1]


def test_a_drawing_does_not_grow_with_the_number_of_images(rng):
    sizes = []
    for count in (1_000, 20_000):
        values, p = rng.normal(size=count), {"ID": rng.uniform(size=count)}
        drawings = (
            partial(plots.histograms, {"ID": values, "OOD": values - 1}),
            partial(plots.acceptance, p, 500),
            partial(plots.rejection, p, 500),
        )
        sizes.append(sum(len(svg(Figure("title", draw), "one")) for draw in drawings))
    assert sizes[1] < 1.2 * sizes[0]


def test_labels_are_escaped_and_are_no_formulas(rng):
    values = rng.normal(size=20)
    scores = {"<script>$\\alpha$": values, "b": values}
    text = svg(Figure("<b>$x$", partial(plots.histograms, scores)), "one")
    assert "<script>" not in text
    assert "&lt;script&gt;$\\alpha$" in text
    assert "&lt;b&gt;$x$" in text


@pytest.mark.parametrize("scale", [1e7, 1e-7])
def test_an_axis_has_no_factor_beside_it(rng, scale):
    values = scale * (20 + rng.normal(size=50))
    text = svg(Figure("a", partial(plots.histograms, {"b": values}), SMALL), "one")
    found = [float(t.replace("\N{MINUS SIGN}", "-")) for t in re.findall(r">([^<>]+)</text>", text)]
    assert any(15 * scale < tick < 25 * scale for tick in found)


def test_drawings_are_in_the_colours_of_the_page(rng):
    scores = {name: rng.normal(size=50) for name in "abcdefg"}
    text = svg(Figure("#d55e00", partial(plots.histograms, scores, threshold=0.0)), "one")
    assert set(re.findall("#[0-9a-f]{6}", text)) == {"#d55e00"}
    assert {f"--line{n}" for n in range(6)} | {"--blue", "--ink"} <= {*re.findall(r"--\w+", text)}


def test_the_data_sets_of_a_benchmark_are_told_apart_and_more_can_be_drawn(rng):
    from matplotlib.figure import Figure as Canvas

    ax = Canvas().subplots()
    plots.histograms({name: rng.normal(size=9) for name in "abcdefg"}, ax)
    assert len({(p.get_edgecolor(), str(p.get_linestyle())) for p in ax.patches[2:]}) == 6
    assert plots.dots({n: {"x": 1.0, "y": 2.0} for n in "abcdefgh"}, ax, "AUROC")
    assert plots.contributions({n: ["mds"] for n in "abcdefgh"}, ax)
    assert plots.histograms({"a": np.ones(3)}, ax, marks={n: np.ones(1) for n in "abcdefgh"})


@pytest.mark.parametrize("draw", [plots.histograms, plots.roc, plots.contributions, DOTS])
def test_nothing_to_draw_is_an_error(draw):
    with pytest.raises(DataError, match="nothing to draw"):
        draw({}, None)


def test_acceptance_and_rejection_are_the_shares_of_p_values(rng):
    from matplotlib.figure import Figure as Canvas

    p = rng.uniform(size=200) ** 2
    for draw, share in ((plots.acceptance, p > 0.2), (plots.rejection, p <= 0.2)):
        ax = Canvas().subplots()
        text = draw({"them": p}, 10**6, ax, asked=0.8)
        (line,) = (line for line in ax.lines if line.get_label() == "them")
        at = np.interp(80, *line.get_data())
        assert at == pytest.approx(100 * share.mean(), abs=0.5)
        said = float(re.search(r"([\d.]+)% of them", text)[1])
        assert said == pytest.approx(100 * share.mean(), abs=1)
    assert "rejected" in ax.get_ylabel()


def test_the_best_curve_is_the_first_and_then_those_of_the_largest_auroc(rng):
    from matplotlib.figure import Figure as Canvas

    ids = rng.normal(size=300)
    methods = {f"m{shift}": (ids, [ids - shift]) for shift in (0.5, 0.1, 3.0, 1.0, 2.0)}
    text = plots.roc(methods, Canvas().subplots(), shown=2)
    assert re.findall(r"m[\d.]+", text) == ["m0.5", "m3.0", "m2.0", "m1.0", "m0.1"]


def test_images_are_chosen_for_variety():
    images = [*("aaaabaac"), *("dd")]
    assert varied(images, lambda image: image, 5) == ["a", "b", "c", "d", "a"]
    assert varied(images[:2], lambda image: image, 5) == ["a", "a"]


def test_a_thousand_pictures_of_photographs_fit(rng):
    photograph = torch.from_numpy(load_sample_image("flower.jpg") / 255.0).permute(2, 0, 1)
    corners = (rng.integers(0, [427 - 224, 640 - 224]) for _ in range(50))
    reads = [lambda y=y, x=x: photograph[:, y : y + 224, x : x + 224] for y, x in corners]
    images = [Shown("", (), read) for read in reads]
    cards = gallery.listed(images, 50, "", ((0.0,) * 3, (1.0,) * 3)).cards
    assert 20 * sum(len(uri) for card in cards for uri, _ in card.pictures) < PICTURES
    few = gallery.listed(images, 50, "", NORM, room=20_000).cards
    assert len(few) == 50
    assert sum(bool(card.pictures) for card in few) < 20


def test_a_thumbnail_shows_the_pixels_that_the_network_saw():
    pixels = torch.rand(3, 20, 30)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORM)
    uri = data_uri(thumbnail((pixels - mean) / std, NORM))
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert (image.format, image.size) == ("PNG", (30, 20))
        assert np.abs(np.asarray(image) - 255 * pixels.permute(1, 2, 0).numpy()).max() <= 0.51


def test_a_large_image_becomes_a_small_jpeg():
    uri = data_uri(thumbnail(torch.randn(3, 480, 640), NORM))
    assert len(uri) < 20_000
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert (image.format, max(image.size)) == ("JPEG", SIDE)


def test_a_heat_map_is_yellow_where_the_energy_is():
    heat = torch.zeros(4, 4)
    heat[0, 3] = 1
    assert where(heat) == "upper right"
    picture = np.asarray(overlaid(Image.new("RGB", (64, 64)), heat), int)
    yellow = picture[..., 0] - picture[..., 2]
    assert yellow[8, 56] > 50 > yellow[56, 8]


@pytest.mark.parametrize(
    ("row", "column", "place"), [(1, 1, "centre"), (2, 0, "lower left"), (1, 2, "middle right")]
)
def test_a_place_has_a_name(row, column, place):
    heat = torch.zeros(3, 3)
    heat[row, column] = 1
    assert where(heat) == place
    assert where(heat[1:2, 1:2]) == "centre"
