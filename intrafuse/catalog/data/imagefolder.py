"""A folder of images with one subfolder for each class; files are decoded batch by batch."""

from __future__ import annotations

from pathlib import Path

import torch

from intrafuse.catalog.data.images import RGB_MEAN, RGB_STD, ImageFiles, Images, open_folder
from intrafuse.support.errors import IntrafuseError

__all__ = ["load"]

LARGEST = 8192  # largest side in pixels
_SUFFIXES = (".png", ".jpg", ".jpeg")


def load(argument: str, split: str, limit: int | None) -> Images:
    """List FOLDER/{train,test|val}/CLASS/*, or FOLDER/CLASS/* for every split. Decode nothing.

    The classes alternate, so that the classes stay balanced under any limit.

    Args:
        argument: FOLDER, or FOLDER@SIZE for images of SIZE pixels instead of 224.
        split: "train" or "test".
        limit: number of images to keep; None keeps all.

    Raises:
        IntrafuseError: the folder is missing, a class has no .png or .jpg, there are no classes, or
            the size is invalid.
    """
    root, _, size = argument.rpartition("@")
    if not size.isdecimal():
        root, size = argument, "224"
    if len(size) > len(str(LARGEST)) or not 1 <= int(size) <= LARGEST:
        rule = f"the image size must be at least 1 and at most {LARGEST}"
        raise IntrafuseError(rule, value=argument, usage=True)
    folder, siblings = _split_folders(open_folder(root, example="imagefolder:FOLDER[@SIZE]"), split)
    classes = sorted({name for sibling in siblings for name in _class_names(sibling)})
    rows: list[tuple[int, int, Path]] = []
    for label, name in enumerate(classes):
        if (folder / name).is_dir():  # a split may lack a class; labels stay the same
            files = _class_files(folder / name)
            rows += [(rank, label, path) for rank, path in enumerate(files)]
    rows = sorted(rows)[:limit]
    return Images(
        images=ImageFiles(tuple(path for _, _, path in rows), int(size)),
        labels=torch.tensor([label for _, label, _ in rows], dtype=torch.int64),
        classes=tuple(classes),
        mean=RGB_MEAN,
        std=RGB_STD,
        name=f"imagefolder:{argument}",
    )


def _split_folders(root: Path, split: str) -> tuple[Path, list[Path]]:
    """Return the folder of the split, and the folders of all splits, which define the classes."""
    siblings = [root / n for n in ("train", "test", "val") if (root / n).is_dir()] or [root]
    names = ("train",) if split == "train" else ("test", "val")
    for name in names:
        if root / name in siblings:
            return root / name, siblings
    if siblings == [root]:
        return root, siblings
    raise IntrafuseError(f"the folder has no subfolder {' or '.join(names)}", value=str(root))


def _class_names(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]


def _class_files(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not files:
        raise IntrafuseError(
            "the class folder holds no .png or .jpg", value=str(folder), remedy="remove it"
        )
    return files
