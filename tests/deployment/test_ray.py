"""Actors of a local Ray cluster write the shards that one process writes."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from fusenorm_openood import FuseNorm
from fusenorm_openood.cli.main import main
from fusenorm_openood.deployment import files as sharded
from fusenorm_openood.deployment.files import FileShards
from fusenorm_openood.deployment.ray import TRIES, score_with_actors, shape
from fusenorm_openood.errors import CheckpointError, ClusterError
from fusenorm_openood.storage.shards import ShardSet
from tests.deployment import imagefiles
from tests.deployment.actors import Ray
from tests.deployment.imagefiles import (
    NETWORK,
    Loading,
    ends,
    fails,
    network,
    write_detector,
    write_images,
)


@pytest.fixture(scope="session")
def two_cores():
    """Ray with two cores and little memory."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False
    )
    yield ray
    ray.shutdown()


REAL = pytest.mark.parametrize(
    "ray", ["stand-in", pytest.param("ray", marks=pytest.mark.slow)], indirect=True
)


@pytest.fixture
def ray(request, monkeypatch):
    """Two cores of the stand-in, or on request of Ray itself."""
    if getattr(request, "param", "") == "ray":
        return request.getfixturevalue("two_cores")
    monkeypatch.setattr(imagefiles, "IN_THIS_PROCESS", True)
    monkeypatch.setattr(ShardSet, "write", ShardSet.write)  # which `Loading` changes
    return Ray()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a detector, 45 images, and the store and rows of one process."""
    home = tmp_path_factory.mktemp("home")
    write_detector(home / "d.st")
    write_images(home / "images", 45)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "SHARD", 10)
        assert score(home, home / "one") == 3
    return home


@pytest.fixture
def files(home, tmp_path, monkeypatch) -> FileShards:
    """Five shards in an empty store."""
    monkeypatch.setattr(sharded, "SHARD", 10)
    paths = sorted((home / "images").iterdir())
    return FileShards(FuseNorm.load(home / "d.st", network()), paths, tmp_path / "store", 4)


def score(home, out: Path, *options: object) -> int:
    argv = ["score", "--detector", home / "d.st", home / "images", "--store", f"{out}.store"]
    argv += ["--network", NETWORK]
    argv += ["--csv", f"{out}.csv", "--no-progress", "--num-workers", 0, "--batch-size", 4]
    return main([str(a) for a in [*argv, "--device", "cpu", *options]])


def shards_in(store: Path) -> dict[Path, bytes]:
    return {p.relative_to(store): p.read_bytes() for p in store.rglob("files-*/*.safetensors")}


@REAL
def test_actors_change_no_bit_of_shards_and_rows(ray, home, tmp_path, monkeypatch):
    monkeypatch.setattr(sharded, "SHARD", 10)
    if isinstance(ray, Ray):
        monkeypatch.setattr("fusenorm_openood.cli.score.cluster", lambda: nullcontext(ray))
    out = tmp_path / "ray"
    assert score(home, out, "--engine", "ray", "--cores-per-actor", 1) == 3
    assert len(shards_in(tmp_path / "ray.store")) == 5
    assert shards_in(tmp_path / "ray.store") == shards_in(home / "one.store")
    assert (tmp_path / "ray.csv").read_bytes() == (home / "one.csv").read_bytes()


@REAL
@pytest.mark.parametrize("line", ["begins 2", "written 2"])
def test_an_actor_that_ends_loses_no_shard_and_repeats_none_that_is_written(
    ray, home, files, tmp_path, line, caplog
):
    load = Loading(home / "d.st", tmp_path / "log", killed=line)
    assert sorted(score_with_actors(ray, files, load, cores=1)) == list(range(5))
    assert load.log.with_suffix(".killed").exists()
    assert load.lines("written") == [f"written {number}" for number in range(5)]
    assert load.lines("begins 2") == ["begins 2"] * (2 if line == "begins 2" else 1)
    assert shards_in(tmp_path / "store") == shards_in(home / "one.store")
    assert "an actor ended while scoring shard 2" in caplog.text


def test_only_missing_shards_are_dealt_out(ray, home, files, tmp_path):
    list(files.stored.computed([0, 3]))
    load = Loading(home / "d.st", tmp_path / "log")
    assert sorted(score_with_actors(ray, files, load, cores=1)) == [1, 2, 4]
    assert load.lines("begins") == ["begins 1", "begins 2", "begins 4"]
    assert shards_in(tmp_path / "store") == shards_in(home / "one.store")


def test_actors_that_end_again_and_again_are_one_sentence(ray, files):
    with pytest.raises(ClusterError, match=f"^{TRIES} actors ended while loading the detector"):
        list(score_with_actors(ray, files, ends, cores=2))


def test_an_actor_says_why_it_cannot_load_the_detector(ray, files):
    with pytest.raises(CheckpointError, match=r"^checkpoint a\.ckpt is damaged: download it"):
        list(score_with_actors(ray, files, fails, cores=1))


def test_an_actor_with_another_detector_writes_nothing(ray, files, tmp_path):
    write_detector(tmp_path / "other.st", seed=3)
    load = Loading(tmp_path / "other.st", tmp_path / "log")
    with pytest.raises(ClusterError, match="has another detector"):
        list(score_with_actors(ray, files, load, cores=1))
    assert shards_in(tmp_path / "store") == {}


def test_too_few_cores_are_one_sentence(files):
    with pytest.raises(ClusterError, match=r"has 2 CPU cores, and an actor takes 3: choose fewer"):
        list(score_with_actors(Ray(), files, fails, cores=3))


def test_gpus_and_cores_say_how_many_actors_there_are():
    assert shape(Ray(CPU=7.0), 2, gpus=True) == (3, {"num_cpus": 2, "num_gpus": 0})
    assert shape(Ray(CPU=8.0, GPU=2.0), 2, gpus=True) == (2, {"num_cpus": 2, "num_gpus": 1})
    assert shape(Ray(CPU=2.0, GPU=2.0), 2, gpus=True) == (1, {"num_cpus": 2, "num_gpus": 1})
    assert shape(Ray(CPU=8.0, GPU=2.0), 2, gpus=False) == (4, {"num_cpus": 2, "num_gpus": 0})


COMMAND = """
import sys
from fusenorm_openood import FuseNorm
from fusenorm_openood.cli.main import main
from fusenorm_openood.deployment import files as sharded

sharded.SHARD = 10
status = main(sys.argv[1:])
import ray
print(status, ray.is_initialized())
"""


@pytest.mark.slow
def test_a_command_starts_ray_and_shuts_it_down(home, tmp_path):
    pytest.importorskip("ray")
    done = subprocess.run(command(home, tmp_path), capture_output=True, text=True)
    assert done.stdout == "3 False\n", done.stderr
    assert (tmp_path / "ray.csv").read_bytes() == (home / "one.csv").read_bytes()


def command(home, tmp_path):
    argv = ["score", "--detector", home / "d.st", home / "images", "--store", tmp_path / "store"]
    argv += ["--network", NETWORK]
    argv += ["--csv", tmp_path / "ray.csv", "--num-workers", 0, "--batch-size", 4]
    argv += ["--engine", "ray", "--cores-per-actor", 1, "--device", "cpu", "--no-progress"]
    return [sys.executable, "-c", COMMAND, *map(str, argv)]
