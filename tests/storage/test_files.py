import subprocess
import sys

import pytest

from fusenorm_openood.errors import ConfigError
from fusenorm_openood.storage.files import alone_in, check_writable, write_whole


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


COUNTER = """
import sys, time
from pathlib import Path
from fusenorm_openood.storage.files import alone_in

folder = Path(sys.argv[1])
with alone_in(folder):
    count = folder.with_suffix(".txt")
    before = int(count.read_text()) if count.exists() else 0
    time.sleep(0.1)
    count.write_text(str(before + 1))
"""


def test_processes_enter_a_folder_one_after_another(tmp_path):
    command = [sys.executable, "-c", COUNTER, str(tmp_path / "new")]
    running = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert (tmp_path / "new.txt").read_text() == "3"


def test_a_folder_that_cannot_be_locked_is_entered(tmp_path):
    (tmp_path / "file").touch()
    entered = []
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with alone_in(folder):
            entered.append(folder)
    assert len(entered) == 2
