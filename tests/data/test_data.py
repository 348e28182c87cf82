import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fusenorm_openood.data.benchmarks import (
    benchmark_names,
    how_to_get,
    image_loader,
    load_benchmark,
)
from fusenorm_openood.data.digits import ID_CLASSES, digits_image_sets, write_digits
from fusenorm_openood.data.lists import ImageList, read_imagelist
from fusenorm_openood.data.preprocessing import (
    NORMALIZATIONS,
    EvalTransform,
    parse_normalization,
)
from fusenorm_openood.errors import ConfigError, DataError
from fusenorm_openood.forward.batches import batches
from fusenorm_openood.storage.configs import lookup, parse_yaml, read_config
from tests.conftest import drawn_benchmark
from tests.preprocessing import PREPROCESSING, drawn_image

HALF = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
TRANSFORM = EvalTransform(HALF)


@pytest.fixture
def images(tmp_path):
    """A list of three images in two formats, one greyscale and one with an alpha channel."""
    rng = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(tmp_path / "a/grey.png")
    Image.fromarray(rng.integers(0, 255, (8, 8, 4), np.uint8)).save(tmp_path / "a/alpha.png")
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(tmp_path / "a/rgb.jpg")
    (tmp_path / "list.txt").write_text("a/grey.png 3\na/alpha.png -1\na/rgb.jpg 0\n")
    return tmp_path


