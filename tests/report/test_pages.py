"""What is on the pages of the digits, and what is not."""

import ast
import csv
import pickle
import re
from base64 import b64encode
from collections import Counter
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fusenorm_openood import FuseNorm, load_network, ood_metrics
from fusenorm_openood.cli.main import main
from fusenorm_openood.data.benchmarks import image_loader, load_benchmark
from fusenorm_openood.deployment.rows import read_rows
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.evaluation.evaluation import evaluate
from fusenorm_openood.report import page
from fusenorm_openood.report.evaluation import report_of_evaluation
from fusenorm_openood.report.page import render
from tests.conftest import shortened_digits
from tests.detectors.test_groups import brightness
from tests.report.conftest import call

PAGES = ("eval_page", "compare_page", "score_page")
NATIVE = ("eval", "--id-data", "digits", "--engine", "native")


class Elements(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += f" {data} "


@pytest.fixture(params=PAGES)
def elements(request):
    return Elements(request.getfixturevalue(request.param).read_text(encoding="utf-8"))


def test_ids_are_unique_and_links_lead_to_them(elements):
    ids = [attributes["id"] for _, attributes in elements.tags if "id" in attributes]
    assert [name for name, times in Counter(ids).items() if times > 1] == []
    values = [value or "" for _, attributes in elements.tags for value in attributes.values()]
    used = {name for value in values for name in re.findall(r"url\(#([^)]+)\)", value)}
    for _, attributes in elements.tags:
        used |= {v[1:] for k, v in attributes.items() if k.endswith("href") and v[:1] == "#"}
        used |= set((attributes.get("aria-labelledby") or "").split())
    assert used
    assert used <= set(ids)


def test_a_page_refers_to_nothing_outside(elements):
    for tag, attributes in elements.tags:
        assert tag not in ("iframe", "object", "embed", "base")
        assert tag != "script" or not attributes
        for name, value in attributes.items():
            if (tag, name) == ("a", "href"):
                assert value.startswith(("#", "file:///")), value
            elif name in ("src", "srcset", "href", "xlink:href", "action", "data"):
                assert value.startswith(("data:", "#")), (tag, name, value)
            elif not name.startswith("xmlns"):
                assert "//" not in (value or "") or name in ("alt", "aria-label"), (tag, name)
            assert not name.startswith("on")
    assert "@import" not in elements.text
    assert "url(" not in elements.text


def test_every_picture_has_an_alternative_text(elements):
    images = [attributes for tag, attributes in elements.tags if tag == "img"]
    drawings = [attributes for tag, attributes in elements.tags if tag == "svg"]
    assert all(attributes["alt"] for attributes in images)
    assert drawings
    assert all(a["role"] == "img" and a["aria-labelledby"] for a in drawings)
    assert ("html", {"lang": "en"}) in elements.tags


def test_hostile_names_are_text(score_page):
    page = score_page.read_text(encoding="utf-8")
    assert page.count("<script") == page.count("</script") == 1
    content = page.partition("<script>")[2].partition("</script>")[0].encode()
    assert f"script-src 'sha256-{b64encode(sha256(content).digest()).decode()}'" in page
    assert "&lt;script&gt;class_" in page
    assert "broken&lt;b&gt;.png" in page


def test_the_counts_are_those_of_the_rows(score_page, judged):
    rows = list(csv.DictReader(judged.open(newline="", encoding="utf-8")))
    counts = Counter(row["ood"] for row in rows)
    text = " ".join(Elements(score_page.read_text(encoding="utf-8")).text.split())
    assert f"images {len(rows)} accepted {counts['False']} rejected as OOD {counts['True']}" in text
    assert f"unreadable {counts['']}" in text
    rejected = Counter(row["objected"] for row in rows if row["ood"] == "True")
    name, times = rejected.most_common(1)[0]
    assert f"{name} {100 * times / counts['True']:.0f}%" in text


def test_the_most_rejected_images_are_shown(score_page, judged):
    rows = list(csv.DictReader(judged.open(newline="", encoding="utf-8")))
    worst = min((r for r in rows if r["ood"] == "True"), key=lambda row: float(row["confidence"]))
    text = " ".join(Elements(score_page.read_text(encoding="utf-8")).text.split())
    shown = text.partition("Most rejected")[2]
    assert shown.split()[0] == "/".join(Path(worst["path"]).parts[-2:]).split()[0]
    assert f"{float(worst['confidence']):.3f}" in shown


def test_another_acceptance_gives_other_verdicts(folders, judged, tmp_path):
    page = tmp_path / "page.html"
    arguments = ["report", "--detector", folders / "detector.safetensors", "--csv", judged]
    arguments += ["--output", page, "--acceptance", 0.8]
    assert main([str(argument) for argument in arguments]) == 0
    rows = csv.DictReader(judged.open(newline="", encoding="utf-8"))
    p = np.array([float(row["p_value"]) for row in rows if row["p_value"]])
    text = " ".join(Elements(page.read_text(encoding="utf-8")).text.split())
    assert f"rejected as OOD {(p <= 0.2 + 1e-12).sum()} " in text


def test_every_image_is_listed_the_most_rejected_first(score_page, judged):
    rows = [row for row in read_rows(judged) if row.confidence is not None]
    page = Elements(score_page.read_text(encoding="utf-8"))
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    listed = [link for link in links if link.startswith("file:")][-len(rows) :]
    rows.sort(key=lambda row: row.confidence)
    assert listed == [Path(row.path).as_uri() for row in rows]


def test_three_experts_are_open_and_the_others_folded(score_page):
    page = score_page.read_text(encoding="utf-8").partition('id="s3"')[2]
    opened, *folded = page.partition('id="settings"')[0].split("<details>")
    assert opened.count("<figcaption>") == 4
    counts = [int(re.search(r"<summary>[\w ]+\((\d+)\)", part)[1]) for part in folded]
    assert counts == [part.count("<figcaption>") for part in folded]
    assert sum(counts) == 12 - 3


def test_a_comparison_lists_images_with_verdicts(compare_page, evaluated):
    above, _, page = compare_page.read_text(encoding="utf-8").partition("those farthest beyond")
    methods = int(re.search(r"Of (\d+) methods", above)[1])
    assert not re.search("<th[^>]*>(strong experts|block norms) alone</th>", page)
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in page.split("<tr")[2:]]
    conf = {name: s.conf for sets in evaluated[0].sets.values() for name, s in sets.items()}
    assert len(rows) == sum(map(len, conf.values()))
    cut = np.quantile(conf["digits"], 0.05)
    for name, known in conf.items():
        of = [row for row in rows if row[3] == name]
        shown = sorted(float(row[-1]) for row in of)
        np.testing.assert_allclose(shown, np.sort(known), atol=6e-4)
        assert [row[4] for row in of].count("rejected") == (known < cut).sum()
    for *_, ours, best, count, _ in rows:
        verdicts = [ours, best]
        assert verdicts.count("rejected") <= int(count) <= methods - verdicts.count("accepted")


