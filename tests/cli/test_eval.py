"""`fusenorm eval`: its tables, files and errors."""

import pickle
import runpy
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
from fusenorm_openood.errors import ConfigError, DataError
from fusenorm_openood.openood.bridge import openood_installed
from tests.cli.conftest import DIGITS, IMAGES
from tests.conftest import make_net, shortened_digits

NO_DICE = (
    "--engine native has no postprocessor 'dice', and --engine openood does not support --id-data"
    if openood_installed()
    else "unknown postprocessor 'dice': choose from fusenorm, fusenorm_published, "
)
SCRIPT = Path(__file__).parents[2] / "scripts" / "eval_ood.py"


def job(name="fusenorm", data_root="data", **how):
    config = read_postprocessor(name, **{k: how.pop(k) for k in ("aps_mode",) if k in how})
    return Job(config=config, benchmark=load_benchmark("digits", data_root))


def test_version_needs_no_torch():
    code = (
        "import sys; from fusenorm_openood.cli.main import main\n"
        "try: main(['--version'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'openood' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"fusenorm {__version__}"


def test_the_table_is_printed_and_what_is_requested_is_saved(evaluate, runs, capsys):
    assert evaluate("--compare", "--save-csv", "--save-score") == 0
    out = capsys.readouterr().out
    other = "--engine openood does not support --id-data digits"
    why = other if openood_installed() else "OpenOOD is not installed"
    assert f"engine native ({why}), device cpu" in out
    assert ", 1 run(s), mean ± std in percent:" in out
    assert "AUROC / FPR@95, run s0" in out
    table = pd.read_csv(runs / "ood" / "fusenorm.csv", index_col=0)
    assert list(table.columns) == ["FPR@95", "AUROC", "AUPR_IN", "AUPR_OUT", "ACC"]
    assert all(cell in out for cell in table.loc["farood"])
    scores = pickle.loads((runs / "s0" / "scores" / "fusenorm.pkl").read_bytes())
    assert len(scores["ood"]["far"]["noise"][1]) == IMAGES
    assert not list(runs.rglob("*.tmp"))


def test_a_checkpoint_file_is_a_root_and_has_its_results_next_to_it(evaluate, runs, few, capsys):
    file = runs / "resnet20.th"
    (runs / "s0" / "best.ckpt").rename(file)
    msp = ("--postprocessor", "msp")
    assert evaluate(*msp, "--save-csv", "--save-score", root=file) == 0
    assert f"saved {runs / 'resnet20' / 'ood' / 'msp.csv'}" in capsys.readouterr().out
    assert (runs / "resnet20" / "scores" / "msp.pkl").is_file()
    data = ["--id-data", "digits", "--data-root", str(few)]
    assert main(["leaderboard", "--root", str(file), *data, *msp]) == 0
    assert "resnet20.th" in capsys.readouterr().out


def test_a_normalization_changes_the_images(evaluate, capsys):
    tables = []
    for value in ("digits", "0.5,0.5,0.5,0.5,0.5,0.5", "imagenet"):
        assert evaluate("--postprocessor", "msp", "--normalization", value) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] != tables[2]
    with pytest.raises(SystemExit, match="2"):
        evaluate("--normalization", "mean")
    assert "--normalization: normalization must be one of cifar10" in capsys.readouterr().err


def test_openoods_evaluator_normalises_images_in_its_own_way():
    benchmark = load_benchmark("cifar10", normalization=NORMALIZATIONS["imagenet"])
    other = replace(job(), benchmark=benchmark)
    assert find_engine(other)[0] == "native"
    with pytest.raises(ConfigError, match="does not support --normalization: choose --engine nat"):
        find_engine(other, "openood")


def test_several_runs_give_a_mean_and_a_standard_deviation(evaluate, runs, capsys):
    (runs / "s1").mkdir()
    torch.save(make_net(seed=1, classes=DIGITS).state_dict(), runs / "s1" / "best.ckpt")
    assert evaluate("--postprocessor", "ebo", "--save-csv") == 0
    assert "2 run(s)" in capsys.readouterr().out
    table = pd.read_csv(runs / "ood" / "ebo.csv", index_col=0)
    assert not table["AUROC"].str.endswith("± 0.00").all()


@pytest.mark.parametrize("name", ["react", "knn"])  # a fit, training images
def test_single_experts_run_under_openoods_name(evaluate, name, capsys):
    assert evaluate("--postprocessor", name, "--compare") == 0
    out = capsys.readouterr().out
    assert f"{name} on digits: engine native" in out
    assert "farood" in out


def test_bfloat16_and_channels_last_give_about_the_same_table(evaluate, runs):
    tables = []
    for flags in ([], ["--amp", "bf16", "--channels-last"]):
        save = ["--save-csv", "--output-dir", runs / f"out{len(flags)}", "--set", "output=energy"]
        assert evaluate(*flags, *save) == 0
        tables.append(pd.read_csv(save[2] / "ood" / "fusenorm.csv", index_col=0)["AUROC"])
    auroc = [table.str.split().str[0].astype(float) for table in tables]
    assert (auroc[0] - auroc[1]).abs().max() < 5
    assert not tables[0].equals(tables[1])  # the flags have an effect


