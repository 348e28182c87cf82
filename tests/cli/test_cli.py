import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from fusenorm_openood import __version__
from fusenorm_openood.cli.engines import Job, find_engine, read_postprocessor
from fusenorm_openood.cli.inputs import check_files
from fusenorm_openood.cli.main import main
from fusenorm_openood.data.benchmarks import load_benchmark
from fusenorm_openood.data.preprocessing import NORMALIZATIONS
from fusenorm_openood.detectors.configuration import detector_for
from fusenorm_openood.errors import ConfigError, DataError
from fusenorm_openood.kernels.devices import find_device
from fusenorm_openood.openood.bridge import openood_installed
from tests.conftest import shortened_digits, without_environment

NO_DICE = (
    "--engine native has no postprocessor 'dice', and --engine openood does not support "
    "--id-data digits"
    if openood_installed()
    else "unknown postprocessor 'dice': choose from fusenorm, fusenorm_published, fusenorm_joint, "
    "msp, mls, ebo, odin, react, t2fnorm, knn, nci, gen, fdbd, scale, ash, vim, mds, she, "
    "or install OpenOOD, which has more, with 'bash scripts/install_openood.sh'"
)
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def root(digits, tmp_path):
    """A data root with 40 images per list, and the root of one training run."""
    data_root, checkpoint = digits
    shutil.copytree(checkpoint.parent.parent, tmp_path / "run")
    return shortened_digits(data_root, tmp_path / "data", 40, 40), tmp_path / "run"


def evaluation(root, *args):
    data_root, runs = root
    return ["eval", "--id-data", "digits", "--root", str(runs), "--data-root", str(data_root),
            "--num-workers", "0", "--no-progress", *args]  # fmt: skip


def test_version_and_help_need_no_torch():
    code = (
        "import sys; from fusenorm_openood.cli.main import main\n"
        "try: main(['--version'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'openood' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"fusenorm {__version__}"


def test_eval_prints_the_table_and_saves_what_is_requested(root, capsys):
    assert main(evaluation(root, "--compare", "--save-csv", "--save-score")) == 0
    out = capsys.readouterr().out
    assert "engine native, device cpu" in out
    assert "AUROC / FPR@95, run s0" in out
    table = pd.read_csv(root[1] / "ood" / "fusenorm.csv", index_col=0)
    assert list(table.columns) == ["FPR@95", "AUROC", "AUPR_IN", "AUPR_OUT", "ACC"]
    for cell in table.loc["farood"]:
        assert cell in out
    scores = pickle.loads((root[1] / "s0" / "scores" / "fusenorm.pkl").read_bytes())
    assert len(scores["ood"]["far"]["noise"][1]) == 40
    assert not list(root[1].rglob("*.tmp"))


def test_a_checkpoint_file_is_a_root_and_has_its_results_next_to_it(root, capsys):
    data_root, runs = root
    file = runs / "resnet20.th"
    (runs / "s0" / "best.ckpt").rename(file)
    args = evaluation((data_root, file), "--postprocessor", "msp")
    assert main([*args, "--save-csv", "--save-score"]) == 0
    assert f"saved {runs / 'resnet20' / 'ood' / 'msp.csv'}" in capsys.readouterr().out
    assert (runs / "resnet20" / "scores" / "msp.pkl").is_file()
    args = ["--id-data", "digits", "--data-root", str(data_root), "--postprocessor", "msp"]
    assert main(["leaderboard", "--root", str(file), *args]) == 0
    assert "resnet20.th" in capsys.readouterr().out


def test_a_normalization_changes_the_images_and_the_step_of_odin(root, monkeypatch, capsys):
    stds = []
    monkeypatch.setattr(
        "fusenorm_openood.cli.engines.detector_for",
        lambda name, config, std: stds.append(std) or detector_for(name, config, std),
    )
    tables = []
    for value in ("digits", "0.5,0.5,0.5,0.5,0.5,0.5", "imagenet"):
        assert main(evaluation(root, "--postprocessor", "odin", "--normalization", value)) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] != tables[2]
    assert list(dict.fromkeys(stds)) == [(0.5,) * 3, (0.229, 0.224, 0.225)]
    with pytest.raises(SystemExit, match="2"):
        main(evaluation(root, "--normalization", "mean"))
    assert "--normalization: normalization must be one of cifar10" in capsys.readouterr().err


