"""CIFAR-10 and CIFAR-100: parquet files of the public hub, or torchvision's pickled batches."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from intrafuse.catalog.data.images import (
    RGB_MEAN,
    RGB_STD,
    Images,
    decode,
    open_folder,
)
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.extras import import_extra
from intrafuse.support.reading import require_file

__all__ = ["load_cifar10", "load_cifar100"]


@dataclass(frozen=True)
class _Layout:
    """Differences between CIFAR-10 and CIFAR-100: classes, and the names used in files."""

    name: str
    classes: tuple[str, ...]
    column: str  # labels in the parquet files
    key: str  # labels in the pickled batches
    folder: str  # of the pickled batches
    batches: dict[str, tuple[str, ...]]


_CIFAR10 = _Layout(
    "cifar10",
    tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
    "label",
    "labels",
    "cifar-10-batches-py",
    {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
)
_CIFAR100 = _Layout(
    "cifar100",
    tuple(
        """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
        butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
        crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
        keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
        mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain
        plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
        skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
        television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman
        worm""".split()
    ),
    "fine_label",
    "fine_labels",
    "cifar-100-python",
    {"train": ("train",), "test": ("test",)},
)


def _load(argument: str, split: str, limit: int | None, *, layout: _Layout) -> Images:
    """Load {train,test}.parquet, its shards (train-*.parquet), or torchvision's folder.

    Args:
        argument: FOLDER. In torchvision's layout it may also be the folder of the batches itself.
        split: "train" or "test".
        limit: number of images to keep; None keeps all.

    Raises:
        IntrafuseError: a folder, file or column is missing, a file or image is broken, or a label
            is invalid.
    """
    folder = open_folder(argument, example=f"{layout.name}:FOLDER")
    single, shards = folder / f"{split}.parquet", sorted(folder.glob(f"{split}-*.parquet"))
    names = layout.batches[split]
    batches = [[root / name for name in names] for root in (folder / layout.folder, folder)]
    complete = [paths for paths in batches if all(path.is_file() for path in paths)]
    if single.is_file() or shards:
        parts = _read_parquet([single] if single.is_file() else shards, layout.column, limit)
    elif complete:
        parts = [_read_batch(path, layout.key) for path in complete[0]]
    else:
        expected = f"{split}.parquet nor {layout.folder}/" + ", ".join(names)
        raise IntrafuseError(f"the folder holds neither {expected}", value=argument)
    pixels, labels = (np.concatenate(arrays)[:limit] for arrays in zip(*parts, strict=True))
    return Images(
        images=torch.from_numpy(np.ascontiguousarray(pixels)),
        labels=torch.from_numpy(labels),
        classes=layout.classes,
        mean=RGB_MEAN,
        std=RGB_STD,
        name=f"{layout.name}:{argument}",
    )


load_cifar10 = partial(_load, layout=_CIFAR10)
load_cifar100 = partial(_load, layout=_CIFAR100)


def _read_parquet(
    paths: list[Path], column: str, limit: int | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Read the columns img = {bytes, path} and labels; decode at most `limit` images."""
    parquet = import_extra("pyarrow.parquet", "data")
    parts, left = [], limit
    for path in paths:
        try:
            require_file(path)
            file = parquet.ParquetFile(path)
            missing = sorted({"img", column} - set(file.schema_arrow.names))
            if missing:
                raise IntrafuseError(
                    f"the file needs the columns img and {column}",
                    value=file.schema_arrow.names,
                    layer=str(path),
                )
            table = file.read(columns=["img", column])[:left]
            images, labels = (table[name].to_pylist() for name in ("img", column))
        except IntrafuseError:
            raise
        except Exception as error:  # pyarrow's errors have many base classes
            raise IntrafuseError(f"the file is not parquet ({error})", value=str(path)) from error
        pixels = np.empty((len(table), 32, 32, 3), np.uint8)
        for row, image in enumerate(images):
            pixels[row] = _decode_row(image, f"{path}, row {row}")
        parts.append((pixels.transpose(0, 3, 1, 2), _check_labels(labels, path)))
        left = None if left is None else left - len(table)
        if left == 0:
            break
    return parts


def _decode_row(image: Any, where: str) -> Any:
    raw = image.get("bytes") if isinstance(image, dict) else None
    if raw is None:
        raise IntrafuseError("the column img must hold the bytes of images", layer=where)
    decoded = decode(io.BytesIO(raw), where=where)
    if decoded.size != (32, 32):
        raise IntrafuseError("CIFAR images are 32 x 32", value=decoded.size, layer=where)
    return decoded


def _check_labels(values: Any, path: Path) -> np.ndarray:
    labels = np.array(values, object).reshape(-1)
    if not all(isinstance(label, int | np.integer) for label in labels):
        raise IntrafuseError("labels must be whole numbers", layer=str(path))
    try:
        return labels.astype(np.int64)
    except OverflowError as error:
        raise IntrafuseError("labels must fit 64 bits", layer=str(path)) from error


def _latin1(text: str, encoding: str) -> bytes:
    """Replace codecs.encode, which old pickles use to write bytes."""
    return text.encode("latin1")


_HARMLESS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}
for _core in ("numpy.core", "numpy._core"):  # the module names before and since NumPy 2
    _HARMLESS[f"{_core}.multiarray", "_reconstruct"] = np.empty(0).__reduce__()[0]
    _HARMLESS[f"{_core}.numeric", "_frombuffer"] = np.empty(0).__reduce_ex__(5)[0]


class _Unpickler(pickle.Unpickler):
    """Unpickle arrays and plain containers; refuse all other names, so no code can run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise IntrafuseError(
                "the file asks for code that a data set does not need",
                value=f"{module}.{name}",
                remedy="download the file from www.cs.toronto.edu/~kriz/cifar.html",
            )
        return _HARMLESS[module, name]


def _read_batch(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one batch of the original "python version": data (N, 3072) and a list of labels."""
    try:
        with path.open("rb") as file:
            batch = _Unpickler(file, encoding="latin1").load()
    except IntrafuseError:
        raise
    except Exception as error:  # a broken pickle can fail in any way
        raise IntrafuseError(f"the file cannot be read ({error})", value=str(path)) from error
    if not isinstance(batch, dict) or not {"data", key} <= set(batch):
        raise IntrafuseError(f"the file has no entries data and {key}", value=str(path))
    data = batch["data"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
        raise IntrafuseError("the entry data must be uint8 of shape (N, 3072)", value=str(path))
    return data.reshape(-1, 3, 32, 32), _check_labels(batch[key], path)