@pytest.fixture(scope="module")
def fewer(digits_images, tmp_path_factory):
    """The digits benchmark with 20 images in every list."""
    return shortened_digits(digits_images, tmp_path_factory.mktemp("fewer"), 20, 20)


@pytest.fixture(scope="module")
def evaluated(digits, short_data):
    benchmark = load_benchmark("digits", short_data)
    return evaluate(FuseNorm(load_network(digits[1])), benchmark, progress=False), benchmark


def test_figures_are_those_of_the_metrics(evaluated):
    result, _ = evaluated
    report, again = (report_of_evaluation(*evaluated, "digits") for _ in range(2))
    page = render(report, date="today")
    assert page == render(again, date="today")
    table = report.sections[0].tables[0]
    shown = np.array([row[1:] for row in table.rows], float)
    assert np.allclose(shown, result.table.to_numpy(), atol=0.005001)
    assert "near-OOD mean" in table.strong
    text = " ".join(Elements(page).text.split())
    known = result.sets["id"]["digits"]
    for row, name in [(None, "confidence"), *enumerate(result.detector.experts)]:
        said = []
        for group, title in (("nearood", "near-OOD"), ("farood", "far-OOD")):
            each = [
                ood_metrics(known.conf, s.conf)
                if row is None
                else ood_metrics(known.experts[row], s.experts[row])
                for s in result.sets[group].values()
            ]
            auroc, fpr95 = (
                100 * np.mean([getattr(m, n) for m in each]) for n in ("auroc", "fpr95")
            )
            said.append(f"{title} AUROC {auroc:.2f}, FPR@95 {fpr95:.2f}")
        assert " ".join((name, *said)).replace(" ", "") in text.replace(" ", "")


