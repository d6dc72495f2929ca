"""Optimal transport between the channels of a group and the kept channels.

Letters, as in Theus et al. 2024 (arXiv 2402.07839) and in POT:

    X  (n, F)  features of the channels             Y  (m, F)  features of the targets
    mu (n,)    mass of each channel, sums to one    nu (m,)    mass of each target, sums to one
    C  (n, m)  ground cost, C_ij = |x_i - y_j|_p    T  (n, m)  transport, T 1 = mu, T^T 1 = nu
    P  (m, n)  encode matrix of the merge map
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from intrafuse.graph.typed import from_numpy
from intrafuse.support.errors import IntrafuseError

__all__ = [
    "Marginal",
    "Normalisation",
    "Transport",
    "assignment",
    "encode_matrix",
    "ground_cost",
    "marginal",
    "onto_channels",
    "transport",
]

Marginal = Literal["uniform", "importance", "softmax"]
Normalisation = Literal["paper", "barycentric"]
STRIP = 32  # features in a strip of the ground cost
ENTROPIC_FROM = 16384  # with more channels the exact solver takes minutes; 11,008 take 24 s
TOLERANCE = 1e-6  # stopping threshold of the entropic solver
WORST = 1e-3  # largest accepted error of the marginals
ROUNDING = 1e-15  # mass


@dataclass(frozen=True)
class Transport:
    """A solved transport problem.

    Attributes:
        matrix: T (n, m), float64.
        cost: the ground cost C (n, m).
        source, target: the required marginals mu (n,) and nu (m,).
    """

    matrix: NDArray[np.float64]
    cost: NDArray[np.float64]
    source: NDArray[np.float64]
    target: NDArray[np.float64]

    @property
    def value(self) -> float:
        """The transport cost, sum of T * C."""
        return float((self.matrix * self.cost).sum())

    @property
    def error(self) -> float:
        """Sum of absolute differences between the marginals of T and the required ones."""
        rows = np.abs(self.matrix.sum(1) - self.source).sum()
        return float(rows + np.abs(self.matrix.sum(0) - self.target).sum())


def ground_cost(x: Tensor, y: Tensor, *, p: float = 1.0) -> NDArray[np.float64]:
    """Compute p-norm distances between features scaled to unit Euclidean length.

    Args:
        x: features of the channels (n, F).
        y: features of the targets (m, F).
        p: order of the norm, at least 1; infinity is allowed.

    Returns:
        C (n, m), float64.

    Raises:
        IntrafuseError: p is below 1, a feature is not finite, or the numbers of features differ.

    >>> ground_cost(torch.eye(2), 3 * torch.eye(2)).round(3)
    array([[0., 2.],
           [2., 0.]])
    """
    if not p >= 1:
        raise IntrafuseError("the order p of a norm must be at least 1", value=p)
    if x.dim() != 2 or x.shape[1:] != y.shape[1:]:
        shapes = (tuple(x.shape), tuple(y.shape))
        raise IntrafuseError("channels and targets must have equally many features", value=shapes)
    x, y = (torch.nn.functional.normalize(f.float(), dim=1, eps=1e-12) for f in (x, y))
    distance = _manhattan(x, y) if p == 1 else torch.cdist(x, y, p=p)
    cost = distance.double().cpu().numpy()
    if not np.isfinite(cost).all():
        raise IntrafuseError(
            "the ground cost must be finite", remedy="check the weights for NaN and infinity"
        )
    return cost


def _manhattan(x: Tensor, y: Tensor) -> Tensor:
    """Sum absolute differences (n, m) over strips of features that fit a core's cache.

    This is two to four times as fast as one `torch.cdist` over thousands of features, and more
    accurate.
    """
    distance = x.new_zeros(len(x), len(y))
    for a, b in zip(torch.split(x, STRIP, 1), torch.split(y, STRIP, 1), strict=True):
        distance += torch.cdist(a.contiguous(), b.contiguous(), p=1.0)
    return distance


def marginal(kind: Marginal, scores: Tensor) -> NDArray[np.float64]:
    """Compute the mass of each channel (n,): uniform, by importance, or by softmax of importance.

    Raises:
        IntrafuseError: a score is not finite, or the kind is unknown. With `importance` also: a
            score is negative, or all are zero.

    >>> marginal("importance", torch.tensor([1.0, 3.0]))
    array([0.25, 0.75])
    """
    scores = scores.double().cpu()
    if not torch.isfinite(scores).all():
        raise IntrafuseError("mass by importance needs finite scores", remedy="check the weights")
    if kind == "uniform":
        return np.full(len(scores), 1 / len(scores))
    if kind == "softmax":
        return torch.softmax(scores, 0).numpy()
    if kind != "importance":
        choices = "uniform, importance, softmax"
        raise IntrafuseError(f"a marginal must be one of {choices}", value=kind)
    if bool((scores < 0).any()) or float(scores.sum()) <= 0:
        raise IntrafuseError(
            "mass by importance needs scores that are not negative and not all zero",
            remedy="use another importance, or marginals 'uniform' or 'softmax'",
        )
    return (scores / scores.sum()).numpy()


def transport(
    cost: NDArray[np.float64],
    source: NDArray[np.float64],
    target: NDArray[np.float64],
    *,
    regularisation: float | None = None,
) -> Transport:
    """Solve the transport problem.

    Args:
        cost: C (n, m).
        source: mu (n,), not negative.
        target: nu (m,), not negative, with the same sum.
        regularisation: entropic regularization in units of the mean cost; 0 solves exactly
            (network simplex, `ot.emd`). None solves exactly below 16,384 channels, where that is
            also faster, and uses 0.01 from there on.

    Raises:
        IntrafuseError: shapes or masses do not fit, the regularization is negative or not finite,
            or the solver failed.

    >>> transport(np.array([[0.0, 1.0], [1.0, 0.0]]), np.ones(2) / 2, np.ones(2) / 2).value
    0.0
    """
    if regularisation is None:
        regularisation = 0.0 if max(cost.shape) < ENTROPIC_FROM else 0.01
    if not 0 <= regularisation < np.inf:
        raise IntrafuseError("regularisation must be finite and not negative", value=regularisation)
    _check_problem(cost, source, target)
    with warnings.catch_warnings(), np.errstate(divide="ignore"):  # logarithm of zero mass
        warnings.simplefilter("error", UserWarning)  # POT warns on failure
        try:
            matrix = _solve(cost, source, target, regularisation)
        except UserWarning as warning:
            raise IntrafuseError(f"the transport solver failed: {warning}") from warning
    solution = Transport(matrix, cost, source, target)
    if not solution.error <= WORST:
        raise IntrafuseError(
            "the transport solver did not converge: the marginals are off by more than "
            f"{WORST:g} of the mass",
            value=solution.error,
            remedy="set a larger regularisation, or 0 for the exact solver",
        )
    return solution


def onto_channels(
    features: Tensor,
    keep: Tensor,
    source: NDArray[np.float64],
    target: NDArray[np.float64],
    *,
    p: float = 1.0,
) -> NDArray[np.float64]:
    """Transport channels exactly onto some of them.

    The cost is a distance, so mass that a kept channel and its target share stays where it is. Only
    the rest is solved for: at half the width a quarter of the costs of all channels and targets.

    Args:
        features: X (n, F), of the channels.
        keep: (m,) ascending indices of the kept channels, whose features are those of the targets.
        source, target: mu (n,) and nu (m,).
        p: see `ground_cost`.

    Returns:
        T (n, m), of the lowest transport cost.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 0.1]])
    >>> onto_channels(x, torch.tensor([0, 1]), np.full(4, 0.25), np.full(2, 0.5)).tolist()
    [[0.25, 0.0], [0.0, 0.25], [0.0, 0.25], [0.25, 0.0]]
    """
    kept = keep.cpu().numpy()
    matrix = np.zeros((len(source), len(target)))
    stays = np.minimum(source[kept], target)
    matrix[kept, np.arange(len(kept))] = stays
    left, free = source.copy(), target - stays
    left[kept] -= stays
    rows, columns = np.flatnonzero(left > ROUNDING), np.flatnonzero(free > ROUNDING)
    if len(rows) and len(columns):
        x, y = (features[from_numpy(i).to(features.device)] for i in (rows, kept[columns]))
        wanted = free[columns] * (left[rows].sum() / free[columns].sum())
        rest = transport(ground_cost(x, y, p=p), left[rows], wanted, regularisation=0.0)
        matrix[np.ix_(rows, columns)] += rest.matrix
    return matrix


def _solve(
    cost: NDArray[np.float64],
    source: NDArray[np.float64],
    target: NDArray[np.float64],
    regularisation: float,
) -> NDArray[np.float64]:
    """Call a solver, exact if the regularization is 0; return T (n, m)."""
    if regularisation == 0 and cost.shape[0] == cost.shape[1] and _equal(source, target):
        matrix = np.zeros_like(cost)  # some transport of lowest cost is an assignment
        matrix[np.arange(len(source)), assignment(cost)] = source
        return matrix
    import ot  # slow to import  # pyright: ignore[reportMissingTypeStubs]

    if regularisation == 0:
        matrix = ot.emd(source, target, cost, numItermax=10_000_000)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    else:
        eps = regularisation * float(cost.mean()) or 1.0
        matrix = ot.sinkhorn(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            source,
            target,
            cost,
            eps,
            method="sinkhorn_log",
            numItermax=20_000,
            stopThr=TOLERANCE,
            warn=False,
        )
    return np.asarray(matrix)  # pyright: ignore[reportUnknownArgumentType]


def _equal(source: NDArray[np.float64], target: NDArray[np.float64]) -> bool:
    """Tell whether all masses are equal up to rounding."""
    masses = np.concatenate((source, target))
    return bool(np.ptp(masses) <= 1e-9 * masses.max())


def _check_problem(
    cost: NDArray[np.float64], source: NDArray[np.float64], target: NDArray[np.float64]
) -> None:
    if cost.shape != (len(source), len(target)):
        raise IntrafuseError(
            f"a ground cost between {len(source)} channels and {len(target)} targets must be "
            f"({len(source)}, {len(target)})",
            value=cost.shape,
        )
    if not all(np.isfinite(part).all() for part in (cost, source, target)):
        raise IntrafuseError(
            "the ground cost and the marginals must be finite",
            remedy="check the weights and the importance for NaN and infinity",
        )
    masses = float(source.sum()), float(target.sum())
    if min(source.min(), target.min()) < 0 or not np.isclose(*masses, rtol=1e-6, atol=0):
        raise IntrafuseError(
            "mass must not be negative, and must have the same total on both sides",
            value=masses,
        )


def assignment(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """Match n channels with n targets at the lowest cost; return the target of each channel (n,).

    This is transport with equal widths and uniform mass (SciPy's Hungarian method).

    Raises:
        IntrafuseError: the cost is not square, or not finite.

    >>> assignment(np.array([[5.0, 1.0], [1.0, 5.0]]))
    array([1, 0])
    """
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or not np.isfinite(cost).all():
        raise IntrafuseError("the cost of an assignment must be square and finite")
    from scipy import optimize  # slow to import  # pyright: ignore[reportMissingTypeStubs]

    _, targets = optimize.linear_sum_assignment(cost)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return targets  # pyright: ignore[reportUnknownVariableType]


def encode_matrix(
    transported: NDArray[np.float64], normalisation: Normalisation = "paper"
) -> Tensor:
    """Turn a transport T into the encode matrix P (m, n), float32.

    `paper`: P = T^T diag(1 / mu), each channel spreads its whole mass, so columns sum to one
    (section 4 of the paper). `barycentric`: P = diag(1 / nu) T^T, each new channel is a mean.

    Raises:
        IntrafuseError: `normalisation` is unknown.
    """
    matrix = transported.T
    if normalisation == "paper":
        encode = matrix / np.maximum(matrix.sum(0, keepdims=True), np.finfo(float).tiny)
    elif normalisation == "barycentric":
        encode = matrix / np.maximum(matrix.sum(1, keepdims=True), np.finfo(float).tiny)
    else:
        raise IntrafuseError("normalisation must be paper or barycentric", value=normalisation)
    return from_numpy(np.ascontiguousarray(encode)).float()
