"""Accuracy or loss on the plane through three networks (Garipov et al., arXiv 1802.10026)."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat
from torch import Tensor, nn

from intrafuse.catalog.data import Images
from intrafuse.pruning.plan import Plan
from intrafuse.study.evaluate.embed import embed, folded
from intrafuse.support.arguments import check_choice
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.files import replacing
from intrafuse.support.reading import read_json
from intrafuse.surgery.install import install

__all__ = ["Anchor", "Landscape", "landscape"]

Kind = Literal["accuracy", "loss"]
CELL = r"^(anchor \d+|\d+ \d+)$"  # names of values
MARGIN = 0.25  # margin around the networks, as a share of their extent


@dataclass(frozen=True)
class Anchor:
    """One of the three networks: its name, its place on the plane, and its value."""

    name: str
    x: float
    y: float
    value: float


@dataclass(frozen=True)
class Landscape:
    """Values on a grid of a plane through three networks.

    Attributes:
        measure: accuracy in percent, or mean cross-entropy (loss).
        anchors: the original and two pruned networks.
        x, y: coordinates of the grid's columns and rows, in units of the weights.
        values: values by row, then by column.
    """

    measure: str
    anchors: tuple[Anchor, ...]
    x: tuple[float, ...]
    y: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]

    def as_data(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class _Plane:
    """w = start + x u + y v, with u and v orthogonal and of length one, for each parameter."""

    start: Mapping[str, Tensor]
    u: Mapping[str, Tensor]
    v: Mapping[str, Tensor]
    places: tuple[tuple[float, float], ...]

    @classmethod
    def through(cls, points: Sequence[Mapping[str, Tensor]]) -> _Plane:
        start, second, third = points
        u = {name: second[name] - start[name] for name in start}
        length = _dot(u, u) ** 0.5
        w = {name: third[name] - start[name] for name in start}
        if length > 0:
            u = {name: tensor / length for name, tensor in u.items()}
            along = _dot(w, u)
            v = {name: w[name] - along * u[name] for name in w}
            height = _dot(v, v) ** 0.5
        if length == 0 or height <= 1e-6 * length:
            raise IntrafuseError(
                "a plane needs three networks that do not lie on one line",
                remedy="choose other methods, or a larger share to remove",
            )
        v = {name: tensor / height for name, tensor in v.items()}
        return cls(start, u, v, ((0.0, 0.0), (length, 0.0), (along, height)))

    def put(self, parameters: Mapping[str, Tensor], x: float, y: float) -> None:
        """Write the weights at a point of the plane into parameters."""
        for name, parameter in parameters.items():
            point = self.start[name] + x * self.u[name] + y * self.v[name]
            parameter.copy_(point)


def landscape(
    model: nn.Module,
    plans: Mapping[str, Plan],
    data: Images,
    *,
    kind: Kind = "accuracy",
    points: int = 21,
    state: str | Path | None = None,
    batch_size: int = 250,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Landscape:
    """Measure a grid on the plane through a network and two pruned versions of it.

    Theus et al., "Towards Meta-Pruning via Optimal Transport", section 5.2. Batch norm is folded.
    Pruned networks are embedded in the original's shapes (`embed`), which does not change their
    outputs.

    Args:
        model: the original; it is not changed.
        plans: two plans for the model, by the names of the pruned networks.
        data: labeled images.
        kind: the quantity to measure.
        points: grid points in each direction; a coarse grid is measured first.
        state: file that stores every value. A later call with the same networks, grid and images
            reuses these values. No other file is overwritten.
        batch_size: images in a batch.
        device: device to compute on.
        progress: called with (points measured, points in total).

    Raises:
        IntrafuseError: there are not two plans, or fewer than two points, the three networks lie on
            one line, values are not finite, or the state file is broken or belongs to another
            landscape.
    """
    check_choice("kind", kind, Kind)
    if len(plans) != 2 or type(points) is not int or points < 2:
        raise IntrafuseError(
            "a landscape needs two plans, and a grid of two points or more in each direction",
            value=(len(plans), points),
            usage=True,
        )
    first = next(iter(plans.values()))
    whole = folded(first, model)
    network = copy.deepcopy(install(model, whole)).to(device).eval()  # shares no tensor with model
    parameters = {n: p for n, p in network.named_parameters() if p.is_floating_point()}
    states = [whole.state, *(embed(plan, model).state for plan in plans.values())]
    plane = _Plane.through(
        [{name: s[name].to(device).float() for name in parameters} for s in states]
    )
    xs, ys = (_line([place[i] for place in plane.places], points) for i in (0, 1))
    batches = list(data.batches(batch_size, device=device))
    kept = _Kept(None if state is None else Path(state), _digest(plane, data, kind, xs, ys))

    def measure(place: tuple[float, float], name: str) -> float:
        if name not in kept.values:
            with torch.inference_mode():
                plane.put(parameters, *place)
                kept.note(name, _value(network, batches, kind))
        if progress is not None:
            progress(len(kept.values), points**2 + 3)
        return kept.values[name]

    names = ["original", *plans]
    anchors = [
        Anchor(name, *place, measure(place, f"anchor {i}"))
        for i, (name, place) in enumerate(zip(names, plane.places, strict=True))
    ]
    for i, j in _coarse_first(points):
        measure((xs[j], ys[i]), f"{i} {j}")
    values = [[kept.values[f"{i} {j}"] for j in range(points)] for i in range(points)]
    return Landscape(kind, tuple(anchors), xs, ys, tuple(tuple(row) for row in values))


def _value(network: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], kind: Kind) -> float:
    total, count = 0.0, 0
    for images, labels in batches:
        logits = network(images)
        if not logits.isfinite().all():
            raise IntrafuseError("a network on the plane returns numbers that are not finite")
        if kind == "accuracy":
            total += 100 * float((logits.argmax(1) == labels).sum())
        else:
            total += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
        count += len(labels)
    return total / count


def _dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def _line(places: Sequence[float], points: int) -> tuple[float, ...]:
    low, high = min(places), max(places)
    margin = MARGIN * (high - low)
    return tuple(torch.linspace(low - margin, high + margin, points, dtype=torch.double).tolist())


def _coarse_first(points: int) -> Iterator[tuple[int, int]]:
    """Visit every cell of a grid once, cells of coarse grids first."""
    seen: set[tuple[int, int]] = set()
    step = 1 << max(0, (points - 1).bit_length() - 1)
    while step:
        for i in range(0, points, step):
            for j in range(0, points, step):
                if (i, j) not in seen:
                    seen.add((i, j))
                    yield i, j
        step //= 2


class _State(BaseModel):
    """The content of a landscape's state file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    identity: str
    values: dict[Annotated[str, Field(pattern=CELL)], NonNegativeFloat]


