"""Importance metrics that run the model on the user's data, and their shared functions.

They score the channels of the original model. One pass scores all groups, and the scores are cached
while the original tensors of the plan exist. The model is not changed: training flags are restored,
`.grad` is untouched, also after exceptions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafuse.graph.blocks import channel_rows
from intrafuse.graph.groups import ChannelGroup, Slot
from intrafuse.graph.trace import as_arguments, evaluating
from intrafuse.support.batches import batches, tensors_of
from intrafuse.support.calls import as_called
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.sums import Sums
from intrafuse.surgery.context import Context
from intrafuse.surgery.weights import Weights
from intrafuse.sweep.walk import walk

__all__ = [
    "Scores",
    "activation",
    "chip",
    "floating",
    "products",
    "refusing",
    "scored",
    "taylor",
]

Scores = dict[int, Tensor]  # id of the group -> (channels,)
CHIP_BATCHES, CHIP_INPUTS = 5, 32  # the paper: 5 batches; the first inputs of each
# Nodes of the trapezoidal rule for `_independence`, in log s relative to the largest singular
# value: with this step and range its error is below 1e-7 of that value.
STEP = 0.4
LOG_NODES = torch.arange(-24.0, 20.0, STEP, dtype=torch.float64)


# -- the metrics ---------------------------------------------------------------------------------


def taylor(group: ChannelGroup, context: Context) -> Tensor:
    """Estimate, to first order, how the loss changes if a channel's writers become zero.

    The score is the squared sum of gradient times value over the channel's writers (weights and
    biases), averaged over the batches. The loss is the cross-entropy with the labels.

    Raises:
        IntrafuseError: there is no data, or it has no labels, or labels do not fit the outputs.

    Source: Molchanov, Mallya, Tyree, Frosio, Kautz, "Importance Estimation for Neural Network
    Pruning", CVPR 2019, arXiv 1906.10771, section 3 (first-order, filters as groups).
    """
    return scored(group, context, "taylor", _first_order)


def chip(group: ChannelGroup, context: Context) -> Tensor:
    """Compute how much nuclear norm the feature maps lose if a channel becomes zero.

    For each input sample, A (channels, positions) is the input of the group's first reader. The
    score is the nuclear norm of A minus the nuclear norm of A with the channel's row set to zero,
    averaged over the first 32 samples of each of the first 5 batches. Labels are not used.

    Raises:
        IntrafuseError: there is no data, or no convolution or linear map reads the channels.

    Source: Sui, Yin, Xie, Phan, Zonouz, Yuan, "CHIP: CHannel Independence-based Pruning for
    Compact Neural Networks", NeurIPS 2021, arXiv 2110.13981, section 3.
    """

    def compute(context: Context) -> Scores:
        return _averages(context, "chip", _independence, first_reader=True, limit=CHIP_BATCHES)

    return scored(group, context, "chip", compute)


def activation(group: ChannelGroup, context: Context) -> Tensor:
    """Average the absolute activation of a channel over all inputs of its readers.

    Every sample of every batch counts equally, for each reader. Labels are not used.

    Raises:
        IntrafuseError: there is no data, or no convolution or linear map reads the channels.

    Source: Molchanov, Tyree, Karras, Aila, Kautz, "Pruning Convolutional Neural Networks for
    Resource Efficient Inference", ICLR 2017, arXiv 1611.06440, section 2.2 (mean activation).
    """

    def compute(context: Context) -> Scores:
        return _averages(context, "activation", lambda x: x.abs().mean(2, dtype=torch.float64))

    return scored(group, context, "activation", compute)


# -- what all of them share ----------------------------------------------------------------------

_KNOWN: WeakKeyDictionary[Weights, dict[str, tuple[tuple, Scores]]] = WeakKeyDictionary()


def scored(
    group: ChannelGroup, context: Context, metric: str, compute: Callable[[Context], Scores]
) -> Tensor:
    """Return a group's scores from the cache of a metric, which computes all groups at once.

    The key is the original tensors of the plan. An entry is valid only for the same model, data and
    example inputs, which it keeps alive.
    """
    entries = _KNOWN.setdefault(context.original, {})
    source = (context.model, context.data, context.example_inputs)
    known = entries.get(metric)
    if known is None or any(old is not new for old, new in zip(known[0], source, strict=True)):
        known = entries[metric] = (source, compute(context))
    if group.id in known[1]:
        return known[1][group.id].to(torch.float32, copy=True)
    reason = "locked" if group.locked else "no convolution or linear map reads them"
    raise IntrafuseError(
        f'importance "{metric}" cannot see these channels: {reason}',
        layer=group.name,
        remedy='exclude the group, or choose another importance, such as "l1"',
    )


def floating(value: Any) -> Iterator[Tensor]:
    """Iterate over the floating tensors of a model's output."""
    return (tensor for tensor in tensors_of(value) if tensor.is_floating_point())


