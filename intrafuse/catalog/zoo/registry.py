"""Resolve a MODEL string to a network: the registry ZOO, and prefixes for other sources.

To add a network, write a factory in networks.py and enter it in ZOO.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intrafuse.catalog.zoo import networks
from intrafuse.catalog.zoo.hub import from_hub
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.extras import import_extra

__all__ = ["ZOO", "ResolvedModel", "ZooEntry", "from_zoo", "resolve_model"]

Shape = tuple[int, ...]
_IMAGENET: Shape = (3, 224, 224)
_COUNTS = ("image_size", "in_channels", "num_classes")


@dataclass(frozen=True)
class ZooEntry:
    """A network of the zoo: its factory and the shape of its input.

    Args:
        factory: builds the network; all its keyword arguments have defaults.
        input_shape: (C, H, W) of one image, with default arguments.
    """

    factory: Callable[..., nn.Module]
    input_shape: tuple[int, int, int]


@dataclass(frozen=True)
class ResolvedModel:
    """A network with the inputs to trace it and the arguments to build it again.

    Args:
        name: the MODEL string.
        model: the network in evaluation mode, with random weights unless its factory loads weights.
        example_inputs: arguments of its forward for a batch of one, positional or by name.
        arguments: the keyword arguments of its factory that were set explicitly.
    """

    name: str
    model: nn.Module
    example_inputs: tuple[Tensor, ...] | dict[str, Tensor]
    arguments: Mapping[str, object] = field(default_factory=dict)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample of the first input."""
        given = self.example_inputs
        first = next(iter(given.values())) if isinstance(given, dict) else given[0]
        return tuple(first.shape[1:])


ZOO: dict[str, ZooEntry] = {
    "vgg11_bn": ZooEntry(networks.vgg11_bn, (3, 32, 32)),
    "resnet18": ZooEntry(networks.resnet18, (3, 32, 32)),
    "resnet20": ZooEntry(networks.resnet20, (3, 32, 32)),
    "resnet32": ZooEntry(networks.resnet32, (3, 32, 32)),
    "resnet44": ZooEntry(networks.resnet44, (3, 32, 32)),
    "resnet56": ZooEntry(networks.resnet56, (3, 32, 32)),
    "digits_resnet": ZooEntry(networks.digits_resnet, (1, 8, 8)),
    "mlp": ZooEntry(networks.mlp, (1, 8, 8)),
}


def resolve_model(
    name: str, *, input_shape: tuple[int, ...] | None = None, **arguments: object
) -> ResolvedModel:
    """Build the network that a MODEL string names.

    Args:
        name: a name in ZOO, `package.module:factory` (a callable or an nn.Module; the current
            folder is searched too), `torchvision:NAME`, `timm:NAME`, `hf:FOLDER` for a folder that
            transformers saved, or `hf:NAME`.
        input_shape: shape of one input without its batch, (C, H, W) for images. None uses the
            known shape of the network, or the attribute ``example_inputs`` of the network or of
            its factory.
        arguments: keyword arguments of the factory, such as num_classes=100.

    Raises:
        IntrafuseError: the name (the message lists near matches), an argument or the input shape is
            unknown, a module cannot be imported, or an extra is not installed.

    >>> resolved = resolve_model("digits_resnet", width=0.5)
    >>> resolved.model.linear.in_features, tuple(resolved.example_inputs[0].shape)
    (32, (1, 1, 8, 8))
    """
    source, colon, rest = name.partition(":")
    if not colon:
        model, example = from_zoo(name, arguments)
    elif source in _SOURCES:
        model, example = _SOURCES[source](rest, arguments)
    else:
        model, example = _from_module(name, arguments)
    if input_shape is not None:
        example = input_shape
    return ResolvedModel(name, model.eval(), _example_inputs(example, name), arguments)


def _example_inputs(example: object, name: str) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Turn a shape, a tensor, or a tuple or dictionary of tensors into arguments of forward."""
    if isinstance(example, dict):
        return example
    if isinstance(example, Tensor):
        return (example,)
    if isinstance(example, tuple | list) and example:
        if all(isinstance(item, Tensor) for item in example):
            return tuple(example)
        if all(type(item) is int and item > 0 for item in example):
            generator = torch.Generator().manual_seed(0)
            return (torch.randn(1, *example, generator=generator),)
    if example is None:
        raise IntrafuseError(
            "the shape of the model's input is unknown",
            value=name,
            remedy="give --input-shape 3,224,224 (in Python input_shape=(3, 224, 224)), "
            "or set example_inputs on the factory",
            usage=True,
        )
    raise IntrafuseError(
        "an input must be positive sizes (C, H, W), a tensor or a tuple of tensors",
        value=example,
        layer=name,
        usage=True,
    )


def _near(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:12]
    return "try " + " or ".join(near)


def from_zoo(name: str, arguments: Mapping[str, Any]) -> tuple[nn.Module, Shape]:
    """Build a network of the zoo in training mode; return it with the shape of one image.

    Raises:
        IntrafuseError: the name or an argument is unknown, or an argument has the wrong type.
    """
    if name not in ZOO:
        raise IntrafuseError(
            "unknown model", value=name, remedy=f"{_near(name, ZOO)}, or module:factory", usage=True
        )
    entry = ZOO[name]
    accepted = sorted(inspect.signature(entry.factory).parameters)
    for argument in sorted(arguments):
        if argument not in accepted:
            raise IntrafuseError(
                f"{name} takes the arguments {', '.join(accepted)}", value=argument, usage=True
            )
        count = arguments[argument]
        if argument in _COUNTS and (type(count) is not int or count < 1):
            raise IntrafuseError(
                f"{argument} must be a whole number of at least 1",
                value=count,
                layer=name,
                usage=True,
            )
    channels, height, width = entry.input_shape
    shape = (
        arguments.get("in_channels", channels),
        arguments.get("image_size", height),
        arguments.get("image_size", width),
    )
    return _call(entry.factory, arguments, name), shape


def _call(factory: Callable[..., Any], arguments: Mapping[str, Any], name: str) -> nn.Module:
    try:
        model = factory(**arguments)
    except IntrafuseError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise IntrafuseError(
            f"the model cannot be built ({type(error).__name__}: {error})", value=name
        ) from error
    if not isinstance(model, nn.Module):
        raise IntrafuseError(
            "the factory must return an nn.Module", value=type(model).__name__, layer=name
        )
    return model


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    # Unlike python itself, a console script does not search the current folder. The folder goes
    # last in the path, so that a file in it never hides an installed package.
    folder = str(Path.cwd())
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _from_module(name: str, arguments: Mapping[str, Any]) -> tuple[nn.Module, object]:
    module_name, _, attribute = name.partition(":")
    with _current_folder_importable():
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # the user's own code may raise anything
            raise IntrafuseError(
                f"the module cannot be imported ({type(error).__name__}: {error})",
                value=name,
                remedy="run in its folder or install its package; the form is module:factory",
            ) from error
        if not hasattr(module, attribute):
            near = _near(attribute, (n for n in vars(module) if not n.startswith("_")))
            raise IntrafuseError(f"{module_name} has no {attribute!r}", value=name, remedy=near)
        factory = getattr(module, attribute)
        if isinstance(factory, nn.Module):
            if arguments:
                raise IntrafuseError("a finished model takes no arguments", value=dict(arguments))
            model = factory
        elif callable(factory):
            model = _call(factory, arguments, name)
        else:
            raise IntrafuseError(
                "the name must stand for a factory or an nn.Module", value=name, usage=True
            )
    example = getattr(model, "example_inputs", None)
    return model, getattr(factory, "example_inputs", None) if example is None else example


def _from_torchvision(name: str, arguments: Mapping[str, Any]) -> tuple[nn.Module, object]:
    models = import_extra("torchvision.models", "zoo")
    if name not in models.list_models():
        raise IntrafuseError(
            "unknown torchvision model",
            value=name,
            remedy=_near(name, models.list_models()),
            usage=True,
        )
    return _call(lambda **kw: models.get_model(name, **kw), arguments, name), _IMAGENET


def _from_timm(name: str, arguments: Mapping[str, Any]) -> tuple[nn.Module, object]:
    timm = import_extra("timm", "zoo")
    if not timm.is_model(name.partition(".")[0]):
        raise IntrafuseError(
            "unknown timm model", value=name, remedy=_near(name, timm.list_models()), usage=True
        )
    model = _call(lambda **kw: timm.create_model(name, **kw), arguments, name)
    return model, tuple(getattr(model, "default_cfg", {}).get("input_size", _IMAGENET))


_SOURCES: dict[str, Callable[[str, Mapping[str, Any]], tuple[nn.Module, object]]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "hf": from_hub,
}
