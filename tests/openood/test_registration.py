"""OpenOOD knows `fusenorm` wherever it looks up a name; its trainers and scripts run."""

import io
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from fusenorm_openood import FuseNormPostprocessor, load_network, on_device, register
from fusenorm_openood.errors import CheckpointError
from fusenorm_openood.method.settings import METHODS
from fusenorm_openood.network import T2FNormNet
from fusenorm_openood.openood.bridge import openood_config_root
from fusenorm_openood.openood.pipelines import find_config, main, names_in, read_configs
from fusenorm_openood.storage.configs import config_root
from tests.openood.test_engines import run_main
from tests.without_openood.test_postprocessor import config

DATA = ["configs/datasets/cifar10/cifar10.yml", "configs/datasets/cifar10/cifar10_ood.yml"]
TRAIN = [
    *DATA[:1],
    "configs/networks/t2fnorm_net.yml",
    "configs/preprocessors/base_preprocessor.yml",
    "configs/pipelines/train/train_t2fnorm.yml",
]


def test_every_lookup_has_fusenorm_after_one_or_two_registrations():
    register()
    import openood.evaluation_api.evaluator as evaluator
    import openood.evaluation_api.postprocessor as api
    import openood.pipelines.test_ood_pipeline as pipeline
    import openood.postprocessors as package
    from openood.utils import Config

    functions = (api.get_postprocessor, package.get_postprocessor)
    register()
    assert functions == (api.get_postprocessor, package.get_postprocessor)
    assert evaluator.get_postprocessor is api.get_postprocessor
    assert pipeline.get_postprocessor is package.utils.get_postprocessor is functions[1]
    for method, settings in METHODS.items():
        assert api.postprocessors[method] is FuseNormPostprocessor
        path = config_root() / "postprocessors" / f"{method}.yml"
        by_config = package.get_postprocessor(Config(str(path)))
        by_name = api.get_postprocessor(str(openood_config_root()), method, "cifar10")
        for found in (by_config, by_name):
            assert isinstance(found, FuseNormPostprocessor)
            assert found.settings == settings()
    # Other names keep their meaning.
    msp = Config({"postprocessor": {"name": "msp"}})
    assert type(package.get_postprocessor(msp)) is package.BasePostprocessor
    with pytest.raises(KeyError):
        package.get_postprocessor(Config({"postprocessor": {"name": "nothing"}}))


