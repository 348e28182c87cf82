"""`fusenorm fit` and `fusenorm score` on folders of digits, one broken image among them."""

import csv
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from fusenorm_openood import FuseNorm, load_network
from fusenorm_openood.cli.main import main
from fusenorm_openood.data.images import TruncatedImageWarning
from fusenorm_openood.data.lists import read_imagelist
from fusenorm_openood.deployment.files import judge_files, judged
from fusenorm_openood.deployment.files import score as scores_of
from fusenorm_openood.deployment.rows import read_rows

FIT, CALIBRATION, NOISE = 100, 60, 40  # images


@pytest.fixture(scope="module")
def folders(digits, tmp_path_factory):
    """Folders of images, and a detector that `fusenorm fit` has saved."""
    data_root, checkpoint = digits
    home = tmp_path_factory.mktemp("folders")
    splits = {"val_digits": FIT, "test_digits": CALIBRATION, "test_noise": NOISE}
    for split, count in splits.items():
        (home / split).mkdir()
        listed = read_imagelist(data_root / "benchmark_imglist" / "digits" / f"{split}.txt")
        for name, *_ in listed[:count]:
            source = data_root / "images_digits" / name
            shutil.copy(source, home / split / source.name)
    arguments = ["fit", "--weights", str(checkpoint), "--id-dir", str(home / "val_digits")]
    arguments += ["--calibration-dir", str(home / "test_digits"), "--no-progress"]
    arguments += ["--num-workers", "0", "--image-size", "24", "--normalization", "digits"]
    assert main([*arguments, "--output", str(home / "detector.safetensors")]) == 0
    return home


def score(folders, *arguments) -> int:
    detector = str(folders / "detector.safetensors")
    options = ["--num-workers", "0", "--no-progress"]
    return main(["score", "--detector", detector, *map(str, arguments), *options])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_have_what_the_detector_says(folders, tmp_path):
    out = tmp_path / "out.csv"
    assert score(folders, folders / "test_noise", "--csv", out) == 0
    rows = rows_of(out)
    detector = FuseNorm.load(folders / "detector.safetensors", load_source(folders))
    assert len(rows) == len(list((folders / "test_noise").iterdir()))
    for row in rows[:5]:
        assert float(row["confidence"]) == pytest.approx(float(detector.score(row["path"])), 1e-4)
        assert row["ood"] == str(bool(detector.is_ood(row["path"])))
        with Image.open(row["path"]) as image:
            assert float(row["p_value"]) == pytest.approx(float(detector.p_values(image)))
        assert row["objected"] == detector.explain(row["path"]).objected[0]
    assert np.mean([row["ood"] == "True" for row in rows]) > 0.9


def load_source(folders):
    from fusenorm_openood.storage.detector_file import read_contents

    return load_network(read_contents(folders / "detector.safetensors").record["source"]["weights"])


def test_an_unreadable_image_is_a_row_with_the_reason(folders, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    shutil.copytree(folders / "test_digits", mixed)
    (mixed / "0001b.png").write_text("no image")
    assert score(folders, mixed) == 3
    out = capsys.readouterr()
    rows = list(csv.DictReader(out.out.splitlines()))
    broken = [row for row in rows if row["error"]]
    assert [Path(row["path"]).name for row in broken] == ["0001b.png"]
    assert "cannot be read" in broken[0]["error"]
    assert broken[0]["confidence"] == broken[0]["ood"] == ""
    accepted = np.mean([row["ood"] == "False" for row in rows if not row["error"]])
    assert accepted == pytest.approx(0.95, abs=0.02)  # of the very images of the calibration
    assert "1 unreadable" in out.err


def test_a_run_that_was_cut_goes_on(folders, tmp_path, capsys):
    whole, cut = tmp_path / "whole.csv", tmp_path / "cut.csv"
    assert score(folders, folders / "test_noise", "--csv", whole) == 0
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[:20]) + lines[20][:30])
    assert score(folders, folders / "test_noise", "--csv", cut, "--resume") == 0
    assert "19 judged before" in capsys.readouterr().err
    assert [row["path"] for row in rows_of(cut)] == [row["path"] for row in rows_of(whole)]
    assert score(folders, folders / "test_noise", "--csv", cut, "--resume") == 0
    assert len(rows_of(cut)) == len(rows_of(whole))


