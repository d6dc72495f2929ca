"""Score the channels of a group: metrics that need no data, the registry, and `score`.

To add a metric, write a function ``metric(group, context) -> scores`` with its paper in the
docstring, and enter it in IMPORTANCE. Metrics that need data live in
`intrafuse.importance.on_data`. Scores are float32, (channels,), one for each present channel of the
group; higher is more important.
"""

from __future__ import annotations

import difflib
import types
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from intrafuse.graph.blocks import channel_rows
from intrafuse.graph.groups import ChannelGroup, Slot
from intrafuse.graph.trace import as_arguments, evaluating
from intrafuse.importance.on_data import (
    Scores,
    activation,
    chip,
    floating,
    products,
    refusing,
    scored,
    taylor,
)
from intrafuse.support.batches import map_tensors
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.modules import copy_without
from intrafuse.surgery.context import Context
from intrafuse.surgery.weights import Weights

__all__ = [
    "IMPORTANCE",
    "Importance",
    "bn_scale",
    "fpgm",
    "l1",
    "l2",
    "lamp",
    "linf",
    "random",
    "score",
    "synflow",
]

Importance = Callable[[ChannelGroup, Context], Tensor]
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
SATURATING = (nn.Hardtanh, nn.Tanh, nn.Softsign)  # ReLU6 is a Hardtanh


def _filters(group: ChannelGroup, weights: Weights) -> list[Tensor]:
    """List the weights that write each channel, one float32 (channels, elements) per writer.

    If no weight writes the group, return all its parameters instead.
    """
    slots: list[Slot] = [s for s in weights.present(group.writers) if s.kind == "weight"]
    if not slots:
        slots = [s for s in weights.present(group.slots) if s.kind not in ("mean", "variance")]
    if not slots:
        raise IntrafuseError(
            "the group has no parameters to score its channels by",
            layer=group.name,
            remedy='choose another importance, such as "random"',
        )
    return [weights.rows(group, slot).float() for slot in slots]


def _norm(group: ChannelGroup, weights: Weights, p: float) -> Tensor:
    """Compute the p-norm of the weights that write each channel.

    All writers of a group, such as a residual stream, have equal influence: the norms of each
    writer are divided by their mean before averaging over writers.
    """
    norms = [torch.linalg.vector_norm(rows, p, dim=1) for rows in _filters(group, weights)]
    if len(norms) == 1:
        return norms[0]
    levels = torch.stack([norm.mean() for norm in norms])
    shares = torch.stack([norm / norm.mean().clamp_min(1e-30) for norm in norms])
    return shares.mean(0) * levels.mean()


def l1(group: ChannelGroup, context: Context) -> Tensor:
    """Sum the absolute weights that write a channel, without biases; writers count equally.

    Source: Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets",
    ICLR 2017, arXiv 1608.08710, section 3.1.
    """
    return _norm(group, context.weights, 1)


def l2(group: ChannelGroup, context: Context) -> Tensor:
    """Compute the Euclidean norm of the weights that write a channel; writers count equally.

    Source: He, Kang, Dong, Fu, Yang, "Soft Filter Pruning for Accelerating Deep Convolutional
    Neural Networks", IJCAI 2018, arXiv 1808.06866, equation 2 with p = 2.
    """
    return _norm(group, context.weights, 2)


def linf(group: ChannelGroup, context: Context) -> Tensor:
    """Return the largest absolute weight that writes a channel; writers count equally.

    Source: as `l2`, with p = infinity.
    """
    return _norm(group, context.weights, torch.inf)


def random(group: ChannelGroup, context: Context) -> Tensor:
    """Draw scores from [0, 1); seed and group name determine them.

    Source: Mittal, Bhardwaj, Khapra, Ravindran, "Recovering from Random Pruning: On the
    Plasticity of Deep Convolutional Neural Networks", WACV 2018, arXiv 1801.10447.
    """
    generator = context.generator(zlib.crc32(group.name.encode()))
    return torch.rand(context.weights.sizes[group.id], generator=generator)


