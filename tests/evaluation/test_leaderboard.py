import csv
import hashlib
import os
import re
import shlex
import shutil

import pandas as pd
import pytest
import torch

from fusenorm_openood.cli.main import main
from fusenorm_openood.data.benchmarks import benchmark_names, load_benchmark
from fusenorm_openood.errors import DataError
from fusenorm_openood.evaluation.evaluation import COLUMNS
from fusenorm_openood.evaluation.leaderboard import (
    FULL_SIZES,
    leaderboard_entry,
    read_results,
    splits,
)
from fusenorm_openood.evaluation.runs import Run
from fusenorm_openood.network import ResNet18_32x32
from tests.conftest import make_t2fnorm

CIFAR10_ROWS = ["cifar100", "tin", "nearood", "mnist", "svhn", "texture", "places365", "farood"]
NAME = "cifar10_t2fnorm_net_t2fnorm_e100_lr0.1_alpha0.1_default"


def rows(text):
    """The rows of an entry, by file, as mappings."""
    blocks = re.findall(r"Row for `(.*?)`:\n\n```csv\n(.*?)```", text, re.DOTALL)
    return {file: next(csv.DictReader(block.splitlines())) for file, block in blocks}


def fields(text):
    """The row of results of an entry."""
    return next(row for file, row in rows(text).items() if file.startswith("results/"))


def save_run(root, run, net):
    (root / run).mkdir(parents=True)
    torch.save(net.state_dict(), root / run / "best.ckpt")
    return root / run / "best.ckpt"


def save_results(path, rows, cell="90.00 ± 1.00"):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame([[cell] * 5] * len(rows), rows, COLUMNS)
    table.loc["nearood", "AUROC"] = cell.replace("90", "91")
    table.loc["farood", "AUROC"] = cell.replace("90", "92")
    table["ACC"] = cell.replace("90", "94")
    table.to_csv(path)


@pytest.fixture
def root(tmp_path):
    """A root with two T2FNorm runs on CIFAR-10 and results newer than them."""
    root = tmp_path / NAME
    for run in ("s0", "s1"):
        os.utime(save_run(root, run, make_t2fnorm(10)), (1e9, 1e9))
    save_results(root / "ood" / "fusenorm.csv", CIFAR10_ROWS)
    return root


@pytest.fixture
def lists(tmp_path):
    """A data root with lists of the same lengths as OpenOOD's for CIFAR-10, without images."""
    data_root = tmp_path / "data"
    for split in splits(load_benchmark("cifar10", data_root), fsood=True):
        split.imagelist.parent.mkdir(parents=True, exist_ok=True)
        split.imagelist.write_text("x.png 0\n" * split.full)
    return data_root


def entry(root, data_root, *args):
    return main(["leaderboard", "--root", str(root), "--data-root", str(data_root), *args])


def test_the_rows_are_those_of_openoods_leaderboard(root, lists, capsys):
    """Columns and style of `results/cifar10.csv` and `utils/papers.csv` of its repository."""
    assert entry(root, lists) == 0
    text = capsys.readouterr().out
    results = [
        "Training,Postprocessor,Near-OOD_AUROC,Far-OOD_AUROC,ID_Accuracy,Outlier_Data,Arch,"
        "Additional_Description",
        "T2FNorm,FuseNorm (default),91.00 ± 1.00,92.00 ± 1.00,94.00 ± 1.00,No,ResNet18 of width 4,"
        "100 epochs",
    ]
    papers = ["Alias,Link", "FuseNorm (default),(to be filled in)"]
    for file, lines in (("results/cifar10.csv", results), ("utils/papers.csv", papers)):
        block = "\n".join(["", "```csv", *lines, "```", ""])
        assert f"Row for `{file}`:\n{block}" in text
    assert "branch leaderboard of https://github.com/zjysteven/OpenOOD" in text
    assert "tau 0.1, mean ± std over 2 training runs (s0, s1), cifar10 benchmark, OOD." in text
    assert "Warning" not in text
    for run in ("s0", "s1"):
        digest = hashlib.sha256((root / run / "best.ckpt").read_bytes()).hexdigest()
        assert f"| `…/{NAME}/{run}/best.ckpt` | `{digest}` |" in text
    assert "| near-OOD | `test_tin.txt` | 7793 | 7793 |" in text
    assert "test_cifar10c" not in text


