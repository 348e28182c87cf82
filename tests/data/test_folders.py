"""Folders, patterns and lists: every image once, and a word on what is left out."""

import bz2
import gzip
import lzma
import os
import sys
import warnings
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pandas as pd
import pytest

from fusenorm_openood.cli.fit import class_names
from fusenorm_openood.data.paths import image_paths, manifest_paths
from fusenorm_openood.errors import DataError
from fusenorm_openood.storage.urls import Url


def files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def found(folder: Path, *given: object) -> list[str]:
    """What arguments name, relative to a folder."""
    return [os.path.relpath(path, folder) for path in image_paths(map(str, given))]


@pytest.fixture
def linked(tmp_path):
    """A folder of classes: one a folder, one a link, with links back and to each other."""
    files(tmp_path / "disk", "0.png", "1.png")
    files(tmp_path / "set/cat", "2.png")
    (tmp_path / "set/dog").symlink_to(tmp_path / "disk")
    (tmp_path / "set/again").symlink_to(tmp_path / "set/cat")
    (tmp_path / "set/cat/back").symlink_to(tmp_path / "set")
    (tmp_path / "disk/up").symlink_to(tmp_path)
    (tmp_path / "set/twin.png").symlink_to(tmp_path / "set/cat/2.png")
    (tmp_path / "set/own.png").symlink_to(tmp_path / "other.png")
    files(tmp_path, "other.png")
    return tmp_path


@pytest.mark.parametrize("pattern", ["", "**/*.png", "**", "**/**/*.png"])
def test_links_are_followed_once_by_their_real_paths(linked, pattern):
    names = found(linked / "set", linked / "set" / pattern)
    assert sorted(os.path.realpath(linked / "set" / name) for name in names) == [
        str(linked / name) for name in ("disk/0.png", "disk/1.png", "other.png", "set/cat/2.png")
    ]
    assert {"dog/0.png", "dog/1.png", "own.png"} < set(names)


def test_folders_that_overlap_give_each_file_once(linked):
    assert len(found(linked, linked / "set", linked / "disk", linked / "set" / "cat")) == 4
    assert found(linked, linked / "set/*/0.png", linked / "disk") == ["set/dog/0.png", "disk/1.png"]


@pytest.mark.parametrize("link", ["loop", "gone"])
def test_a_link_to_nothing_is_counted(tmp_path, link):
    files(tmp_path, "a.png")
    (tmp_path / link).symlink_to(tmp_path / link if link == "loop" else tmp_path / "absent")
    with pytest.warns(UserWarning, match="left out: 1 broken link"):
        assert found(tmp_path, tmp_path) == ["a.png"]


HIDDEN = ["@eaDir", "__MACOSX", ".thumbnails/x"]


@pytest.mark.parametrize("given", ["", "**/*.png", "*"])
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_copies_are_left_out_with_a_word(tmp_path, given, name):
    files(tmp_path, "c/a.png", f"c/{name}/a.png", f"{name}/a.png", "c/._a.png", "c/.DS_Store")
    with pytest.warns(UserWarning, match=r"left out: \d+ hidden"):
        assert found(tmp_path, tmp_path / given) == ["c/a.png"]


def test_hidden_names_that_are_typed_are_meant(tmp_path):
    files(tmp_path, "@eaDir/a.png", "c/.b/d.png")
    assert found(tmp_path, tmp_path / "@eaDir") == ["@eaDir/a.png"]
    assert found(tmp_path, tmp_path / "**/.b/*.png") == ["c/.b/d.png"]


def test_hidden_folders_are_no_classes(tmp_path):
    files(tmp_path, "cat/a.png", "dog/a.png", ".ipynb_checkpoints/a.png", "@eaDir/a.png")
    assert class_names("folders", [str(tmp_path)]) == ("cat", "dog")


def test_what_is_left_out_is_counted_by_ending_and_folder(tmp_path):
    names = ["a.CR2", "b.cr2", "ct.nii", "in/3f9ac2", "in/1.2.840", "x.png"]
    with pytest.warns(UserWarning, match="left out") as caught:
        assert found(tmp_path, files(tmp_path, *names)) == ["x.png"]
    (said,) = (str(warning.message) for warning in caught)
    assert "left out: 2 .cr2" in said
    assert {"1 .nii", "1 without ending", "1 .840"} < set(said.split(" (")[0].split(", "))
    assert f"{tmp_path}: 3" in said
    assert f"{tmp_path / 'in'}: 2" in said


def test_a_folder_of_other_files_says_which(tmp_path):
    with pytest.raises(DataError, match=r"has no image files.*1 \.nii"):
        image_paths([str(files(tmp_path, "a.nii"))])
    with pytest.raises(DataError, match="no file, folder"):
        image_paths([str(tmp_path / "absent")])


