import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from flexnorm.lab.data import load


def make_npz(path, rng=None, train=24, test=12, shape=(6, 6, 3), classes=3, **replace):
    rng = rng or np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (train, *shape), dtype=np.uint8),
        "y_train": np.arange(train) % classes,
        "x_test": rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        "y_test": np.arange(test) % classes,
    }
    arrays.update(replace)
    np.savez_compressed(path, **{k: v for k, v in arrays.items() if v is not None})
    return arrays


def test_digits_are_the_bundled_images_in_a_fixed_stratified_split():
    from sklearn.datasets import load_digits

    data = load("digits")
    assert data.x_train.shape == (1437, 1, 8, 8)
    assert data.x_test.shape == (360, 1, 8, 8)
    assert data.x_train.dtype == torch.float32
    assert data.y_train.dtype == torch.int64
    # Undo the standardization: all 1,797 scans are there once.
    pixels = torch.cat([data.x_train, data.x_test]) * data.std + data.mean
    ours = sorted(map(bytes, (pixels * 16).round().to(torch.uint8).flatten(1).numpy()))
    theirs = sorted(map(bytes, load_digits().images.astype(np.uint8).reshape(1797, -1)))
    assert ours == theirs
    assert (data.y_test.bincount() - torch.tensor(load_digits().target).bincount() / 5).abs().max() < 1
    assert (
        data.digest == "c95c728850884988dc0e2c92dfaf2143173735870ddf5ae6a42bd50773a573db"
    )  # the split must never change: published tables rest on it
    assert data.classes == tuple("0123456789")


def test_images_are_standardized_by_training_statistics(tmp_path):
    arrays = make_npz(tmp_path / "a.npz")
    data = load(str(tmp_path / "a.npz"))
    x = arrays["x_train"].astype(np.float64) / 255
    mean, std = x.mean((0, 1, 2)), x.std((0, 1, 2))
    np.testing.assert_allclose(data.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(data.std, std, rtol=1e-6)
    test = (arrays["x_test"] / 255.0 - mean) / std
    np.testing.assert_allclose(data.x_test, test.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6)
    assert data.x_train.is_contiguous()
    assert data.shape == (3, 6, 6)
    assert data.num_classes == 3
    assert data.describe() == f"{tmp_path / 'a.npz'}: 24 train + 12 test images, 3 channels, 6x6, 3 classes"


def test_a_constant_channel_stays_finite(tmp_path):
    make_npz(tmp_path / "a.npz", x_train=np.full((24, 6, 6), 7, dtype=np.uint8), shape=(6, 6))
    data = load(str(tmp_path / "a.npz"))
    assert torch.isfinite(data.x_train).all()
    assert (data.x_train == 0).all()


def test_greyscale_without_channel_axis_floats_and_class_names(tmp_path):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(24, 5, 4)).astype(np.float32)
    make_npz(tmp_path / "a.npz", x_train=x, x_test=x[:12], classes=3)
    with np.load(tmp_path / "a.npz") as archive:
        members = dict(archive)
    np.savez(tmp_path / "b.npz", **{**members, "classes": np.array(["cat", "dog", "eel", "fox"])})
    data = load(str(tmp_path / "b.npz"))
    assert data.shape == (1, 5, 4)
    assert data.classes == ("cat", "dog", "eel", "fox")
    np.testing.assert_allclose(data.mean, x.mean(dtype=np.float64), rtol=1e-5)  # floats are taken as they are


def test_limit_is_a_deterministic_stratified_subset(tmp_path):
    make_npz(tmp_path / "a.npz")
    full, small = load(str(tmp_path / "a.npz")), load(str(tmp_path / "a.npz"), limit=9)
    assert small.y_train.bincount().tolist() == [3, 3, 3]
    assert small.y_test.bincount().tolist() == [3, 3, 3]
    assert small.digest != full.digest
    assert small.digest == load(str(tmp_path / "a.npz"), limit=9).digest
    assert small.digest != load(str(tmp_path / "a.npz"), limit=9, seed=1).digest
    assert load(str(tmp_path / "a.npz"), limit=999).digest == full.digest
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load("digits", limit=0)


