"""`fusenorm fit` and `fusenorm score` on folders of digits, one broken image among them."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusenorm_openood import FuseNorm, load_network
from fusenorm_openood.cli.main import main
from fusenorm_openood.data.lists import read_imagelist


@pytest.fixture(scope="module")
def folders(digits, tmp_path_factory):
    """Folders of images, and a detector that `fusenorm fit` has saved."""
    data_root, checkpoint = digits
    home = tmp_path_factory.mktemp("folders")
    for split in ("val_digits", "test_digits", "test_noise"):
        (home / split).mkdir()
        for name, *_ in read_imagelist(data_root / "benchmark_imglist" / "digits" / f"{split}.txt"):
            source = data_root / "images_digits" / name
            shutil.copy(source, home / split / source.name)
    arguments = ["fit", "--weights", str(checkpoint), "--id-dir", str(home / "val_digits")]
    arguments += ["--calibration-dir", str(home / "test_digits"), "--no-progress"]
    arguments += ["--image-size", "24", "--normalization", "digits"]
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
    from fusenorm_openood.detectors.storage import read_contents

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
    assert accepted == pytest.approx(0.95, abs=0.01)  # of the very images of the calibration
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


def test_rows_are_written_as_they_come(folders, tmp_path):
    """A process that is killed has written the rows of all finished batches."""
    out = tmp_path / "out.csv"
    program = """if True:
        import os, signal, sys
        import fusenorm_openood.cli.score as score
        from fusenorm_openood.cli.main import main
        judge = score.judge_files
        def killed(*args):
            for number, rows in enumerate(judge(*args)):
                if number == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield rows
        score.judge_files = killed
        main(sys.argv[1:])
    """
    arguments = ["score", "--detector", folders / "detector.safetensors", folders / "test_noise"]
    arguments += ["--csv", out, "--batch-size", "8", "--num-workers", "0", "--no-progress"]
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], check=False)
    assert done.returncode == -9
    assert len(rows_of(out)) == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--acceptance", "0.9999"], "needs at least 9999 calibration images"),
        (["--resume"], "give --csv FILE"),
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
    same = ["--calibration-dir", str(folders / "val_digits"), "--image-size", "24"]
    same += ["--normalization", "digits", "--num-workers", "0", "--no-progress"]
    assert main([*given, "--weights", str(checkpoint), *same]) == 1
    assert "are among those that the detector was fitted on" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
    assert main([*given, "--weights", str(checkpoint), *same, "--class-names", "absent.txt"]) == 1
    assert "class names absent.txt cannot be read (No such file" in capsys.readouterr().err
