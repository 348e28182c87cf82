import re

import numpy as np
import pandas as pd
import pytest
import torch

from fusenorm_openood import FuseNorm, load_network
from fusenorm_openood.cli.main import main
from fusenorm_openood.data.benchmarks import image_loader, load_benchmark
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.errors import ConfigError
from fusenorm_openood.evaluation.comparison import BLOCKS, FUSENORM, STRONG, compare, tables
from fusenorm_openood.evaluation.evaluation import evaluate
from fusenorm_openood.method.metrics import ood_metrics
from fusenorm_openood.method.scores import POSTHOC, make_score
from fusenorm_openood.storage.configs import config_root
from tests.conftest import shortened_digits

SWEEP = {"strong": [["output"], ["output", "knn"]], "penalty": ["deviation", "joint"]}


@pytest.fixture(scope="module")
def few(digits_images, tmp_path_factory):
    """The digits benchmark with 40 images in every list."""
    return shortened_digits(digits_images, tmp_path_factory.mktemp("few"), 40, 40)


@pytest.mark.parametrize("method", ["base", "t2fnorm"])
def test_every_row_equals_the_method_evaluated_alone(digits, few, method, tmp_path):
    checkpoint = digits[1]
    if method == "t2fnorm":
        weights = torch.load(checkpoint, weights_only=True)
        weights = {f"backbone.{name}": tensor for name, tensor in weights.items()}
        checkpoint = tmp_path / "t2fnorm.ckpt"
        torch.save({**weights, "tau": torch.tensor(0.1)}, checkpoint)
    net, benchmark = load_network(checkpoint), load_benchmark("digits", few)
    result = compare(net, benchmark, SWEEP if method == "base" else None, progress=False)
    std = benchmark.norm[1]
    id_val = [batch["data"] for batch in image_loader(benchmark.id["val"])]  # no labels
    posthoc = ["knn", "vim", "mds++"] if method == "base" else ["gen"]
    alone = {
        "MSP" if method == "base" else "MSP (T2FNorm)": SingleScore(net, "msp"),
        "Energy": SingleScore(net, "ebo", temperature=1.0),
        "ODIN": SingleScore(net, make_score("odin", input_std=std)),
        "ReAct": SingleScore(net, "react", percentile=90.0),
        **{POSTHOC[n].title: SingleScore(net, n).fit(id_val) for n in posthoc},
        "KNN (K = 5)": SingleScore(net, "knn", K=5).fit(id_val),
        "strong experts alone": FuseNorm(net, cap=0.0),
        # A penalty so large that the strong experts do not count.
        "block norms alone": FuseNorm(net, joint_margin=-1e2, cap=1e300),
        **{name: FuseNorm(net, settings) for name, settings in FUSENORM.items()},
        **{name: FuseNorm(net, found.settings) for name, found in result.found.items()},
    }
    assert {score.title for score in POSTHOC.values()} <= set(result.auroc.index)
    if method == "base":
        assert [name.split(", ")[1] for name in result.found] == ["validation pair)", "pseudo-OOD)"]
    for name, detector in alone.items():
        expected = evaluate(detector, benchmark, progress=False).table
        assert list(result.auroc.columns) == list(expected.index)
        # Single experts are scored in float64 here, while OpenOOD's float32 scores have a few
        # ties: one tied pair among 40 x 40 changes the AUROC by 0.03.
        np.testing.assert_allclose(result.auroc.loc[name], expected["AUROC"], atol=0.1)
        if name.startswith("FuseNorm"):
            np.testing.assert_allclose(result.fpr95.loc[name], expected["FPR@95"], atol=1e-9)