BAD_ARRAYS = {
    "missing keys": ({"x_test": None, "y_test": None}, "lacks x_test, y_test; it holds: x_train, y_train"),
    "no images": ({"x_train": np.zeros((0, 6, 6, 3), np.uint8), "y_train": np.zeros(0, int)}, "x_train is empty"),
    "no pixels": ({"x_train": np.zeros((24, 0, 6, 3), np.uint8)}, "have no pixels"),
    "flat images": ({"x_train": np.zeros((24, 108), np.uint8)}, r"x_train has shape \(24, 108\); expected \(images"),
    "channels first": ({"x_train": np.zeros((24, 3, 6, 6), np.uint8)}, "looks like channels first"),
    "integer pixels": ({"x_train": np.zeros((24, 6, 6, 3), np.int64)}, "x_train has type int64; pixels must be"),
    "NaN pixels": ({"x_test": np.full((12, 6, 6, 3), np.nan, np.float32)}, "x_test holds NaN or infinite"),
    "other size in test": (
        {"x_test": np.zeros((12, 5, 6, 3), np.uint8)},
        r"\(6, 6, 3\) but test images are \(5, 6, 3\)",
    ),
    "other type in test": ({"x_test": np.zeros((12, 6, 6, 3), np.float32)}, "x_train is uint8 but x_test is float32"),
    "too few labels": ({"y_train": np.zeros(23, int)}, "y_train has 23 labels but x_train has 24 images"),
    "float labels": ({"y_train": np.zeros(24)}, "y_train has type float64; labels must be integers"),
    "one-hot labels": ({"y_test": np.zeros((12, 3), int)}, r"y_test has shape \(12, 3\); expected one integer label"),
    "negative label": ({"y_test": np.arange(12) - 1}, "y_test holds the negative label -1"),
    "one class": ({"y_train": np.full(24, 2)}, "all training images have label 2"),
    "test label unseen in training": (
        {"y_test": np.arange(12) % 3 + 1},
        "y_test holds label 3, which no training image",
    ),
    "gaps": (
        {"y_train": np.arange(24) % 3 * 1000, "y_test": np.arange(12) % 3 * 1000, "classes": None},
        "labels go up to 2000, but no training image has label 1 ",
    ),
    "label beyond classes": ({"classes": np.array(["a", "b"])}, "y_train holds label 2, but there are 2 classes"),
    "pickled classes": ({"classes": np.array([{}, "b", 3], dtype=object)}, "classes holds Python objects"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_unusable_arrays_are_refused_with_the_reason(tmp_path, case):
    replace, message = BAD_ARRAYS[case]
    path = tmp_path / "a.npz"
    make_npz(path)
    with np.load(path) as archive:
        arrays = {**archive, **replace}
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(ValueError, match=message):
        load(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"hello world", r"\(11 bytes\) is not a .npz archive"),
        ("half", "damaged or incomplete"),
    ],
)
def test_files_that_are_no_archive(tmp_path, content, message):
    path = tmp_path / "a.npz"
    make_npz(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == "half" else content)
    with pytest.raises(ValueError, match=message):
        load(str(path))


def test_a_damaged_directory_of_the_archive_is_noticed(tmp_path):
    path = tmp_path / "a.npz"
    make_npz(path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x01\x02")] = 0  # the first entry of the central directory
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load(str(path))


@pytest.mark.parametrize("compressed", [True, False])
def test_a_flipped_byte_is_noticed(tmp_path, compressed):
    path = tmp_path / "a.npz"
    arrays = make_npz(path)
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 4] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="damaged"):
        load(str(path))