def test_without_experts_there_are_still_curves(evaluated):
    result, benchmark = evaluated
    alone = result._replace(detector=None, compare=result.compare.iloc[:0])
    titles = [s.title for s in report_of_evaluation(alone, benchmark, "digits").sections]
    assert titles == ["Results", "Acceptance and rejection"]


@pytest.mark.parametrize("by", ["label", brightness])
def test_groups_of_the_detector_change_only_what_is_said_of_it(evaluated, by):
    result, benchmark = evaluated
    plain = report_of_evaluation(result, benchmark, "digits")
    own = pickle.loads(pickle.dumps(result.detector))
    own.calibrate(image_loader(benchmark.id["train"]), by=by, least=1)
    grouped = report_of_evaluation(result._replace(detector=own), benchmark, "digits")
    assert set(grouped.facts) - set(plain.facts) == {("ID images", str(own.calibration_))}
    assert render(grouped._replace(facts=plain.facts), "today") == render(plain, "today")


def test_a_report_on_the_validation_pair_promises_nothing(digits, short_data):
    benchmark = load_benchmark("digits", short_data)
    detector = FuseNorm(load_network(digits[1]))
    result = evaluate(detector, benchmark, validation=True, progress=False)
    report = report_of_evaluation(result, benchmark, "digits")
    assert "Acceptance and rejection" not in [section.title for section in report.sections]
    assert "p-value" not in render(report)


def test_several_runs_are_named(digits, fewer, tmp_path):
    root = tmp_path / "runs"
    for run in ("s0", "s1"):
        (root / run).mkdir(parents=True)
        (root / run / "best.ckpt").symlink_to(digits[1])
    page = tmp_path / "page.html"
    assert call(*NATIVE, "--data-root", fewer, "--root", root, "--report", page) == 0
    text = page.read_text(encoding="utf-8")
    assert "everything else is from the first one, s0" in text
    assert "± 0.00" in text


def test_results_outlive_a_report_that_fails(digits, fewer, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fusenorm_openood.report.page.write_whole", full)
    page, out = tmp_path / "page.html", tmp_path / "out"
    where = ("--root", digits[1], "--data-root", fewer, "--report", page, "--output-dir", out)
    assert call(*NATIVE, *where, "--save-csv") == 1
    said = capsys.readouterr()
    assert "farood" in said.out
    assert f"report {page} cannot be written (No space left on device)" in said.err
    assert (out / "ood" / "fusenorm.csv").exists()


def test_matplotlib_and_jinja_are_imported_when_a_page_is_made():
    for path in Path(page.__file__).parent.glob("*.py"):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                assert not re.search("matplotlib|jinja2|markupsafe", ast.unparse(statement)), path


def test_a_single_expert_has_pictures_without_heat_maps(digits, short_data):
    benchmark = load_benchmark("digits", short_data)
    result = evaluate(SingleScore(load_network(digits[1]), "msp"), benchmark, progress=False)
    text = render(report_of_evaluation(result, benchmark, "digits"))
    assert "as the network sees it" in text
    assert "eat map" not in text
    assert "Why images are rejected" not in text