def test_the_entry_holds_what_eval_saved(digits, tmp_path, capsys):
    data_root, checkpoint = digits
    given = ["--id-data", "digits", "--root", str(checkpoint.parent.parent),
             "--data-root", str(data_root), "--output-dir", str(tmp_path),
             "--postprocessor", "msp"]  # fmt: skip
    assert main(["leaderboard", *given]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'ood' / 'msp.csv'} does not exist" in error
    command = shlex.split(error.split("'")[1])
    assert command[0] == "fusenorm"
    assert main([*command[1:], "--num-workers", "0", "--no-progress"]) == 0
    capsys.readouterr()

    assert main(["leaderboard", *given]) == 0
    text = capsys.readouterr().out
    table = pd.read_csv(tmp_path / "ood" / "msp.csv", index_col=0)
    found = fields(text)
    assert found["Training"] == "CrossEntropy"
    assert found["Near-OOD_AUROC"] == table.AUROC["nearood"]
    assert found["Far-OOD_AUROC"] == table.AUROC["farood"]
    assert found["ID_Accuracy"] == table.ACC["farood"]
    assert "digits is not an OpenOOD benchmark" in text
    assert "| far-OOD | `test_noise.txt` | 400 | unknown |" in text
    assert text.count("Warning") == 1


def test_short_lists_give_a_warning(root, lists, capsys):
    (lists / "benchmark_imglist/cifar10/test_svhn.txt").write_text("x.png 0\n" * 3)
    (lists / "benchmark_imglist/cifar10/test_mnist.txt").unlink()
    assert entry(root, lists) == 0
    text = capsys.readouterr().out
    assert text.startswith("**Warning:** results on subsets do not belong on the leaderboard")
    assert "from OpenOOD's: test_svhn 3 of 26032 images." in text
    assert "the image lists test_mnist.txt cannot be read" in text
    assert "| far-OOD | `test_mnist.txt` | unknown | 70000 |" in text


def test_checkpoints_newer_than_the_results_give_a_warning(root, lists, capsys):
    later = (root / "ood" / "fusenorm.csv").stat().st_mtime + 10
    os.utime(root / "s1" / "best.ckpt", (later, later))
    assert entry(root, lists) == 0
    assert f"{NAME}/s1/best.ckpt is newer than …/{NAME}/ood/fusenorm.csv" in capsys.readouterr().out


def test_a_search_beside_the_results_gives_a_warning(root, lists, capsys):
    assert entry(root, lists) == 0
    assert "searched" not in capsys.readouterr().out
    (root / "s1" / "aps").mkdir()
    (root / "s1" / "aps" / "fusenorm.csv").touch()
    assert entry(root, lists) == 0
    assert f"searched beside …/{NAME}/ood/fusenorm.csv: if" in capsys.readouterr().out


def test_results_of_another_number_of_runs_give_a_warning(root, lists, capsys):
    save_results(root / "ood" / "fusenorm.csv", CIFAR10_ROWS, "90.00 ± 0.00")
    assert entry(root, lists) == 0
    assert "a single run, but the root has 2 training runs:" in capsys.readouterr().out
    save_results(root / "ood" / "fusenorm.csv", CIFAR10_ROWS)
    shutil.rmtree(root / "s1")
    assert entry(root, lists) == 0
    assert "several runs, but the root has 1 training run:" in capsys.readouterr().out


def test_plain_percentages_as_in_openoods_script_for_imagenet_are_accepted(root, lists, capsys):
    shutil.rmtree(root / "s1")
    save_results(root / "ood" / "fusenorm.csv", CIFAR10_ROWS, "90.00")
    assert entry(root, lists) == 0
    text = capsys.readouterr().out
    assert fields(text)["Near-OOD_AUROC"] == "91.00"
    assert "Warning" not in text
    assert "normalised" not in text
    assert entry(root, lists, "--normalization", "digits") == 0
    assert "images normalised by mean (0.5, 0.5, 0.5) and std" in capsys.readouterr().out


