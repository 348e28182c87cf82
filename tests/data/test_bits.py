"""Pictures of 10 or 12 bits in 16-bit files, and files of several pages."""

import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from fusenorm_openood.data.images import ImageWarning, read_image
from fusenorm_openood.errors import DataError
from tests.data.test_images import png_of


def grey(bits: int) -> np.ndarray:
    """All values of these bits that are 16 bits at most, [64, 64]."""
    return np.linspace(0, 2**bits - 1, 4096).round().astype(np.uint16).reshape(64, 64)


def written(path, values, stated=None, **tags):
    """A 16-bit file, PNG with `sBIT` or TIFF with a maximum, if it is stated."""
    image = Image.fromarray(values)
    if path.suffix == ".tif":
        image.save(path, tiffinfo={} if stated is None else {tags.get("tag", 281): 2**stated - 1})
        return path
    data = BytesIO()
    image.save(data, "PNG")
    png = data.getvalue()
    if stated is not None:
        chunk = b"sBIT" + bytes([stated])
        chunk = struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk))
        png = png[:33] + chunk + png[33:]  # behind the header
    path.write_bytes(png)
    return path


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("bits", [8, 10, 16])
@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("stated", [True, False])
def test_the_bits_that_are_used_become_8(tmp_path, bits, ending, stated):
    values = grey(bits)
    path = written(tmp_path / f"x.{ending}", values, bits if stated else None)
    image = read_image(path, 16 if stated else bits)  # what a file states counts
    np.testing.assert_array_equal(np.asarray(image)[..., 1], values >> (bits - 8))
    with Image.open(path) as file:
        np.testing.assert_array_equal(read_image(file, 16 if stated else bits), image)


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("dark", [False, True])
def test_a_png_that_is_scaled_as_its_standard_says(tmp_path, bits, dark):
    values = (grey(bits) >> (9 if dark else 0)) << (16 - bits)
    image = read_image(written(tmp_path / "x.png", values, bits))
    np.testing.assert_array_equal(np.asarray(image)[..., 0], values >> 8)


def test_other_maxima_of_a_tiff_are_those_of_the_image(tmp_path):
    path = tmp_path / "x.tif"
    Image.fromarray(grey(12)).save(path, tiffinfo={281: 4000})
    with pytest.warns(ImageWarning, match="fit in 12 bits"):
        read_image(path)
    written(path, grey(12), 12, tag=341)
    assert np.asarray(read_image(path)).max() == 255


@pytest.mark.parametrize("bits", [8, 14])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_without_a_number_of_bits_a_warning_says_how_many_are_used(tmp_path, bits, ending):
    path = written(tmp_path / f"x.{ending}", grey(bits))
    with pytest.warns(ImageWarning, match=f"fit in {bits} bits.*--bits"):
        image = read_image(path)
    np.testing.assert_array_equal(np.asarray(image)[..., 0], grey(bits) >> 8)


def test_a_pgm_is_scaled_by_its_own_maximum(tmp_path):
    values = grey(12)
    (tmp_path / "x.pgm").write_bytes(b"P5 64 64 4095\n" + values.astype(">u2").tobytes())
    found = np.asarray(read_image(tmp_path / "x.pgm", 10))[..., 0]
    np.testing.assert_allclose(found, values / 16, atol=1)


def test_black_and_ordinary_pictures_give_no_warning(tmp_path):
    for values in (np.zeros((4, 4), np.uint16), grey(16), grey(15)):
        read_image(written(tmp_path / "x.png", values))


def test_values_above_the_given_bits_are_an_error(tmp_path):
    with pytest.raises(DataError, match="a value of 4095, more than 10 bits hold"):
        read_image(written(tmp_path / "x.png", grey(12)), 10)


def test_16_bit_colour_of_fewer_bits_is_told_or_refused(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(png_of(np.stack([grey(12)] * 3, axis=2)))
    with pytest.warns(ImageWarning, match="fit in 12 bits"):
        read_image(path)
    with pytest.raises(DataError, match="convert it to 8 bit"):
        read_image(path, 12)
    path.write_bytes(png_of(np.stack([grey(16)] * 3, axis=2)))
    assert np.asarray(read_image(path)).max() == 255


@pytest.mark.parametrize("stated", [10, 12, 16])
def test_a_picture_that_is_judged_again_has_the_same_pixels(tmp_path, stated):
    path = written(tmp_path / "x.png", grey(min(stated, 12)), stated)
    with Image.open(path) as file:
        first, again = (np.asarray(read_image(file)) for _ in range(2))
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(first, np.asarray(read_image(path)))


@pytest.mark.parametrize("bits", [12, 16])
def test_white_is_zero_in_some_tiffs(tmp_path, bits):
    values, top = grey(bits), 2**bits - 1
    dark, light = (tmp_path / name for name in ("dark.tif", "light.tif"))
    Image.fromarray(values).save(dark)
    Image.fromarray(top - values).save(light, tiffinfo={262: 0})
    with Image.open(light) as file:
        assert file.tag_v2[262] == 0
    np.testing.assert_array_equal(read_image(light, bits), read_image(dark, bits))


def test_a_page_that_was_chosen_is_read(tmp_path):
    pages = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    with Image.open(tmp_path / "x.tif") as file:
        file.seek(1)
        np.testing.assert_array_equal(read_image(file), pages[1])
