"""`fusenorm score` with a store: files that are unreadable or changed."""

import csv
import os
import shutil

import pytest

from tests.scale.commands import assert_one_sentence, log_of, run


@pytest.fixture
def images(short, tmp_path):
    """A folder of 30 images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted((short.data / "images_digits" / "test_flower").iterdir())[:30]:
        shutil.copy2(path, folder)
    return folder


@pytest.fixture
def argv(detector, images, tmp_path):
    argv = ["score", "--detector", detector, images, "--store", tmp_path / "store"]
    return [*argv, "--num-workers", 0, "--no-progress", "--device", "cpu"]


def test_a_changed_image_is_computed_again_and_another_acceptance_is_not(argv, images, tmp_path):
    run(tmp_path / "first", argv, shard=8)
    (done,) = run(tmp_path / "same", [*argv, "--acceptance", "0.5"], shard=8)
    assert (done.status, log_of(tmp_path / "same")) == (0, [])
    (images / "0003.png").write_bytes((images / "0004.png").read_bytes())
    (changed,) = run(tmp_path / "changed", argv, shard=8)
    assert len(log_of(tmp_path / "changed")) == 8
    (live,) = run(tmp_path / "live", [a for a in argv if a not in ("--store", tmp_path / "store")])
    assert changed.out == live.out


def test_an_unreadable_image_is_a_row_and_no_failure_of_several_processes(argv, images, tmp_path):
    (images / "0003.png").write_text("no image")
    (one,) = run(tmp_path / "one", argv, shard=8)
    assert one.status == 3
    done = run(tmp_path / "two", argv, 2, shard=8)
    assert [d.status for d in done] == [0, 0], done
    assert done[0].out == one.out
    assert "30 images: " in done[0].err
    assert "1 unreadable" in done[0].err


def test_an_image_that_was_unreadable_for_a_moment_is_read_again(argv, images, tmp_path):
    image = images / "0003.png"
    (live,) = run(tmp_path / "live", [a for a in argv if a not in ("--store", tmp_path / "store")])
    time = image.stat().st_mtime_ns
    content = image.read_bytes()
    image.write_bytes(bytes(len(content)))
    os.utime(image, ns=(time, time))
    (one,) = run(tmp_path / "one", argv, shard=8)
    assert one.status == 3
    image.write_bytes(content)
    os.utime(image, ns=(time, time))
    (two,) = run(tmp_path / "two", argv, shard=8)
    assert two.status == 0
    before, after = (csv.DictReader(done.out.splitlines()) for done in (live, two))
    for row, again in zip(before, after, strict=True):
        conf, conf_again = float(row.pop("confidence")), float(again.pop("confidence"))
        assert (row, conf) == (again, pytest.approx(conf_again))
    assert log_of(tmp_path / "two") == []


def test_several_processes_need_a_store_and_no_standard_input(argv, images, tmp_path):
    for wrong, said in (
        ([a for a in argv if a not in ("--store", tmp_path / "store")], "2 processes meet in a"),
        (
            ["-" if a == images else a for a in argv],
            "2 processes cannot read the same standard input",
        ),
        ([*argv, "--resume", "--csv", tmp_path / "x.csv"], "leave out --resume"),
    ):
        done = run(tmp_path, wrong, 2)
        assert_one_sentence(next((d for d in done if d.status == 1), done), said)
