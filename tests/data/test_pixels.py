"""Images that are no 8-bit RGB: grey, many channels, 12 and 16 bits, floats, DICOM, HEIC, pages."""

import warnings
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fusenorm_openood.data.images import ImageWarning
from fusenorm_openood.data.paths import each_page, image_paths
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.errors import ConfigError, DataError
from fusenorm_openood.storage.files import manifest
from fusenorm_openood.storage.urls import Places
from tests.data.test_bits import written
from tests.data.test_images import png_of

H, W = 20, 24


def draw(shape, high=2**16, dtype=np.uint16, low=0):
    values = np.random.default_rng(0).integers(low, high, shape).astype(dtype)
    values.flat[:2] = low, high - 1
    return values


def how(channels=1, size=(H, W), interpolation="bilinear", **fields):
    """Values minus 0.5, of images of that size."""
    return Preprocessing(size, size, interpolation, (0.5,) * channels, (1.0,) * channels, **fields)


def unit(preprocessing, path):
    return preprocessing.read(path).numpy() + np.float32(0.5)


def saved(path, values):
    np.save(path, values)
    return path


def expected(values, low, high):
    return (values.astype(np.float64) - low) / (high - low)


CASES = {
    "grey": (how(), np.uint8, 1, 0, 255),
    "12 bits": (how(dtype="uint16", bits=12), np.uint16, 1, 0, 4095),
    "13 channels": (how(13, dtype="uint16"), np.uint16, 13, 0, 65535),
    "13 channels of 8 bits": (how(13), np.uint8, 13, 0, 255),
    "2 channels": (how(2, dtype="float32", range=(-9, 999)), np.int16, 2, -9, 999),
    "colour of 16 bits": (how(3, dtype="uint16"), np.uint16, 3, 0, 65535),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("axes", ["last", "first"])
def test_an_array_keeps_all_its_values(tmp_path, name, axes):
    preprocessing, dtype, channels, low, high = CASES[name]
    values = draw((channels, H, W), high + 1, dtype, low)
    path = saved(tmp_path / "x.npy", values if axes == "first" else values.transpose(1, 2, 0))
    np.testing.assert_allclose(unit(preprocessing, path), expected(values, low, high), atol=1e-6)
    assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("planes", ["contig", "separate", "pages"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_keeps_all_its_values(tmp_path, name, planes, order):
    tifffile = pytest.importorskip("tifffile")
    preprocessing, dtype, channels, low, high = CASES[name]
    values, path = draw((channels, H, W), high + 1, dtype, low), tmp_path / "x.tif"
    if planes == "pages" and channels > 1:
        tifffile.imwrite(path, values, photometric="minisblack", byteorder=order)
    elif planes == "pages" or channels == 1:
        tifffile.imwrite(path, values[0], photometric="minisblack", byteorder=order)
    else:
        given = values if planes == "separate" else values.transpose(1, 2, 0)
        kind = "rgb" if channels == 3 else "minisblack"
        tifffile.imwrite(path, given, photometric=kind, planarconfig=planes, byteorder=order)
    np.testing.assert_allclose(unit(preprocessing, path), expected(values, low, high), atol=1e-6)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_grey_of_16_bits_as_pil_reads_it(tmp_path, ending):
    values = draw((H, W))
    path = written(tmp_path / f"x.{ending}", values) if ending != "pgm" else tmp_path / "x.pgm"
    if ending == "pgm":
        path.write_bytes(b"P5 %d %d 65535\n" % (W, H) + values.astype(">u2").tobytes())
    for channels in (1, 3):  # grey is repeated for a network of RGB
        found = unit(how(channels, dtype="uint16"), path)
        np.testing.assert_allclose(found, np.stack([values / 65535] * channels), atol=1e-6)
    with Image.open(path) as file:
        assert torch.equal(how(dtype="uint16")(file), how(dtype="uint16").read(path))


def assert_whole(values):
    np.testing.assert_allclose(values, np.round(values), atol=0.02)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(9, 11), (31, 40)])
@pytest.mark.parametrize("name", ["12 bits", "13 channels", "2 channels"])
def test_resized_as_torch_does_with_antialias(tmp_path, interpolation, size, name):
    given, dtype, channels, low, high = CASES[name]
    values = draw((channels, H, W), high + 1, dtype, low)
    fields = {key: getattr(given, key) for key in ("dtype", "bits", "range")}
    preprocessing = how(channels, size, interpolation, crop_mode="squash", **fields)
    found = unit(preprocessing, saved(tmp_path / "x.npy", values))
    wanted = torch.from_numpy(expected(values, low, high))[None]
    wanted = F.interpolate(wanted, size, mode=interpolation, antialias=True)[0]
    if given.dtype == "uint16":  # as in files: whole numbers, within the bits
        assert_whole(found * high)
        wanted = wanted.clamp(0, 1)
    np.testing.assert_allclose(found, wanted, atol=1e-6 if low else 0.51 / high)


@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_colour_of_16_bits_is_scaled_to_8(tmp_path, planes):
    """PIL reads the bytes of separate planes as if they were pixels."""
    tifffile = pytest.importorskip("tifffile")
    values, path = draw((3, H, W)), tmp_path / "x.tif"
    given = values if planes == "separate" else values.transpose(1, 2, 0)
    tifffile.imwrite(path, given, photometric="rgb", planarconfig=planes)
    np.testing.assert_allclose(unit(how(3), path) * 255, values >> 8, atol=1e-3)


def test_a_grey_network_sees_colour_as_pil_turns_it_grey(tmp_path):
    colour = Image.fromarray(draw((H, W, 3), 256, np.uint8))
    colour.save(tmp_path / "x.png")
    grey = np.asarray(colour.convert("L")) / 255
    np.testing.assert_allclose(unit(how(), tmp_path / "x.png")[0], grey, atol=1e-6)


def test_borders_have_the_mean_and_crops_the_low_end(tmp_path):
    path = saved(tmp_path / "x.npy", np.full((2, 8, 8), 3.0, np.float32))
    fields = {"dtype": "float32", "range": (1.0, 5.0)}
    border = Preprocessing((8, 16), (8, 16), "bilinear", (0.25, 0.75), (1, 1), "border", **fields)
    np.testing.assert_allclose(border.read(path)[:, :, 0], 0)
    crop = Preprocessing(8, (8, 16), "bilinear", (0.0, 0.0), (1, 1), **fields)
    assert (crop.read(path)[:, :, 0] == 0).all()
    assert (crop.read(path)[:, :, 8] == 0.5).all()


def test_a_tiff_is_turned_upright(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    values, path = draw((H, W, 5)), tmp_path / "x.tif"
    turned = np.rot90(values).copy()  # orientation 6 turns it back
    tags = [(274, "H", 1, 6, True)]
    tifffile.imwrite(path, turned, photometric="minisblack", planarconfig="contig", extratags=tags)
    found = unit(how(5, dtype="uint16"), path)
    np.testing.assert_allclose(found, values.transpose(2, 0, 1) / 65535, atol=1e-6)


FLOATS = {"dtype": "float32", "range": (0.0, 1.0)}
REFUSED = {
    "no more than 12 bits": (how(dtype="uint16", bits=12), draw((H, W)), "than 12 bits hold"),
    "no 8 bits": (how(dtype="uint16"), draw((H, W), 256, np.uint8), "it has 8 bits, the"),
    "no floats": (how(), np.zeros((H, W), np.float32), "numbers of unknown range.*--range"),
    "no signed": (how(dtype="uint16"), np.zeros((H, W), np.int16), "integer numbers of unknown"),
    "no values outside": (how(**FLOATS), np.full((H, W), 1.5), "from 1.5 to 1.5, outside the"),
    "no NaN": (how(**FLOATS), np.full((H, W), np.nan), "from nan to nan, outside the range 0"),
    "no 8 bits for more": (
        how(dtype="float32", range=(0, 999)),
        np.zeros((H, W), np.uint8),
        "uint8 holds no value of 999",
    ),
    "no other channels": (how(13), draw((H, W, 5)), r"\[20, 24, 5\] has the 13 channel.*nowhere"),
    "no ambiguity": (how(5), draw((5, W, 5)), r"\[5, 24, 5\] has the 5 channel.*at both ends"),
    "no lists of images": (how(), draw((2, H, W, 1)), "nowhere"),
    "no complex": (how(), np.zeros((H, W), complex), "pixels are complex128"),
    "no objects": (how(), np.array([[{}]]), "no NPY of one array of numbers"),
    "none that are empty": (how(), np.zeros((0, 4), np.uint8), r"uint8 \[0, 4, 1\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_array_that_does_not_fit_is_refused(tmp_path, name):
    preprocessing, values, why = REFUSED[name]
    with pytest.raises(DataError, match=f"image .*x.npy cannot be read .*{why}"):
        preprocessing.read(saved(tmp_path / "x.npy", values))


@pytest.mark.parametrize("stated", [10, 12])
def test_a_file_of_other_bits_is_refused(tmp_path, stated):
    path = written(tmp_path / "x.tif", draw((H, W), 2**10), stated)
    preprocessing = how(dtype="uint16", bits=12)
    if stated == 12:
        assert unit(preprocessing, path).max() == pytest.approx(1023 / 4095)
    else:
        with pytest.raises(DataError, match="it states 10 bits, the preprocessing has 12"):
            preprocessing.read(path)


def test_low_bits_that_pil_drops_are_missed(tmp_path):
    (tmp_path / "x.png").write_bytes(png_of(draw((H, W, 3))))
    with pytest.raises(DataError, match="drops the low bits of 16-bit colour: convert it to TIFF"):
        how(3, dtype="uint16").read(tmp_path / "x.png")


def npy_header(shape, kind="<u2"):
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize("kind", ["tif", "npy", "dcm"])
@pytest.mark.parametrize("fault", ["truncated", "garbage", "bomb"])
def test_damaged_files_are_one_error_and_take_no_memory(tmp_path, kind, fault, monkeypatch):
    path, values = tmp_path / f"x.{kind}", draw((H, W, 13))
    if kind == "npy":
        np.save(path, values)
    elif kind == "tif":
        tifffile = pytest.importorskip("tifffile")
        tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig")
    else:
        write_dicom(path, values[..., 0])
    data = path.read_bytes()
    if fault == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        if kind == "npy":
            path.write_bytes(npy_header((10**6, 10**6)))
    else:
        path.write_bytes(data[: int(0.7 * len(data))] if fault == "truncated" else data[:200])
    with pytest.raises(DataError, match=r"x\.\w+ cannot be read \(") as raised:
        how(1 if kind == "dcm" else 13, dtype="uint16").read(path)
    assert str(raised.value).count("\n") == 0


def write_dicom(path, values, kind="MONOCHROME2", frames=None, **elements):
    """A DICOM file of values [H, W] or [H, W, 3], or [N, H, W] for several frames."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = elements.pop("syntax", ExplicitVRLittleEndian)
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3"
    data.Rows, data.Columns = values.shape[:2] if frames is None else values.shape[1:3]
    if frames is not None:
        data.NumberOfFrames = frames
    data.PhotometricInterpretation = kind
    data.SamplesPerPixel = 1 if "O" in kind else 3  # MONOCHROME, PALETTE COLOR
    data.PlanarConfiguration = 0
    data.BitsAllocated = data.BitsStored = 8 * values.itemsize
    data.PixelRepresentation = int(values.dtype.kind == "i")
    for name, value in elements.items():
        setattr(data, name, value)
    data.HighBit = data.BitsStored - 1
    data.PixelData = values.tobytes()
    data.save_as(path, enforce_file_format=True)
    return path


def windowed(x, centre, width):
    """PS3.3 C.11.2.1.2.1."""
    return ((x - (centre - 0.5)) / (width - 1) + 0.5).clip(0, 1)


CT = {"RescaleSlope": 2.0, "RescaleIntercept": -1000.0}


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
@pytest.mark.parametrize("fields", [{}, {"dtype": "uint16", "bits": 12}])
def test_dicom_is_shown_as_by_a_viewer(tmp_path, kind, dtype, fields):
    low, high = (-2048, 2048) if dtype == np.int16 else (0, 4096)
    values, preprocessing = draw((H, W), high, dtype, low), how(**fields)
    top = preprocessing.span[1]
    hounsfield = 2.0 * values - 1000
    windows = {"WindowCenter": [300, 0], "WindowWidth": [2000, 1]}
    shown = {
        "window": ({**CT, **windows}, windowed(hounsfield, 300, 2000)),
        "sigmoid": (
            {**CT, "WindowCenter": 300, "WindowWidth": 900, "VOILUTFunction": "SIGMOID"},
            1 / (1 + np.exp(-4 * (hounsfield - 300) / 900)),
        ),
        "no window": (CT, (values - float(low)) / 4095),
    }
    for name, (elements, wanted) in shown.items():
        path = write_dicom(tmp_path / "x.dcm", values, kind, BitsStored=12, **elements)
        wanted = 1 - wanted if kind == "MONOCHROME1" else wanted
        found = unit(preprocessing, path)[0]
        np.testing.assert_allclose(found, wanted, atol=0.51 / top, err_msg=name)
        assert_whole(found * top)


def test_the_range_of_floats_is_the_window_of_dicom(tmp_path):
    values = draw((H, W), 4096)
    windows = {"WindowCenter": 0, "WindowWidth": 1}
    path = write_dicom(tmp_path / "x.dcm", values, BitsStored=12, **CT, **windows)
    found = unit(how(dtype="float32", range=(-500, 1500)), path)[0]
    wanted = ((2.0 * values - 1000).clip(-500, 1500) + 500) / 2000
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_dicom_with_a_table_of_values(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    values, table = draw((H, W), 256, np.uint16), pydicom.Dataset()
    table.LUTDescriptor, steps = [256, 0, 10], np.linspace(0, 1, 256) ** 2 * 1023
    table.LUTData = steps.astype(np.uint16).tobytes()
    path = write_dicom(tmp_path / "x.dcm", values, VOILUTSequence=[table])
    wanted = steps.astype(np.uint16)[values] / 1023
    np.testing.assert_allclose(unit(how(dtype="uint16"), path)[0], wanted, atol=1e-5)


def test_an_enhanced_image_has_the_window_of_its_frame(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    frames, groups = draw((2, H, W), 4096), []
    for centre in (1000, 3000):
        group, window, rescale = (pydicom.Dataset() for _ in range(3))
        window.WindowCenter, window.WindowWidth = centre, 500
        rescale.RescaleSlope, rescale.RescaleIntercept = 2, -100
        group.FrameVOILUTSequence = [window]
        group.PixelValueTransformationSequence = [rescale]
        groups.append(group)
    path = write_dicom(tmp_path / "x", frames, frames=2, PerFrameFunctionalGroupsSequence=groups)
    for page, centre in enumerate((1000, 3000)):
        wanted = windowed(2.0 * frames[page] - 100, centre, 500)
        found = unit(how(dtype="uint16"), f"{path}#page={page + 1}")[0]
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["RGB", "YBR_FULL", "PALETTE COLOR"])
def test_dicom_in_colour(tmp_path, kind):
    pytest.importorskip("pydicom")
    colour, elements = draw((H, W, 3), 256, np.uint8), {}
    given, wanted = colour, colour
    if kind == "YBR_FULL":
        wanted = np.asarray(Image.fromarray(colour, "YCbCr").convert("RGB"))
    elif kind == "PALETTE COLOR":
        given = draw((H, W), 256, np.uint8)
        wanted = colour.reshape(-1, 3)[given]
        for name, channel in zip(("Red", "Green", "Blue"), range(3), strict=True):
            table = (colour.reshape(-1, 3)[:256, channel]).astype(np.uint16) << 8
            elements[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
            elements[f"{name}PaletteColorLookupTableData"] = table.tobytes()
    path = write_dicom(tmp_path / "x.dcm", given, kind, **elements)
    found = unit(how(3), path) * 255
    np.testing.assert_allclose(found, wanted.transpose(2, 0, 1), atol=2 if "Y" in kind else 1e-3)


@pytest.mark.parametrize(
    ("elements", "why"),
    [
        ({"kind": "HSV"}, "DICOM in HSV: convert it"),
        ({"Rows": 5000}, "it is DICOM that fails with ValueError"),
    ],
)
def test_dicom_that_cannot_be_read_says_why(tmp_path, elements, why):
    values = draw((H, W, 3) if "kind" in elements else (H, W), 256, np.uint8)
    path = write_dicom(tmp_path / "x.dcm", values, **elements)
    with pytest.raises(DataError, match=why):
        how(3).read(path)


def test_dicom_without_a_decoder_says_what_to_install(tmp_path):
    pydicom, lossless = pytest.importorskip("pydicom"), "1.2.840.10008.1.2.4.80"
    if pytest.importorskip("pydicom.pixels").get_decoder(lossless).is_available:
        pytest.skip("a decoder for JPEG-LS is installed")
    data = pydicom.dcmread(write_dicom(tmp_path / "x.dcm", draw((H, W), 256, np.uint8)))
    data.file_meta.TransferSyntaxUID = lossless
    data.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    data["PixelData"].VR = "OB"
    data.save_as(tmp_path / "x.dcm")
    with pytest.raises(DataError, match=r"JPEG-LS Lossless.*no decoder here: pip install"):
        how(3).read(tmp_path / "x.dcm")


def test_heic(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    smooth = np.linspace(0, 255, 64, dtype=np.uint8)
    colour = np.stack(
        [np.tile(smooth, (64, 1)), np.tile(smooth[:, None], 64), np.full((64, 64), 99)], 2
    )
    heif.from_pillow(Image.fromarray(colour.astype(np.uint8))).save(tmp_path / "x.heic", quality=95)
    assert [p.name for p in image_paths([str(tmp_path)])] == ["x.heic"]
    found = unit(how(3, (64, 64)), tmp_path / "x.heic") * 255
    np.testing.assert_allclose(found, colour.transpose(2, 0, 1), atol=12)


@pytest.mark.parametrize(
    ("module", "head", "extra"),
    [
        ("pydicom", bytes(128) + b"DICM", "dicom"),
        ("tifffile", b"II+\0" + bytes(40), "tiff"),
        ("pillow_heif", b"\0\0\0\x18ftypheic" + bytes(40), "heif"),
    ],
)
def test_without_its_package_a_file_names_the_extra(tmp_path, module, head, extra, monkeypatch):
    for name in (module, "pydicom.pixels"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    (tmp_path / "x").write_bytes(head)
    with pytest.raises(DataError, match=rf"needs {module} \(.*: pip install '.*\[{extra}\]'"):
        how().read(tmp_path / "x")


@pytest.mark.parametrize("kind", ["tif", "gif", "dcm", "many.tif"])
def test_pages(tmp_path, kind):
    path, pages = tmp_path / f"x.{kind}", draw((3, H, W), 256, np.uint8)
    preprocessing = how()
    if kind == "dcm":
        write_dicom(path, pages, frames=3)
    elif kind == "many.tif":
        tifffile = pytest.importorskip("tifffile")
        pages, preprocessing = draw((3, H, W, 5), 256, np.uint8), how(5)
        tifffile.imwrite(path, pages, photometric="minisblack", planarconfig="contig")
    else:
        first, *rest = map(Image.fromarray, pages)
        first.save(path, save_all=True, append_images=rest)
    given = image_paths([str(path)])
    every = each_page(given, "all")
    assert list(map(str, every)) == [f"{path}#page={n}" for n in (1, 2, 3)]
    assert each_page(every, "all").texts == every.texts
    assert each_page(given, "first") is given
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = np.stack([unit(preprocessing, page) for page in every])
    wanted = pages[:, None] if pages.ndim == 3 else pages.transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found * 255, wanted, atol=1e-3)
    with pytest.warns(ImageWarning, match="has 3 pages.*--pages all"):
        np.testing.assert_array_equal(unit(preprocessing, path), found[0])
    with pytest.raises(DataError, match="cannot be read"):
        preprocessing.read(f"{path}#page=4")


def test_a_page_belongs_to_its_file_unless_a_file_has_that_name(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(draw((H, W), 256, np.uint8)).save(path)
    before = manifest(Places([f"{path}#page=1"]))
    Image.fromarray(draw((H, W), 2, np.uint8)).save(path)
    assert manifest(Places([f"{path}#page=1"])) != before
    other = tmp_path / "x.png#page=1"
    Image.fromarray(draw((H, W), 256, np.uint8)).save(other, "PNG")
    assert unit(how(), other).max() == 1
    assert list(each_page(Places([other, tmp_path / "gone.png"]), "all")) == [
        other,
        tmp_path / "gone.png",
    ]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"dtype": "float32"}, "range must be two numbers LOW < HIGH with dtype float32"),
        ({"range": (0, 1)}, "range must be .* and None with others.* with uint8"),
        ({"dtype": "float32", "range": (1, 0)}, "range must be two numbers LOW < HIGH or None"),
        ({"dtype": "float32", "range": (0, 1), "bits": 12}, "which has no bits.* and bits 12"),
        ({"dtype": "int8"}, "dtype must be one of uint8, uint16, float32"),
        ({"shown": (0, 1, 2)}, "shown must be channels < 1"),
        ({"shown": (0, 0)}, "shown must be one or three channels"),
    ],
)
def test_fields_that_do_not_go_together(fields, why):
    with pytest.raises(ConfigError, match=why):
        how(**fields)


def test_pil_images_of_floats_and_uploads(tmp_path):
    values = np.random.default_rng(0).random((H, W)).astype(np.float32)
    data = BytesIO()
    Image.fromarray(values).save(data, "TIFF")
    for image in (Image.fromarray(values), Image.open(data)):
        np.testing.assert_allclose(how(**FLOATS)(image)[0] + 0.5, values, atol=1e-6)