def test_openoods_evaluator_normalises_images_in_its_own_way():
    job = Job(
        postprocessor="fusenorm",
        config=read_postprocessor("fusenorm"),
        benchmark=load_benchmark("cifar10", normalization=NORMALIZATIONS["imagenet"]),
    )
    assert find_engine(job) == "native"
    with pytest.raises(ConfigError, match="does not support --normalization: choose --engine nat"):
        find_engine(job, "openood")


def test_several_runs_give_a_mean_and_a_standard_deviation(root, capsys):
    _, runs = root
    state = torch.load(runs / "s0" / "best.ckpt", weights_only=True)
    (runs / "s1").mkdir()
    torch.save(
        {k: v + 0.02 * torch.randn_like(v) if v.ndim == 4 else v for k, v in state.items()},
        runs / "s1" / "best.ckpt",
    )
    assert main(evaluation(root, "--postprocessor", "ebo", "--save-csv")) == 0
    assert "2 run(s)" in capsys.readouterr().out
    table = pd.read_csv(runs / "ood" / "ebo.csv", index_col=0)
    assert not table["AUROC"].str.endswith("± 0.00").all()


@pytest.mark.parametrize("name", ["msp", "mls", "ebo", "odin", "react"])
def test_every_single_expert_runs_under_openoods_name(root, name, capsys):
    assert main(evaluation(root, "--postprocessor", name, "--compare")) == 0
    assert "farood" in capsys.readouterr().out


def test_bfloat16_and_channels_last_give_about_the_same_table(root, capsys):
    tables = []
    for flags in ([], ["--amp", "bf16", "--channels-last"]):
        out = root[1] / f"out{len(flags)}"
        save = ["--save-csv", "--output-dir", str(out), "--set", "output=energy"]
        assert main(evaluation(root, *flags, *save)) == 0
        tables.append(pd.read_csv(out / "ood" / "fusenorm.csv", index_col=0)["AUROC"])
    auroc = [table.str.split().str[0].astype(float) for table in tables]
    assert (auroc[0] - auroc[1]).abs().max() < 2
    assert not tables[0].equals(tables[1])  # the flags have an effect


def test_the_script_takes_the_same_flags_as_openoods(root):
    data_root, runs = root
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "eval_ood.py"), "--root", str(runs),
         "--postprocessor", "msp", "--id-data", "digits", "--batch-size", "100",
         "--data-root", str(data_root)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "nearood" in done.stdout


