"""Drawings and small pictures."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from fusenorm_openood import ood_metrics
from fusenorm_openood.report.charts import (
    POINTS,
    Series,
    acceptance_curves,
    bin_edges,
    histogram,
    mean_roc,
)
from fusenorm_openood.report.gallery import SIDE, data_uri, overlaid, thumbnail, where
from fusenorm_openood.report.page import Report, Section, Table, render, svg

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
        series = Series("ID", rng.normal(size=count))
        drawing = histogram("score", series, [Series("OOD", series.values - 1)], "score")
        p = Series("ID", rng.uniform(size=count))
        curves = acceptance_curves("curves", 500, p, [p], 0.95)
        sizes.append(sum(len(svg(figure, "one")) for figure in (drawing, curves)))
    assert sizes[1] < 1.2 * sizes[0]


def test_labels_are_escaped_and_are_no_formulas(rng):
    values = rng.normal(size=20)
    drawing = histogram("<b>$x$", Series("<script>$\\alpha$", values), [Series("b", values)], "c")
    text = svg(drawing, "one")
    assert "<script>" not in text
    assert "&lt;script&gt;$\\alpha$" in text
    assert "&lt;b&gt;$x$" in text


def test_two_copies_of_a_drawing_share_no_id(rng):
    values = rng.normal(size=20)
    drawing = histogram("a", Series("b", values), [Series("c", values)], "d", 0.0)
    ids = [re.findall(r' id="([^"]+)"', svg(drawing, name)) for name in ("s1f1", "s1f11")]
    assert ids[0]
    assert not set(ids[0]) & set(ids[1])


def test_a_cell_is_text():
    table = Table("<i>caption", ("<i>a", "b"), (("<i>row", "&"),))
    page = render(Report("<i>title", (("<i>f", "v"),), (), (Section("<i>s", tables=(table,)),)))
    assert "<i>" not in page
    assert page.count("&lt;i&gt;") >= 6
    assert "<td>&amp;</td>" in page


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
