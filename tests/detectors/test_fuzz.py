"""Whatever is given as an image: a right answer or a typed error, and the network as it was."""

import io
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fusenorm_openood import FuseNorm
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.errors import FuseNormError
from tests.conftest import assert_undisturbed, state_of
from tests.nets import Net, some_images

SIZES = st.sampled_from([0, 1, 2, 3, 4, 7, 16, 33])
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64)
DTYPES += (torch.bool, torch.complex64)
FILLS = st.sampled_from(["normal", "zeros", "ones", "nan", "inf", "huge", "one pixel nan"])


@pytest.fixture(scope="module")
def detector():
    known = [some_images(60, (16, 16))]
    found = FuseNorm(Net()).fit(known, calibration=[some_images(40, (16, 16), seed=7)])
    found.preprocessing = Preprocessing(18, (16, 16), "bilinear", (0.5,) * 3, (0.25,) * 3)
    return found


def assert_right_or_refused(detector, given, count) -> None:
    before = state_of(detector.net)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            conf, p = detector.score(given), detector.p_values(given)
            why = detector.explain(given)
    except FuseNormError:
        pass
    else:
        assert conf.numel() == p.numel() == len(why.objected) == count
        assert torch.isfinite(conf).all()
        np.testing.assert_allclose(why.contributions.sum(0), conf.double().reshape(-1), atol=1e-3)
        known = detector.calibration_scores_
        expected = [(1 + (known <= c).sum()) / 41 for c in conf.double().reshape(-1).numpy()]
        np.testing.assert_allclose(p.reshape(-1), expected)
    assert_undisturbed(detector.net, before)


@st.composite
def tensors(draw):
    shape = draw(
        st.one_of(
            st.tuples(st.integers(0, 3), st.sampled_from([1, 3, 3, 3, 4]), SIZES, SIZES),
            st.tuples(st.sampled_from([1, 3]), SIZES, SIZES),
            st.lists(SIZES, max_size=5).map(tuple),
        )
    )
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    fill = draw(FILLS)
    if fill == "one pixel nan" and values.numel():
        values.view(-1)[draw(st.integers(0, values.numel() - 1))] = float("nan")
    elif fill == "huge":
        return values.fill_(3e38).to(draw(st.sampled_from(DTYPES)))
    elif fill != "normal":
        values.fill_(
            {"zeros": 0.0, "ones": 1.0}.get(fill, float("nan" if fill == "nan" else "inf"))
        )
    return values.to(draw(st.sampled_from(DTYPES[:4])))


@settings(max_examples=80, suppress_health_check=list(HealthCheck))
@given(images=tensors())
def test_tensors(detector, images):
    count = len(images) if images.ndim == 4 else 1
    assert_right_or_refused(detector, images, count)


MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "LA")


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    mode=st.sampled_from(MODES),
    width=st.sampled_from([1, 2, 17, 400, 20_000]),
    height=st.sampled_from([1, 3, 18]),
    rotation=st.integers(0, 9),
    container=st.sampled_from(["PIL", "PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"]),
    damage=st.sampled_from([None, None, "cut", "flipped", "text", "empty"]),
)
def test_images_and_files(
    detector, tmp_path_factory, mode, width, height, rotation, container, damage
):
    image = Image.new("RGB", (width, height), (200, 40, 90))
    image = Image.new(mode, (width, height)) if mode in ("I;16", "F", "I") else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = rotation
    if container == "PIL":
        assert_right_or_refused(detector, image, 1)
        return
    buffer = io.BytesIO()
    try:
        image.save(buffer, container, exif=exif, save_all=True, append_images=[image])
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):
        return  # a mode that the format does not have
    data = bytearray(buffer.getvalue())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 255
    elif damage in ("text", "empty"):
        data = bytearray(b"no image" if damage == "text" else b"")
    path = tmp_path_factory.getbasetemp() / "fuzzed.img"
    path.write_bytes(data)
    assert_right_or_refused(detector, path if rotation % 2 else str(path), 1)


@pytest.mark.parametrize(
    "images",
    [
        None,
        b"image",
        [b"image"],
        np.zeros((3, 16, 16)),
        torch.empty(2, 3, 16, 16, device="meta"),
        torch.zeros(2, 3, 16, 16).to_sparse(),
    ],
)
def test_other_things(detector, images):
    for call in (detector.score, detector.is_ood, detector.explain, detector.p_values):
        with pytest.raises(FuseNormError):
            call(images)