def test_a_damaged_array_header_is_noticed(tmp_path):
    import zipfile

    path = tmp_path / "a.npz"
    make_npz(path)
    with zipfile.ZipFile(path, "w") as archive:
        for key in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{key}.npy", b"\x93NUMPY\x01\x00" + b"\x10\x00" + b"{'descr': nonsen")
    with pytest.raises(ValueError, match="x_train is damaged"):
        load(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        for key in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(key, b"text")
    with pytest.raises(ValueError, match="x_train is not an array"):
        load(str(path))


def test_a_single_array_is_no_archive(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="is a single array"):
        load(str(tmp_path / "a.npz"))


def test_pickles_are_never_loaded(tmp_path):
    import pickle

    (tmp_path / "a.npz").write_bytes(pickle.dumps({"x_train": 1}))
    with pytest.raises(ValueError, match=r"is not a \.npz archive"):
        load(str(tmp_path / "a.npz"))


def test_unknown_specs(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'digit'; did you mean 'digits'"):
        load("digit")
    with pytest.raises(FileNotFoundError, match=r"no data at there/nothing\.npz"):
        load("there/nothing.npz")
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"must be a \.npz archive, not '\.csv'"):
        load(str(tmp_path / "a.csv"))


def make_folder(root, mode="RGB", size=(5, 4), test="val", suffix="png"):
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), (test, 2)):
        for name in ("eel", "cod"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                shape = (*size, 3) if mode == "RGB" else size
                Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(root / part / name / f"{i}.{suffix}")
    return root


def test_image_folder(tmp_path):
    data = load(str(make_folder(tmp_path)))
    assert data.x_train.shape == (12, 3, 5, 4)
    assert data.x_test.shape == (4, 3, 5, 4)
    assert data.classes == ("cod", "eel")
    assert data.y_train.tolist() == [0] * 6 + [1] * 6
    pixel = np.asarray(Image.open(tmp_path / "train" / "cod" / "0.png"), dtype=np.float64)[1, 2] / 255
    torch.testing.assert_close(data.x_train[0, :, 1, 2] * data.std + data.mean, torch.tensor(pixel).float())


def test_image_folder_greyscale_stays_one_channel_and_mixed_becomes_rgb(tmp_path):
    make_folder(tmp_path, mode="L", test="test")
    assert load(str(tmp_path)).shape == (1, 5, 4)
    Image.fromarray(np.zeros((5, 4, 3), np.uint8)).save(tmp_path / "train" / "cod" / "9.png")
    assert load(str(tmp_path)).shape == (3, 5, 4)


def test_image_folder_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"is not an image folder.*it holds: nothing"):
        load(str(tmp_path / "empty"))
    root = make_folder(tmp_path / "a")
    Image.fromarray(np.zeros((7, 4, 3), np.uint8)).save(root / "val" / "cod" / "9.png")
    with pytest.raises(ValueError, match=r"9\.png is 4x7 pixels, the images before it 4x5"):
        load(str(root))
    (root / "val" / "cod" / "9.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"9\.png is damaged or not an image"):
        load(str(root))
    whole = (root / "train" / "cod" / "0.png").read_bytes()
    (root / "val" / "cod" / "9.png").write_bytes(whole[:60])
    with pytest.raises(ValueError, match=r"9\.png is damaged or not an image"):
        load(str(root))
    (root / "train" / "cod" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0\.png is damaged or not an image"):
        load(str(root))
    (root / "val" / "hake").mkdir()
    with pytest.raises(ValueError, match="holds the classes hake"):
        load(str(root))
    for part in ("train", "val"):
        (tmp_path / "b" / part).mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no class folders"):
        load(str(tmp_path / "b"))
    for part in ("train", "val"):
        (tmp_path / "b" / part / "cod").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        load(str(tmp_path / "b"))


class ClassLabel:
    def __init__(self, *names):
        self.names = list(names)


class Picture:
    pass


Picture.__name__ = "Image"


class Split(dict):
    features: dict

    def __init__(self, features, **columns):
        super().__init__(columns)
        self.features = features


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub's client: `datasets.load_dataset` answers from a dictionary."""
    module = types.ModuleType("datasets")
    known = {}
    module.load_dataset = lambda name, config: known[name, config]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return known


def pictures(count, size=(4, 4), mode="RGB"):
    return [Image.new(mode, size, color=i if mode == "L" else (i, i, i)) for i in range(count)]


def test_hub(hub):
    features = {"img": Picture(), "label": ClassLabel("no", "yes")}
    split = Split(features, img=pictures(6), label=[0, 1] * 3)
    hub["ns/things", None] = {"train": split, "validation": Split(features, img=pictures(2), label=[0, 1])}
    hub["ns/grey", "small"] = {
        "train": Split(features, img=pictures(6, mode="L"), label=[0, 1] * 3),
        "test": Split(features, img=pictures(2, mode="L"), label=[1, 0]),
    }
    data = load("hf:ns/things")
    assert data.x_train.shape == (6, 3, 4, 4)
    assert data.classes == ("no", "yes")
    assert load("hf:ns/grey:small").shape == (1, 4, 4)


def test_hub_errors(hub, monkeypatch):
    with pytest.raises(ValueError, match="names no data set"):
        load("hf:")
    with pytest.raises(ValueError, match="hf:ns/none could not be loaded"):
        load("hf:ns/none")
    good = {"img": Picture(), "label": ClassLabel("no", "yes")}
    hub["a", None] = {"train": Split(good, img=pictures(6), label=[0, 1] * 3)}
    with pytest.raises(ValueError, match="has the splits train; needed"):
        load("hf:a")
    split = Split({"text": "x"}, text=[])
    hub["b", None] = {"train": split, "test": split}
    with pytest.raises(ValueError, match=r"has the columns text \(str\); needed"):
        load("hf:b")
    uneven = Split(good, img=pictures(3) + pictures(3, size=(5, 5)), label=[0, 1] * 3)
    hub["c", None] = {"train": uneven, "test": uneven}
    with pytest.raises(ValueError, match="differ in size"):
        load("hf:c")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'flexnorm\[hf\]'"):
        load("hf:a")