def test_a_list_returns_images_and_labels(images):
    listed = ImageList(images / "list.txt", images, TRANSFORM)
    assert [listed[i]["label"] for i in range(len(listed))] == [3, -1, 0]
    assert all(listed[i]["data"].shape == (3, 8, 8) for i in range(3))
    assert listed.first_missing() is None


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_and_corrupt_images_are_reported_with_their_line(images, workers):
    (images / "a/alpha.png").unlink()
    listed = ImageList(images / "list.txt", images, TRANSFORM)
    assert "list.txt, line 2: image" in listed.first_missing()
    assert "alpha.png is missing" in listed.first_missing()
    message = r"list\.txt, line 2: image .*alpha\.png cannot be read \(missing\): restore"
    with pytest.raises(DataError, match=message) as error:
        list(batches(DataLoader(listed, 3, num_workers=workers)))
    assert "\n" not in str(error.value)
    whole = (images / "a/rgb.jpg").read_bytes()
    for content in (b"", b"no image", whole[: len(whole) // 2]):
        (images / "a/rgb.jpg").write_bytes(content)
        with pytest.raises(DataError, match=r"list\.txt, line 3: image .*rgb\.jpg cannot be read"):
            listed[2]


def test_unreadable_lists_are_reported(images):
    with pytest.raises(DataError, match=r"nothing\.txt cannot be read: No such file"):
        ImageList(images / "nothing.txt", images, TRANSFORM)
    (images / "list.txt").write_text("")
    with pytest.raises(DataError, match=r"list\.txt is empty"):
        ImageList(images / "list.txt", images, TRANSFORM)
    (images / "list.txt").write_text("a/grey.png 3\na/alpha.png\n")
    with pytest.raises(
        DataError, match=r"list\.txt, line 2: must be 'path label' .*, got 'a/alpha\.png'"
    ):
        ImageList(images / "list.txt", images, TRANSFORM)


@pytest.mark.parametrize(
    ("content", "entries"),
    [
        (b"\xef\xbb\xbfa.png 0\n", [("a.png", 0, 1)]),
        (b"a b.png 3\nc\td.png -1", [("a b.png", 3, 1), ("c\td.png", -1, 2)]),
        (b"a.png\t3\n", [("a.png", 3, 1)]),
        (b"\n  \na.png 0\r\n\r\nb.png 1\r\n\n", [("a.png", 0, 3), ("b.png", 1, 5)]),
        ("\u00e9\u0085\u2028.png 0\n".encode(), [("\u00e9\u0085\u2028.png", 0, 1)]),
    ],
)
def test_the_label_is_the_last_field_of_a_line_that_is_not_blank(tmp_path, content, entries):
    (tmp_path / "list.txt").write_bytes(content)
    assert read_imagelist(tmp_path / "list.txt") == entries


def test_messages_name_the_line_although_blank_lines_are_skipped(images):
    (images / "list.txt").write_bytes(b"\na/grey.png 3\r\n\na/gone 1.png 9\n")
    listed = ImageList(images / "list.txt", images, TRANSFORM)
    where = r"list\.txt, line 4: image .*a/gone 1\.png"
    with pytest.raises(DataError, match=rf"{where} cannot be read \(missing\)"):
        listed[1]
    assert re.search(f"{where} is missing", listed.first_missing())
    assert listed.faults() == {1: "missing"}
    assert re.search(where, listed.where(1))
    with pytest.raises(DataError, match=r"line 4: .* a/gone 1\.png .* 5 classes 0 to 4, got 9"):
        listed.check_labels(5)
    (images / "list.txt").write_text("\n\na/grey.png\n")
    with pytest.raises(DataError, match=r"line 3: must be 'path label'"):
        ImageList(images / "list.txt", images, TRANSFORM)


@pytest.mark.parametrize(
    ("encoding", "found"), [("latin-1", "0xe9"), ("utf-16", "0xff"), ("utf-16-le", "0x00")]
)
def test_lists_must_be_in_utf8(tmp_path, encoding, found):
    name = "\u00e9.png" if encoding == "latin-1" else "e.png"
    (tmp_path / "list.txt").write_bytes(f"{name} 0\n".encode(encoding))
    with pytest.raises(DataError, match=rf"list\.txt must be in UTF-8, got byte {found}: convert"):
        read_imagelist(tmp_path / "list.txt")


def test_labels_of_id_images_must_be_classes_of_the_benchmark(tmp_path):
    b = drawn_benchmark("imagenet200", tmp_path)
    b.check_labels(b.every())  # OOD lists have -1
    for image_set in (b.id["val"], b.id["test"], b.csid["imagenet_r"]):
        before = image_set.imagelist.read_text()
        for label in (-1, 200):
            image_set.imagelist.write_text(f"{before}a.png {label}\n")
            with pytest.raises(DataError, match=rf"{image_set.imagelist}, line 3: .* got {label}"):
                b.check_labels(b.tested(fsood=True))
        image_set.imagelist.write_text(before)


def test_a_normalization_is_a_name_or_six_numbers():
    assert parse_normalization("imagenet") == NORMALIZATIONS["imagenet"]
    assert parse_normalization("0, 1,-2,.5,1e0,2") == ((0, 1, -2), (0.5, 1, 2))
    for text in ("cinic", "", "0.5", "1,1,1,1,1,1,1", "0,0,0,1,1,0", "0,0,0,1,1,-1",
                 "0,0,nan,1,1,1", "0,0,0,1,1,inf", "0,0,0,1,1,x"):  # fmt: skip
        with pytest.raises(ConfigError, match=r"one of cifar10, .* M,M,M,S,S,S with each S > 0"):
            parse_normalization(text)


def test_a_normalization_replaces_the_benchmarks_own(digits_images):
    own = load_benchmark("digits", digits_images)
    other = load_benchmark("digits", digits_images, HALF)
    assert other.norm == HALF
    for ours, theirs in zip(own.every(), other.every(), strict=True):
        pixels = ours.images()[0]["data"] * 0.5 + 0.5
        torch.testing.assert_close(theirs.images()[0]["data"], (pixels - 0.5) / 0.25)


def test_errors_for_unknown_names_list_the_known_ones():
    with pytest.raises(
        ConfigError, match="unknown ID data set 'svhn': choose from cifar10, cifar100, digits"
    ):
        load_benchmark("svhn")


FAR = "inaturalist textures openimage_o"


@pytest.mark.parametrize(
    ("name", "classes", "near", "far", "csid"),
    [
        ("cifar10", 10, "cifar100 tin", "mnist svhn texture places365", "cifar10c"),
        ("cifar100", 100, "cifar10 tin", "mnist svhn texture places365", "cifar100c"),
        ("imagenet200", 200, "ssb_hard ninco", FAR, "imagenet_v2 imagenet_c imagenet_r"),
        ("imagenet", 1000, "ssb_hard ninco", FAR, "imagenet_v2 imagenet_c imagenet_r imagenet_es"),
        ("digits", 7, "digit8 digit9", "china flower noise stripes", ""),
    ],
)
def test_benchmarks_equal_openoods(name, classes, near, far, csid, tmp_path):
    b, (near, far, csid) = load_benchmark(name, tmp_path), (x.split() for x in (near, far, csid))
    assert name in benchmark_names()
    assert (b.num_classes, list(b.near), list(b.far), list(b.csid)) == (classes, near, far, csid)
    assert b.id["test"].imagelist == tmp_path / f"benchmark_imglist/{name}/test_{name}.txt"
    assert len(b.missing(b.tested())) == 2 + len(near) + len(far)
    assert len(b.missing(b.tested(fsood=True))) == 2 + len(near) + len(far) + len(csid)
    assert len(b.missing(b.tested(validation=True))) == 2
    assert len(b.missing(b.every())) == 4 + len(near) + len(far) + len(csid)
    assert (name == "digits") == ("fusenorm digits" in how_to_get(name))
    if "imagenet_c" in csid:
        image = Image.new("RGB", (224, 224))
        assert b.csid["imagenet_c"].transform(image).shape == (3, 224, 224)
        assert b.csid["imagenet_r"].transform(Image.new("RGB", (300, 500))).shape == (3, 224, 224)


def test_digits_sets_are_disjoint_and_have_the_right_labels():
    sets = digits_image_sets()
    known = [name for name in sets if name.endswith("digits")]
    assert set(np.concatenate([sets[name][1] for name in known])) == set(range(ID_CLASSES))
    assert sum(len(sets[name][0]) for name in known) == 1264
    split = {name: {image.tobytes() for image in sets[name][0]} for name in known}
    assert not split["train_digits"] & split["test_digits"]
    assert not split["val_digits"] & split["test_digits"]
    for name, (images, labels) in sets.items():
        assert images.shape == (len(labels), 24, 24)
        assert images.dtype == np.uint8
        if name not in known:
            assert set(labels) == {-1}
    again = digits_image_sets()
    assert all(np.array_equal(sets[name][0], again[name][0]) for name in sets)


def test_digits_are_written_once_and_completely(digits_images, tmp_path):
    b = load_benchmark("digits", digits_images)
    assert b.missing(b.every()) == []
    before = b.id["test"].imagelist.stat().st_mtime_ns
    write_digits(digits_images)
    assert b.id["test"].imagelist.stat().st_mtime_ns == before
    copy = tmp_path / "copy"
    shutil.copytree(digits_images, copy)
    (copy / "images_digits/train_digits/0007.png").unlink()
    copied = load_benchmark("digits", copy)
    assert "train_digits.txt, line 8" in copied.missing(copied.every())[0]
    write_digits(copy)
    assert copied.missing(copied.every()) == []
    images, labels = next(iter(batches(image_loader(b.id["test"], 64))))
    assert images.shape == (64, 3, 24, 24)
    assert labels.max() < ID_CLASSES


def test_digits_cannot_be_written_over_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="choose a writable folder with --data-root"):
        write_digits(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-3", 1e-3), ("+2E5", 2e5), ("-.5e1", -5.0), ("1.e3", 1e3), ("7", 7), ("0.5", 0.5)),
        *(("none", "none"), ("e5", "e5"), ("1e", "1e"), ("1e5x", "1e5x"), ("'1e5'", "1e5")),
    ],
)
def test_numbers_in_configurations_need_no_point(text, value):
    read = parse_yaml(f"[{text}]")[0]
    assert (read, type(read)) == (value, type(value))


