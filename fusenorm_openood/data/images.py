"""Image files: read as in OpenOOD, and checked without decoding those that look complete."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from io import BytesIO
from pathlib import Path
from threading import RLock

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from fusenorm_openood.errors import DataError, RemoteError
from fusenorm_openood.urls import Place, Url

# What PIL raises for a file that it cannot decode.
UNREADABLE = (
    OSError,
    UnidentifiedImageError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
)
# First and last bytes of files in the usual formats.
_ENDS = ((b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG", b"IEND\xae\x42\x60\x82"))
_flag = RLock()  # held by a thread while it changes PIL's flag


class TruncatedImageWarning(UserWarning):
    """A truncated image file was read with its missing rows filled with grey."""


def read_image(path: Place) -> Image.Image:
    """An image in RGB with 8 bits per channel.

    PIL takes the higher 8 bits of 16-bit colour images; so do we of 16-bit greyscale images, which
    PIL, and so OpenOOD, saturates instead. A truncated file is read as in OpenOOD, with its missing
    rows filled with grey, and a `TruncatedImageWarning` is issued.

    Raises:
        FileNotFoundError, or another of `UNREADABLE`: the file cannot be read as an image.
        DataError: pixels with 32 bits.
        RemoteError: a URL cannot be read now.
    """
    try:
        with _truncated_images(read=False), Image.open(_opened(path)) as file:
            return to_rgb(file)
    except (FileNotFoundError, Image.DecompressionBombError, DataError):
        raise
    except UNREADABLE:
        with _truncated_images(read=True), Image.open(_opened(path)) as file:
            image = to_rgb(file)
        warnings.warn(
            f"image {path} is truncated: its missing rows are filled with grey, as in OpenOOD",
            TruncatedImageWarning,
            stacklevel=2,
        )
        return image


class _Downloaded(BytesIO):
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


def _opened(path: Place) -> Path | BytesIO:
    """What PIL opens."""
    return path if isinstance(path, Path) else _Downloaded(path)


def to_rgb(file: Image.Image) -> Image.Image:
    """A PIL image in RGB with 8 bits per channel; see `read_image`."""
    # PNG and PPM hold at most 16 bits, which PIL may store in 32.
    if file.mode.startswith("I;16") or (file.mode == "I" and file.format in ("PNG", "PPM")):
        grey = Image.fromarray((np.asarray(file) >> 8).astype(np.uint8))
        grey.info |= file.info  # the EXIF orientation, for example
        return grey.convert("RGB")
    if file.mode in ("I", "F"):
        kind = "integer" if file.mode == "I" else "floating-point"
        raise DataError(f"its pixels are {kind} numbers of unknown range: convert it to 8 bit")
    return file.convert("RGB")


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
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"it has more than the {limit} pixels that PIL reads: make it smaller"
    return str(getattr(error, "strerror", None) or error)


def truncated_images_read() -> AbstractContextManager[None]:
    """Let PIL fill the missing rows of truncated images with grey, as OpenOOD does."""
    return _truncated_images(read=True)


@contextmanager
def _truncated_images(read: bool) -> Iterator[None]:
    """Set whether PIL reads truncated images: a global flag, which importing OpenOOD turns on."""
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