def lamp(group: ChannelGroup, context: Context) -> Tensor:
    """Divide the squared norm of a channel by the sum over all channels of at least that norm.

    Within a group the ranking is the same as for `l2`. Between groups, scores are shares of the
    remaining norm, so prefer `lamp` to `l2` if one threshold cuts all groups.

    Source: Lee, Park, Mo, Ahn, Shin, "Layer-adaptive Sparsity for the Magnitude-based Pruning",
    ICLR 2021, arXiv 2010.07611: the LAMP score, on channels instead of single weights.
    """
    squares = _norm(group, context.weights, 2).double().square()
    ascending = squares.sort().values
    rest = ascending.flip(0).cumsum(0).flip(0)  # rest[k]: sum from the k-th smallest on
    rest = rest[torch.searchsorted(ascending, squares)]  # equal channels get equal scores
    return torch.where(squares > 0, squares / rest, squares).float()


def bn_scale(group: ChannelGroup, context: Context) -> Tensor:
    """Sum the |gamma| of the batch norms that a channel passes, before any folding.

    Use it for networks that were trained with a penalty on gamma. Folding does not affect it,
    because gamma is read from the module.

    Raises:
        IntrafuseError: the channels pass no batch norm with a scale.

    Source: Liu, Li, Shen, Huang, Yan, Zhang, "Learning Efficient Convolutional Networks through
    Network Slimming", ICCV 2017, arXiv 1708.06519, section 3.
    """
    norms = {norm.weight for norm in context.original.graph.norms}
    slots = [s for s in group.carriers if s.kind == "scale" and s.parameter in norms]
    if not slots:
        raise IntrafuseError(
            'importance "bn_scale" needs a batch norm with a scale between writer and reader',
            layer=group.name,
            remedy='exclude the group, or choose another importance, such as "l1"',
        )
    given = {**context.original.state, **dict(context.model.named_parameters())}
    scales = [
        channel_rows(given[s.parameter].detach(), s.axis, s.blocks, group.size) for s in slots
    ]
    return torch.stack([scale.float().abs().sum(1) for scale in scales]).sum(0)


def fpgm(group: ChannelGroup, context: Context) -> Tensor:
    """Sum the Euclidean distances from a channel's weights to those of all other channels.

    The other channels can replace a channel near the geometric median.

    Source: He, Liu, Wang, Hu, Yang, "Filter Pruning via Geometric Median for Deep Convolutional
    Neural Networks Acceleration", CVPR 2019, arXiv 1811.00250.
    """
    filters = torch.cat(
        _filters(group, context.weights), 1
    ).double()  # cdist squares, so float32 would lose precision
    return torch.cat([torch.cdist(part, filters).sum(1) for part in filters.split(1024)]).float()


def synflow(group: ChannelGroup, context: Context) -> Tensor:
    """Compute the share of the synaptic flow through a channel's writers; needs no data.

    R is the sum of the outputs for an input of ones, with absolute parameters, in float64 and
    evaluation mode. Norm layers only scale and shift (batch norm by |gamma| / std). ReLU6 and other
    saturating modules return their input. A channel's score is the sum of |w dR/dw| / R over its
    writers' weights. In a chain without biases, the scores of a group sum to one.

    Raises:
        IntrafuseError: the model cannot be copied or run in float64, or R overflows.

    Source: Tanaka, Kunin, Yamins, Ganguli, "Pruning neural networks without any data by
    iteratively conserving synaptic flow", NeurIPS 2020, arXiv 2006.05467, algorithm 1.
    """
    return scored(group, context, "synflow", _synaptic_flow)


def _synaptic_flow(context: Context) -> Scores:
    with torch.inference_mode(False), torch.enable_grad():
        with refusing("synflow"):
            model = _linear_copy(context.model)
            given = dict(model.named_parameters())
            args, kwargs = as_arguments(map_tensors(_ones, context.example_inputs))
            with evaluating(model):
                flow = torch.stack([t.sum() for t in floating(model(*args, **kwargs))]).sum()
            found = torch.autograd.grad(flow, list(given.values()), allow_unused=True)
        if not torch.isfinite(flow):
            raise IntrafuseError(
                'importance "synflow" overflows in this model, even in float64',
                value=flow.item(),
                remedy='choose another importance, such as "l1"',
            )
        gradients = dict(zip(given, found, strict=True))
        scores: Scores = {}
        for group in context.original.graph.groups:
            slots = [s for s in group.writers if s.kind == "weight" and s.parameter in given]
            sums = products(group, slots, given, gradients).abs().sum(1)
            scores[group.id] = sums / flow.detach().clamp_min(1e-300)
    return scores


