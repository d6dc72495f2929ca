"""The training loop: plain PyTorch, reproducible for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from intrafuse.catalog.data import Images
from intrafuse.study.training.augment import crop_flip
from intrafuse.study.training.settings import Training
from intrafuse.study.training.state import read_state, write_state
from intrafuse.support.device import pick_device
from intrafuse.support.errors import IntrafuseError

__all__ = ["train"]

STRIDE = 1_000_003  # prime factor of the seed, so that epochs of two trainings get different seeds
Progress = Callable[[int, int], None]


def train(
    model: nn.Module,
    data: Images,
    settings: Training,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    state: Path | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Train a classifier in place by cross-entropy.

    The order of images, their augmentation and dropout depend only on the seed and the epoch. So a
    resumed training ends with the same network, bit for bit on a CPU with the same number of
    threads.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes); its parameters are changed.
        data: labeled images.
        settings: settings of the training.
        seed: seed of all random choices.
        device: device to compute on; the model is moved there and stays. `auto` uses a GPU if there
            is one.
        state: file that the training writes after each epoch. The training resumes from it if it
            exists and belongs to the same training. None writes no file.
        progress: called with (steps done, steps in total).

    Returns:
        The model, in evaluation mode.

    Raises:
        IntrafuseError: the loss becomes infinite or NaN, or the state cannot be written.

    >>> from intrafuse.catalog.data import load_data
    >>> from intrafuse.catalog.zoo import resolve_model
    >>> _ = train(resolve_model("mlp").model, load_data("digits", limit=64), Training(epochs=1))
    """
    device = pick_device(device)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(),
        settings.rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    identity = {"settings": settings.model_dump_json(), "seed": str(seed), "data": data.digest()}
    start = read_state(state, model, optimizer, identity) if state is not None else 0
    with torch.random.fork_rng():
        for epoch in range(start, settings.epochs):
            _epoch(model, optimizer, data, settings, epoch, seed, progress)
            if state is not None:
                write_state(state, model, optimizer, identity, epoch + 1)
    return model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


def _epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Images,
    settings: Training,
    epoch: int,
    seed: int,
    progress: Progress | None,
) -> None:
    """Train for one pass over the data."""
    device = next(model.parameters()).device
    own = seed * STRIDE + epoch
    torch.manual_seed(own)
    generator = torch.Generator().manual_seed(own)
    steps = -(-len(data) // settings.batch)
    model.train()
    loss = torch.zeros(())
    batches = data.batches(settings.batch, shuffle=True, seed=own, device=device)
    for step, (images, labels) in enumerate(batches):
        rate = settings.rate_at(epoch + step / steps, settings.epochs)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if len(labels) == 1 and step:
            break  # batch norm needs two images
        if settings.augments(data.input_shape):
            images = crop_flip(images, generator)
        images = images.to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        with _precision(settings, device):
            logits = model(images)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress(epoch * steps + step + 1, settings.epochs * steps)
    if not torch.isfinite(loss):
        raise IntrafuseError(
            "the loss must stay finite", value=loss.item(), layer=f"epoch {epoch + 1}",
            remedy="lower the learning rate",
        )  # fmt: skip


def _precision(settings: Training, device: torch.device) -> Any:
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if settings.precision == "bfloat16" or (settings.precision == "auto" and on_gpu):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