def test_a_custom_configuration(root, tmp_path, capsys):
    own = tmp_path / "own.yml"
    own.write_text(
        (SCRIPTS.parent / "configs/postprocessors/fusenorm.yml")
        .read_text()
        .replace("output: energy", "output: msp")
        .replace("weights: null", "weights: [1, 2, 3]")
    )
    assert main(evaluation(root, "--config", str(own), "--set", "strong=[output]")) == 1
    assert "each of the 1 strong experts" in capsys.readouterr().err
    own_set = ["--set", "strong=[output]", "--set", "weights=null"]
    assert main(evaluation(root, "--config", str(own), *own_set)) == 0
    own.write_text(own.read_text().replace("alpha", "alhpa"))
    assert main(evaluation(root, "--config", str(own))) == 1
    assert "unknown setting 'alhpa'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--postprocessor", "dice"], NO_DICE),
        (["--id-data", "svhn"], "unknown ID data set 'svhn': choose from cifar10"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--engine", "openood"], "--engine openood does not support --id-data digits: choose"),
        (
            ["--postprocessor", "t2fnorm"],
            "postprocessor 't2fnorm' needs a network trained with T2FNorm",
        ),
        (["--set", "alpha"], "--set must be KEY=VALUE, for example alpha=0.5, got 'alpha'"),
        (["--set", "alhpa=1"], "unknown setting 'alhpa'"),
        (["--set", "alpha=[1"], "is not valid YAML"),
        (["--fsood"], "no covariate-shifted ID images"),
        (["--fsood", "--validation"], "--validation and --fsood cannot be combined"),
        (
            ["--postprocessor", "react", "--set", "percentile=200"],
            "percentile of 'react' must be a number in (0, 100), got 200",
        ),
        (
            ["--postprocessor", "odin", "--set", "temperature=hot"],
            "temperature of 'odin' must be a number in (0, inf), got 'hot'",
        ),
        (["--config", "nowhere.yml"], "nowhere.yml cannot be read"),
        (["--output-dir", "/dev/null/x", "--save-csv"], "choose another with --output-dir"),
    ],
)
def test_errors_are_one_sentence_and_exit_code_1(root, args, message, capsys):
    assert main(evaluation(root, *args)) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_missing_files_are_reported_in_one_message_before_any_work(tmp_path, capsys):
    args = [
        "--id-data",
        "cifar10",
        "--root",
        str(tmp_path / "r"),
        "--data-root",
        str(tmp_path / "d"),
    ]
    assert main(["eval", *args]) == 1
    error = capsys.readouterr().err
    assert "benchmark_imglist/cifar10/val_cifar10.txt" in error
    assert "and 5 more" in error
    assert "r/s0/best.ckpt" in error
    assert "scripts/download/download.py" in error


def test_a_truncated_run_is_found_before_the_first_is_scored(root, capsys):
    (root[1] / "s1").mkdir()
    whole = (root[1] / "s0" / "best.ckpt").read_bytes()
    (root[1] / "s1" / "best.ckpt").write_bytes(whole[:1000])
    assert main(evaluation(root)) == 1
    captured = capsys.readouterr()
    assert "s1/best.ckpt of 1000 bytes cannot be read" in captured.err
    assert "farood" not in captured.out


def test_a_corrupt_image_is_reported_with_its_line(root, tmp_path, capfd):
    data_root = tmp_path / "copy"
    shutil.copytree(root[0], data_root)
    (data_root / "images_digits/test_china/0003.png").write_bytes(b"no image")
    assert main([*evaluation((data_root, root[1])), "--num-workers", "1"]) == 1
    error = capfd.readouterr().err
    assert "test_china.txt, line 4: image" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("label", [-1, 7])
@pytest.mark.parametrize("command", ["eval", "compare"])
def test_a_label_that_is_no_class_is_found_before_any_image_is_scored(root, command, label, capsys):
    listed = root[0] / "benchmark_imglist" / "digits" / "test_digits.txt"
    lines = listed.read_text().splitlines()
    listed.write_text("\n".join([*lines[:2], f"{lines[2].split()[0]} {label}", *lines[3:]]))
    assert main([command, *evaluation(root)[1:]]) == 1
    captured = capsys.readouterr()
    assert f"{listed}, line 3: the label of {lines[2].split()[0]} must be one of" in captured.err
    assert f"7 classes 0 to 6, got {label}" in captured.err
    assert captured.out == ""


def test_numbers_and_none_are_read_as_what_they_mean(root, capsys):
    tables = []
    for changes in (
        ["eps=1e-8", "temperature=None", "react_percentile=none", "base=2e0"],
        ["eps=0.00000001", "temperature=null", "react_percentile=null", "base=2"],
    ):
        assert main(evaluation(root, *(a for c in changes for a in ("--set", c)))) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    sweep = ["--sweep", "eps=[1e-8, 1.e-3]", "--sweep", "react_percentile=[None]"]
    assert main(evaluation(root, "--aps", *sweep, "--set", "strong=[output]", "--sweep",
                           "strong=[[output]]", "--sweep", "penalty=[joint]")) == 0  # fmt: skip
    assert "react_percentile = None" in capsys.readouterr().out
    args = ["--postprocessor", "gen", "--set", "gamma=1e-1", "--set", "M=7"]
    assert main(evaluation(root, *args)) == 0