def test_the_script_takes_the_same_flags_as_openoods(runs, few, monkeypatch, tmp_path, capsys):
    flags = ["--root", runs, "--postprocessor", "msp", "--id-data", "digits", "--batch-size", 100]
    given = [SCRIPT, *flags, "--data-root", few, "--num-workers", 0]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in given])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "nearood" in capsys.readouterr().out


def test_a_custom_configuration(evaluate, tmp_path, capsys):
    own, ours = tmp_path / "own.yml", SCRIPT.parents[1] / "configs/postprocessors/fusenorm.yml"
    text = ours.read_text().replace("output: energy", "output: msp")
    own.write_text(text.replace("weights: null", "weights: [1, 2, 3]"))
    assert evaluate("--config", own, "--set", "strong=[output]") == 1
    assert "each of the 1 strong experts" in capsys.readouterr().err
    assert evaluate("--config", own, "--set", "strong=[output]", "--set", "weights=null") == 0
    own.write_text(own.read_text().replace("alpha", "alhpa"))
    assert evaluate("--config", own) == 1
    assert "unknown setting 'alhpa'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--postprocessor", "dice"], NO_DICE),
        (["--id-data", "svhn"], "unknown ID data set 'svhn': choose from cifar10"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--engine", "openood"], "--engine openood does not support --id-data digits: choose"),
        (["--postprocessor", "t2fnorm"], "'t2fnorm' needs a network trained with T2FNorm"),
        (["--set", "alpha"], "--set must be KEY=VALUE, for example alpha=0.5, got 'alpha'"),
        (["--set", "alpha=[1"], "is not valid YAML"),
        (["--fsood"], "no covariate-shifted ID images"),
        (["--fsood", "--validation"], "--validation and --fsood cannot be combined"),
        (["--postprocessor", "odin", "--aps"], "cannot search settings for 'odin'"),
        (["--aps", "--sweep", "base"], "--sweep must be KEY=VALUE"),
        (["--config", "nowhere.yml"], "nowhere.yml cannot be read"),
        (["--output-dir", "/dev/null/x", "--save-csv"], "choose another with --output-dir"),
    ],
)
def test_errors_are_one_sentence_and_exit_code_1(evaluate, args, message, capsys):
    assert evaluate(*args) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_missing_files_are_reported_in_one_message_before_any_work(tmp_path, capsys):
    args = ["--root", str(tmp_path / "r"), "--data-root", str(tmp_path / "d")]
    assert main(["eval", "--id-data", "cifar10", *args]) == 1
    error = capsys.readouterr().err
    assert "benchmark_imglist/cifar10/val_cifar10.txt" in error
    assert "and 5 more" in error
    assert "r/s0/best.ckpt" in error
    assert "scripts/download/download.py" in error


def test_a_truncated_run_is_found_before_the_first_is_scored(evaluate, runs, capsys):
    (runs / "s1").mkdir()
    whole = (runs / "s0" / "best.ckpt").read_bytes()
    (runs / "s1" / "best.ckpt").write_bytes(whole[:1000])
    assert evaluate() == 1
    captured = capsys.readouterr()
    assert "s1/best.ckpt of 1000 bytes cannot be read" in captured.err
    assert "farood" not in captured.out


def test_a_corrupt_image_is_reported_with_its_line(evaluate, few, tmp_path, capfd):
    data_root = tmp_path / "copy"
    shutil.copytree(few / "benchmark_imglist", data_root / "benchmark_imglist")
    for folder in (few / "images_digits").iterdir():
        (data_root / "images_digits").mkdir(exist_ok=True)
        (data_root / "images_digits" / folder.name).symlink_to(folder)
    china = data_root / "images_digits" / "test_china"
    china.unlink()
    shutil.copytree(few / "images_digits" / "test_china", china)
    (china / "0003.png").write_bytes(b"no image")
    assert evaluate("--num-workers", 1, data_root=data_root) == 1
    error = capfd.readouterr().err
    assert "test_china.txt, line 4: image" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(("command", "label"), [("eval", -1), ("compare", 7)])
def test_a_label_that_is_no_class_is_found_before_any_image_is_scored(
    evaluate, few, tmp_path, command, label, capsys
):
    data_root = shortened_digits(few, tmp_path / "own", IMAGES, IMAGES)
    listed = data_root / "benchmark_imglist" / "digits" / "test_digits.txt"
    lines = listed.read_text().splitlines()
    listed.write_text("\n".join([*lines[:2], f"{lines[2].split()[0]} {label}", *lines[3:]]))
    assert evaluate(command=command, data_root=data_root) == 1
    captured = capsys.readouterr()
    assert f"{listed}, line 3: the label of {lines[2].split()[0]} must be one of" in captured.err
    assert f"7 classes 0 to 6, got {label}" in captured.err
    assert captured.out == ""


