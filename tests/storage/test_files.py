import os
import sys
import time

import pytest

from fusenorm_openood.data.paths import manifest_paths
from fusenorm_openood.errors import ConfigError, DataError
from fusenorm_openood.storage.files import alone_in, check_writable, manifest, write_whole
from tests.storage.sets import forked


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    def write_half(path):
        path.write_text("half")
        raise KeyError

    with pytest.raises(KeyError):
        write_whole(tmp_path / "run" / "best.ckpt", write_half)
    assert list((tmp_path / "run").iterdir()) == []
    write_whole(tmp_path / "run" / "best.ckpt", lambda path: path.write_text("whole"))
    assert [p.read_text() for p in (tmp_path / "run").iterdir()] == ["whole"]


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    def write_while_another_writes(path):
        path.write_text("last")
        write_whole(tmp_path / "file", lambda other: other.write_text("first"))
        assert (tmp_path / "file").read_text() == "first"

    write_whole(tmp_path / "file", write_while_another_writes)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["last"]


def test_the_error_for_a_folder_that_is_not_writable_names_the_option(tmp_path):
    check_writable(tmp_path / "new", "--root")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"folder .*file.*is not writable .*choose another with --root"
    ):
        check_writable(tmp_path / "file", "--root")


def test_processes_enter_a_folder_one_after_another(tmp_path):
    count = tmp_path / "count"
    count.write_text("0")

    def add_one():
        with alone_in(tmp_path / "new"):
            before = int(count.read_text())
            time.sleep(0.05)
            count.write_text(str(before + 1))

    for child in [forked(add_one) for _ in range(3)]:
        os.waitpid(child, 0)
    assert count.read_text() == "3"


def test_a_folder_that_cannot_be_locked_is_entered(tmp_path):
    (tmp_path / "file").touch()
    entered = []
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with alone_in(folder):
            entered.append(folder)
    assert len(entered) == 2


def test_without_its_package_a_file_names_the_extra(tmp_path, monkeypatch):
    for name in ("pyarrow", "fsspec", "fsspec.core"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pyarrow.*pip install 'fusenorm-openood\[parquet\]'"):
        manifest_paths(str(tmp_path / "m.parquet"))
    with pytest.raises(DataError, match=r"fsspec: pip install 'fusenorm-openood\[remote\]'"):
        manifest_paths("s3://bucket/m.txt")


def test_a_manifest_depends_on_names_and_versions(tmp_path):
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_text("1")
    found = [manifest(paths), manifest(iter(paths), ["a 0", "b 1"])]
    paths[1].write_text("12")
    found += [manifest(paths), manifest(map(str, paths), ["a 0", "b 1"]), manifest(paths[::-1])]
    paths[1].unlink()
    found += [manifest(paths)]
    assert len(set(found)) == len(found)
