"""What the store answers without the network, and what makes it compute anew."""

import shutil
from functools import partial

import pytest
import torch
import yaml

from fusenorm_openood import FuseNorm
from fusenorm_openood.data import lists
from fusenorm_openood.data.lists import ImageList
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.deployment.files import experts_key
from fusenorm_openood.evaluation import runs
from fusenorm_openood.evaluation.runs import network_key
from fusenorm_openood.storage.configs import config_root, read_config
from fusenorm_openood.storage.shards import digest
from tests.conftest import make_loader, make_net
from tests.scale.commands import log_of, run, scored_twice
from tests.scale.conftest import Short

SETS = {
    "val_digits", "test_digits", "test_digit8", "test_digit9",
    "test_china", "test_flower", "test_noise", "test_stripes",
}  # fmt: skip
FAULTS = {f"{name}_faults" for name in SETS}


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def without_network_and_images():
    """Let whatever loads the network or opens an image fail."""

    def fail(*args, **kwargs):
        raise AssertionError("this was in the store")

    runs.load_network = ImageList.__getitem__ = lists.find_fault = fail


def as_version(version):
    runs.__version__ = version


@pytest.fixture(scope="module")
def own(short, tmp_path_factory) -> Short:
    """A copy of the images and the checkpoint, which a test may change."""
    home = tmp_path_factory.mktemp("own")
    shutil.copytree(short.data / "benchmark_imglist", home / "data" / "benchmark_imglist")
    for path in (short.data / "benchmark_imglist" / "digits").glob("*.txt"):
        for line in path.read_text().splitlines():
            image = home / "data" / "images_digits" / line.rsplit(maxsplit=1)[0]
            image.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(short.data / "images_digits" / line.rsplit(maxsplit=1)[0], image)
    (home / "run" / "s0").mkdir(parents=True)
    return Short(home / "data", shutil.copy2(short.checkpoint, home / "run" / "s0" / "best.ckpt"))


@pytest.fixture(scope="module")
def full(own, tmp_path_factory):
    """A store with all that the default method needs."""
    home = tmp_path_factory.mktemp("full")
    (done,) = run(home, own.argv("eval", home / "store"))
    assert done.status == 0, done.err
    assert written(home) == {*SETS, *FAULTS, "network"}
    return home / "store"


def written(home):
    return {name.rpartition("-")[0] for kind, name, _ in log_of(home) if kind == "written"}


@pytest.mark.parametrize(
    "options",
    [
        ["--set", "strong=[output, knn, vim, nci, gen, she, scale, ash]", "--set", "neighbours=3"],
        ["--postprocessor", "react"],
        ["--compare", "--batch-size", "7"],
    ],
    ids=" ".join,
)
def test_another_fusion_needs_neither_network_nor_images(own, full, tmp_path, options):
    live, again = ([*own.argv("eval", store), *options] for store in ("none", full))
    (expected,) = run(tmp_path / "live", live)
    (done,) = run(tmp_path, again, first=without_network_and_images)
    assert (done.status, done.out) == (0, expected.out), done
    assert log_of(tmp_path) == []


@pytest.fixture
def t2fnorm(own, tmp_path):
    """A network with separate scoring logits."""
    weights = torch.load(own.checkpoint, weights_only=True)
    weights = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    torch.save({**weights, "tau": torch.tensor(0.1)}, tmp_path / "t2fnorm.ckpt")
    return own._replace(checkpoint=tmp_path / "t2fnorm.ckpt")


def test_a_second_comparison_with_a_search_needs_neither_network_nor_images(t2fnorm, tmp_path):
    config = read_config(config_root() / "postprocessors" / "fusenorm.yml")
    config["postprocessor"]["postprocessor_sweep"] = {"base": [5, 10]}
    (tmp_path / "few.yml").write_text(yaml.dump(config))
    search = "compare", "--search", "--config", tmp_path / "few.yml"
    live, again = (
        t2fnorm.argv(search[0], store, *search[1:]) for store in ("none", tmp_path / "store")
    )
    (expected,) = run(tmp_path / "live", live)
    done = run(tmp_path / "first", again, 2, shard=8)
    done += run(tmp_path / "second", again, 2, shard=8, first=without_network_and_images)
    assert [d.status for d in done] == [0] * 4, done
    assert [d.out for d in done] == [expected.out, ""] * 2
    assert scored_twice(log_of(tmp_path / "first")) == []
    assert log_of(tmp_path / "second") == []


