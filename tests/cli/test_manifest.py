"""`fusenorm score --manifest`: lists, images and a store, local and at URLs."""

import csv
import json
import sys
from pathlib import Path

import fsspec
import pandas as pd
import pytest

from fusenorm_openood.cli.main import main
from fusenorm_openood.data.paths import manifest_paths
from fusenorm_openood.deployment import files as sharded
from fusenorm_openood.storage.files import manifest
from fusenorm_openood.storage.shards import Key, ShardSet
from fusenorm_openood.storage.urls import Url
from tests.deployment.imagefiles import NETWORK, write_detector, write_images
from tests.storage.sets import RECORD, assert_same_bits, columns_of


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_detector(home / "d.st")
    write_images(home / "images", 12)
    return home


def score(home, *arguments: object) -> int:
    argv = ["score", "--detector", home / "d.st", "--network", NETWORK, "--num-workers", 0]
    argv += ["--batch-size", 4]
    return main([str(a) for a in [*argv, "--no-progress", "--device", "cpu", *arguments]])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def judgements(path: Path) -> list[list[str]]:
    """The rows of a file without their paths."""
    return [[v for k, v in row.items() if k not in ("path", "error")] for row in rows_of(path)]


def write_manifest(path: str, names: list[str]) -> None:
    if path.endswith(".parquet"):
        pd.DataFrame({"size": 1, "path": names}).to_parquet(path)
        return
    with fsspec.open(path, "w") as file:
        file.write("\n".join([*(["path"] if path.endswith(".csv") else []), *names, ""]))


@pytest.mark.parametrize("kind", ["parquet", "csv", "txt"])
@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_manifest_lists_paths_from_its_folder_and_urls(tmp_path, memory, kind, where):
    folder = tmp_path if where == "local" else Url("memory://lists")
    write_manifest(str(folder / f"m.{kind}"), ["b/a b.png", "s3://b/d.png", "b/a b.png"])
    listed = manifest_paths(str(folder / f"m.{kind}"))
    assert list(listed) == [folder / "b/a b.png", Url("s3://b/d.png")]


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_pattern_joins_manifests_in_order(tmp_path, memory, where):
    folder = tmp_path if where == "local" else Url("memory://lists")
    for name in ("b", "a"):
        write_manifest(str(folder / f"{name}.csv"), [f"{name}.png"])
    assert [p.name for p in manifest_paths(str(folder / "*.csv"))] == ["a.png", "b.png"]


def test_images_manifest_and_store_at_urls_give_the_local_rows(
    home, tmp_path, memory, monkeypatch, capsys
):
    monkeypatch.setattr(sharded, "SHARD", 8)
    local = tmp_path / "local.csv"
    # Rounding depends on the sizes of the batches, which are those of a store.
    assert score(home, home / "images", "--csv", local, "--store", tmp_path / "store") == 3
    for path in sorted((home / "images").iterdir()):
        memory.pipe_file(f"/bucket/images/{path.name}", path.read_bytes())
    names = [f"images/{p.name}" for p in sorted((home / "images").iterdir())]
    write_manifest("memory://bucket/m.parquet", names)
    given = ["--manifest", "memory://bucket/m.parquet", "--store", "memory://store"]
    out = tmp_path / "urls.csv"
    assert score(home, *given, "--csv", out) == 3
    assert judgements(out) == judgements(local)
    assert [row["path"] for row in rows_of(out)] == [f"memory://bucket/{n}" for n in names]
    assert "cannot identify image file 'memory://bucket/images/002.png'" in rows_of(out)[2]["error"]
    assert len(memory.glob("/store/files-*/*.safetensors")) == 2
    assert "per second" in capsys.readouterr().err
    assert score(home, *given, "--csv", tmp_path / "again.csv") == 3
    assert "per second" not in capsys.readouterr().err
    assert (tmp_path / "again.csv").read_bytes() == out.read_bytes()


def test_a_changed_or_new_object_is_another_set(memory):
    urls = [Url("memory://b/x.png"), Url("memory://b/y.png")]
    memory.pipe_file("/b/x.png", b"1")
    found = [manifest(urls)]
    memory.pipe_file("/b/y.png", b"1")
    found.append(manifest(urls))
    memory.pipe_file("/b/y.png", b"2")  # as many bytes, later
    found.append(manifest(urls))
    assert len(set(found)) == 3
    assert manifest(urls) == found[-1]


def test_shards_at_a_url_are_verified_and_discarded(memory):
    shards = ShardSet(Url("memory://store"), Key(RECORD, "digits", 20, 8))
    for number in (0, 2):
        shards.write(number, columns_of(shards, number))
    again = ShardSet(Url("memory://store"), Key(RECORD, "digits", 20, 8))
    assert again.missing() == [1]
    assert_same_bits(again.read(2), columns_of(shards, 2))
    again.present()[0].write_bytes(b"")
    assert [error is None for _, error in again.verify()] == [False, True]
    again.present()[0].unlink()
    assert shards.missing() == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to score: give PATH or --manifest FILE"),
        (["unknown://a/b.png"], "unknown://a/b.png cannot be read now (Protocol not known"),
        (["unknown://b.png", "--num-workers", "1"], "fusenorm: unknown://b.png cannot be read now"),
        (["a.png", "--engine", "ray"], "give --store"),
    ],
)
def test_what_cannot_be_scored_is_one_sentence(home, capsys, arguments, message):
    assert score(home, *arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_without_ray_the_engine_says_how_to_install_it(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    given = [home / "images", "--store", tmp_path / "s", "--csv", tmp_path / "o.csv"]
    assert score(home, *given, "--engine", "ray") == 1
    assert capsys.readouterr().err.endswith("pip install 'fusenorm-openood[ray]'\n")


@pytest.mark.parametrize("before", ["", "simplecache::"])
def test_references_whose_templates_could_run_code_are_refused(tmp_path, before):
    code = "{{ cycler.__init__.__globals__.os.mkdir('%s') }}" % (tmp_path / "ran")
    made = {"key": f"a{code}", "url": "http://a", "dimensions": {"i": [1]}}
    facts = {"version": 1, "gen": [made], "refs": {"a.png": "text"}}
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    url = Url(f"{before}reference://a.png::file://{tmp_path / 'facts.json'}")
    with pytest.raises(PermissionError, match="could run code"):
        url.read_bytes()
    assert not (tmp_path / "ran").exists()
    assert Url("s3://b/reference/a.png").parent == Url("s3://b/reference")