def test_rows_are_written_as_they_come(folders, tmp_path, monkeypatch):
    """While a batch is judged, the rows of all before it are in the file."""
    out, written = tmp_path / "out.csv", []

    def watched(*args):
        for rows in judge_files(*args):
            written.append(len(rows_of(out)))
            yield rows

    monkeypatch.setattr("fusenorm_openood.cli.score.judge_files", watched)
    assert score(folders, folders / "test_noise", "--csv", out, "--batch-size", 8) == 0
    assert written == [0, 8, 16, 24, 32]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--acceptance", "0.9999"], "needs at least 9999 calibration images"),
        (["--resume"], "give --csv FILE"),
        (["--fdr", "0.1"], "for which it needs a file: --csv"),
        (["--report", "a.html"], "--report is about the rows of a file: give --csv FILE"),
        (["--csv", "/dev/full"], "cannot be written (No space left on device)"),
        (["--csv", "absent/folder.csv"], "give another file to --csv"),
        (["--weights", "absent.ckpt"], "absent.ckpt not found"),
    ],
)
def test_errors_of_score(folders, capsys, arguments, message):
    assert score(folders, folders / "test_noise", *arguments) == 1
    assert message in capsys.readouterr().err


def test_errors_of_fit(folders, digits, tmp_path, capsys):
    _, checkpoint = digits
    given = ["fit", "--id-dir", str(folders / "val_digits"), "--output", str(tmp_path / "d")]
    assert main(given) == 1
    assert "give --weights FILE, --network SPEC, or both" in capsys.readouterr().err
    assert main([*given, "--weights", str(checkpoint)]) == 1
    assert "declares no preprocessing: give --image-size" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
    known = ["--image-size", "24", "--normalization", "digits", "--class-names", "absent.txt"]
    assert main([*given, "--weights", str(checkpoint), *known]) == 1
    assert "class names absent.txt cannot be read (No such file" in capsys.readouterr().err


def test_parquet_holds_the_rows_of_the_csv(folders, tmp_path):
    given, tables = tmp_path / "given", [tmp_path / "out.csv", tmp_path / "out.parquet"]
    shutil.copytree(folders / "test_noise", given)
    (given / "broken.png").write_text("no image")
    for table in tables:
        assert score(folders, given, "--csv", table) == 3
    assert list(read_rows(tables[1])) == list(read_rows(tables[0]))
    assert {path.name for path in tmp_path.iterdir()} == {"given", "out.csv", "out.parquet"}


def test_the_false_discovery_rate_is_that_of_all_rows(folders, tmp_path, capsys):
    """Benjamini and Hochberg's procedure by hand, also over the rows of an earlier run."""
    out, together = tmp_path / "out.csv", [folders / "test_noise", folders / "test_digits"]
    assert score(folders, together[0], "--csv", out) == 0
    assert score(folders, *together, "--csv", out, "--fdr", "0.1", "--resume") == 0
    rows = list(read_rows(out))
    p = np.array([row.p_value for row in rows])
    ranks = np.arange(1, len(p) + 1)
    largest = np.flatnonzero(np.sort(p) <= 0.1 * ranks / len(p)).max()
    assert [row.ood for row in rows] == (p <= np.sort(p)[largest]).tolist()
    assert sum(row.ood for row in rows) > 0.9 * NOISE
    assert score(folders, together[1], "--csv", out, "--fdr", "0.0001") == 0
    assert not any(row.ood for row in read_rows(out))
    assert "calibration images give no p-value below" in capsys.readouterr().err


def test_another_acceptance_changes_the_rows_of_an_earlier_run(folders, tmp_path):
    out, image = tmp_path / "out.csv", folders / "test_digits"
    assert score(folders, image, "--csv", out, "--acceptance", "0.6") == 0
    rejected = sum(row.ood for row in read_rows(out))
    assert score(folders, image, "--csv", out, "--resume", "--acceptance", "0.95") == 0
    assert 0 < sum(row.ood for row in read_rows(out)) < rejected


def test_rows_of_another_detector_are_not_mixed_with(folders, tmp_path, capsys):
    out = tmp_path / "out.csv"
    assert score(folders, folders / "test_noise", "--csv", out) == 0
    lines = out.read_text().splitlines(keepends=True)
    path, predicted, confidence, *rest = lines[3].split(",")
    lines[3] = ",".join([path, predicted, str(2 * float(confidence)), *rest])
    out.write_text("".join(lines[:4]))
    assert score(folders, folders / "test_noise", "--csv", out, "--resume") == 1
    assert "give another file to --csv, or the detector" in capsys.readouterr().err
    assert out.read_text() == "".join(lines[:4])


def test_class_names_from_folders(folders, digits, tmp_path, capsys):
    _, checkpoint = digits
    sorted_into = tmp_path / "sorted"
    for number, path in enumerate(sorted((folders / "val_digits").iterdir())):
        folder = sorted_into / f"digit {number % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    given = ["fit", "--weights", checkpoint, "--image-size", "24", "--normalization", "digits"]
    given += ["--output", tmp_path / "d", "--num-workers", "0", "--no-progress"]
    given = [*map(str, given), "--class-names", "folders", "--id-dir"]
    assert main([*given, str(sorted_into)]) == 0
    net = load_network(checkpoint)
    assert FuseNorm.load(tmp_path / "d", net).class_names == tuple(f"digit {n}" for n in range(7))
    assert main([*given, str(folders / "val_digits")]) == 1
    assert "needs one folder per class in --id-dir" in capsys.readouterr().err