def test_tables_are_made_from_the_confidences():
    g = np.random.default_rng(0)
    known = {"Energy": g.normal(1, 1, 200), "KNN": g.normal(1.2, 1, 200)}
    known["FuseNorm"] = known["KNN"]
    names = {"nearood": ["a", "b"], "farood": ["c"]}
    unknown = {
        group: {name: {m: g.normal(0, 1, 100) for m in known} for name in sets}
        for group, sets in names.items()
    }
    for sets in unknown.values():
        for scored in sets.values():
            scored["FuseNorm"] = scored["KNN"]
    auroc, fpr95, summary = tables(known, unknown, ["Energy", "KNN"])
    expected = ood_metrics(known["KNN"], unknown["nearood"]["b"]["KNN"])
    assert auroc.loc["KNN", "b"] == pytest.approx(100 * expected.auroc)
    assert fpr95.loc["KNN", "b"] == pytest.approx(100 * expected.fpr95)
    means = auroc[["a", "b"]].mean(axis=1)
    np.testing.assert_allclose(summary["nearood AUROC"], means)
    np.testing.assert_allclose(
        summary["rank"], auroc[["a", "b", "c"]].rank(ascending=False).mean(1)
    )
    best = auroc.loc[["Energy", "KNN"], "nearood"].idxmax()
    gain = summary.loc["FuseNorm", f"nearood over {best}"]
    assert summary.loc["Energy", f"nearood over {best}"] == ""
    if best == "KNN":
        assert gain == "+0.00 to +0.00"


def test_the_command_compares_roots(digits, few, tmp_path, capsys):
    root = digits[1].parents[1]
    csv = tmp_path / "table.csv"
    args = ["--id-data", "digits", "--data-root", str(few), "--num-workers", "0", "--no-progress"]
    roots = [str(root), str(digits[1])]  # a folder of runs, and its checkpoint file
    assert main(["compare", *args, "--root", *roots, "--csv", str(csv)]) == 0
    out = capsys.readouterr().out
    assert "mean ± std over 2 roots" in out
    assert "all fitted on 40 ID validation images, KNN with K = 50" in out
    table = pd.read_csv(csv, index_col=[0, 1])
    assert table.shape[1] == 16  # AUROC and FPR@95 of six data sets and two means
    first, second = (table.xs(name) for name in table.index.levels[0])
    pd.testing.assert_frame_equal(first, second)
    assert f"{first.loc['FuseNorm (default)', 'nearood']:.2f}" in out
    assert main(["compare", *args, "--root", str(root), str(tmp_path)]) == 1
    assert "no checkpoint" in capsys.readouterr().err


def test_methods_can_be_chosen(digits, few, capsys):
    args = ["compare", "--id-data", "digits", "--data-root", str(few), "--num-workers", "0"]
    args += ["--no-progress", "--root", str(digits[1]), "--methods"]
    assert main([*args, "gen", "vim"]) == 0
    out = capsys.readouterr().out
    assert "KNN" not in out
    table = out.partition("AUROC in percent:")[2].splitlines()
    names = [re.split("  +", line)[0] for line in table[2:-1]]
    assert names == ["GEN", "ViM", STRONG, BLOCKS, *FUSENORM]
    with pytest.raises(ConfigError, match="no single method to compare with"):
        compare(
            load_network(digits[1]),
            load_benchmark("digits", few),
            gradients=False,
            methods=["odin"],
        )
    assert main([*args, "msp", "knm"]) == 1
    assert "unknown method 'knm' (did you mean 'knn'?)" in capsys.readouterr().err


def test_the_command_searches_on_request(digits, few, tmp_path, capsys):
    config = tmp_path / "small.yml"
    text = (config_root() / "postprocessors" / "fusenorm.yml").read_text()
    head = text[: text.index("  postprocessor_sweep:")]
    config.write_text(head + "  postprocessor_sweep:\n    base: [2, 20]\n")
    args = ["--id-data", "digits", "--data-root", str(few), "--num-workers", "0", "--no-progress"]
    root = str(digits[1].parents[1])
    assert main(["compare", *args, "--root", root, "--search", "--config", str(config)]) == 0
    out = capsys.readouterr().out
    assert "FuseNorm (searched, validation pair), 2 combinations, AUROC" in out
    assert "FuseNorm (searched, pseudo-OOD), 2 combinations, AUROC" in out
