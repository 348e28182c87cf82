import numpy as np
import pandas as pd
import pytest

from fusenorm_openood import FuseNorm, load_network
from fusenorm_openood.benchmark.comparison import compare
from fusenorm_openood.benchmark.evaluation import evaluate
from fusenorm_openood.cli.main import main
from fusenorm_openood.data.benchmarks import load_benchmark
from fusenorm_openood.detectors.baselines import Baseline
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.training.digits import train_digits
from tests.conftest import shortened_digits

SWEEP = {"weights": [[0.3, 1.0], [1.0, 1.0]], "base": [2, 20]}


@pytest.fixture(scope="module")
def few(digits_images, tmp_path_factory):
    """The digits benchmark with 40 images in every list."""
    return shortened_digits(digits_images, tmp_path_factory.mktemp("few"), 40, 40)


@pytest.mark.parametrize("method", ["base", "t2fnorm"])
def test_every_row_equals_the_method_evaluated_alone(digits, few, method, tmp_path):
    checkpoint = digits[1]
    if method == "t2fnorm":
        checkpoint = train_digits(few, tmp_path, method=method, progress=False)
    net, benchmark = load_network(checkpoint), load_benchmark("digits", few)
    table, found = compare(net, benchmark, SWEEP, progress=False)
    std = benchmark.norm[1]
    searched = {name: FuseNorm(net, f.settings) for name, f in found.items()}
    alone = {
        "MSP" if method == "base" else "MSP (T2FNorm)": Baseline(net, "msp"),
        "Energy": Baseline(net, "ebo", temperature=1.0),
        "ODIN": Baseline(net, "odin", std, temperature=1000.0, noise=0.0014),
        "ReAct": Baseline(net, "react", percentile=90.0),
        "FuseNorm, published": FuseNorm(net),
        **searched,
    }
    assert list(table.index) == list(alone)
    for name, detector in alone.items():
        expected = evaluate(detector, benchmark, progress=False).table["AUROC"]
        assert list(table.columns) == list(expected.index)
        # Single experts are scored in float64 here, while OpenOOD's float32 scores have a few
        # ties: one tied pair among 40 x 40 changes the AUROC by 0.03.
        np.testing.assert_allclose(table.loc[name], expected, atol=0.1)
    assert found["FuseNorm, searched"].settings.output == "odin"
    assert not found["FuseNorm, searched, no gradient"].settings.output_expert.needs_gradient
    assert Settings() == alone["FuseNorm, published"].settings


def test_the_command_compares_roots(digits, few, tmp_path, capsys):
    root = digits[1].parents[1]
    csv = tmp_path / "table.csv"
    args = ["--id-data", "digits", "--data-root", str(few), "--num-workers", "0", "--no-progress"]
    assert main(["compare", *args, "--root", str(root), "--csv", str(csv)]) == 0
    out = capsys.readouterr().out
    assert "FuseNorm, searched, 60 combinations, validation AUROC" in out
    assert "FuseNorm, searched, no gradient, 720 combinations" in out
    table = pd.read_csv(csv, index_col=[0, 1])
    assert table.shape == (7, 8)
    assert f"{table.iloc[0, 0]:.2f}" in out
    assert main(["compare", *args, "--root", str(root), str(tmp_path)]) == 1
    assert "no checkpoint" in capsys.readouterr().err
