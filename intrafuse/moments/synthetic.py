"""Synthetic inputs, optimized until each batch norm reads its running statistics.

Letters, for one batch norm that reads z (batch, channels, ...):

    m, v  running mean and variance (channels,)    a, b  those of z on the synthetic inputs
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from intrafuse.graph.trace import ExampleInputs, as_arguments, evaluating
from intrafuse.support.arguments import check_arguments
from intrafuse.support.batches import fitting
from intrafuse.support.calls import apart
from intrafuse.support.device import require_numbers
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.watch import watching

__all__ = ["synthesise"]

Seen = dict[str, list[tuple[Tensor, Tensor]]]  # by norm and call: a - m and b
LEAVES, SHADE = 60, 0.85  # balls in each input; share of their color common to all channels
USE_DATA = "pass unlabeled data= instead (--data on the command line)"


@apart
def synthesise(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    images: int = 128,
    steps: int = 60,
    batch_size: int = 64,
    learning_rate: float = 0.1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Make inputs that resemble the model's training data, without any data.

    Random shapes are optimized until mean and variance of the inputs of every batch norm agree with
    its running statistics (Deep Inversion, Yin et al., CVPR 2020, arXiv 1912.08795). A hundred real
    unlabeled inputs, if available, work better.

    Args:
        model: the network, with batch norm that has running statistics. It runs in evaluation
            mode; its state is restored.
        example_inputs: one floating-point tensor (batch, channels, ...), or a tuple or mapping of
            exactly one. Only its shape matters; its values and batch size do not.
        images: number of inputs to make.
        steps: number of Adam steps, each over all images.
        batch_size: most images in one call of the model, at least 2. Batches are drawn again in
            every step, and statistics are matched in each batch.
        learning_rate: initial learning rate of Adam; it falls to 0 along a cosine.
        seed: seeds everything random; the global generators are not touched.
        progress: called with (steps done, all steps).

    Returns:
        Batches of inputs, for `data=`, on the model's device and in its dtype.

    Raises:
        IntrafuseError: no batch norm with running statistics, other example inputs, a setting out
            of range, or a loss that is not finite. The model's state is restored then, too.

    >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3))
    >>> [tuple(batch.shape) for batch in synthesise(net, torch.zeros(1, 2), images=4, steps=1)]
    [(4, 2)]
    """
    check_arguments(
        model=model,
        images=images,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        progress=progress,
    )
    name, example = _only_input(example_inputs)
    norms = _norms(model)
    if not norms:
        raise _no_norm()
    like = next((p for p in model.parameters() if p.is_floating_point()), example)
    generator = torch.Generator().manual_seed(seed % 2**63)
    start = dead_leaves((images, *example.shape[1:]), generator)
    with torch.enable_grad(), _frozen(model), evaluating(model), _watched(norms) as seen:
        precise = torch.promote_types(like.dtype, torch.float32)
        inputs = start.to(like.device, precise).requires_grad_()
        adam = torch.optim.Adam([inputs], lr=learning_rate)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        for step in range(steps):
            adam.zero_grad()
            order = torch.randperm(images, generator=generator)
            for part in order.tensor_split(-(-images // batch_size)):
                batch = inputs[part.to(like.device)].to(like.dtype)
                seen.clear()
                with fitting("synthetic inputs", USE_DATA):
                    model(batch) if name is None else model(**{name: batch})
                _loss(norms, seen, step).backward()
            adam.step()
            falling.step()
            if progress is not None:
                progress(step + 1, steps)
    return list(inputs.detach().to(like.dtype).tensor_split(-(-images // batch_size)))


def dead_leaves(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Paint balls of random place, size and color over each other, like objects in images.

    Sizes follow the power law that makes the spectrum and the edges of natural images (Lee,
    Mumford and Huang, IJCV 2001; Baradad et al., NeurIPS 2021, arXiv 2106.05963), from 2
    positions to half the width. Channels have correlation 0.7, like colors.

    Args:
        shape: (images, channels, ...), with any number of spatial dimensions; with none the result
            is Gaussian noise.
        generator: random generator on the CPU.

    Returns:
        Inputs with mean near 0 and variance near 1, float32.
    """
    images, channels, *space = shape
    if not space:
        return torch.randn(shape, generator=generator)
    every = (images, *[1] * len(space))

    def colors() -> Tensor:
        shared = torch.randn(images, 1, *every[1:], generator=generator)
        own = torch.randn(images, channels, *every[1:], generator=generator)
        return SHADE * shared + (1 - SHADE**2) ** 0.5 * own

    largest = max(space) / 2
    smallest = min(2.0, largest)
    axes = torch.meshgrid(*(torch.arange(n).float() for n in space), indexing="ij")
    picture = colors().expand(shape)
    for _ in range(LEAVES):
        share = torch.rand(every, generator=generator)
        radius = (smallest**-2 + share * (largest**-2 - smallest**-2)) ** -0.5
        away = torch.zeros(())
        for axis, size in zip(axes, space, strict=True):
            away = away + (axis - size * torch.rand(every, generator=generator)).square()
        inside = (away <= radius.square()).unsqueeze(1)
        picture = torch.where(inside, colors(), picture)
    return picture


def _loss(norms: Mapping[str, _BatchNorm], seen: Seen, step: int) -> Tensor:
    """Average the divergence over all norms that were called, with equal weights."""
    if not seen:
        raise _no_norm()
    terms = {name: _divergence(norms[name], calls) for name, calls in seen.items()}
    loss = torch.stack([term.cpu() for term in terms.values()]).mean()
    if not torch.isfinite(loss):
        raise IntrafuseError(
            f"the loss of synthetic inputs became {loss.item()} in step {step + 1}",
            layer=next((n for n, term in terms.items() if not torch.isfinite(term)), None),
            remedy="lower learning_rate, or use the model in float32",
        )
    if not loss.requires_grad:
        raise IntrafuseError("the forward call of the model passes no gradient", remedy=USE_DATA)
    return loss


def _no_norm() -> IntrafuseError:
    return IntrafuseError(
        "synthetic inputs need a batch norm with running statistics that the forward call of the "
        "model reaches",
        remedy=USE_DATA,
    )


def _divergence(norm: _BatchNorm, calls: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Compare two Gaussians for each channel, KL(N(a, b) || N(m, v)), and average over channels.

    If a norm is called several times, the moments of all calls are averaged, as in running
    statistics. The norm's eps is added to both variances, for channels of zero variance.
    """
    assert norm.running_var is not None
    off = torch.stack([a for a, _ in calls]).mean(0)
    spread = torch.stack([b for _, b in calls]).mean(0)
    scale = norm.running_var.to(off) + norm.eps
    ratio = (spread + norm.eps) / scale
    return 0.5 * (off.square() / scale + ratio - 1 - ratio.log()).mean()


def _moments(norm: _BatchNorm, z: Tensor) -> tuple[Tensor, Tensor]:
    """Measure a - m and b (channels,) of a norm's input, in float32 or better."""
    assert norm.running_mean is not None
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    # a copy, in case the model changes z in place; subtracting m keeps squares accurate
    z = z - norm.running_mean.to(z).view(-1, *[1] * (z.dim() - 2))
    dims = [d for d in range(z.dim()) if d != 1]
    off = z.mean(dims)
    return off, ((z * z).mean(dims) - off.square()).clamp_min(0)


def _only_input(example_inputs: ExampleInputs) -> tuple[str | None, Tensor]:
    """Return the name (None for a positional input) and the tensor of the only input."""
    args, kwargs = as_arguments(example_inputs)
    named = [*((None, value) for value in args), *kwargs.items()]
    found = [value for _, value in named]
    fits = len(found) == 1 and isinstance(found[0], Tensor) and found[0].is_floating_point()
    if not fits or found[0].dim() < 2 or found[0][:1].numel() == 0:
        kinds = [
            f"{str(v.dtype).removeprefix('torch.')}{tuple(v.shape)}"
            if isinstance(v, Tensor) else type(v).__name__
            for v in found
        ]  # fmt: skip
        raise IntrafuseError(
            "synthetic inputs need one example input: a floating-point tensor (batch, channels, "
            "...) with a sample",
            value=kinds,
            remedy=USE_DATA,
        )
    return named[0]


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """List the batch norms with running statistics by name, and check the statistics."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    for name, norm in found.items():
        assert norm.running_mean is not None and norm.running_var is not None
        require_numbers(name, norm.running_mean)
        total = float(norm.running_mean.double().sum() + norm.running_var.double().sum())
        if not math.isfinite(total) or float(norm.running_var.min()) < 0:
            raise IntrafuseError(
                "running means must be finite, and running variances finite and not negative",
                layer=name,
                value=total,
            )
    return found


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Disable gradients of the parameters; restore their flags at the end."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _watched(norms: Mapping[str, _BatchNorm]) -> Iterator[Seen]:
    """Yield the moments of each norm's inputs since the last clear, by name and call."""
    seen: Seen = {}

    def keep(name: str, received: Tensor) -> None:
        seen.setdefault(name, []).append(_moments(norms[name], received))

    with watching(((norm, partial(keep, name)) for name, norm in norms.items())):
        yield seen