def _ones(tensor: Tensor) -> Tensor:
    """Return ones of the same shape; integers, such as tokens, stay."""
    if not tensor.is_floating_point():
        return tensor
    return torch.ones(tensor.shape, dtype=torch.float64, device=tensor.device)


def _linear_copy(model: nn.Module) -> nn.Module:
    """Copy a model in float64 with absolute parameters; it is linear for an input of ones."""
    model = copy_without(model, []).double().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.abs()
        parameter.requires_grad_(parameter.is_floating_point())
    for module in model.modules():
        if isinstance(module, NORMS):
            module.forward = types.MethodType(_scale_and_shift, module)
        elif isinstance(module, SATURATING):
            module.forward = types.MethodType(lambda _, x: x, module)
    return model


def _scale_and_shift(module: Any, x: Tensor) -> Tensor:
    """Apply a norm layer without input statistics, and a batch norm without its running mean."""
    shape = tuple(getattr(module, "normalized_shape", ()))
    if not shape or tuple(x.shape[-len(shape) :]) != shape:  # channels first, also LayerNorm2d
        shape = (-1, *[1] * (x.dim() - 2))
    if getattr(module, "running_var", None) is not None:
        x = x / (module.running_var + module.eps).sqrt().view(shape)
    if module.weight is not None:
        x = x * module.weight.view(shape)
    if getattr(module, "bias", None) is not None:
        x = x + module.bias.view(shape)
    return x


IMPORTANCE: dict[str, Importance] = {
    "l1": l1,
    "l2": l2,
    "linf": linf,
    "random": random,
    "lamp": lamp,
    "bn_scale": bn_scale,
    "fpgm": fpgm,
    "synflow": synflow,
    "taylor": taylor,
    "chip": chip,
    "activation": activation,
}


def score(group: ChannelGroup, context: Context, importance: str | Importance) -> Tensor:
    """Score the channels of a group, and check the scores.

    Args:
        group: the channel group.
        context: the state of planning. Metrics that run the model score its original channels, so
            call them before the group is merged.
        importance: a name in IMPORTANCE, or any function (group, context) -> (channels,).

    Returns:
        float32 (channels,), finite; higher is more important.

    Raises:
        IntrafuseError: the name is unknown, the scores have the wrong shape or are not finite, or
            the metric needs data and the context has none.

    >>> from torch import nn
    >>> from intrafuse.graph import trace
    >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0], [-4.0]]))
    >>> graph = trace(model, torch.zeros(1, 1))
    >>> weights = Weights.of(graph, model)
    >>> score(graph.groups[0], Context(weights, weights, model, torch.zeros(1, 1)), "l1")
    tensor([3., 4.])
    """
    name, metric = _resolve(importance)
    scores = metric(group, context)
    channels = context.weights.sizes[group.id]
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (channels,):
        raise IntrafuseError(
            f'importance "{name}" must return one score for each of {channels} channels',
            value=tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__,
            layer=group.name,
            remedy=f"return a tensor of shape ({channels},), and call metrics that run the model "
            "before the group is merged",
        )
    scores = scores.detach().float()
    if not torch.isfinite(scores).all():
        bad = (~torch.isfinite(scores)).nonzero().ravel().tolist()
        raise IntrafuseError(
            f'importance "{name}" must be finite, but it is not for {len(bad)} of {channels} '
            f"channels, the first of them channel {bad[0]}",
            value=scores[bad[0]].item(),
            layer=group.name,
            remedy="check the weights and the data, or choose another importance",
        )
    return scores


def _resolve(importance: str | Importance) -> tuple[str, Importance]:
    if not isinstance(importance, str):
        if not callable(importance):
            raise IntrafuseError(
                "importance must be a name or a function (group, context) -> scores",
                value=importance,
                remedy=f"try {', '.join(IMPORTANCE)}",
                usage=True,
            )
        return getattr(importance, "__name__", type(importance).__name__), importance
    if importance not in IMPORTANCE:
        near = difflib.get_close_matches(importance, IMPORTANCE, n=3) or list(IMPORTANCE)
        raise IntrafuseError(
            "unknown importance", value=importance, remedy=f"try {' or '.join(near)}", usage=True
        )
    return importance, IMPORTANCE[importance]
