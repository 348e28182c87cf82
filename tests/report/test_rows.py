"""Rows of `fusenorm score` read back, and reports about very many of them."""

import sys

import numpy as np
import pytest
import torch

from fusenorm_openood import FuseNorm, load_network
from fusenorm_openood.cli.main import main
from fusenorm_openood.deployment.files import Judged
from fusenorm_openood.deployment.rows import read_rows
from fusenorm_openood.errors import DataError
from fusenorm_openood.method.conformal import conformal_p_values, rejects, threshold
from fusenorm_openood.report.files import link_to, report_of_files
from fusenorm_openood.report.page import render
from fusenorm_openood.report.plots import heat_map

HEADER = ",".join(Judged._fields)


@pytest.fixture(scope="module")
def detector(folders, digits):
    return FuseNorm.load(folders / "detector.safetensors", load_network(digits[1]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,score\n", "was not written by this version of fusenorm score"),
        ("", "was not written by this version of fusenorm score"),
        (f"{HEADER}\na.png,3,high,0.5,True,mds,\n", "line 2 is not a row of fusenorm score"),
        (f"{HEADER}\na.png,3,0.5\n", "line 2 is not a row of fusenorm score"),
        (f"{HEADER}\na.png,3,0.5,0.5,maybe,mds,\n", "line 2 is not a row of fusenorm score"),
    ],
)
def test_a_file_that_is_none_of_score(tmp_path, text, message):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_rows(path))


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(DataError, match="cannot be read \\(No such file"):
        list(read_rows(tmp_path / "absent.csv"))


def test_thousands_of_rows_make_a_small_page(detector, folders):
    rng = np.random.default_rng(0)
    conf = rng.normal(0.3, 0.5, 25_000)
    p = conformal_p_values(conf, detector.calibration_scores_)
    image = str(next((folders / "test_digits").iterdir()))
    rows = (
        Judged(image if i % 2 else f"gone/{i}.png", "class", c, q, bool(q <= 0.05), "mds++")
        for i, (c, q) in enumerate(zip(conf, p, strict=True))
    )
    report = report_of_files(detector, rows)
    assert dict(report.highlights)["images"] == "25,000"
    assert dict(report.highlights)["rejected as OOD"] == f"{rejects(p, 0.95).sum():,}"
    page = render(report)
    assert len(page.encode()) < 5 * 2**20
    assert "can no longer be read" in page


def test_long_paths_are_no_large_page(detector):
    rows = (
        Judged(f"{i}/" + "<" * 4_000, "class", -float(i), None, True, "mds") for i in range(3_000)
    )
    report = report_of_files(detector, rows)
    listed = next(s.listed for s in report.sections if s.listed)
    assert listed.caption.startswith(f"{len(listed.cards):,} of 3,000 images")
    assert len(render(report).encode()) < 3 * 2**20


@pytest.mark.parametrize(
    ("path", "link"),
    [
        ("/a/b c.png", "file:///a/b%20c.png"),
        ("https://host/a.png", "https://host/a.png"),
        ("file:///a.png", "file:///a.png"),
        ("/javascript:alert(1)", "file:///javascript%3Aalert%281%29"),
        ("/scan.tif#page=2", "file:///scan.tif#page=2"),
        ("s3://bucket/a.png", ""),
        ("javascript://%0aalert(1)", ""),
        ("data://text/html,x", ""),
    ],
)
def test_links_lead_to_files_only(path, link):
    assert link_to(path) == link


def test_rejected_images_are_chosen_for_variety(detector):
    names = detector.experts[:3]
    rows = [Judged(f"gone/{i}", "class", -50.0 + i, None, True, names[0]) for i in range(20)]
    rows += [Judged(f"gone/{n}", "class", -20.0, None, True, n) for n in names[1:]]
    galleries = next(s for s in report_of_files(detector, rows).sections if s.galleries).galleries
    cards = dict(galleries)["Most rejected"]
    assert [card.name for card in cards][:3] == ["gone/0", *(f"gone/{n}" for n in names[1:])]


def test_a_heat_map_is_of_the_layer_that_contributes_least(detector, folders):
    from matplotlib.figure import Figure

    images = [
        detector.preprocessing.read(p) for p in sorted((folders / "test_noise").iterdir())[1:4]
    ]
    why, ax = detector.explain(torch.stack(images)), Figure().subplots()
    text = heat_map(why, ax, image=2)
    below = {n: why.below_mean[row, 2] for row, n in enumerate(why.experts) if n in why.maps}
    layer = max(below, key=below.get)
    assert ax.get_title() == layer
    assert text.startswith(f"Heat map of {layer}: most energy in the ")
    drawn, heat = np.asarray(ax.images[0].get_array(), int), why.maps[layer][2]
    height, width = drawn.shape[:2]
    row, column = np.unravel_index(int(heat.argmax()), heat.shape)
    place = int((row + 0.5) * height / heat.shape[0]), int((column + 0.5) * width / heat.shape[1])
    assert drawn[place][0] > np.median(drawn[..., 0])


def test_an_image_is_shown_once(detector, folders):
    paths = sorted((folders / "test_digits").iterdir())[:5]
    scores = [float(detector.score(path)) for path in paths]
    rows = [Judged(str(path), "c", score) for path, score in zip(paths, scores, strict=True)]
    galleries = next(s for s in report_of_files(detector, rows).sections if s.galleries).galleries
    names = [card.name for _, cards in galleries for card in cards]
    assert len(names) == len(set(names)) == 5


def test_without_readable_images_there_is_still_a_page(detector):
    report = report_of_files(detector, [Judged("a.png", error="no image")])
    assert dict(report.highlights) == {
        "images": "1",
        "accepted": "0",
        "rejected as OOD": "0",
        "unreadable": "1",
    }
    assert "no image" in render(report)


def test_without_calibration_there_are_no_verdicts(folders, digits):
    detector = FuseNorm.load(folders / "detector.safetensors", load_network(digits[1]))
    detector.calibration_ = None
    path = next((folders / "test_digits").iterdir())
    report = report_of_files(detector, [Judged(str(path), "c", float(detector.score(path)))])
    assert dict(report.highlights) == {"images": "1", "unreadable": "0"}
    assert "there are no verdicts" in render(report)


def test_rows_of_another_detector_are_refused(detector):
    with pytest.raises(DataError, match=r"a.png was judged by another detector: .* 0.123"):
        report_of_files(detector, [Judged("a.png", "c", 0.0, 0.123)])


def test_an_image_at_the_threshold_is_accepted(detector, folders):
    image = str(min((folders / "test_digits").iterdir()))
    cut = threshold(detector.calibration_scores_, 0.95)
    rows = [Judged(image, "c", conf) for conf in (np.nextafter(cut, -np.inf), cut, cut + 1)]
    counts = dict(report_of_files(detector, rows).highlights)
    assert (counts["accepted"], counts["rejected as OOD"]) == ("2", "1")


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_found_before_any_work(monkeypatch, tmp_path, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ["report", "--detector", "absent", "--csv", "absent"]
    assert main([*arguments, "--output", str(tmp_path / "page.html")]) == 1
    said = capsys.readouterr().err
    assert f"needs {package}: pip install 'fusenorm-openood[report]'" in said


def test_a_place_that_cannot_be_written_is_found_before_any_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    for command in ("eval", "compare"):
        arguments = [command, "--id-data", "digits", "--root", "absent", "--report"]
        assert main([*arguments, str(tmp_path)]) == 1
        assert "--report must be a file" in capsys.readouterr().err
        assert main([*arguments, str(tmp_path / "file" / "page.html")]) == 1
        assert "is not writable" in capsys.readouterr().err