def test_unreadable_configurations_are_reported(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.yml cannot be read \(No such file"):
        read_config(tmp_path / "no.yml")
    (tmp_path / "bad.yml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"bad\.yml is not valid YAML"):
        read_config(tmp_path / "bad.yml")
    (tmp_path / "latin1.yml").write_bytes(b"a: \xe9")
    with pytest.raises(ConfigError, match=r"latin1\.yml must be in UTF-8"):
        read_config(tmp_path / "latin1.yml")
    (tmp_path / "list.yml").write_text("- 1")
    with pytest.raises(ConfigError, match="must contain a mapping, got list"):
        read_config(tmp_path / "list.yml")
    with pytest.raises(
        ConfigError, match=r"'a\.c' is missing from the configuration: found only b"
    ):
        lookup({"a": {"b": 1}}, "a", "c")


@pytest.mark.parametrize("name", PREPROCESSING)
def test_images_are_resized_bilinearly_cropped_and_normalised(name):
    image, preprocessing = drawn_image(), PREPROCESSING[name]
    expected = preprocessing.normalised(preprocessing.resized(image))
    benchmark = load_benchmark(name)
    plain = benchmark.csid.get("imagenet_c")
    for image_set in benchmark.every():
        if image_set is not plain:
            np.testing.assert_allclose(image_set.transform(image), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["imagenet200", "imagenet"])
def test_imagenet_c_comes_in_its_final_size_and_is_only_normalised(name):
    image = drawn_image()
    expected = PREPROCESSING[name].normalised(np.asarray(image))
    transform = load_benchmark(name).csid["imagenet_c"].transform
    np.testing.assert_allclose(transform(image), expected, atol=1e-5)
