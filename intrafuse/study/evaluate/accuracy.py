"""Measure the share of images that a classifier labels correctly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from intrafuse.catalog.data import Images
from intrafuse.graph.trace import evaluating
from intrafuse.support.errors import IntrafuseError

__all__ = ["accuracy"]


def accuracy(
    model: nn.Module,
    data: Images,
    *,
    batch_size: int = 100,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Measure the top-1 accuracy of a classifier in evaluation mode.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes). The model and its training flags
            are not changed, also after an error.
        data: the images, with the same classes as the outputs of the model.
        batch_size: images in a batch; the result does not depend on it. On a CPU about 100 is
            fastest for small images.
        device: device of the model.
        progress: called after each batch with (images done, images in total).

    Returns:
        Accuracy in percent, 0 to 100.

    Raises:
        IntrafuseError: the model is on another device, cannot take the images, does not return one
            logit per class, or returns NaN.

    >>> from intrafuse.catalog.data import load_data
    >>> from intrafuse.catalog.zoo import resolve_model
    >>> 0 <= accuracy(resolve_model("mlp").model, load_data("digits", limit=50)) <= 100
    True
    """
    _check_device(model, torch.device(device))
    correct = done = 0
    with evaluating(model), torch.inference_mode():
        for images, labels in data.batches(batch_size, device=device):
            logits = _logits(model, images, data)
            correct += int((logits.argmax(1) == labels).sum())
            done += len(labels)
            if progress is not None:
                progress(done, len(data))
    return 100 * correct / done


def _check_device(model: nn.Module, device: torch.device) -> None:
    place = next((p.device for p in model.parameters()), None)
    if place is not None and place.type != device.type:
        raise IntrafuseError(
            "the model is on another device", value=str(place), remedy=f'device="{place}"'
        )


def _logits(model: nn.Module, images: Tensor, data: Images) -> Tensor:
    try:
        logits = model(images)
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise IntrafuseError(
            f"the model cannot take images of shape {data.input_shape} ({text})", value=data.name
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (len(images), len(data.classes)):
        raise IntrafuseError(
            f"the model must return {len(data.classes)} logits for each image, one for each class",
            value=tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__,
            layer=data.name,
        )
    if logits.isnan().any():
        raise IntrafuseError("the model returns NaN", layer=data.name)
    return logits