def test_baselines_of_a_known_network_do_not_load_it(t2fnorm, tmp_path):
    argv = [*t2fnorm.argv("eval", tmp_path / "store"), "--postprocessor", "t2fnorm"]
    first, second = (
        run(tmp_path, argv, first=how)[0] for how in (None, without_network_and_images)
    )
    assert (first.status, first.out) == (second.status, second.out)


def test_a_damaged_shard_is_reported_and_computed_again(own, full, tmp_path):
    (shard,) = full.glob("test_china-*/*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    done = run(tmp_path, own.argv("eval", full), 2)
    assert [d.status for d in done] == [0, 0], done
    assert sum(d.err.count("computed again") for d in done) == 1
    assert [kind for kind, *_ in log_of(tmp_path)] == ["loaded", "written"]
    assert shard.read_bytes() == whole


def test_anything_else_is_computed(own, full, tmp_path):
    (done,) = run(tmp_path, own.argv("eval", tmp_path), first=without_network_and_images)
    assert done.status == 1
    assert "this was in the store" in done.err


@pytest.mark.parametrize(
    "options",
    [
        ["--set", "k_min=0.2"],
        slow(["--normalization", "cifar10"]),
        slow(["--amp", "bf16"]),
    ],
    ids=" ".join,
)
def test_other_scores_of_the_network_are_computed(own, full, tmp_path, options):
    (done,) = run(tmp_path, [*own.argv("eval", full), *options])
    assert done.status == 0, done.err
    assert written(tmp_path) >= SETS


def test_another_version_computes_anew(own, full, tmp_path):
    (done,) = run(tmp_path, own.argv("eval", full), first=partial(as_version, "0.0"))
    assert done.status == 0, done.err
    assert written(tmp_path) == {*SETS, *FAULTS, "network"}


def test_another_checkpoint_computes_anew(own, full, tmp_path):
    weights = torch.load(own.checkpoint, weights_only=True)
    next(iter(weights.values())).mul_(1.01)
    other = own._replace(checkpoint=tmp_path / "other.ckpt")
    torch.save(weights, other.checkpoint)
    (done,) = run(tmp_path, other.argv("eval", full))
    assert done.status == 0, done.err
    assert written(tmp_path) == {*SETS, "network"}


def of_the_same_size(image, path):
    other = sorted(image.parent.iterdir())[1].read_bytes()
    size = max(len(other), image.stat().st_size)
    image.write_bytes(other + bytes(size - len(other)))


def relabelled(image, path):
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first.rsplit(maxsplit=1)[0] + " -2\n", *others]))


@pytest.mark.parametrize("change", [of_the_same_size, slow(relabelled)])
def test_a_changed_image_set_is_computed_anew_and_no_other(own, full, tmp_path, change):
    path = own.data / "benchmark_imglist" / "digits" / "test_flower.txt"
    name = path.read_text().split()[0]
    change(own.data / "images_digits" / name, path)
    (done,) = run(tmp_path, own.argv("eval", full))
    assert done.status == 0, done.err
    assert written(tmp_path) == {"test_flower", "test_flower_faults"}
    (live,) = run(tmp_path / "live", own.argv("eval", "none"))
    assert done.out == live.out


def test_a_network_is_known_by_its_file_its_name_the_size_of_images_and_how_it_runs(tmp_path):
    files = tmp_path / "one", tmp_path / "two"
    for path in files:
        path.write_text(path.name)
    known = [
        network_key(files[0], None, 32, amp=False),
        network_key(files[1], None, 32, amp=False),
        network_key(files[0], "timm:resnet18", 32, amp=False),
        network_key(files[0], None, 64, amp=False),
        network_key(files[0], None, 32, amp=True),
    ]
    assert len(set(map(digest, known))) == len(known)
    files[0].rename(tmp_path / "three")
    assert network_key(tmp_path / "three", None, 32, amp=False) == known[0]


def test_scores_of_files_are_known_by_all_that_they_depend_on(net, loader, tmp_path):
    def known(net=net, loader=loader, size=16, **changes):
        detector = FuseNorm(net, **changes).fit(loader)
        detector.preprocessing = Preprocessing(size, (16, 16), "bilinear", (0.5,) * 3, (0.5,) * 3)
        return digest(experts_key(detector, tmp_path))

    same = [known(), known(), known(base=5), known(percentile_low=1), known(weights=(1, 2, 1, 1))]
    assert len(set(same)) == 1
    other = [
        known(make_net(1)), known(loader=make_loader(seed=2)), known(size=32), known(k_min=0.2),
        known(strong=("output", "fdbd")), known(output="msp"), known(temperature=2.0),
        known(react_percentile=90.0), known(strong=("output", "knn"), neighbours=3),
    ]  # fmt: skip
    assert len({*same, *other}) == 1 + len(other)
