"""`fusenorm score` with a store: files that are damaged, unreadable or changed."""

import csv
import os
import shutil

import pytest

from fusenorm_openood.storage import stored as loading
from fusenorm_openood.storage.maintenance import verify
from tests.scale.commands import ended, log_of, run, start
from tests.scale.test_failures import assert_one_sentence, flip, misname


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


def shard_of(tmp_path, number):
    (path,) = (tmp_path / "store").glob(f"files-*/{number:06d}-*.safetensors")
    return path


@pytest.mark.parametrize("world", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_damaged_scores_of_files_are_reported_and_computed_again(argv, tmp_path, world):
    (first,) = run(tmp_path / "first", argv, shard=8)
    flip(shard_of(tmp_path, 1), None)
    misname(shard_of(tmp_path, 2), None)
    done = run(tmp_path / "again", argv, world, shard=8)
    assert [d.status for d in done] == [0] * world, done
    assert done[0].out == first.out
    assert done[0].err.count("it is computed again\n") == 2
    assert [kind for kind, *_ in log_of(tmp_path / "again")] == ["loaded", "written"] * 2
    assert not any(verify(tmp_path / "store").values())


def test_another_image_detector_setting_or_version_is_computed(argv, images, tmp_path):
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


def impatient():
    loading.WORD, loading.SILENCE = 0.1, 0.5


def test_a_process_does_not_wait_for_ever_for_one_with_other_images(argv, images, tmp_path):
    others = [images / "0001.png" if a == images else a for a in argv]
    running = [
        start(tmp_path, given, rank, 2, shard=8, first=impatient)
        for rank, given in enumerate((argv, others))
    ]
    leader, other = ended(running)
    assert (leader.status, leader.out.count("\n"), other.status) == (0, 31, 0)


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
