"""Truncated and unreadable images: found before any work, and read as in OpenOOD."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, UnidentifiedImageError

from fusenorm_openood.cli.inputs import check_readable
from fusenorm_openood.data.benchmarks import ImageSet
from fusenorm_openood.data.images import TruncatedImageWarning, find_fault, read_image, to_rgb
from fusenorm_openood.data.lists import ImageList
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


MODES = {
    "png": ("1", "L", "P", "RGB", "RGBA", "LA"),
    "tiff": ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr"),
}


@pytest.mark.parametrize(("kind", "mode"), [(k, mode) for k in MODES for mode in MODES[k]])
def test_8_bit_images_are_what_pil_makes_of_them(folder, kind, mode):
    path = folder[0] / f"8.{kind}"
    image = Image.open(folder[0] / "whole.png").convert(mode)
    image.save(path)
    expected = Image.open(path)
    assert expected.mode == mode
    assert read_image(path).mode == "RGB"
    np.testing.assert_array_equal(read_image(path), expected.convert("RGB"))


RAMP = np.arange(0, 65536, 64).reshape(32, 32)


def test_16_bit_images_that_pil_opens_with_32_are_scaled_too(folder):
    """Old releases of PIL open a 16-bit PNG in mode I."""
    image = Image.fromarray(RAMP.astype(np.int32))
    image.format = "PNG"
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[..., 0], RAMP >> 8)


def test_a_16_bit_colour_image_is_read_as_by_pil(folder):
    colour = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=2)
    path = folder[0] / "colour.png"
    path.write_bytes(png_of(colour))
    np.testing.assert_array_equal(read_image(path), colour >> 8)
    np.testing.assert_array_equal(read_image(path), Image.open(path).convert("RGB"))


def png_of(colour):
    """A PNG file with 16 bits per channel, which PIL does not write."""

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", colour.shape[1], colour.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colour)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "floating-point"), ("int32", "integer")])
def test_images_of_unknown_range_are_refused(folder, dtype, kind):
    home = folder[0]
    Image.fromarray((RAMP / 65536).astype(dtype)).save(home / "f.tif")
    (home / "list.txt").write_text("whole.png 0\nf.tif 0\n")
    fault = f"its pixels are {kind} numbers of unknown range: convert it to 8 bit"
    fault += ", or fit with --dtype float32 and --range"
    assert find_fault(home / "f.tif") == fault
    with pytest.raises(DataError, match=rf"list\.txt, line 2: image .*f\.tif .* \({fault}\)"):
        ImageList(home / "list.txt", home, lambda image: image)[1]


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_images_that_are_too_large_are_refused(folder, kind, monkeypatch):
    home = folder[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (home / "list.txt").write_text(f"whole.{kind} 0\n")
    fault = "it has more than the 200 pixels that PIL reads: make it smaller"
    assert find_fault(home / f"whole.{kind}") == fault
    with pytest.raises(DataError, match=rf"line 1: image .*whole\.{kind} .* \({fault}\)"):
        ImageList(home / "list.txt", home, lambda image: image)[0]


def test_all_faults_of_all_lists_are_reported_at_once(folder, caplog):
    home, cut = folder
    cut("png", 0.9)
    cut("jpg", 0.01)
    (home / "list.txt").write_text("whole.png 0\ncut.png 1\ncut.jpg 2\nwhole.jpg 3\n")
    (home / "other.txt").write_text("gone.png 0\ncut.png 0\n")
    image_sets = [ImageSet(home / name, home, lambda image: image) for name in ("list.txt",)]
    with pytest.raises(DataError) as error:
        check_readable([*image_sets, ImageSet(home / "other.txt", home, lambda image: image)])
    warning = caplog.text
    assert "2 truncated image(s)" in warning
    assert f"list.txt, line 2: image {home / 'cut.png'}" in warning
    assert f"other.txt, line 2: image {home / 'cut.png'}" in warning
    assert "2 image(s) cannot be read" in str(error.value)
    assert f"list.txt, line 3: image {home / 'cut.jpg'}" in str(error.value)
    assert f"other.txt, line 1: image {home / 'gone.png'} (missing)" in str(error.value)


def test_images_are_opened_once_per_store_until_they_change(folder, caplog):
    home, cut = folder
    path = cut("png", 0.9)
    (home / "list.txt").write_text("whole.png 0\n\ncut.png 1\n")
    image_sets = [ImageSet(home / "list.txt", home, lambda image: image)]
    content, known = path.read_bytes(), path.stat()

    def replace(content, time):
        path.write_bytes(content)
        os.utime(path, ns=(time, time))

    check_readable(image_sets, home / "store")
    replace(bytes(len(content)), known.st_mtime_ns)  # seen by who opens it only
    caplog.clear()
    check_readable(image_sets, home / "store")
    assert f"list.txt, line 3: image {path}" in caplog.text
    with pytest.raises(DataError, match=r"line 3: image .*cut\.png"):
        check_readable(image_sets, home / "other")
    replace(content, known.st_mtime_ns)  # what cannot be read may become readable as it is
    check_readable(image_sets, home / "other")
    replace(bytes(len(content)), known.st_mtime_ns + 10**9)
    with pytest.raises(DataError, match=r"line 3: image .*cut\.png"):
        check_readable(image_sets, home / "store")


def test_a_postscript_program_is_no_image_whatever_its_name(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path, "EPS")
    with pytest.raises(UnidentifiedImageError):
        read_image(path)