@dataclass(eq=False)
class _Kept:
    """Measured values, in memory and in a file."""

    path: Path | None
    identity: str
    values: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is None or not self.path.exists():
            return
        try:
            state = _State.model_validate(read_json(self.path))
        except (OSError, ValueError) as error:  # also pydantic's errors
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise IntrafuseError(
                f"the state of a landscape cannot be read ({reason})",
                value=str(self.path),
                remedy="choose another file, or delete this one",
            ) from error
        if state.identity != self.identity:
            raise IntrafuseError(
                "this is the state of another landscape, with other networks, grid or images",
                value=str(self.path),
                remedy="choose another file, or delete this one",
            )
        self.values.update(state.values)

    def note(self, name: str, value: float) -> None:
        """Store a value."""
        self.values[name] = value
        if self.path is not None:
            with replacing(self.path) as temporary:
                content = {"identity": self.identity, "values": self.values}
                temporary.write_text(json.dumps(content), "utf-8")


def _digest(plane: _Plane, data: Images, kind: str, *lines: Sequence[float]) -> str:
    """Hash everything that determines the values of a landscape."""
    told = hashlib.sha256(f"{kind} {lines} {data.digest()}".encode())
    for tensors in (plane.start, plane.u, plane.v):
        for tensor in tensors.values():
            told.update(tensor.cpu().numpy().tobytes())
    return told.hexdigest()