def test_full_spectrum_results_are_marked_as_such(root, lists, capsys):
    assert entry(root, lists, "--fsood") == 1
    assert f"{root / 'fsood' / 'fusenorm.csv'} does not exist" in capsys.readouterr().err
    save_results(root / "fsood" / "fusenorm.csv", CIFAR10_ROWS)
    assert entry(root, lists, "--fsood") == 0
    text = capsys.readouterr().out
    assert "full-spectrum: covariate-shifted ID images count as ID" in text
    assert "| covariate-shifted ID | `test_cifar10c.txt` | 10000 | 10000 |" in text
    assert "no full-spectrum leaderboard for cifar10" in text


@pytest.mark.parametrize(
    ("benchmark", "fsood", "file", "postprocessor", "alias", "paper"),
    [
        ("cifar100", False, "cifar100", "mds++", "MDS++", None),
        ("imagenet200", False, "imagenet200_ood", "vim", "VIM", None),
        ("imagenet200", True, "imagenet200_fsood", "fdbd", "fDBD", None),
        ("imagenet", False, "imagenet1k_ood", "gram", "gram", "(to be filled in)"),
        ("imagenet", True, "imagenet1k_fsood", "fusenorm_published", "FuseNorm (published)",
         "https://github.com/sunshine8641/FuseNorm"),
    ],
)  # fmt: skip
def test_files_and_names_of_the_leaderboard(
    tmp_path, benchmark, fsood, file, postprocessor, alias, paper
):
    known = load_benchmark(benchmark, tmp_path)
    path = save_run(tmp_path / "some", "s0", torch.nn.Linear(1, 1))
    save_results(tmp_path / "x.csv", [*known.near, "nearood", *known.far, "farood"], "90.00")
    with torch.device("meta"):
        net = ResNet18_32x32(known.num_classes)
    runs = {"s0": Run(net, path)}
    text = leaderboard_entry(postprocessor, known, fsood, runs, tmp_path / "x.csv")
    found = rows(text)
    row = found.pop(f"results/{file}.csv")
    assert (row["Training"], row["Postprocessor"], row["Arch"], row["Additional_Description"]) == (
        "CrossEntropy", alias, "ResNet18", "(to be filled in)",
    )  # fmt: skip
    expected = {} if paper is None else {"utils/papers.csv": {"Alias": alias, "Link": paper}}
    assert found == expected


def test_an_unknown_trainer_is_left_to_the_user(root, lists, capsys):
    other = root.rename(root.with_name("cifar10_resnet18_32x32_oe_e30_lr1e-05"))
    assert entry(other, lists) == 0
    text = capsys.readouterr().out
    assert fields(text)["Training"] == "oe"
    assert "30 epochs, learning rate 1e-05, tau" in text
    assert fields(text)["Outlier_Data"] == "(to be filled in)"
    assert "fill in by hand whether it uses outlier data" in text


def test_a_folder_named_after_another_training_method_gives_a_warning(root, lists, capsys):
    other = root.rename(root.with_name("cifar10_resnet18_32x32_base_e100_lr0.1_default"))
    assert entry(other, lists) == 0
    text = capsys.readouterr().out
    assert fields(text)["Training"] == "T2FNorm"
    assert "named after CrossEntropy training" in text


@pytest.mark.parametrize(
    ("rows", "cell", "message"),
    [
        (["digit8", "nearood", "farood"], "90.00 ± 1.00", "rows cifar100, tin, .* got .* digit8"),
        (CIFAR10_ROWS, "nan ± nan", "FPR@95 of cifar100 in .* got 'nan ± nan'"),
    ],
)
def test_results_of_another_benchmark_are_rejected(tmp_path, rows, cell, message):
    save_results(tmp_path / "x.csv", rows, cell)
    with pytest.raises(DataError, match=message):
        read_results(tmp_path / "x.csv", load_benchmark("cifar10"))


def test_a_file_that_is_not_csv_is_rejected(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"x\.csv cannot be read"):
        read_results(tmp_path / "x.csv", load_benchmark("cifar10"))


def test_full_sizes_belong_to_lists_of_the_benchmarks():
    assert set(FULL_SIZES) == set(benchmark_names()) - {"digits"}
    for name, sizes in FULL_SIZES.items():
        tested = {s.imagelist.stem: s.full for s in splits(load_benchmark(name), fsood=True)}
        assert set(sizes) <= set(tested)
        assert {stem for stem, full in tested.items() if full is None} <= {
            "test_imagenet_es",
            "test_cifar100c",
        }