def test_a_change_fills_an_empty_section(tmp_path):
    own = tmp_path / "own.yml"
    own.write_text("postprocessor:\n  name: fusenorm\n  postprocessor_sweep:\n")
    read = read_postprocessor("fusenorm", own, sweep=["base=[2, 20]"])
    assert read["postprocessor"]["postprocessor_sweep"] == {"base": [2, 20]}


SWEEP = ["--sweep", "output=[energy]", "--sweep", "react_percentile=[None]"]
SWEEP += ["--sweep", "penalty=[deviation]", "--sweep", "strong=[[output], [output, knn]]"]
SWEEP += ["--sweep", "joint_margin=[3]"]


def test_settings_are_searched_before_the_test(evaluate, tmp_path, capsys):
    own = ["--output-dir", tmp_path, "--save-csv"]
    assert evaluate("--aps", *SWEEP, "--sweep", "base=[2, 20]", *own) == 0
    assert "search over 4 combinations, run s0: validation AUROC" in capsys.readouterr().out
    trials = pd.read_csv(tmp_path / "s0" / "aps" / "fusenorm.csv")
    best = trials.loc[trials["AUROC"].idxmax()]
    assert len(trials) == 4
    assert trials["AUROC"].equals(trials["AUROC"].round(4))
    searched = (tmp_path / "ood" / "fusenorm.csv").read_text()
    found = (f"strong={best['strong']}", f"base={best['base']}", "penalty=deviation")
    assert evaluate(*(word for change in found for word in ("--set", change)), *own) == 0
    assert (tmp_path / "ood" / "fusenorm.csv").read_text() == searched


def test_settings_are_searched_without_ood_images(evaluate, capsys):
    assert evaluate("--aps", "pseudo", *SWEEP, "--sweep", "base=[1.2, 2]") == 0
    out = capsys.readouterr().out
    assert "search over 4 combinations" in out
    assert "react_percentile = None" in out


def test_a_search_checks_its_images_before_any_work(runs, few, tmp_path):
    data_root = shortened_digits(few, tmp_path / "own", 2, 2)
    (data_root / "benchmark_imglist" / "digits" / "val_digit7.txt").unlink()
    plain, searched = job(data_root=data_root), job(data_root=data_root, aps_mode=True)
    found = check_files(plain.benchmark, plain.image_sets(), [str(runs)])
    assert list(found[str(runs)]) == ["s0"]
    with pytest.raises(DataError, match=r"val_digit7\.txt cannot be read"):
        check_files(searched.benchmark, searched.image_sets(), [str(runs)])


def test_validation_does_not_overwrite_test_scores(evaluate, runs):
    assert evaluate("--validation", "--save-csv", "--save-score") == 0
    assert (runs / "val" / "fusenorm.csv").is_file()
    assert not (runs / "s0" / "scores").exists()


def test_a_method_is_chosen_by_name_and_reported_under_it(evaluate, tmp_path, capsys):
    method, output = "fusenorm_deviation", ["--output-dir", tmp_path, "--save-csv"]
    # As the scripts do: their --postprocessor comes first.
    assert evaluate("--postprocessor", "fusenorm", "--config", method, *output) == 0
    assert f"\n{method}, digits, 1 run(s)" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "ood").iterdir()] == [f"{method}.csv"]
    table = (tmp_path / "ood" / f"{method}.csv").read_text()
    assert evaluate("--postprocessor", method, *output) == 0
    assert (tmp_path / "ood" / f"{method}.csv").read_text() == table


BASE = "digits_resnet18_32x32_base_e16_lr0.05_default"
T2FNORM = "digits_t2fnorm_net_t2fnorm_e16_lr0.05_alpha0.1_default"


class TrainingError(Exception):
    pass


@pytest.fixture
def untrained(evaluate, tmp_path, monkeypatch):
    """Runs `eval` on a root and data that do not exist; raises what would be trained."""

    def train(data_root, root, method, progress):
        raise TrainingError(method)

    monkeypatch.setattr("fusenorm_openood.training.loop.train_digits", train)
    monkeypatch.chdir(tmp_path)
    return lambda root: evaluate(data_root="data", root=root)


@pytest.mark.parametrize(
    ("root", "exists"), [("results/nonsense", True), (f"{BASE}/s0/best.ckpt", False)]
)
def test_no_network_is_trained_under_another_root(untrained, capsys, root, exists):
    if exists:
        Path(root).mkdir(parents=True)
    assert untrained(root) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"fusenorm: no checkpoint {root}/s0/best.ckpt")
    assert (f"{root} is empty" if exists else f"{root} does not exist") in err
    assert f"--root results/{BASE} or results/{T2FNORM}" in err
    assert err.count("\n") == 1
    assert not Path("data", "images_digits").exists()


@pytest.mark.parametrize(("root", "method"), [(BASE, "base"), (T2FNORM, "t2fnorm")])
def test_a_network_is_trained_under_the_root_of_its_recipe(untrained, root, method):
    with pytest.raises(TrainingError, match=f"^{method}$"):
        untrained(Path("elsewhere/deep", root))
