"""The pixels of image files of any number of channels and bits: TIFF, NPY, DICOM, all that PIL has.

tifffile, pydicom and pillow-heif are extras, each imported for the first file that needs it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from io import BytesIO
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from fusenorm_openood.data import images
from fusenorm_openood.data.images import opened, read_image, truncated_images, used_bits
from fusenorm_openood.errors import DataError, first_sentence, import_extra
from fusenorm_openood.storage.urls import Place, Url, split_page

if TYPE_CHECKING:
    from fusenorm_openood.data.preprocessing import Preprocessing

_extra = partial(import_extra, kind=DataError)
_WITH_ALPHA = {"LA": 2, "RGBA": 4}  # channels of modes whose last one may be any other


class Read(NamedTuple):
    """Values `[H, W, C]` of a file, how many bits it states, its orientation by EXIF, its pages."""

    values: NDArray[Any]
    stated: int | None = None
    turned: int = 1  # upright
    pages: int = 1


def read_bands(given: Place | Image.Image, how: "Preprocessing") -> list[Image.Image]:
    """An image as PIL images: one in RGB or grey with 8 bits, or one for each channel.

    These are grey with 8 bits, or of floating-point numbers for `uint16` and `float32`. DataError
    if it cannot be read, or its channels, bits or values are others than those of the
    preprocessing; also what `read_image` raises.
    """
    plain = how.dtype == "uint8" and how.channels in (1, 3)
    try:
        if plain:
            image = read_image(given, how.bits)
            return [image if how.channels == 3 else image.convert("L")]
        read = _read(given, how)
    except UnidentifiedImageError:
        if isinstance(given, Image.Image):
            raise
        read = _read_other(given, how)
    images.warn_of_pages(read.pages, given)
    values = _in_type(read.values, read.stated, how)
    found, wanted = values.shape[2], how.channels
    if plain and found in (1, 3):
        image = Image.fromarray(values if found == 3 else values[..., 0])
        bands = [image.convert("RGB" if wanted == 3 else "L")]
    elif found == wanted or (found, wanted) == (1, 3):
        channels = np.broadcast_to(values, (*values.shape[:2], wanted)).transpose(2, 0, 1)
        bands = [Image.fromarray(np.ascontiguousarray(channel)) for channel in channels]
    else:
        raise DataError(
            f"it has {found} channel(s), the preprocessing {wanted}: give images of {wanted}, or "
            f"fit with the mean and standard deviation of {found}"
        )
    for band in bands:
        if read.turned != 1:
            band.getexif()[ExifTags.Base.Orientation] = read.turned
    return bands


def pages_of(given: Place) -> list[str]:
    """The names of the pages or frames of a file, `scan.tif#page=2`; its own if it has one."""
    file, pages = split_page(given)[0], 1
    with suppress(DataError, *images.UNREADABLE):  # its row says why
        try:
            with opened(file) as image:
                pages = images.page_count(image)
        except UnidentifiedImageError:
            with _stream(file) as stream:
                pages = _count(stream, _kind(stream))
    if pages == 1 or file != given:
        return [str(given)]
    return [f"{file}#page={number}" for number in range(1, pages + 1)]


def _read(given: Place | Image.Image, how: "Preprocessing") -> Read:
    """The values of an image that PIL reads without loss."""
    if not isinstance(given, Image.Image) and how.channels not in (1, 3):
        with _stream(split_page(given)[0]) as stream:
            if _kind(stream) == "TIFF":  # of which tifffile keeps all channels
                raise UnidentifiedImageError
    with truncated_images(read=False), opened(given) as file:
        is_grey = images.is_deep_grey(file)
        apart = file.format == "TIFF" and images.page_count(file) == how.channels > 1
        if apart and how.dtype != "uint8" and not isinstance(given, Image.Image):
            raise UnidentifiedImageError("a page for each channel, all of which tifffile reads")
        if not is_grey and how.dtype != "uint8" and images.is_deep_colour(file):
            if file.format == "TIFF":  # of which tifffile keeps all bits
                raise UnidentifiedImageError(images.LOW_BITS)
            raise DataError(f"{images.LOW_BITS}: convert it to TIFF or NPY")
        turned, stated = file.getexif().get(ExifTags.Base.Orientation, 1), None
        if is_grey:
            values, stated = images.deep_grey(file, 16 if how.dtype == "float32" else how.bits)
        elif file.mode in ("I", "F"):
            values = np.asarray(file)
        else:
            keeps = _WITH_ALPHA.get(file.mode) == how.channels
            grey = file.mode in ("1", "L", "LA")
            values = np.asarray(file if keeps else file.convert("L" if grey else "RGB"))
        return Read(np.atleast_3d(values), stated, turned, images.page_count(file))


def _in_type(values: NDArray[Any], stated: int | None, how: "Preprocessing") -> NDArray[Any]:
    """Values of a file in the type of a preprocessing; DataError for values of others."""
    dtype, (low, high) = values.dtype, how.span
    if dtype.kind not in "uif" or not values.size:
        raise DataError(f"its pixels are {dtype} {list(values.shape)}: convert them to numbers")
    if how.dtype == "float32":
        if dtype.kind != "f" and np.iinfo(dtype).max < high:
            raise DataError(f"{dtype} holds no value of {high:g}, where its range is to end")
        least, most = values.min(), values.max()
        if not low <= least <= most <= high:  # also NaN
            raise DataError(
                f"it has values from {least:g} to {most:g}, outside the range {low:g} to {high:g} "
                "of the preprocessing: check --range"
            )
        return values.astype(np.float32)
    if dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise images.unknown_range(dtype.kind == "f")
    wanted = how.bits or 16
    if dtype.itemsize == 1:
        if how.dtype == "uint16":
            raise DataError(f"it has 8 bits, the preprocessing {wanted}: give images of {wanted}")
        return values
    used = used_bits(values, stated, how.bits)
    if how.dtype == "uint8":
        return (values >> (used - 8)).astype(np.uint8)
    if used != wanted:
        raise DataError(f"it states {used} bits, the preprocessing has {wanted}: check --bits")
    return values.astype(np.float32)


# Formats that PIL does not know, by their first bytes.


def _read_other(given: Place, how: "Preprocessing") -> Read:
    file, page = split_page(given)
    with _stream(file) as stream:
        kind = _kind(stream)
        if kind is None:
            raise UnidentifiedImageError(f"cannot identify image file {str(file)!r}")
        if kind == "HEIC":
            _extra("pillow_heif", "HEIC", "heif")  # else PIL would have read it
            raise DataError("it is damaged HEIC: restore it")
        with _faults_of(kind):
            return _READERS[kind](stream, page, how)


@contextmanager
def _stream(file: Place) -> Iterator[BinaryIO]:
    with images.Downloaded(file) if isinstance(file, Url) else Path(file).open("rb") as stream:
        yield stream


def _kind(stream: BinaryIO) -> str | None:
    head = stream.read(132)
    stream.seek(0)
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "HEIC"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    return "NPY" if head[:6] == b"\x93NUMPY" else "DICOM" if head[128:] == b"DICM" else None


@contextmanager
def _faults_of(kind: str) -> Iterator[None]:
    """Context in which whatever a package raises for a damaged file is a DataError."""
    try:
        yield
    except (DataError, MemoryError, images.BOMB):
        raise
    except Exception as error:
        raise DataError(f"it is {kind} that fails with {first_sentence(error)}") from error


def _check_size(height: int, width: int, channels: int = 1) -> None:
    """Refuse what is larger than the RGB images that PIL reads, before memory is taken for it."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width * max(channels / 3, 1) > 2 * limit:
        raise Image.DecompressionBombError