def test_nothing_is_said_where_nothing_is_left_out(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found(tmp_path, files(tmp_path, "a.png", ".DS_Store", "Thumbs.db")) == ["a.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("given", ["s", "s/**/*.png", "s/b/x.png"])
def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, given):
    files(tmp_path, "s/a/0.png", "s/b/1.png")
    (tmp_path / "s/b").chmod(0)
    for folder in (tmp_path, *tmp_path.parents):
        folder.chmod(folder.stat().st_mode | 0o555)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(12345)
            image_paths([str(tmp_path / given)])
        except DataError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    said = os.read(read, 1000).decode()
    assert "cannot be read (Permission denied)" in said
    assert str(tmp_path / "s/b") in said


def test_names_with_brackets_are_themselves(tmp_path):
    files(tmp_path, "a[1]/x[2].png", "a1/x2.png", "a[1]/y.png")
    assert found(tmp_path, tmp_path / "a[1]/x[2].png") == ["a[1]/x[2].png"]
    assert found(tmp_path, tmp_path / "a[1]") == ["a[1]/x[2].png", "a[1]/y.png"]
    assert found(tmp_path, tmp_path / "a[1]/*y*") == ["a[1]/y.png"]
    assert found(tmp_path, tmp_path / "a[12]/*.png") == ["a1/x2.png"]
    (tmp_path / "m[1].csv").write_text("path\na1/x2.png\n")
    assert list(manifest_paths(str(tmp_path / "m[1].csv"))) == [tmp_path / "a1/x2.png"]


def test_a_pattern_of_folders_stands_for_their_images(tmp_path):
    files(tmp_path, "s/a/0.png", "s/b/in/1.png", "s/b/notes.md", "s/2.png")
    with pytest.warns(UserWarning, match=r"1 \.md"):
        assert found(tmp_path, tmp_path / "s/*") == ["s/2.png", "s/a/0.png", "s/b/in/1.png"]


@pytest.fixture
def shots(memory):
    for name in ("a.png", "in/b.jpg", "in/notes.md", "@eaDir/a.png", "x[1].png", "noname"):
        memory.pipe_file(f"/shots/{name}", b"x")
    return memory


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("memory://shots", ["a.png", "in/b.jpg", "x[1].png"]),
        ("memory://shots/", ["a.png", "in/b.jpg", "x[1].png"]),
        ("memory://shots/*.png", ["a.png", "x[1].png"]),
        ("memory://shots/**/*.jpg", ["in/b.jpg"]),
        ("memory://shots/x[1].png", ["x[1].png"]),
        ("memory://shots/noname", ["noname"]),
        ("memory://shots/absent", ["absent"]),  # a row that says so
    ],
)
@pytest.mark.filterwarnings("ignore:left out")
def test_folders_and_patterns_at_urls(shots, given, expected):
    names = [str(path).replace("memory:///", "memory://") for path in image_paths([given])]
    assert names == [f"memory://shots/{name}" for name in expected]


@pytest.mark.filterwarnings("ignore:left out")
def test_the_root_of_a_file_system(shots):
    shots.pipe_file("/list.txt", b"top.png\n")
    names = ["shots/a.png", "shots/in/b.jpg", "shots/x[1].png"]
    assert list(image_paths(["memory://"])) == [Url(f"memory:///{name}") for name in names]
    for root in ("memory://", "memory:///"):
        assert list(image_paths([f"{root}list.txt"])) == [Url("memory:///top.png")]


def test_lists_that_are_absent_or_without_paths_are_one_sentence(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        manifest_paths(str(tmp_path / "m.csv"))
    pd.DataFrame({"file": ["a.png"], "label": [3]}).to_parquet(tmp_path / "m.parquet")
    with pytest.raises(
        DataError, match=r"column 'path' of strings \(found: file, label\): add it$"
    ):
        manifest_paths(str(tmp_path / "m.parquet"))


def test_a_pattern_at_a_url_without_files(shots):
    with pytest.raises(DataError, match=r"pattern memory://shots/\*\.tif matches no file"):
        image_paths(["memory://shots/*.tif"])
    query = "https://host/image?id=3&size=[2]"
    assert list(image_paths([query])) == [Url(query)]


LISTS = {
    "m.tsv": b"size\tpath\n1\tin/a b.png\n",
    "m.csv.gz": gzip.compress(b"path\nin/a b.png\n", mtime=0),
    "m.txt.xz": lzma.compress(b"in/a b.png 3\n"),
    "m.jsonl": b'{"path": "in/a b.png", "label": 3}\n\n',
    "m.JSONL.gz": gzip.compress(b'{"path": "in/a b.png"}\n', mtime=0),
    "m.ndjson": '{"path": "in/a b.png", "caption": "\u2028 \x85"}\r\n'.encode(),
    "m.csv": b"path,label\nin/a b.png,3\n",
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("read", [manifest_paths, lambda given: image_paths([given])])
def test_lists_of_all_kinds_are_read(tmp_path, name, read):
    (tmp_path / name).write_bytes(LISTS[name])
    assert list(read(str(tmp_path / name))) == [tmp_path / "in/a b.png"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.json", b'[\n"a.png"\n]', "must be text, CSV, TSV, JSON Lines or Parquet"),
        ("m.csv.gz", b"path\na.png\n", "cannot be read"),
        ("m.csv.gz", gzip.compress(b"path\na.png\n" * 99, mtime=0)[:-20], "is damaged"),
        ("m.csv.bz2", bz2.compress(b"path\na.png\n" * 99)[:-20], "is damaged"),
        ("m.jsonl", b'{"file": "a.png"}\n', "must have a column 'path'"),
        ("m.jsonl", b'{"path": 3}\n', "must have a column 'path'"),
        ("m.tsv", b"path,label\n", "must have a column 'path'"),
        ("m.parquet", b"PAR1", "must have a column 'path'"),
        ("m.txt", b"\n\n", "lists no files"),
        ("m.txt", b"\xff\xfe", "must be in UTF-8"),
    ],
)
def test_other_lists_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} {message}"):
        manifest_paths(str(tmp_path / name))


def test_names_on_standard_input_need_not_be_utf8(monkeypatch):
    given = TextIOWrapper(BytesIO(b"caf\xe9.png\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", given)
    assert [os.fsencode(str(path)) for path in image_paths(["-"])] == [b"caf\xe9.png"]
