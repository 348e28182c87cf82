"""OpenOOD's Evaluator, its pipelines and the native engine agree for every postprocessor."""

import pickle
import re
import warnings
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import ImageFile

from fusenorm_openood import FuseNorm, on_device
from fusenorm_openood.cli.engines import read_postprocessor
from fusenorm_openood.cli.main import main as fusenorm
from fusenorm_openood.data.benchmarks import image_loader, load_benchmark
from fusenorm_openood.detectors.configuration import detector_for, read_fusenorm
from fusenorm_openood.detectors.search import search
from fusenorm_openood.errors import CheckpointError, ConfigError, DataError
from fusenorm_openood.evaluation.evaluation import evaluate
from fusenorm_openood.method.settings import METHODS
from fusenorm_openood.network import build_network
from fusenorm_openood.openood.adapter import make_postprocessor
from fusenorm_openood.openood.bridge import evaluate_with_openood
from fusenorm_openood.openood.pipelines import main
from tests.conftest import assert_undisturbed, drawn_benchmark, state_of
from tests.openood.conftest import first_images

# FuseNorm's gradients are those of ODIN, which is tested separately.
CHANGES = {"fusenorm_published": ["output=energy"]}
NETWORKS = {"base": "resnet18_32x32", "t2fnorm": "t2fnorm_net"}


def printed(table):
    return [[f"{value:.2f}" for value in row] for row in table.to_numpy()]


def run_main(out, network, postprocessor, pipeline, checkpoint, *changes):
    configs = [
        "datasets/cifar10/cifar10.yml",
        "datasets/cifar10/cifar10_fsood.yml",
        f"networks/{network}.yml",
        "preprocessors/base_preprocessor.yml",
        f"pipelines/test/{pipeline}.yml",
        f"postprocessors/{postprocessor}.yml",
    ]
    args = ["--config", *(f"configs/{c}" for c in configs), "--device", "cpu"]
    changes = ("--output_dir", str(out), "--network.checkpoint", str(checkpoint), *changes)
    return main([*args, *changes])


@pytest.mark.parametrize(
    ("root", "name"),
    [
        *(("base", name) for name in (*METHODS, "msp", "odin", "react")),
        *(("t2fnorm", name) for name in ("fusenorm", "odin")),
        *(pytest.param("t2fnorm", name, marks=pytest.mark.slow) for name in ("ebo", "react")),
    ],
)
def test_three_engines_print_the_same_table(
    home, networks, checkpoints, name, root, tmp_path, monkeypatch
):
    from openood.evaluation_api import Evaluator

    monkeypatch.chdir(home)
    net, changes = networks[root], CHANGES.get(name, [])
    config = read_postprocessor(name, None, changes)
    before = state_of(net)
    with on_device("cpu"):
        postprocessor = make_postprocessor(name, config, "cifar10")
        evaluator = Evaluator(net, "cifar10", "data", postprocessor=postprocessor, num_workers=0)
        tables = {fsood: evaluator.eval_ood(fsood, progress=False) for fsood in (False, True)}
    assert_undisturbed(net, before)

    benchmark = load_benchmark("cifar10", "data")
    for fsood, table in tables.items():
        detector = detector_for(name, config, benchmark.norm[1])(net)
        native = evaluate(detector, benchmark, fsood, progress=False).table
        assert list(native.index) == list(table.index)
        assert printed(native) == printed(table)

        pipeline = "test_fsood" if fsood else "test_ood"
        keys = [f"postprocessor.postprocessor_args.{c}".split("=") for c in changes]
        more = [part for key, value in keys for part in (f"--{key}", value)]
        out = tmp_path / pipeline
        assert run_main(out, NETWORKS[root], name, pipeline, checkpoints[root], *more) == 0
        (saved,) = out.rglob("ood.csv")
        by_pipeline = pd.read_csv(saved, index_col=0, dtype=str)
        assert list(by_pipeline.index) == list(table.index)
        assert by_pipeline.to_numpy().tolist() == printed(table)


# OpenOOD's GEN saturates on scoring logits, this package's does not.
@pytest.mark.parametrize(
    ("root", "name"),
    [
        *(("base", name) for name in ("knn", "nci", "fdbd", "gen", "scale", "ash")),
        *(("t2fnorm", name) for name in ("knn", "fdbd", "ash")),
    ],
)
def test_post_hoc_experts_have_the_same_table_natively_and_in_openood(home, networks, name, root):
    assert_same_table(networks[root], home / "data", name, ["K=3"] if name == "knn" else [])


@pytest.mark.parametrize(("root", "name"), [("base", "vim"), ("t2fnorm", "she")])
def test_vim_and_she_have_the_same_table_with_more_images_than_dimensions(
    bench, networks, tmp_path, name, root
):
    # With few images OpenOOD's SHE is NaN for a class without any, and its ViM is rounding error.
    data_root = first_images(bench[0], tmp_path, 8)
    train = Path("benchmark_imglist", "cifar10", "train_cifar10.txt")
    lines = (bench[0] / train).read_text().splitlines(keepends=True)
    (data_root / train).write_text("".join(lines[:600]))
    assert_same_table(networks[root], data_root, name)


def assert_same_table(net, data_root, name, changes=()):
    config, benchmark = (
        read_postprocessor(name, None, changes),
        load_benchmark("cifar10", data_root),
    )
    postprocessor = make_postprocessor(name, config, "cifar10")
    table, _ = evaluate_with_openood(net, postprocessor, "cifar10", data_root, 200, 0, False, False)
    detector = detector_for(name, config, benchmark.norm[1])(net)
    native = evaluate(detector, benchmark, progress=False).table
    assert printed(native) == printed(table)


@pytest.mark.parametrize("aps_mode", [True, "pseudo"])
def test_openood_searches_strong_experts_penalty_and_base_as_the_native_engine(
    home, networks, aps_mode
):
    net, config = networks["base"], read_postprocessor("fusenorm", aps_mode=aps_mode)
    config["postprocessor"]["postprocessor_sweep"] = {
        "strong": [["output"], ["output", "fdbd"], ["output", "knn", "mds++"]],
        "penalty": ["deviation", "joint"],
        "base": [1.2, 2, 20],
    }
    benchmark = load_benchmark("cifar10", home / "data")
    id_val, ood_val = (image_loader(s) for s in (benchmark.id["val"], benchmark.val_ood))
    settings, sweep, _ = read_fusenorm(config)
    found = search(net, settings, sweep, id_val, ood_val if aps_mode is True else None)
    assert len(found.trials) == 18
    postprocessor = make_postprocessor("fusenorm", config, "cifar10")
    table, _ = evaluate_with_openood(
        net, postprocessor, "cifar10", home / "data", 200, 0, False, False
    )
    assert postprocessor.settings == found.settings
    detector = FuseNorm(net, found.settings).with_statistics(found.statistics)
    native = evaluate(detector, benchmark, progress=False).table
    assert printed(native) == printed(table)
    again = pickle.loads(pickle.dumps(postprocessor))
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(again.postprocess(net, images)[1], postprocessor.postprocess(net, images)[1])


def test_a_wrapped_network_is_not_wrapped_again(networks, home):
    from openood.networks.react_net import ReactNet

    net = networks["t2fnorm"]
    react = make_postprocessor("react", read_postprocessor("react", None, []), "cifar10")
    images = torch.randn(4, 3, 32, 32)
    with on_device("cpu"):
        react.setup(net, {"val": [{"data": images}]}, {})
        scored = react.postprocess(net, images)
        wrapped = react.postprocess(ReactNet(net), images)
    assert torch.equal(scored[0], wrapped[0])
    assert torch.equal(scored[1], wrapped[1])


def test_postprocessors_that_cannot_be_built_raise(networks):
    with pytest.raises(
        ConfigError, match=r"'fusenrom' .*: choose from .*fusenorm, fusenorm_deviation, .*gen, gm"
    ):
        make_postprocessor("fusenrom", {"postprocessor": {"name": "msp"}}, "cifar10")
    with pytest.raises(ConfigError, match="'knn' cannot be built from its configuration"):
        make_postprocessor("knn", {"postprocessor": {"name": "knn"}}, "cifar10")
    with pytest.raises(ConfigError, match="'msp' has no parameters to search"):
        make_postprocessor("msp", {"postprocessor": {"APS_mode": True}}, "cifar10")
    t2fnorm = make_postprocessor("t2fnorm", {"postprocessor": {"name": "msp"}}, "cifar10")
    with pytest.raises(CheckpointError, match="got a ResNet18_32x32: use such a checkpoint"):
        t2fnorm.setup(networks["base"], {}, {})


def test_the_command_accepts_openoods_postprocessors(home, bench, tmp_path, capsys):
    from tests.openood.conftest import RUNS

    args = ["eval", "--id-data", "cifar10", "--data-root", str(home / "data"), "--num-workers", "0"]
    args += ["--root", str(bench[1] / RUNS["base"]), "--device", "cpu", "--no-progress"]
    out = ["--output-dir", str(tmp_path), "--save-csv"]
    knn = ["--postprocessor", "knn", "--set", "K=3", "--engine", "openood"]
    assert fusenorm([*args, *knn, *out]) == 0
    assert "knn on cifar10: engine openood" in capsys.readouterr().out
    assert (tmp_path / "ood" / "knn.csv").is_file()
    assert fusenorm([*args, "--postprocessor", "dice", "--engine", "native"]) == 1
    assert "--engine native has no postprocessor 'dice': choose" in capsys.readouterr().err
    assert fusenorm([*args, "--postprocessor", "dice", "--validation"]) == 1
    assert "and --engine openood does not support --validation" in capsys.readouterr().err
    assert fusenorm([*args, "--postprocessor", "nearest"]) == 1
    assert "nearest.yml cannot be read" in capsys.readouterr().err


