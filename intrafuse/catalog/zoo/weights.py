"""Load weights from safetensors. All checks run before any tensor changes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from intrafuse.support.errors import IntrafuseError
from intrafuse.support.reading import require_file

__all__ = ["file_sha256", "is_finite", "load_weights", "read_tensors", "require_keys"]

PACKED = getattr(torch, "float4_e2m1fn_x2", None)  # since PyTorch 2.8
_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


def file_sha256(path: str | Path) -> str:
    """Compute the SHA-256 of a file.

    Returns:
        64 hexadecimal digits.

    Raises:
        IntrafuseError: the file does not exist or cannot be read.

    >>> file_sha256(__file__) == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    True
    """
    try:
        require_file(path)
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise IntrafuseError(
            f"the file cannot be read ({error.strerror})", value=str(path)
        ) from error


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy the weights of a safetensors file into a model of the same architecture.

    The file may lack counters of batch norm (num_batches_tracked); they then keep their values. Of
    tied parameters, which are one tensor under several names, the file needs only one name.

    Args:
        model: changed in place, but only if the whole file fits.
        path: a .safetensors file; floating-point types are converted to the model's.

    Raises:
        IntrafuseError: the file is missing, truncated, corrupt or pickled (no file is unpickled);
            keys are missing, unexpected or have the wrong shape (one message lists all); or a
            parameter holds NaN or infinity.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file(source.state_dict(), f"{folder}/model.safetensors")
    ...     load_weights(target, f"{folder}/model.safetensors")
    >>> bool((source.weight == target.weight).all())
    True
    """
    tensors = read_tensors(Path(path))
    require_keys(model, tensors, path)
    wanted = model.state_dict()
    tensors = {name: tensor.to(wanted[name].dtype) for name, tensor in tensors.items()}
    broken = [n for n, t in sorted(tensors.items()) if not is_finite(t)]
    if broken:
        raise IntrafuseError("weights must be finite", value=str(path), layer=", ".join(broken))
    model.load_state_dict(tensors, strict=False)


def is_finite(tensor: Tensor, *, infinite: bool = False) -> bool:
    """Tell whether a tensor of any dtype is free of NaN, and of infinity unless `infinite`."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    value = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no isfinite
    return not bool((value.isnan() if infinite else ~value.isfinite()).any())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file without unpickling anything.

    Raises:
        IntrafuseError: the file is missing, truncated, corrupt or pickled.
    """
    try:
        require_file(path)
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise IntrafuseError(
            f"the weights cannot be read ({error.strerror})", value=str(path)
        ) from error
    # Safetensors start with eight bytes of length, which may look like a pickle, and a brace.
    pickled = start.startswith(_PICKLE_STARTS) and start[8:] != b"{"
    if pickled or path.suffix.lower() in _PICKLE_SUFFIXES:
        raise IntrafuseError(
            "weights are read only from safetensors, and nothing is unpickled",
            value=str(path),
            remedy="convert a state dict that you trust with safetensors.torch.save_file("
            "torch.load(FILE, weights_only=True), 'model.safetensors')",
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, LookupError, RuntimeError, TypeError) as error:
        raise IntrafuseError(
            f"the file is not safetensors, or is truncated or corrupt ({error})", value=str(path)
        ) from error
    packed = sorted(name for name, tensor in tensors.items() if tensor.dtype == PACKED)
    if packed:
        raise IntrafuseError(
            "a dtype that packs two numbers into one byte is not supported",
            value=str(path),
            layer=", ".join(packed),
        )
    return tensors


def require_keys(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    path: str | Path,
    remedy: str = "check the model's name and arguments, such as num_classes",
) -> None:
    """Refuse weights whose names, shapes or kinds of dtype differ from the model's.

    Args:
        model: the network; nothing changes.
        tensors: the weights by name; on the meta device, if they were not read yet.
        path: where they lie, for the error.
        remedy: what to do, for the error.

    Raises:
        IntrafuseError: keys are missing, unexpected or have the wrong shape.
    """
    wanted = model.state_dict(keep_vars=True)
    given = {id(wanted[name]) for name in tensors if name in wanted}
    missing = [
        name
        for name, tensor in wanted.items()
        if name not in tensors
        and id(tensor) not in given  # else tied to a name in the file
        and not name.endswith("num_batches_tracked")
    ]
    unexpected = sorted(set(tensors) - set(wanted))
    misshapen = [
        f"{name} (file {_describe(tensors[name])}, model {_describe(tensor)})"
        for name, tensor in wanted.items()
        if name in tensors and not _fits(tensors[name], tensor)
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    found = [f"{kind}: {', '.join(sorted(names))}" for kind, names in kinds.items() if names]
    if found:
        raise IntrafuseError(
            f"the weights do not fit the model; {'; '.join(found)}",
            value=str(path),
            remedy=remedy,
        )


def _fits(given: Tensor, wanted: Tensor) -> bool:
    same_kind = given.is_floating_point() == wanted.is_floating_point()
    return given.shape == wanted.shape and same_kind and given.is_complex() == wanted.is_complex()


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
