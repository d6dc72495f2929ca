"""Check the arguments of a fusion before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Literal

from torch import nn

from intrafuse.allocation.patterns import near_matches
from intrafuse.graph.groups import ChannelGraph
from intrafuse.support.batches import require_rereadable
from intrafuse.support.errors import IntrafuseError

__all__ = [
    "Width",
    "check_data",
    "check_networks",
    "check_reference",
    "check_regularisation",
    "scaled_shares",
    "wanted_widths",
]

Width = Literal["first"] | float | Mapping[str, int]


def check_networks(models: object) -> list[nn.Module]:
    """Return the networks as a list; refuse fewer than two, or other objects."""
    if isinstance(models, nn.Module | str) or not isinstance(models, Iterable):
        raise IntrafuseError(
            "fusion takes a list of networks",
            value=type(models).__name__,
            usage=True,
            remedy="fuse([a, b], example_inputs)",
        )
    networks = list(models)
    for model in networks:
        if not isinstance(model, nn.Module):
            raise IntrafuseError(
                "a network must be a torch.nn.Module", value=type(model).__name__, usage=True
            )
    if len(networks) < 2:
        raise IntrafuseError("fusion needs two networks or more", value=len(networks), usage=True)
    return networks


def check_reference(reference: int, networks: int) -> int:
    """Return the index of the reference, from 0; a negative index counts from the end."""
    if type(reference) is not int or not -networks <= reference < networks:
        raise IntrafuseError(
            f"reference must be the index of one of {networks} networks",
            value=reference,
            usage=True,
        )
    return reference % networks


def check_regularisation(regularisation: float | None) -> None:
    """Refuse a regularization that is negative or not finite."""
    if regularisation is not None and not (_number(regularisation) and regularisation < math.inf):
        raise IntrafuseError(
            "regularisation must be finite and not negative",
            value=regularisation,
            usage=True,
        )


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and float(value) >= 0


def check_data(data: object, features: str, repair: str | None, samples: int) -> None:
    """Refuse missing data before anything is computed."""
    needs = {
        'features="activations"': features == "activations",
        "repair of batch norm": repair == "batchnorm",
    }
    for purpose, needed in needs.items():
        if needed and data is None:
            raise IntrafuseError(
                f"{purpose} needs unlabeled data",
                usage=True,
                remedy="pass data=, batches of inputs (on the command line --data)",
            )
    require_rereadable(data)
    if not (type(samples) is int and samples > 0):
        raise IntrafuseError("samples must be a whole number above 0", value=samples, usage=True)


def scaled_shares(weights: Sequence[float] | None, networks: int) -> tuple[float, ...]:
    """Scale the networks' weights to sum to one."""
    if weights is None:
        return (1 / networks,) * networks
    listed = isinstance(weights, list | tuple)
    if not listed or len(weights) != networks or not all(isinstance(w, Real) for w in weights):
        raise IntrafuseError(
            f"weights must be {networks} numbers, one for each network",
            value=weights,
            usage=True,
        )
    given = [float(weight) for weight in weights]
    if not all(math.isfinite(w) and w >= 0 for w in given) or sum(given) <= 0:
        raise IntrafuseError(
            "weights must be finite, not negative, and not all zero", value=given, usage=True
        )
    return tuple(weight / sum(given) for weight in given)


def wanted_widths(
    width: Width, graphs: Sequence[ChannelGraph], reference: ChannelGraph, method: str
) -> dict[str, int]:
    """Return the width of each group in the fused network, by group name."""
    sizes = dict(reference.widths)
    if isinstance(width, Mapping):
        for name, wanted in width.items():
            if name not in sizes:
                raise IntrafuseError(
                    "width names an unknown channel group",
                    value=name,
                    usage=True,
                    remedy=near_matches(str(name), sorted(sizes)),
                )
            most = sizes[name]
            if method == "moment":
                most = sum(graph.by_name[name].size for graph in graphs)
            if type(wanted) is not int or not 1 <= wanted <= most:
                rule = f"width must be a whole number from 1 to {most}"
                raise IntrafuseError(rule, value=wanted, layer=name, usage=True)
        return {**sizes, **width}
    if width == "first":
        return sizes
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 <= width < 1:
        raise IntrafuseError(
            'width must be "first", a share to remove in [0, 1), or channels by group',
            value=width,
            usage=True,
        )
    return {name: max(1, int(size * (1 - width) + 1e-9)) for name, size in sizes.items()}