def test_modules_that_openood_imports_later_know_fusenorm_too():
    code = (
        "import sys, fusenorm_openood\n"
        "assert 'openood' not in sys.modules\n"
        "fusenorm_openood.register()\n"
        "assert 'openood.pipelines' not in sys.modules\n"
        "import openood.pipelines.test_ood_pipeline_aps as pipeline\n"
        "assert pipeline.get_postprocessor.has_fusenorm"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_evaluator_finds_it_by_name(home, networks, tmp_path):
    from openood.evaluation_api import Evaluator

    register()
    before = sorted(openood_config_root().rglob("*"))
    with on_device("cpu"):
        for root in (openood_config_root(), config_root()):
            evaluator = Evaluator(
                networks["base"], "cifar10", str(home / "data"), str(root),
                postprocessor_name="fusenorm", num_workers=0,
            )  # fmt: skip
            assert isinstance(evaluator.postprocessor, FuseNormPostprocessor)
            assert evaluator.postprocessor.setup_flag
    assert sorted(openood_config_root().rglob("*")) == before
    own = custom_config_root(tmp_path, "alpha", 0.5)
    with on_device("cpu"):
        evaluator = Evaluator(
            networks["base"], "cifar10", str(home / "data"), str(own),
            postprocessor_name="fusenorm", num_workers=0,
        )  # fmt: skip
    assert evaluator.postprocessor.settings.alpha == 0.5


def custom_config_root(folder: Path, key: str, value: float) -> Path:
    (folder / "postprocessors").mkdir()
    (folder / "postprocessors" / "fusenorm.yml").write_text(yaml.safe_dump(config(**{key: value})))
    return folder


def test_openoods_script_pickles_and_reloads_it_after_setup(
    home, checkpoints, tmp_path, monkeypatch, capsys
):
    (tmp_path / "scripts").mkdir()
    openood = openood_config_root()
    script = shutil.copy(openood.parent / "scripts" / "eval_ood.py", tmp_path / "scripts")
    (tmp_path / "configs").symlink_to(openood)
    (tmp_path / "data").symlink_to(home / "data")
    run = tmp_path / "results" / "s0"
    run.mkdir(parents=True)
    shutil.copy(checkpoints["base"], run / "best.ckpt")
    args = ["--root", str(run.parent), "--postprocessor", "fusenorm", "--save-csv", "--save-score"]
    monkeypatch.setattr(sys, "argv", [script, *args])
    monkeypatch.setattr(sys, "path", list(sys.path))
    register()
    tables = []
    for _ in range(2):
        with on_device("cpu"):
            runpy.run_path(script, run_name="__main__")
        tables.append((run.parent / "ood" / "fusenorm.csv").read_text())
        assert (run / "postprocessors" / "fusenorm.pkl").is_file()
        capsys.readouterr()
        (run / "scores" / "fusenorm.pkl").unlink()
    assert tables[0] == tables[1]
    assert "± 0.00" in tables[0]


def test_openoods_trainer_writes_a_checkpoint_that_loads(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    stdout, benchmark = sys.stdout, torch.backends.cudnn.benchmark
    args = ["--config", *TRAIN, "--device", "cpu", "--output_dir", f"{tmp_path}/"]
    args += ["--optimizer.num_epochs", "1", "--dataset.train.batch_size", "4", "--num_workers", "0"]
    assert main(args) == 0
    assert (sys.stdout, torch.backends.cudnn.benchmark) == (stdout, benchmark)
    assert not sys.stdout.closed
    run = tmp_path / "cifar10_t2fnorm_net_t2fnorm_e1_lr0.1_alpha0.1_default" / "s0"
    net = load_network(run / "best.ckpt", 10)
    assert isinstance(net, T2FNormNet)
    assert float(net.tau) == pytest.approx(0.1)
    assert "Training Completed!" in (run / "log.txt").read_text()
    # The second time OpenOOD would prompt for an answer, and stdin is empty.
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert main(args) == 1


def test_output_directories_equal_openoods(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = [*TRAIN[:1], "configs/networks/resnet18_32x32.yml", *TRAIN[2:3]]
    test = [*DATA, *base[1:], "configs/postprocessors/msp.yml"]
    pipelines = {
        "train/train_t2fnorm": (
            TRAIN[:3],
            "cifar10_t2fnorm_net_t2fnorm_e100_lr0.1_alpha0.1_default/s0",
        ),
        "train/baseline": (base, "cifar10_resnet18_32x32_base_e100_lr0.1_default/s0"),
        "test/test_ood": (test, "cifar10_resnet18_32x32_test_ood_ood_msp_default/s0/ood"),
        "test/test_ood_aps": (test, "cifar10_resnet18_32x32_test_ood_aps_ood_msp_default"),
        "test/test_fsood": (test, "cifar10_resnet18_32x32_test_ood_fsood_msp_default"),
    }  # fmt: skip
    for pipeline, (files, directory) in pipelines.items():
        files = [*files, f"configs/pipelines/{pipeline}.yml"]
        for root in (None, openood_config_root().parent):
            paths = [find_config(f) if root is None else str(root / f) for f in files]
            read = read_configs(paths)
            assert read.output_dir == f"./results/{directory}"
            assert read.dataset.num_workers == read.num_workers
            assert read.network.num_classes == 10


def test_every_configuration_is_read_by_openood():
    from openood.utils import Config

    paths = list(config_root().rglob("*.yml"))
    assert len(paths) > 30
    for path in paths:
        assert dict(Config(str(path)).all_items())


def test_csid_lists_equal_openoods():
    from openood.evaluation_api.datasets import DATA_INFO

    for name in ("cifar10", "cifar100", "imagenet200", "imagenet"):
        path = config_root() / "datasets" / name / f"{name}_fsood.yml"
        csid = yaml.safe_load(path.read_text())["ood_dataset"]["csid"]
        theirs = DATA_INFO[name]["csid"]
        assert csid["datasets"] == (theirs["datasets"] or ["cifar100c"])
        for shifted in theirs["datasets"]:
            listed = f"./data/{theirs[shifted]['imglist_path']}"
            assert csid[shifted]["imglist_pth"] == listed


def test_names_are_found_in_openoods_functions():
    from openood.networks.utils import get_network
    from openood.pipelines.utils import get_pipeline

    assert {"train", "test_ood", "test_ood_aps"} <= set(names_in(get_pipeline))
    assert {"resnet18_32x32", "t2fnorm_net", "react_net"} <= set(names_in(get_network))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--pipeline.name", "test"], ": choose from feat_extract"),
        (
            ["--postprocessor.name", "fusenrom"],
            "unknown postprocessor 'fusenrom' (did you mean 'fusenorm'?)",
        ),
        (["--network.name", "resnet"], ": choose from arpl_gan"),
        (["--evaluator.name", "odd"], ": choose from ad, arpl, base"),
        (["--nothing", "1"], "key 'nothing' is missing from the configurations"),
        (["--seed", "1:nothing"], "the configuration cannot be read (NameError"),
        (["--num_gpus", "2"], "must be 1, since pipeline 'test_ood' on cpu runs in one process"),
        (["--network.checkpoint", "nowhere.ckpt"], "checkpoint nowhere.ckpt not found"),
        (["--device", "tpu9"], "device 'tpu9' cannot be used"),
        (["--ood_dataset.val.imglist_pth", "no.txt"], "cannot read or write a file ([Errno 2]"),
    ],
)
def test_errors_are_reported_in_one_sentence(home, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(home)
    assert run_main(tmp_path, "resnet18_32x32", "fusenorm", "test_ood", "none", *changes) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("fusenorm_openood.main: ")
    assert message in err


def test_a_search_that_openoods_evaluator_would_skip_is_rejected(
    home, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(home)
    searching = ("--postprocessor.APS_mode", "True:bool")
    assert run_main(tmp_path, "resnet18_32x32", "odin", "test_fsood", "none", *searching) == 1
    assert "OpenOOD's evaluator 'fsood' cannot search parameters" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["APS_mode", "postprocessor_sweep"])
def test_a_missing_key_is_reported(home, tmp_path, monkeypatch, capsys, key):
    monkeypatch.chdir(home)
    lacking = config()
    del lacking["postprocessor"][key]
    (tmp_path / "own.yml").write_text(yaml.safe_dump(lacking))
    files = [*DATA, *TRAIN[1:3], "configs/pipelines/test/test_ood.yml", str(tmp_path / "own.yml")]
    assert main(["--config", *files, "--device", "cpu", "--output_dir", str(tmp_path)]) == 1
    assert f"key 'postprocessor.{key}' is missing from the conf" in capsys.readouterr().err
    assert main(["--config", *files[1:], "--device", "cpu"]) == 1
    assert "key 'dataset.name' is missing from the conf" in capsys.readouterr().err
    assert main(["--config", *files[:1], *files[2:], "--device", "cpu"]) == 1
    assert "key 'ood_dataset' is missing from the configuration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("network", "root"), [("resnet18_32x32", "t2fnorm"), ("t2fnorm_net", "base")]
)
def test_a_checkpoint_of_another_network_is_rejected(
    home, checkpoints, tmp_path, monkeypatch, capsys, network, root
):
    monkeypatch.chdir(home)
    assert run_main(tmp_path, network, "msp", "test_ood", checkpoints[root]) == 1
    kind = "T2FNorm" if root == "t2fnorm" else "plain"
    message = f"of a {kind} network does not fit the network '{network}'"
    assert message in capsys.readouterr().err


def test_a_head_for_other_classes_is_skipped_for_training_only(checkpoints):
    from openood.networks.utils import get_network
    from openood.utils import Config

    from fusenorm_openood.openood.pipelines import load_checkpoint

    path = str(checkpoints["base"])
    section = {"name": "resnet18_32x32", "num_classes": 4, "num_gpus": 0}
    network = Config(section, pretrained=True, checkpoint=path)
    net = load_checkpoint(get_network, network, head_may_differ=True)
    assert torch.equal(net.layer4[0].conv1.weight, load_network(path).layer4[0].conv1.weight)
    with pytest.raises(CheckpointError, match=r"2 of its 122 tensors .* example fc\.weight"):
        load_checkpoint(get_network, network)


def test_the_search_runs_in_openoods_pipeline(home, checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home)
    own = config({"cap": [0.0, 1.0]}, output="energy", temperature=1)
    own["postprocessor"]["APS_mode"] = True
    (tmp_path / "own.yml").write_text(yaml.safe_dump(own))
    files = [*DATA, "configs/networks/resnet18_32x32.yml", TRAIN[2]]
    files += ["configs/pipelines/test/test_ood_aps.yml", str(tmp_path / "own.yml")]
    more = ["--device", "cpu", "--output_dir", str(tmp_path)]
    more += ["--network.checkpoint", str(checkpoints["base"])]
    assert main(["--config", *files, *more]) == 0
    out = capsys.readouterr().out
    assert "Final hyperparam" in out
    (saved,) = tmp_path.rglob("ood.csv")
    assert len(pd.read_csv(saved)) == 8