@pytest.fixture
def with_a_broken_image(home, tmp_path):
    """A function that writes one truncated ID test image and returns its data root."""
    lists = tmp_path / "benchmark_imglist" / "cifar10"
    lists.mkdir(parents=True)
    for path in (home / "data" / "benchmark_imglist" / "cifar10").glob("*.txt"):
        (lists / path.name).write_text(path.read_text())
    image = (lists / "test_cifar10.txt").read_text().split()[0]
    (lists / "test_cifar10.txt").write_text("broken.png 0\n")
    images = tmp_path / "images_classic"
    images.mkdir()
    for folder in (home / "data" / "images_classic").iterdir():
        (images / folder.name).symlink_to(folder)
    whole = (home / "data" / "images_classic" / image).read_bytes()

    def write(kept: float) -> Path:
        (images / "broken.png").write_bytes(whole[: int(kept * len(whole))])
        return tmp_path

    return write


def test_truncated_images_are_read_alike_by_both_engines(networks, with_a_broken_image):
    data_root = with_a_broken_image(0.9)
    net, before = networks["base"], ImageFile.LOAD_TRUNCATED_IMAGES
    msp = make_postprocessor("msp", {"postprocessor": {"name": "msp"}}, "cifar10")
    table, _ = evaluate_with_openood(net, msp, "cifar10", data_root, 8, 1, False, False)
    assert before == ImageFile.LOAD_TRUNCATED_IMAGES
    benchmark = load_benchmark("cifar10", data_root)
    detector = detector_for("msp", read_postprocessor("msp"))(net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        native = evaluate(
            detector, benchmark, load=partial(image_loader, batch_size=8), progress=False
        ).table
    assert [str(w.message).split()[1] for w in caught] == [
        str(data_root / "images_classic" / "broken.png")
    ]
    assert printed(native) == printed(table)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_reported_in_one_sentence(networks, with_a_broken_image, workers):
    data_root = with_a_broken_image(0.01)
    msp = make_postprocessor("msp", {"postprocessor": {"name": "msp"}}, "cifar10")
    with pytest.raises(DataError, match=r"cannot read or write a file \([^\n]*\)"):
        evaluate_with_openood(networks["base"], msp, "cifar10", data_root, 8, workers, False, False)


@pytest.fixture
def named(tmp_path, capsys):
    """A function from options to the table of torchvision's ResNet-18 on drawn images."""
    drawn_benchmark("cifar10", tmp_path / "data", images=12)
    for name in ("cifar10", "cifar100", "tin", "mnist", "svhn", "texture", "places365"):
        (tmp_path / "data" / "images_classic" / name / name).mkdir(parents=True)  # no download
    torch.manual_seed(0)
    torch.save(build_network("torchvision:resnet18", 10).state_dict(), tmp_path / "net.pth")

    def table(*options):
        args = ["--data-root", str(tmp_path / "data"), "--root", str(tmp_path / "net.pth")]
        args += ["--network", "torchvision:resnet18", "--num-workers", "0", "--device", "cpu"]
        assert fusenorm(["eval", "--id-data", "cifar10", "--no-progress", *args, *options]) == 0
        return capsys.readouterr().out.split("in percent:")[1]

    return table


@pytest.mark.parametrize("name", ["fusenorm", "react"])
def test_a_network_that_is_named_gives_the_same_table_in_both_engines(name, named):
    both = [named("--postprocessor", name, "--engine", e) for e in ("native", "openood")]
    assert both[0] == both[1]


def test_openoods_own_postprocessors_get_the_features_of_a_network_that_is_named(named):
    assert "farood" in named("--postprocessor", "dice")


def test_both_engines_make_the_same_figures(home, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    shown = {}
    for engine in ("native", "openood"):
        page = tmp_path / f"{engine}.html"
        args = ["--root", str(checkpoints["base"]), "--num-workers", "0", "--device", "cpu"]
        args += ["--engine", engine, "--report", str(page), "--no-progress"]
        assert fusenorm(["eval", "--id-data", "cifar10", *args]) == 0
        text = page.read_text(encoding="utf-8")
        assert ("Most rejected" in text) == (engine == "native")
        shown[engine] = re.findall(r"<dd>([\d.]+%)</dd>", text)
    assert len(shown["native"]) == 4
    assert shown["native"] == shown["openood"]
