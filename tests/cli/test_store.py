import pytest

from fusenorm_openood import __version__
from fusenorm_openood.cli.main import main
from tests.storage.sets import discard, full_set


@pytest.fixture
def store(tmp_path):
    """A store with a set of this version and one of another, which lacks a shard."""
    record = {"version": __version__, "checkpoint": "0123456789" * 5, "postprocessor": "fusenorm"}
    current = full_set(tmp_path, record=record)
    old = full_set(tmp_path, record={"version": "0.0.1"})
    discard(old, 2)
    return tmp_path, current, old


def run(*args):
    return main(["store", *map(str, args)])


def megabytes(*sets):
    files = [path for shards in sets for path in shards.folder.iterdir()]
    return f"{sum(path.stat().st_size for path in files) / 1e6:.2f}"


def test_list_prints_what_each_set_was_computed_with(store, capsys):
    root, current, old = store
    assert run("list", "--store", root) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines if line}
    heading = "postprocessor network checkpoint version rows shards MB"
    assert cells["set"] == heading.split()
    expected = ["fusenorm", "-", "0123456789012345", __version__, "50", "7/7"]
    assert cells[current.folder.name] == [*expected, megabytes(current)]
    assert cells[old.folder.name] == ["-", "-", "-", "0.0.1", "50", "6/7", megabytes(old)]
    assert lines[-1] == f"2 sets, 1 complete, {megabytes(current, old)} MB"


def test_verify_reports_damaged_shards_and_discards_them(store, capsys):
    root, current, _ = store
    assert run("verify", "--store", root) == 0
    assert capsys.readouterr().out == "13 shards read, 0 damaged\n"
    path = current.present()[3]
    path.write_bytes(b"")
    assert run("verify", "--store", root) == 1
    found = capsys.readouterr().out
    assert found == (
        f"{path} is damaged (its checksum is another): delete it\n13 shards read, 1 damaged\n"
    )
    assert current.missing() == []
    assert run("verify", "--store", root, "--discard") == 1
    assert capsys.readouterr().out == found.replace("1 damaged", "1 discarded")
    assert current.missing() == [3]
    assert run("verify", "--store", root) == 0


def test_prune_prints_what_it_removes(store, capsys):
    root, current, old = store
    assert run("prune", "--store", root, "--dry-run") == 0
    planned = capsys.readouterr().out
    assert planned.startswith(
        f"would remove {old.folder} (of version 0.0.1): {megabytes(old)} MB\n"
    )
    assert old.folder.exists()
    assert run("prune", "--store", root) == 0
    assert capsys.readouterr().out == planned.replace("would remove", "removed")
    assert not old.folder.exists()
    discard(current, 0)
    assert run("prune", "--store", root) == 0
    assert current.folder.exists()
    assert run("prune", "--store", root, "--incomplete") == 0
    assert "1 of 7 shards missing" in capsys.readouterr().out
    assert list(root.iterdir()) == []
    assert run("list", "--store", root) == 0
    assert capsys.readouterr().out == f"{root} has no sets of scores\n"


@pytest.mark.parametrize("action", ["list", "verify", "prune"])
def test_a_store_that_does_not_exist_is_one_sentence(tmp_path, monkeypatch, capsys, action):
    monkeypatch.chdir(tmp_path)
    assert run(action) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        "fusenorm: store results/store does not exist: choose another with --store\n"
    )
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []
