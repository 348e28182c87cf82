"""Truncated and unreadable images: found before any work, and read as in OpenOOD."""

import warnings

import numpy as np
import pytest
from PIL import Image, ImageFile

from fusenorm_openood.cli.inputs import check_readable
from fusenorm_openood.data.benchmarks import ImageSet
from fusenorm_openood.data.images import TruncatedImageWarning, find_fault, read_image
from fusenorm_openood.errors import DataError

FORMATS = ["jpg", "png", "bmp", "gif", "tiff", "webp"]


@pytest.fixture
def folder(tmp_path):
    """One noise image in each format, and a function that cuts one short."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for kind in FORMATS:
        Image.fromarray(noise).save(tmp_path / f"whole.{kind}")

    def cut(kind, kept):
        whole = (tmp_path / f"whole.{kind}").read_bytes()
        path = tmp_path / f"cut.{kind}"
        path.write_bytes(whole[: int(kept * len(whole))])
        return path

    return tmp_path, cut


@pytest.mark.parametrize("kind", FORMATS)
def test_intact_images_have_no_fault(folder, kind):
    path = folder[0] / f"whole.{kind}"
    assert find_fault(path) is None
    path.write_bytes(path.read_bytes() + bytes(100))  # some programs append data
    assert find_fault(path) is None


@pytest.mark.parametrize("kind", ["jpg", "png", "bmp", "gif", "tiff"])
@pytest.mark.parametrize("flag", [False, True])
def test_truncated_images_are_found_and_read_with_a_warning(folder, kind, flag, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", flag)  # True after `import openood`
    path = folder[1](kind, 0.9)
    assert find_fault(path) == "truncated"
    with pytest.warns(TruncatedImageWarning, match=f"cut.{kind} is truncated"):
        image = read_image(path)
    assert flag == ImageFile.LOAD_TRUNCATED_IMAGES
    whole = np.asarray(Image.open(folder[0] / f"whole.{kind}").convert("RGB"))
    rows = slice(24, 32) if kind == "bmp" else slice(0, 8)  # BMP starts with the last row
    np.testing.assert_array_equal(np.asarray(image)[rows], whole[rows])


def test_unreadable_images_are_found(folder, tmp_path):
    assert find_fault(tmp_path / "nowhere.png") == "missing"
    assert "cannot identify" in find_fault(folder[1]("png", 0))
    assert "decoder" in find_fault(folder[1]("webp", 0.5))
    (tmp_path / "text.png").write_text("no image")
    assert "cannot identify" in find_fault(tmp_path / "text.png")


def test_all_faults_of_all_lists_are_reported_at_once(folder, capsys):
    home, cut = folder
    cut("png", 0.9)
    cut("jpg", 0.01)
    (home / "list.txt").write_text("whole.png 0\ncut.png 1\ncut.jpg 2\nwhole.jpg 3\n")
    (home / "other.txt").write_text("gone.png 0\ncut.png 0\n")
    image_sets = [ImageSet(home / name, home, lambda image: image) for name in ("list.txt",)]
    with pytest.raises(DataError) as error:
        check_readable([*image_sets, ImageSet(home / "other.txt", home, lambda image: image)])
    warning = capsys.readouterr().err
    assert "2 truncated image(s)" in warning
    assert f"list.txt, line 2: image {home / 'cut.png'}" in warning
    assert f"other.txt, line 2: image {home / 'cut.png'}" in warning
    assert "2 image(s) cannot be read" in str(error.value)
    assert f"list.txt, line 3: image {home / 'cut.jpg'}" in str(error.value)
    assert f"other.txt, line 1: image {home / 'gone.png'} (missing)" in str(error.value)


def test_intact_lists_give_no_warning(folder, capsys):
    home, _ = folder
    (home / "list.txt").write_text("".join(f"whole.{kind} 0\n" for kind in FORMATS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_readable([ImageSet(home / "list.txt", home, lambda image: image)])
    assert capsys.readouterr() == ("", "")
