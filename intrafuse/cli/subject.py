"""The subject of commands that measure prunings: a network, test and training images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from intrafuse.cli.options import RANDOM, Batches, Common, DataOptions, ModelOptions
from intrafuse.cli.output import show_note

if TYPE_CHECKING:
    from torch import nn

    from intrafuse.catalog.data import Images

__all__ = ["Subject"]


@dataclass(frozen=True)
class Subject:
    """A network and the images that it is measured on.

    Attributes:
        model, example_inputs: the network, and the inputs to trace it with.
        test: images for the measurement.
        training: batches of images for metrics and repair, or None.
        title: names of network and data, for a table.
        record: names of network and data, for a record.
    """

    model: nn.Module
    example_inputs: Any
    test: Images
    training: Batches | None
    title: str
    record: dict[str, Any]

    @classmethod
    def of(cls, model: ModelOptions, data: DataOptions, common: Common) -> Subject:
        """Build the network that the options name, and load its images."""
        resolved = model.resolve(common.device)
        if model.is_random:
            show_note(RANDOM)
        spec = data.spec(resolved.input_shape)
        test = data.images(spec, "test", data.limit)
        return cls(
            resolved.model,
            resolved.example_inputs,
            test,
            data.batches(spec, common),
            f"{model.model}, {len(test):,} images of {spec}",
            {**model.record(), "data": spec, "images": len(test)},
        )
