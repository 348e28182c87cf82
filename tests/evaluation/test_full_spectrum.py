"""Two images per data set, and metrics computed by hand."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from fusenorm_openood.cli.main import main
from fusenorm_openood.data.benchmarks import Benchmark, ImageSet
from fusenorm_openood.data.preprocessing import EvalTransform
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.evaluation.evaluation import COLUMNS, evaluate
from tests.conftest import drawn_benchmark, make_net

NORM = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class Brightness(nn.Module):
    """Class 0 for every image, more confident for brighter ones."""

    def forward(self, x):
        grey = x.mean((1, 2, 3))
        return torch.stack([grey, -grey], dim=1)


@pytest.fixture
def benchmark(tmp_path):
    """Grey levels and labels: one of the ID test images and no shifted one is misclassified."""

    def image_set(name, levels, labels):
        lines = []
        for level, label in zip(levels, labels, strict=True):
            Image.new("L", (4, 4), level).save(tmp_path / f"{level}.png")
            lines.append(f"{level}.png {label}\n")
        (tmp_path / f"{name}.txt").write_text("".join(lines))
        return ImageSet(tmp_path / f"{name}.txt", tmp_path, EvalTransform(NORM))

    return Benchmark(
        name="grey",
        data_root=tmp_path,
        num_classes=2,
        pre_size=4,
        image_size=4,
        norm=NORM,
        id={
            "val": image_set("val", [150, 160], [0, 0]),
            "test": image_set("t", [200, 120], [0, 1]),
        },
        val_ood=image_set("val_ood", [1, 2], [-1, -1]),
        near={"near": image_set("near", [80, 40], [-1, -1])},
        far={"far": image_set("far", [10, 20], [-1, -1])},
        csid={"shifted": image_set("shifted", [100, 60], [0, 0])},
    )


def test_shifted_images_count_as_id_in_every_metric(benchmark):
    table = evaluate(SingleScore(Brightness(), "mls"), benchmark, fsood=True, progress=False).table
    assert list(table.columns) == COLUMNS == ["FPR@95", "AUROC", "AUPR_IN", "AUPR_OUT", "ACC"]
    # ID and shifted 200, 120, 100, 60; OOD 80, 40: only the pair of 60 and 80 is out of order.
    # Both OOD images are found where one ID image of four is, too.
    # Precision over recall falls from 1 to 3/4 at 3/4 for ID, from 1 to 1/2 at 1/2 for OOD.
    aupr_in = 3 / 4 + 1 / 4 * (3 / 4 + 4 / 5) / 2
    aupr_out = 1 / 2 + 1 / 2 * (1 / 2 + 2 / 3) / 2
    near = [25, 100 * 7 / 8, 100 * aupr_in, 100 * aupr_out, 75]
    assert table.loc["near"].tolist() == pytest.approx(near)
    assert table.loc["far"].tolist() == pytest.approx([0, 100, 100, 100, 75])


def test_without_full_spectrum_shifted_images_do_not_count(benchmark):
    table = evaluate(SingleScore(Brightness(), "mls"), benchmark, progress=False).table
    for name in ("near", "far"):
        assert table.loc[name].tolist() == pytest.approx([0, 100, 100, 100, 50])


def test_the_command_counts_them_on_cifar10(tmp_path):
    drawn_benchmark("cifar10", tmp_path)
    torch.save(make_net(classes=10).state_dict(), tmp_path / "ckpt.pth")
    given = ["--root", str(tmp_path), "--data-root", str(tmp_path), "--postprocessor", "mls"]
    how = ["--engine", "native", "--num-workers", "0", "--no-progress"]
    assert main(["eval", *given, *how, "--fsood", "--save-csv", "--save-score"]) == 0
    table = pd.read_csv(tmp_path / "fsood" / "mls.csv", index_col=0)
    scores = pickle.loads((tmp_path / "scores" / "mls.pkl").read_bytes())
    known = [scores["id"]["test"], scores["csid"]["cifar10c"]]
    conf = np.concatenate([conf for _, conf, _ in known])
    assert conf.shape == (4,)
    for name, (_, unknown, _) in scores["ood"]["near"].items():
        ordered = np.mean(conf[:, None] > unknown)
        assert table.AUROC[name] == f"{100 * ordered:.2f} \u00b1 0.00"
    right = np.concatenate([pred == label for pred, _, label in known])
    assert table.ACC["nearood"] == f"{100 * right.mean():.2f} \u00b1 0.00"
