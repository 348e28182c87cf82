import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from fusenorm_openood import FuseNorm, Settings, load_network
from fusenorm_openood.baselines import Baseline
from fusenorm_openood.config import config_root, read_config
from fusenorm_openood.data.benchmarks import load_benchmark
from fusenorm_openood.errors import CheckpointError, ConfigError
from fusenorm_openood.evaluation import COLUMNS, evaluate, find_checkpoints, summarise

ROWS = ["digit8", "digit9", "nearood", "china", "flower", "noise", "stripes", "farood"]


@pytest.fixture(scope="module")
def evaluated(digits):
    data_root, checkpoint = digits
    benchmark, net = load_benchmark("digits", data_root), load_network(checkpoint)
    settings = Settings.from_mapping(
        read_config(config_root() / "postprocessors" / "fusenorm.yml")["postprocessor"][
            "postprocessor_args"
        ]
    )
    fused = evaluate(FuseNorm(net, settings).with_companions(), benchmark, progress=False)
    return fused, evaluate(Baseline(net, "msp"), benchmark, progress=False)


def test_fusenorm_reaches_its_figures_on_digits(evaluated):
    fused, msp = (e.table for e in evaluated)
    assert fused.ACC["farood"] >= 97
    assert fused.AUROC["farood"] >= 97
    assert fused.AUROC["nearood"] >= 93
    assert fused.AUROC["farood"] >= msp.AUROC["farood"] + 10


def test_the_table_is_openoods(evaluated):
    table = evaluated[0].table
    assert list(table.index) == ROWS
    assert list(table.columns) == COLUMNS
    assert table.ACC.nunique() == 1
    near = table.loc[["digit8", "digit9"]].mean()
    np.testing.assert_allclose(table.loc["nearood"], near)
    np.testing.assert_allclose(table.loc["farood"], table.loc[ROWS[3:7]].mean())


def test_scores_give_the_table(evaluated):
    fused = evaluated[0]
    _, known, label = fused.scores["id"]["test"]
    _, unknown, ood_label = fused.scores["ood"]["near"]["digit9"]
    is_ood = [0] * len(known) + [1] * len(unknown)
    auroc = roc_auc_score(is_ood, -np.concatenate([known, unknown]))
    assert fused.table.AUROC["digit9"] == pytest.approx(100 * auroc)
    assert set(label) == set(range(7))
    assert set(ood_label) == {-1}
    assert fused.scores["id_preds"].shape == fused.scores["id_labels"].shape == (len(known),)


def test_compare_holds_every_expert_beside_the_fused_score(evaluated):
    fused, msp = evaluated
    assert list(fused.compare.columns) == ROWS
    assert list(fused.compare.index[[0, 1, 9, 10]]) == ["fused", "layer1.0", "output", "msp"]
    assert fused.compare.loc["fused", "farood"] == "{AUROC:.2f} / {FPR@95:.2f}".format(
        **fused.table.loc["farood"]
    )
    # The log-odds of the top class rank as its probability does.
    auroc = float(fused.compare.loc["msp", "nearood"].split(" / ")[0])
    assert auroc == pytest.approx(msp.table.AUROC["nearood"], abs=0.02)


def test_the_validation_pair_is_tested_alone(digits):
    data_root, checkpoint = digits
    detector = FuseNorm(load_network(checkpoint), output="energy", weights=(0.3, 1))
    e = evaluate(detector, load_benchmark("digits", data_root), validation=True, progress=False)
    assert list(e.table.index) == ["val", "valood"]
    assert len(e.scores["ood"]["val"][1]) == 179
    assert e.scores["ood"]["near"] == {}


def test_full_spectrum_needs_shifted_images(digits):
    data_root, checkpoint = digits
    with pytest.raises(ConfigError, match="digits has no covariate-shifted ID images"):
        evaluate(
            FuseNorm(load_network(checkpoint)), load_benchmark("digits", data_root), fsood=True
        )


def test_runs_are_summarised_as_mean_and_population_deviation():
    tables = [pd.DataFrame([[a, 50.0]], ["near"], ["AUROC", "ACC"]) for a in (90.0, 92.0, 97.0)]
    summary = summarise(tables)
    assert summary.loc["near", "AUROC"] == "93.00 ± 2.94"
    assert summary.loc["near", "ACC"] == "50.00 ± 0.00"


def test_runs_are_found_under_a_root(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint .*s0/best\.ckpt"):
        find_checkpoints(tmp_path)
    (tmp_path / "ckpt.pth").touch()
    assert find_checkpoints(tmp_path) == {"": tmp_path / "ckpt.pth"}
    for run in ("s1", "s0", "scores"):
        (tmp_path / run).mkdir()
        if run != "scores":
            (tmp_path / run / "best.ckpt").touch()
    assert list(find_checkpoints(tmp_path)) == ["s0", "s1"]
    (tmp_path / "s2").mkdir()
    with pytest.raises(CheckpointError, match=r"s2 holds no best\.ckpt"):
        find_checkpoints(tmp_path)
