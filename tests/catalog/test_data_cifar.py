"""CIFAR files: exact pixels from parquet and from pickles first, then every broken file."""

from __future__ import annotations

import decimal
import io
import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from intrafuse.catalog.data import load_data
from intrafuse.support.errors import IntrafuseError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(n: int, *, size: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def write_parquet(path: Path, images: list[bytes | None], labels: list, column: str = "label"):
    rows = [{"bytes": image, "path": "x.png"} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"img": pa.array(rows, kind), column: pa.array(labels)}), path)


def write_batch(path: Path, content: object, protocol: int = 2) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol))


# --- CIFAR as parquet ---------------------------------------------------------------------------


def test_parquet_gives_pixels_and_labels(tmp_path):
    images = pixels(5)
    write_parquet(tmp_path / "test.parquet", [png(i) for i in images], [0, 9, 3, 3, 1])
    data = load_data(f"cifar10:{tmp_path}")
    assert torch.equal(data.images, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert data.labels.tolist() == [0, 9, 3, 3, 1] and data.labels.dtype == torch.int64
    assert data.classes[0] == "airplane" and data.classes[9] == "truck"
    assert (data.mean, data.std, data.name) == (MEAN, STD, f"cifar10:{tmp_path}")


def test_parquet_in_shards_and_a_limit_across_them(tmp_path):
    images = pixels(6)
    for i in range(2):
        part = [png(image) for image in images[3 * i : 3 * i + 3]]
        write_parquet(
            tmp_path / f"train-0000{i}-of-00002.parquet", part, [3 * i, 3 * i + 1, 3 * i + 2]
        )
    spec = f"cifar10:{tmp_path}"
    assert load_data(spec, split="train").labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert load_data(spec, split="train", limit=4).labels.tolist() == [0, 1, 2, 3]
    assert load_data(spec, split="train", limit=1).images.shape == (1, 3, 32, 32)


def test_a_limit_decodes_nothing_behind_it(tmp_path):
    write_parquet(tmp_path / "test.parquet", [png(pixels(1)[0]), b"broken"], [1, 2])
    assert len(load_data(f"cifar10:{tmp_path}", limit=1)) == 1


def test_cifar100_reads_fine_labels(tmp_path):
    write_parquet(tmp_path / "test.parquet", [png(pixels(1)[0])], [99], "fine_label")
    data = load_data(f"cifar100:{tmp_path}")
    assert len(set(data.classes)) == 100 and list(data.classes) == sorted(data.classes)
    assert data.classes[data.labels[0]] == "worm"


GOOD = png(pixels(1)[0])


@pytest.mark.parametrize(
    ("images", "labels", "column", "message"),
    [
        ([GOOD], [1], "target", "needs the columns img and label .*target"),
        ([GOOD, b"no image"], [1, 2], "label", "cannot be decoded.*test.parquet, row 1"),
        ([GOOD[:-40]], [1], "label", "cannot be decoded.*row 0"),
        ([None], [1], "label", "must hold the bytes .*row 0"),
        ([png(pixels(1, size=16)[0])], [1], "label", r"32 x 32 .*\(16, 16\)"),
        ([GOOD], [10], "label", r"0\.\.9.*got 10"),
        ([GOOD], [None], "label", "whole numbers"),
        ([GOOD], [0.5], "label", "whole numbers"),
        ([GOOD], np.array([2**64 - 1], np.uint64), "label", "64 bits"),
        ([GOOD], [decimal.Decimal(10**20)], "label", "whole numbers"),
        ([GOOD], [np.datetime64("2020-01-01T00:00:00.000000001")], "label", "whole|not parquet"),
        ([], [], "label", "no images"),
    ],
)
def test_bad_parquet_is_refused(tmp_path, images, labels, column, message):
    write_parquet(tmp_path / "test.parquet", images, labels, column)
    with pytest.raises(IntrafuseError, match=message):
        load_data(f"cifar10:{tmp_path}")


def test_truncated_parquet_is_refused(tmp_path):
    write_parquet(tmp_path / "test.parquet", [GOOD] * 3, [1, 2, 3])
    content = (tmp_path / "test.parquet").read_bytes()
    for broken in (content[:-20], content[: len(content) // 2], b"", b"x" * 100):
        (tmp_path / "test.parquet").write_bytes(broken)
        with pytest.raises(IntrafuseError, match="not parquet"):
            load_data(f"cifar10:{tmp_path}")


def test_shared_cifar10_is_balanced(shared):
    data = load_data(f"cifar10:{shared}/data/cifar10")
    assert data.images.shape == (10000, 3, 32, 32)
    assert data.labels.bincount().tolist() == [1000] * 10
    assert abs(data.images.float().mean() / 255 - 0.4765) < 1e-3


# --- CIFAR as pickles ---------------------------------------------------------------------------


def chw(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("inside", [True, False])
def test_torchvisions_folder_is_read(tmp_path, protocol, inside):
    images = pixels(10)
    folder = tmp_path / "cifar-10-batches-py"
    for i in range(5):
        batch = {"data": chw(images[2 * i : 2 * i + 2]), "labels": [i, i + 1], "batch_label": "x"}
        write_batch(folder / f"data_batch_{i + 1}", batch, protocol)
    data = load_data(f"cifar10:{folder if inside else tmp_path}", split="train", limit=9)
    assert torch.equal(data.images, torch.from_numpy(images[:9]).permute(0, 3, 1, 2))
    assert data.labels.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_pickle_of_python_2_is_read(tmp_path):
    # The published files were written by Python 2, in which the bytes of an array are a string.
    data = chw(pixels(2))
    kind = (
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
        + b"J\xff\xff\xff\xff" * 2
        + b"K\x00tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
    array += b"K\x02M\x00\x0c\x86" + kind + b"\x89T" + struct.pack("<i", data.size) + data.tobytes()
    content = b"\x80\x02}(U\x04data" + array + b"tbU\x06labels](K\x07K\x02eu."
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    path.parent.mkdir()
    path.write_bytes(content)
    loaded = load_data(f"cifar10:{tmp_path}")
    assert loaded.labels.tolist() == [7, 2]
    assert torch.equal(loaded.images.flatten(1), torch.from_numpy(data))


def test_cifar100_pickles_use_fine_labels(tmp_path):
    batch = {"data": chw(pixels(2)), "fine_labels": [5, 99], "coarse_labels": [1, 2]}
    write_batch(tmp_path / "cifar-100-python" / "test", batch)
    assert load_data(f"cifar100:{tmp_path}").labels.tolist() == [5, 99]


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickled_code_is_refused_and_not_run(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    batch = {"data": chw(pixels(1)), "labels": [1], "extra": Malicious()}
    write_batch(tmp_path / "cifar-10-batches-py" / "test_batch", batch, protocol)
    with pytest.raises(IntrafuseError, match=r"code that a data set does not need.*\.system"):
        load_data(f"cifar10:{tmp_path}")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "name",
    ["builtins.eval", "numpy.load", "numpy.core.multiarray.fromfile", "numpy.ndarray.tofile"],
)
def test_only_array_names_are_unpickled(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    content = b"\x80\x04" + b"".join(
        b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, attribute)
    )
    write_batch(tmp_path / "cifar-10-batches-py" / "test_batch", {})
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content + b"\x93.")
    with pytest.raises(IntrafuseError, match=name):
        load_data(f"cifar10:{tmp_path}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no entries data and labels"),
        ({"data": chw(pixels(1))}, "no entries data and labels"),
        ({"data": chw(pixels(1)).astype(np.int16), "labels": [1]}, "uint8 of shape"),
        ({"data": chw(pixels(1))[:, :-1], "labels": [1]}, "uint8 of shape"),
        ({"data": chw(pixels(2)), "labels": [1]}, "one label each"),
        ({"data": chw(pixels(1)), "labels": ["cat"]}, "whole numbers"),
    ],
)
def test_bad_batches_are_refused(tmp_path, content, message):
    write_batch(tmp_path / "cifar-10-batches-py" / "test_batch", content)
    with pytest.raises(IntrafuseError, match=message):
        load_data(f"cifar10:{tmp_path}")


def test_a_truncated_batch_is_refused(tmp_path):
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    write_batch(path, {"data": chw(pixels(1)), "labels": [1]})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(IntrafuseError, match=r"cannot be read.*test_batch"):
        load_data(f"cifar10:{tmp_path}")


def test_a_folder_without_the_split_names_what_it_wants(tmp_path):
    with pytest.raises(IntrafuseError, match=r"neither test\.parquet nor cifar-10-batches-py/t"):
        load_data(f"cifar10:{tmp_path}")


@pytest.mark.parametrize("module", ["pyarrow.parquet", "PIL.Image"])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, module):
    write_parquet(tmp_path / "test.parquet", [GOOD], [1])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(IntrafuseError, match=r'pip install "intrafuse\[data\]"'):
        load_data(f"cifar10:{tmp_path}")
