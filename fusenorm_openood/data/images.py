"""Image files: read as in OpenOOD, and checked without decoding those that look complete."""

import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from fusenorm_openood.errors import DataError, RemoteError
from fusenorm_openood.storage.urls import Place, Url, split_page

# What PIL raises for a file that it cannot decode; UnidentifiedImageError is an OSError.
BOMB = Image.DecompressionBombError
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, RuntimeError, EOFError, BOMB),
    *(MemoryError, AttributeError, LookupError, TypeError, ArithmeticError, struct.error),
)
# Endings of files that `pixels` reads, and PIL does not, with the package that is needed.
OTHERS = {".npy": "numpy", ".dcm": "pydicom", ".dicom": "pydicom"}
# First and last bytes of files in the usual formats.
_ENDS = ((b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG", b"IEND\xae\x42\x60\x82"))
# Keys of `info` for what PIL knows of a file until it is decoded, and what is asked again later.
_DEEP, _SBIT = "16-bit colour", "sBIT"
LOW_BITS = "PIL drops the low bits of 16-bit colour"
_flag = RLock()  # held by a thread while it changes PIL's flag


class ImageWarning(UserWarning):
    """An image of which something else was read than one might think."""


class TruncatedImageWarning(ImageWarning):
    """A truncated image file was read with its missing rows filled with grey."""


def read_image(given: Place | Image.Image, bits: int | None = None) -> Image.Image:
    """An image file, or a PIL image, which stays as it is, in RGB with 8 bits per channel.

    PIL takes the higher 8 bits of 16-bit colour images; so do we of 16-bit greyscale images, which
    PIL, and so OpenOOD, saturates instead; for 10 or 12 bits see `used_bits`. An `ImageWarning` for
    several pages, the first of which is read unless the name says which; `TruncatedImageWarning`
    for a truncated file, which is read as in OpenOOD, with its missing rows filled with grey.
    FileNotFoundError or another of `UNREADABLE` if it cannot be read, DataError for pixels with 32
    bits, with more than `bits`, or of low bits that PIL drops, RemoteError for a URL.
    """
    try:
        with truncated_images(read=False), opened(given) as file:
            return _one_page(file, given, bits)
    except (FileNotFoundError, BOMB, DataError, RemoteError):
        raise
    except UNREADABLE:
        with truncated_images(read=True), opened(given) as file:
            image = _one_page(file, given, bits)
        warnings.warn(
            f"{_called(given)} is truncated: its missing rows are filled with grey, as in OpenOOD",
            TruncatedImageWarning,
            stacklevel=2,
        )
        return image


def _called(given: Place | Image.Image) -> str:
    return "the image" if isinstance(given, Image.Image) else f"image {given}"


def opened(given: Place | Image.Image) -> AbstractContextManager[Image.Image]:
    """A PIL image, or that of a file, at the page that its name says."""
    if isinstance(given, Image.Image):
        return nullcontext(given)
    given, page = split_page(given)
    image = Image.open(Downloaded(given) if isinstance(given, Url) else given, formats=formats())
    if page:
        image.seek(page - 1)
    return image


@cache
def formats() -> tuple[str, ...]:
    """PIL's formats but EPS, a program that PIL has Ghostscript run, whatever the file's name."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    return tuple(name for name in Image.OPEN if name != "EPS")


class Downloaded(BytesIO):
    """The bytes of a URL, which PIL's messages call by it."""

    def __init__(self, url: Url) -> None:
        try:
            super().__init__(url.read_bytes())
        except FileNotFoundError:
            raise
        except OSError as error:  # says nothing about the image
            raise RemoteError(
                f"{url} cannot be read now ({error.strerror}): check the network and credentials"
            ) from None
        self._url = url

    def __repr__(self) -> str:
        return repr(str(self._url))


def _one_page(file: Image.Image, given: Place | Image.Image, bits: int | None) -> Image.Image:
    image = to_rgb(file, bits)
    warn_of_pages(page_count(file), given)
    return image


def page_count(file: Image.Image) -> int:
    """How many pages or frames a PIL image has that is at its first, else 1."""
    with suppress(Exception):  # only the first page is intact
        if file.format not in ("MPO", "PSD") and not file.tell():  # whose others belong to it
            return int(getattr(file, "n_frames", 1))
    return 1


def warn_of_pages(pages: int, given: Place | Image.Image) -> None:
    """Issue an `ImageWarning` if the first of several pages is read without being named."""
    if pages > 1 and (isinstance(given, Image.Image) or not split_page(given)[1]):
        warnings.warn(
            f"{_called(given)} has {pages} pages or frames, of which the first is read: --pages "
            "all judges each, and so does a name that ends in #page=2, for example",
            ImageWarning,
            stacklevel=3,
        )


def to_rgb(file: Image.Image, bits: int | None = None) -> Image.Image:
    """A PIL image in RGB with 8 bits per channel; see `read_image`."""
    if is_deep_grey(file):
        values, used = deep_grey(file, bits)
        grey = Image.fromarray((values >> (used - 8)).astype(np.uint8))
        grey.info |= file.info  # the EXIF orientation, for example
        return grey.convert("RGB")
    if file.mode in ("I", "F"):
        raise unknown_range(file.mode == "F")
    deep = is_deep_colour(file)
    image = file.convert("RGB")
    if deep:
        # PIL has already dropped the low bits, which are all that a 12-bit picture would have.
        values = np.asarray(image).astype(np.uint16) << 8
        if used_bits(values, _stated_bits(file) if file.format == "TIFF" else None, bits) < 16:
            raise DataError(f"{LOW_BITS}: convert it to 8 bit")
    return image


def unknown_range(floating: bool) -> DataError:
    """The error for pixels that are no unsigned integers of 8 or 16 bits."""
    return DataError(
        f"its pixels are {'floating-point' if floating else 'integer'} numbers of unknown range: "
        "convert it to 8 bit, or fit with --dtype float32 and --range"
    )


def is_deep_colour(file: Image.Image) -> bool:
    """Whether a file has 16-bit colour, of which PIL keeps the higher 8 bits; asked at any time."""
    tiles, tags = getattr(file, "tile", ()), getattr(file, "tag_v2", {})
    depths = np.ravel(tags.get(258, 8)) if tags else ()
    if any(";16" in str(tile) for tile in tiles):
        file.info[_DEEP] = True
    elif tiles and len(depths) > 1 and max(depths) > 8 and _DEEP not in file.info:
        raise UnidentifiedImageError("PIL misreads 16-bit colour in separate planes")
    return _DEEP in file.info


def is_deep_grey(file: Image.Image) -> bool:
    """Whether a PIL image has 16-bit grey values; PIL may store those of PNG and PPM in 32."""
    return file.mode.startswith("I;16") or (file.mode == "I" and file.format in ("PNG", "PPM"))


def deep_grey(file: Image.Image, bits: int | None) -> tuple[NDArray[Any], int]:
    """16-bit grey values `[H, W]`, 0 = black, and how many bits of them are used."""
    stated = _stated_bits(file)
    values = np.asarray(file).astype(np.uint16)
    used = used_bits(values, stated, bits)
    if getattr(file, "tag_v2", {}).get(262) == 0:  # white is 0, which PIL leaves as it is
        values = (1 << used) - 1 - values
    return values, used


def used_bits(values: NDArray[Any], stated: int | None, bits: int | None) -> int:
    """How many of 16 bits are used: what the file states, else `bits`, else all.

    An `ImageWarning` for the last if all values fit in fewer bits.
    """
    largest = int(values.max())
    if stated is not None and largest < 1 << stated:  # the file is wrong about a larger value
        return stated
    if bits is not None and largest >= 1 << bits:
        raise DataError(f"it has a value of {largest}, more than {bits} bits hold: check --bits")
    if bits is None and 0 < largest < 1 << 14:  # an ordinary dark picture may well have 15 bits
        warnings.warn(
            f"16-bit images have values that all fit in {largest.bit_length()} bits, and are dark "
            "if that is all they have: give their number of bits, 12 for example, as --bits or "
            "Preprocessing.bits",
            ImageWarning,
            stacklevel=5,
        )
    return bits or 16


def _stated_bits(file: Image.Image) -> int | None:
    """How many bits of a 16-bit greyscale file are used, if it says so."""
    if file.format in ("PPM", "JPEG2000"):  # PIL scales them to 16
        return 16
    if file.format == "PNG":
        return _png_bits(file)
    if not isinstance(file, TiffImagePlugin.TiffImageFile):
        return None
    return tiff_bits(file.tag_v2)


def tiff_bits(tags: Mapping[int, Any]) -> int | None:
    """How many bits of a 16-bit TIFF are used, by its tags, if they say so."""
    # Tag 258 is BitsPerSample; 281 and 341 are the largest value (MaxSampleValue, SMaxSampleValue).
    depth = [int(bits) for bits in np.ravel(tags.get(258, ())) if bits < 16]
    tops = [int(top) for tag in (281, 341) for top in np.ravel(tags.get(tag, ()))]
    # A maximum of 2^n - 1 is that of the format, any other one that of this image.
    depth += [top.bit_length() for top in tops if 255 <= top < 65536 and not top & (top + 1)]
    return min(depth, default=None)


def _png_bits(file: Image.Image) -> int | None:
    """The `sBIT` of a greyscale PNG whose values were not scaled to 16 bits, as they should be."""
    stream = getattr(file, "fp", None)
    if stream is not None:  # not decoded yet: PIL skips the chunk
        at = stream.tell()
        stream.seek(8)  # behind the signature; a chunk is its length, name, data and checksum
        while (head := stream.read(8))[4:] not in (b"IDAT", b""):
            data = stream.read(int.from_bytes(head[:4], "big") + 4)
            if head[4:] == b"sBIT":
                file.info[_SBIT] = data[0]
        stream.seek(at)
    bits = file.info.get(_SBIT, 0)
    if not 8 <= bits <= 16:
        return None
    # The standard wants n bits scaled to 16: then low bits are empty, or values exceed n bits.
    values = np.asarray(file)
    scaled = values.max() >= 1 << bits or not (values & ((1 << (16 - bits)) - 1)).any()
    return 16 if scaled else bits


def find_fault(path: Path) -> str | None:
    """`"truncated"`, `"missing"` or why an image cannot be read; None if it is intact.

    A JPEG or PNG file with the expected first and last bytes is not decoded.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(4)
            file.seek(0, 2)
            file.seek(max(file.tell() - 8, 0))
            end = file.read()
            if any(begin.startswith(first) and end.endswith(last) for first, last in _ENDS):
                file.seek(0)
                Image.open(file)  # reads the header, and so checks the size
                return None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read_image(path)
    except UNREADABLE as error:
        return explain(error)
    return "truncated" if any(w.category is TruncatedImageWarning for w in caught) else None


def explain(error: Exception) -> str:
    """Why an image cannot be read, from one of `UNREADABLE`."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, BOMB):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"it has more than the {limit} pixels that PIL reads: make it smaller"
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Context in which an image that cannot be read is a DataError that names it."""
    try:
        yield
    except RemoteError:
        raise
    except DataError as error:  # with its own way out
        raise DataError(f"{what} cannot be read ({error})") from None
    except UNREADABLE as error:
        reason = explain(error)
        raise DataError(f"{what} cannot be read ({reason}): restore or replace it") from None


@contextmanager
def truncated_images(read: bool) -> Iterator[None]:
    """Set whether PIL reads truncated images, their missing rows in grey, as OpenOOD does.

    It is a global flag, which importing OpenOOD turns on.
    """
    if read == ImageFile.LOAD_TRUNCATED_IMAGES:
        yield
        return
    with _flag:
        before = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = read
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before