def test_rows_on_a_device_are_not_read_back(folders, capsys):
    assert score(folders, folders / "test_noise", "--csv", os.devnull) == 0
    assert " images: " in capsys.readouterr().err


def test_a_report_about_the_rows(folders, tmp_path):
    table, page, part = tmp_path / "out.parquet", tmp_path / "out.html", tmp_path / "part.jpg"
    Image.fromarray(np.zeros((99, 99, 3), np.uint8)).save(part)
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.warns(TruncatedImageWarning) as said:  # once, not for its picture again
        assert score(folders, folders / "test_noise", part, "--csv", table, "--report", page) == 0
    assert [w.category for w in said].count(TruncatedImageWarning) == 1
    text = undated(page)
    rejected = sum(row.ood for row in read_rows(table))
    assert f"{rejected:,}" in text
    again = tmp_path / "again.html"
    arguments = ["report", "--detector", folders / "detector.safetensors", "--csv", table]
    assert main([*map(str, arguments), "--output", str(again)]) == 0
    assert undated(again) == text


@pytest.fixture(scope="module")
def by_class(folders):
    """The file of the detector, calibrated by predicted class by the command."""
    new = folders / "by_class.safetensors"
    arguments = ["--detector", folders / "detector.safetensors", "--output", new, "--least", 9]
    assert calibrate(folders / "test_digits", *arguments, "--calibrate-by", "predicted") == 0
    return new


def calibrate(images, *arguments) -> int:
    options = ["--num-workers", "0", "--no-progress", "--calibration-dir", images]
    return main(["calibrate", *map(str, (*arguments, *options))])


def test_rows_and_report_by_predicted_class(folders, by_class, tmp_path):
    table, page = tmp_path / "out.csv", tmp_path / "out.html"
    arguments = ["score", "--detector", by_class, folders / "test_noise", folders / "val_digits"]
    arguments += ["--acceptance", "0.9", "--csv", table, "--report", page, "--num-workers", "0"]
    assert main([*map(str, arguments), "--no-progress"]) == 0
    detector = FuseNorm.load(by_class, load_source(folders))
    rows = list(read_rows(table))
    for row in rows[::7]:
        assert row.p_value == pytest.approx(float(detector.p_values(row.path)))
        assert row.ood == bool(detector.is_ood(row.path, 0.9))
    assert "Accepted share by predicted class" in page.read_text(encoding="utf-8")
    for row in rows:  # the group is in the row
        cell = detector.calibration_.cell(int(row.predicted))
        assert row.p_value == pytest.approx((1 + (cell <= row.confidence).sum()) / (1 + len(cell)))


def test_classes_of_a_file_are_named_and_nothing_else_changes(folders, by_class, tmp_path, capsys):
    new, names = tmp_path / "new.safetensors", tmp_path / "names.txt"
    names.write_text("a\nb\nc\nd\ne\nf\ng\n")
    arguments = ["calibrate", "--detector", by_class, "--output", new, "--class-names"]
    assert main([*map(str, arguments), str(names)]) == 0
    found, before = (FuseNorm.load(path, load_source(folders)) for path in (new, by_class))
    assert found.class_names == (*"abcdefg",)
    assert str(found.calibration_) == str(before.calibration_)
    assert found.threshold(0.8, "b") == before.threshold(0.8, 1)
    for wrong, message in (
        ([names, "--least", 5], "no images to calibrate on: give --calibration-dir"),
        (["folders"], "needs one folder per class in --calibration-dir"),
        ([folders / "detector.safetensors"], "cannot be read"),
    ):
        assert main([*map(str, (*arguments, *wrong))]) == 1
        assert message in capsys.readouterr().err
    names.write_text("a\nb\n")
    assert main([*map(str, arguments), str(names)]) == 1
    assert "class_names must be the names of 7 classes, got 2" in capsys.readouterr().err


def test_calibrations_of_a_file_are_merged(folders, by_class, tmp_path, capsys):
    new, images = tmp_path / "new.safetensors", folders / "val_digits"
    assert calibrate(images, "--detector", by_class, "--output", new) == 1
    assert "are among those that the detector is fitted on" in capsys.readouterr().err
    assert not new.exists()
    some = tmp_path / "some"
    some.mkdir()
    for path in sorted((folders / "test_noise").iterdir())[:7]:
        shutil.copy(path, some)
    merge = ["--detector", by_class, "--output", new, "--merge", "--newest", "30"]
    with pytest.warns(UserWarning, match="are pooled|groups by") as caught:
        assert calibrate(some, *merge) == 0
    assert all(Path(w.filename).parent.name == "cli" for w in caught)  # shown in one sentence
    assert "calibrated on 30 images" in capsys.readouterr().out
    found = FuseNorm.load(new, load_source(folders)).calibration_
    assert (found.by, found.least) == ("predicted", 9)
    given = [(23, str(folders / "test_digits")), (7, str(some))]
    assert [tuple(call[1:]) for call in found.history] == given
    assert calibrate(some, *merge[:4], "--calibrate-by", "all") == 0
    assert FuseNorm.load(new, load_source(folders)).calibration_.by is None