@contextmanager
def refusing(metric: str) -> Iterator[None]:
    """Turn an error that PyTorch raises for unfit inputs into a one-line IntrafuseError."""
    try:
        with as_called():
            yield
    except (IntrafuseError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise IntrafuseError(
            f'importance "{metric}" cannot run the model: {type(error).__name__}: {text}',
            remedy="check that the batches fit the model, or choose another importance",
        ) from error


def _batches(context: Context, metric: str, limit: int | None = None) -> Iterator[tuple[Any, Any]]:
    """Iterate over (inputs, labels or None); see `intrafuse.support.batches`."""
    return batches(
        context.data,
        context.model,
        purpose=f'importance "{metric}"',
        limit=limit,
        instead=', or choose an importance that needs none, such as "l1"',
    )


def _features(group: ChannelGroup, slot: Slot, at: int, x: Tensor) -> Tensor:
    """Order a reader's input, with channels at an axis, as (samples, channels, positions)."""
    if not torch.isfinite(x).all():
        raise IntrafuseError(
            "activations must be finite, but NaN or infinity was found",
            layer=slot.layer,
            remedy="check the data and the weights",
        )
    x = x[None] if at == 0 else x.movedim(at, 1)  # (inputs, positions of the axis, rest...)
    rows = channel_rows(x, 1, slot.blocks, group.size)
    inputs, rest = x.shape[0], math.prod(x.shape[2:])
    rows = rows.reshape(group.size, -1, inputs, rest)  # (channels, repeats, inputs, rest)
    return rows.permute(2, 0, 1, 3).reshape(inputs, group.size, -1)


def _averages(
    context: Context,
    metric: str,
    measure: Callable[[Tensor], Tensor],
    *,
    first_reader: bool = False,
    limit: int | None = None,
) -> Scores:
    """Average a measure of the inputs of each group's readers over samples.

    Args:
        context: the state of planning, with data.
        metric: names the metric in errors.
        measure: maps (samples, channels, positions) to (samples, channels).
        first_reader: measure only the first reader that is called.
        limit: the most batches to read; None for all.
    """
    graph = context.original.graph
    sums: dict[int, Sums] = {}
    first: dict[int, Slot] = {}
    readers: dict[str, list[tuple[ChannelGroup, Slot]]] = {}
    for group in graph.groups:
        for slot in group.readers:
            readers.setdefault(slot.parameter, []).append((group, slot))

    def see(name: str, x: Tensor) -> None:
        at = x.dim() + 1 - len(graph.axes[name])
        for group, slot in readers[name]:
            if not first_reader or first.setdefault(group.id, slot) == slot:
                sums.setdefault(group.id, Sums()).add(measure(_features(group, slot, at, x)))

    inputs = (x for x, _ in _batches(context, metric, limit))
    seen = {name: partial(see, name) for name in readers}
    walk(context.model, [Weights.of(graph, context.model)], inputs, seen, before=True)
    return {group: known.mean() for group, known in sums.items() if known.count}


# -- one pass for each metric --------------------------------------------------------------------


def _independence(features: Tensor) -> Tensor:
    """Compute the loss of nuclear norm if each row becomes zero: (B, C, K) -> (<=32, C).

    This uses one eigendecomposition instead of C singular value decompositions. Let A be the
    matrix, a_i its row and q_i(s) = a_i^T (A^T A + s^2)^-1 a_i. The integral form of the square
    root and det(A^T A - a_i a_i^T + s^2) = det(A^T A + s^2) (1 - q_i(s)) yield

        ||A||_* - ||A without row i||_* = -(1 / pi) integral_0^inf log(1 - q_i(s)) ds.

    The trapezoidal rule in log s converges exponentially.
    """
    a = features[:CHIP_INPUTS].double()
    if a.shape[1] <= a.shape[2]:
        values, vectors = torch.linalg.eigh(a @ a.mT)  # (B, k), (B, C, k)
        values = values.clamp_min(0)
        loads = vectors.square() * values[:, None]  # squared part of a_i along eigenvector k
    else:
        values, vectors = torch.linalg.eigh(a.mT @ a)
        values = values.clamp_min(0)
        loads = (a @ vectors).square()
    top = values.amax(1).sqrt().clamp_min(1e-100)
    s = top[:, None] * LOG_NODES.to(a.device).exp()  # (B, nodes)
    q = loads @ (1 / (values[:, :, None] + s.square()[:, None]))  # (B, C, nodes)
    logs = torch.log1p(-q.clamp_max(1 - 2**-53))
    return (logs @ s[:, :, None])[..., 0].abs() * (STEP / math.pi)


def _first_order(context: Context) -> Scores:
    model, groups = context.model, context.original.graph.groups
    given = dict(model.named_parameters())
    slots = {g.id: [s for s in g.writers if s.parameter in given] for g in groups}
    wanted = sorted({slot.parameter for group in groups for slot in slots[group.id]})
    # Separate leaves, so that the model's parameters get no .grad and keep requires_grad.
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        leaves = {name: p.detach() for name, p in given.items()}
        leaves.update({name: given[name].detach().requires_grad_() for name in wanted})
        sums: dict[int, Sums] = {group.id: Sums() for group in groups}
        for inputs, labels in _batches(context, "taylor"):
            with refusing("taylor"):
                loss = _loss(model, leaves, inputs, labels)
                found = torch.autograd.grad(loss, [leaves[n] for n in wanted], allow_unused=True)
            gradients = dict(zip(wanted, found, strict=True))
            for group in groups:
                change = products(group, slots[group.id], leaves, gradients).sum(1)
                sums[group.id].add(change.square()[None])
    return {group: known.mean() for group, known in sums.items()}


def _loss(model: nn.Module, leaves: dict[str, Tensor], inputs: Any, labels: Any) -> Tensor:
    """Run the model on one batch and return its cross-entropy."""
    if not isinstance(labels, Tensor):
        raise IntrafuseError(
            'importance "taylor" needs labels, but the data has none',
            remedy="pass batches of (inputs, labels), or choose an importance without labels, "
            'such as "chip" or "l1"',
        )
    outputs = torch.func.functional_call(model, leaves, *as_arguments(inputs))
    logits = next(floating(getattr(outputs, "logits", outputs)), None)
    if logits is None:
        raise IntrafuseError("the model returns no logits", value=type(outputs).__name__)
    if labels.shape == logits.shape[:-1]:  # also with one label per position of a sequence
        logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    return F.cross_entropy(logits.float(), labels)


def products(
    group: ChannelGroup,
    slots: list[Slot],
    values: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor | None],
) -> Tensor:
    """Multiply values by gradients, and concatenate all slots: float64 (channels, elements)."""
    rows = [torch.zeros(group.size, 1, dtype=torch.float64)]
    for slot in slots:
        gradient = gradients[slot.parameter]
        if gradient is not None:  # None if the outputs do not depend on the parameter
            product = values[slot.parameter].detach().double() * gradient.double()
            rows.append(channel_rows(product, slot.axis, slot.blocks, group.size))
    return torch.cat([row.to(rows[-1].device) for row in rows], dim=1)