def test_settings_are_searched_before_the_test(root, tmp_path, capsys):
    sweep = ["--sweep", "output=[energy]", "--sweep", "react_percentile=[null]"]
    sweep += ["--sweep", "penalty=[deviation]", "--sweep", "base=[2, 20]"]
    sweep += ["--sweep", "strong=[[output], [output, knn]]"]
    own = ["--output-dir", str(tmp_path), "--save-csv"]
    assert main(evaluation(root, "--aps", *sweep, *own)) == 0
    out = capsys.readouterr().out
    assert "search over 4 combinations, run s0: validation AUROC" in out
    trials = pd.read_csv(tmp_path / "s0" / "aps" / "fusenorm.csv")
    best = trials.loc[trials["AUROC"].idxmax()]
    assert len(trials) == 4
    chosen = ["--set", f"strong={best['strong']}", "--set", f"base={best['base']}"]
    searched = (tmp_path / "ood" / "fusenorm.csv").read_text()
    assert main(evaluation(root, *chosen, *own)) == 0
    assert (tmp_path / "ood" / "fusenorm.csv").read_text() == searched


def test_a_search_checks_its_images_before_any_work(root, tmp_path):
    data_root, runs = root
    few = shortened_digits(data_root, tmp_path / "few", 20, 20)
    (few / "benchmark_imglist" / "digits" / "val_digit7.txt").unlink()
    job = Job(
        postprocessor="fusenorm",
        config=read_postprocessor("fusenorm"),
        benchmark=load_benchmark("digits", few),
    )
    assert list(check_files(job.benchmark, runs, job.image_sets())) == ["s0"]
    job = replace(job, config=read_postprocessor("fusenorm", aps_mode=True))
    with pytest.raises(DataError, match=r"val_digit7\.txt cannot be read"):
        check_files(job.benchmark, runs, job.image_sets())


def test_settings_that_cannot_be_searched_are_rejected(root, capsys):
    assert main(evaluation(root, "--postprocessor", "odin", "--aps")) == 1
    assert "the native engine cannot search settings for 'odin'" in capsys.readouterr().err
    assert main(evaluation(root, "--aps", "--sweep", "bsae=[2]")) == 1
    assert "unknown setting 'bsae'" in capsys.readouterr().err
    assert main(evaluation(root, "--aps", "--sweep", "base")) == 1
    assert "--sweep must be KEY=VALUE" in capsys.readouterr().err


def test_validation_does_not_overwrite_test_scores(root):
    assert main(evaluation(root, "--validation", "--save-csv", "--save-score")) == 0
    assert (root[1] / "val" / "fusenorm.csv").is_file()
    assert not (root[1] / "s0" / "scores").exists()


def test_digits_and_taps(digits, capsys):
    data_root, checkpoint = digits
    assert (
        main(["digits", "--data-root", str(data_root), "--root", str(checkpoint.parent.parent)])
        == 0
    )
    assert str(checkpoint) in capsys.readouterr().out
    assert main(["taps", str(checkpoint), "--image-size", "24"]) == 0
    assert "* layer4.0, BasicBlock, BCHW, [128, 3, 3]" in capsys.readouterr().out


@pytest.mark.parametrize("network", ["torchvision:resnet152", "torchvision:densenet121"])
def test_taps_prints_a_summary_and_all_with_all(network, capsys):
    assert main(["taps", "--network", network, "--image-size", "32"]) == 0
    summary = capsys.readouterr().out.splitlines()
    assert len(summary) <= 40
    assert main(["taps", "--network", network, "--image-size", "32", "--all"]) == 0
    listed = [line for line in capsys.readouterr().out.splitlines() if line.count(", ") > 3]
    shown = [line for line in summary if line.startswith("  * ")]
    left = int(summary[-1].split()[1])
    assert set(shown) <= set(listed)
    assert len(shown) + left == len(listed)