def undated(page: Path) -> str:
    return re.sub(r"\d\d \w+ 20\d\d, \d\d:\d\d", "", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_of_images_that_leave_early(folders, tmp_path, suffix, capsys):
    images = folders / "test_noise", folders / "test_digits", "--acceptance", "0.8"
    tables = [tmp_path / f"{name}{suffix}" for name in ("whole", "certain", "spending")]
    for table, option in zip(tables, ([], ["--early"], ["--early-spending"]), strict=True):
        assert score(folders, *images, "--csv", table, *option) == 0
    whole, certain, spending = (list(read_rows(table)) for table in tables)
    left = [row for row in certain if row.predicted is None]
    assert 0 < len(left) <= len([row for row in spending if row.predicted is None]) < len(whole)
    for row, early in zip(whole, certain, strict=True):
        assert (early.path, early.ood) == (row.path, row.ood)
        if early.predicted is None:
            assert early.objected.startswith("layer")
            assert row.confidence <= early.bound
            assert early.confidence is early.p_value is None
        else:
            assert early[2:4] == pytest.approx(row[2:4], rel=1e-4)
            assert (early.predicted, early.objected) == (row.predicted, row.objected)
    assert all(row.ood and row.bound is None for row in spending if row.predicted is None)
    # at the end, each has a quarter of the error
    at_the_end = [row.ood == (row.p_value <= 0.05) for row in spending if row.predicted]
    assert all(at_the_end)
    assert score(folders, *images, "--early", "--csv", tables[1], "--resume") == 1
    assert "leave out" in capsys.readouterr().err
    detector = "--detector", str(folders / "detector.safetensors")
    for table in map(str, tables[1:]):  # their rows have no confidences
        assert main(["report", *detector, "--csv", table, "--output", f"{table}.html"]) == 1
        assert "without --early" in capsys.readouterr().err
        assert main(["watch", *detector, "--scores", table]) == 1
        assert "without --early" in capsys.readouterr().err


def test_progress_of_stored_scores_is_by_batch(folders, tmp_path, monkeypatch):
    counts, update = [], tqdm.update

    def counted(bar, n):
        counts.extend([] if bar.disable else [n])
        update(bar, n)

    monkeypatch.setattr(tqdm, "update", counted)
    for table in ("a.csv", "b.csv"):  # the second from the store
        arguments = ["score", "--detector", folders / "detector.safetensors", "--batch-size", 16]
        arguments += [folders / "test_noise", "--store", tmp_path / "store", "--num-workers", 0]
        assert main([*map(str, (*arguments, "--csv", tmp_path / table))]) == 0
    assert sorted(counts) == [13, 13, 14]


def test_what_no_image_can_be_judged_with_is_refused_before_a_file_is_made(
    folders, tmp_path, capsys
):
    table, noise = tmp_path / "rows.csv", folders / "test_noise"
    assert score(folders, noise, "--csv", table, "--early-spending") == 1
    assert "early='spending' judges 4 times" in capsys.readouterr().err
    detector = FuseNorm.load(folders / "detector.safetensors", load_source(folders))
    images = torch.stack([*map(detector.preprocessing.read, sorted(noise.iterdir()))])
    detector.calibrate([{"image": images, "camera": ["left"] * NOISE}], by="camera")
    detector.save(tmp_path / "by_camera.safetensors")
    arguments = ["score", "--detector", tmp_path / "by_camera.safetensors", noise, "--csv", table]
    assert main([*map(str, arguments)]) == 1
    assert "grouped by camera, which image files do not give" in capsys.readouterr().err
    assert not table.exists()


def test_early_rows_beside_images_that_are_not_finite(folders):
    detector = FuseNorm.load(folders / "detector.safetensors", load_source(folders))
    noise = detector.preprocessing.read(sorted((folders / "test_noise").iterdir())[0])
    broken = torch.full_like(noise, torch.nan)
    columns = scores_of(detector, [noise, "no image", broken, noise], 0.8, "certain")
    rows = judged(detector, "abcd", columns, 0.8)
    assert [row.error is None for row in rows] == [True, False, False, True]
    assert rows[0][1:] == rows[3][1:]
    assert rows[0].ood