def _npy(stream: BinaryIO, page: int, how: "Preprocessing") -> Read:
    data = stream.read()
    header, form = BytesIO(data), np.lib.format
    old = form.read_magic(header) == (1, 0)
    read = form.read_array_header_1_0 if old else form.read_array_header_2_0
    shape, _, dtype = read(header)
    if dtype.hasobject or len(data) - header.tell() < prod(shape) * dtype.itemsize or page > 1:
        raise DataError(f"it is no NPY of one array of numbers with all its {prod(shape)} values")
    values = np.load(BytesIO(data), allow_pickle=False)
    fits = {how.channels, 1} if how.channels == 3 else {how.channels}
    last, first = (values.ndim == 3 and values.shape[axis] in fits for axis in (2, 0))
    if values.ndim == 2 and 1 in fits:
        values, last = values[..., None], True
    if last == first:
        why = "at both ends" if last else "nowhere"
        raise DataError(
            f"its shape {list(shape)} has the {how.channels} channel(s) of the preprocessing "
            f"{why}: save it as [H, W], [H, W, {how.channels}] or [{how.channels}, H, W]"
        )
    values = values if last else values.transpose(1, 2, 0)
    _check_size(*values.shape)
    return Read(values)


def _tiff(stream: BinaryIO, page: int, how: "Preprocessing") -> Read:
    with _extra("tifffile", "TIFF of these channels or bits", "tiff").TiffFile(stream) as file:
        first = file.pages[max(page - 1, 0)]
        apart = not page and first.samplesperpixel == 1 < how.channels == len(file.pages)
        chosen = file.pages if apart else [first]  # a page for each channel, as ImageJ writes them
        _check_size(first.imagelength, first.imagewidth, first.samplesperpixel * len(chosen))
        photometric = getattr(first.photometric, "name", str(first.photometric))
        if photometric not in ("MINISBLACK", "MINISWHITE", "RGB") or first.imagedepth > 1:
            raise DataError(f"it is TIFF with {photometric} pixels: convert it to grey or RGB")
        parts = [part.asarray() for part in chosen]
        values = np.dstack(parts) if first.axes != "SYX" else parts[0].transpose(1, 2, 0)
        tags = {tag.code: tag.value for tag in first.tags}
        stated = images.tiff_bits(tags) if values.dtype.itemsize == 2 else None
        if photometric == "MINISWHITE" and values.dtype.kind == "u":
            is_16_bit = values.dtype.itemsize == 2
            used = used_bits(values, stated, how.bits) if is_16_bit else 8 * values.itemsize
            values = values.dtype.type((1 << used) - 1) - values
        return Read(values, stated, int(tags.get(274, 1)), 1 if apart else len(file.pages))