def test_taps_at_the_size_that_a_network_takes(monkeypatch, capsys):
    class OfSize(torch.nn.Sequential):
        def forward(self, x):
            assert x.shape[-1] == size, f"takes {size} pixels"
            return super().forward(x)

    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    net = OfSize(*layers, torch.nn.Linear(4, 3))
    monkeypatch.setattr("fusenorm_openood.cli.taps.build_network", lambda *args, **kwargs: net)
    for size in (28, 224, 50):
        net.default_cfg = {"input_size": (3, 50, 50)} if size == 50 else {}
        assert main(["taps", "--network", "any"]) == 0
        assert f"images [3, {size}, {size}]" in capsys.readouterr().out
    size, net.default_cfg = 77, {}
    assert main(["taps", "--network", "any"]) == 1
    assert "takes 77 pixels" in capsys.readouterr().err


def test_a_script_reports_missing_files(tmp_path):
    """The script itself, in an environment that already exists."""
    project = tmp_path / "project"
    shutil.copytree(SCRIPTS, project / "scripts")
    shutil.copy(SCRIPTS.parent / "pyproject.toml", project)
    venv = project / ".venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (venv / "python").chmod(0o755)
    shutil.copy(SCRIPTS.parent / "pyproject.toml", project / ".venv" / ".installed-fast")
    env = without_environment(PYTHONPATH=str(SCRIPTS.parent))
    done = subprocess.run(
        ["bash", str(project / "scripts/ood/fusenorm/cifar10_test_fusenorm.sh"),
         "--data-root", "elsewhere"],
        capture_output=True, text=True, check=False, env=env, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "elsewhere/benchmark_imglist/cifar10/val_cifar10.txt" in done.stderr
    assert "checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


def test_devices_are_found():
    assert find_device("cpu").type == "cpu"
    assert find_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ConfigError, match="device 'tpu' cannot be used"):
        find_device("tpu")


def test_a_change_fills_an_empty_section(tmp_path):
    own = tmp_path / "own.yml"
    own.write_text("postprocessor:\n  name: fusenorm\n  postprocessor_sweep:\n")
    read = read_postprocessor("fusenorm", own, sweep=["base=[2, 20]"])
    assert read["postprocessor"]["postprocessor_sweep"] == {"base": [2, 20]}


@pytest.mark.parametrize("method", ["fusenorm_joint", "fusenorm_published"])
def test_a_method_is_chosen_by_name_and_reported_under_it(root, method, tmp_path, capsys):
    output = ["--output-dir", str(tmp_path), "--save-csv"]
    # As the scripts do: their --postprocessor comes first.
    given = ["--postprocessor", "fusenorm", "--config", method]
    assert main(evaluation(root, *given, *output)) == 0
    assert f"\n{method}, digits, 1 run(s)" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "ood").iterdir()] == [f"{method}.csv"]
    table = (tmp_path / "ood" / f"{method}.csv").read_text()
    assert main(evaluation(root, "--postprocessor", method, *output)) == 0
    assert (tmp_path / "ood" / f"{method}.csv").read_text() == table


def test_settings_are_searched_without_ood_images(root, capsys):
    sweep = ["--sweep", "output=[energy]", "--sweep", "react_percentile=[null]"]
    sweep += ["--sweep", "penalty=[deviation]", "--sweep", "base=[1.2, 2]"]
    assert main(evaluation(root, "--aps", "pseudo", *sweep)) == 0
    assert "search over 8 combinations" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["knn", "nci", "gen", "fdbd", "scale", "ash", "mds", "she"])
def test_post_hoc_experts_are_postprocessors(root, name, capsys):
    assert main(evaluation(root, "--postprocessor", name)) == 0
    assert f"{name} on digits: engine native" in capsys.readouterr().out
