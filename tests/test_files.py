import pytest

from fusenorm_openood.errors import ConfigError
from fusenorm_openood.files import check_writable, write_whole


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