def _dicom(stream: BinaryIO, page: int, how: "Preprocessing") -> Read:
    """A frame as a viewer shows it: rescaled, windowed by its first window, MONOCHROME1 inverted.

    For `float32` values are rescaled, and the range of the preprocessing is the window.
    """
    pydicom = _extra("pydicom.pixels", "DICOM", "dicom")
    reading = import_module("pydicom")
    data, window = reading.dcmread(stream), reading.Dataset()
    if "Rows" not in data or "PhotometricInterpretation" not in data:
        raise DataError("it is DICOM without pixels: leave it out")
    _check_size(data.Rows, data.Columns, data.get("SamplesPerPixel", 1))
    frame, kind, pages = max(page - 1, 0), str(data.PhotometricInterpretation), _frames(data)
    shared = data.get("SharedFunctionalGroupsSequence") or ()
    own = (data.get("PerFrameFunctionalGroupsSequence") or ())[frame : frame + 1]
    for group in (*shared, *own):  # of an enhanced image
        for part in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            data.update(group[part][0] if part in group else {})
    syntax = data.file_meta.TransferSyntaxUID
    if not pydicom.get_decoder(syntax).is_available:
        raise DataError(
            f"it is DICOM in {syntax.name}, for which pydicom has no decoder here: pip install "
            "pylibjpeg[all], or decompress it"
        )
    values = pydicom.pixel_array(data, index=frame)
    if kind == "PALETTE COLOR":
        values = pydicom.apply_color_lut(values, data)
    if kind in ("PALETTE COLOR", "RGB") or kind.startswith("YBR"):  # which pydicom makes RGB
        return Read(values, pages=pages)
    if not kind.startswith("MONOCHROME"):
        raise DataError(f"it is DICOM in {kind}: convert it to MONOCHROME2 or RGB")
    values = pydicom.apply_modality_lut(values, data).astype(np.float64)
    (low, high), is_float = how.span, how.dtype == "float32"
    if is_float:
        shown = (values.clip(low, high) - low) / (high - low)
    elif data.get("VOILUTSequence"):
        depth = data.VOILUTSequence[0].LUTDescriptor[2]
        shown = pydicom.apply_voi(values.round().astype(np.int64), data) / (2**depth - 1)
    else:
        window.PhotometricInterpretation = kind
        window.BitsStored, window.PixelRepresentation = 16, 0
        for part in ("WindowCenter", "WindowWidth", "VOILUTFunction"):
            if part in data:
                window[part] = data[part]
        if "WindowCenter" in window:
            shown = pydicom.apply_windowing(values, window) / 65535
        else:  # all that can be stored
            half = 1 << (data.BitsStored - 1)
            ends = np.array([-half, half - 1]) + half * (1 - data.PixelRepresentation)
            ends = pydicom.apply_modality_lut(ends, data).astype(np.float64)
            shown = (values - ends.min()) / np.ptp(ends)
    if not np.isfinite(shown).all():
        raise DataError("it is DICOM whose rescaling or window gives no numbers: correct it")
    shown = 1 - shown if kind == "MONOCHROME1" else shown
    scaled = (low + shown.clip(0, 1) * (high - low)).clip(low, high)  # also when rounded
    if not is_float:
        scaled = scaled.round().astype(how.dtype)
    return Read(scaled[..., None], how.bits or 16, pages=pages)


def _frames(data: Any) -> int:
    return int(data.get("NumberOfFrames") or 1)


def _count(stream: BinaryIO, kind: str | None) -> int:
    """How many pages or frames a file of a kind has."""
    with _faults_of(str(kind)):
        if kind == "TIFF":
            with _extra("tifffile", kind, "tiff").TiffFile(stream) as file:
                return len(file.pages)
        if kind == "DICOM":
            pydicom = _extra("pydicom", kind, "dicom")
            return _frames(pydicom.dcmread(stream, stop_before_pixels=True))
    return 1


_READERS: dict[str, Callable[[BinaryIO, int, "Preprocessing"], Read]] = {
    "NPY": _npy,
    "TIFF": _tiff,
    "DICOM": _dicom,
}
