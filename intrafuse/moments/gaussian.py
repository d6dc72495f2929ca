"""Moments of functions of Gaussian variables, by expansion in Hermite polynomials.

Letters: z is Gaussian with mean mu and standard deviation sigma; x is standard Gaussian;
he_k are the probabilists' Hermite polynomials, scaled to E[he_j(x) he_k(x)] = 1 if j = k else 0.

    f(mu + sigma x) = sum_k c_k he_k(x)                     c_k = E[f(mu + sigma x) he_k(x)]
    E[f(z)] = c_0
    Cov(f(z_i), g(z_j)) = sum_{k >= 1} c_k(i) d_k(j) R_ij^k     (Mehler; R = correlation)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "correlation",
    "expanded",
    "hermite_coefficients",
    "product_covariance",
    "quadrature_values",
    "transformed_covariance",
]

TERMS, NODES = 24, 200


@cache
def _basis(terms: int, nodes: int) -> tuple[Tensor, Tensor]:
    """Return quadrature nodes x (nodes,) and weights times he_k(x) (nodes, terms + 1)."""
    x, weight = np.polynomial.hermite_e.hermegauss(nodes)
    rows = [np.ones_like(x), x]
    for k in range(1, terms):
        rows.append((x * rows[k] - np.sqrt(k) * rows[k - 1]) / np.sqrt(k + 1))
    basis = np.stack(rows[: terms + 1], 1) * (weight / weight.sum())[:, None]
    return torch.from_numpy(x), torch.from_numpy(basis)


def hermite_coefficients(
    function: Callable[[Tensor], Tensor],
    mean: Tensor,
    std: Tensor,
    *,
    terms: int = TERMS,
    nodes: int = NODES,
) -> Tensor:
    """Expand a pointwise function of n Gaussian variables.

    Args:
        function: acts on (n, nodes), element by element (a row may have its own parameter).
        mean, std: of each variable, (n,).
        terms: highest order k.
        nodes: of Gauss-Hermite quadrature.

    Returns:
        c (n, terms + 1), float64.

    >>> hermite_coefficients(lambda z: z, torch.tensor([2.0]), torch.tensor([3.0]))[0, :2].round()
    tensor([2., 3.], dtype=torch.float64)
    """
    return expanded(function(quadrature_values(mean, std, nodes=nodes)), terms=terms)


def quadrature_values(mean: Tensor, std: Tensor, *, nodes: int = NODES) -> Tensor:
    """Return the values mu + sigma x (n, nodes) of Gaussian variables at the quadrature nodes."""
    x, _ = _basis(TERMS, nodes)
    return mean.double()[:, None] + std.double()[:, None] * x


def expanded(values: Tensor, *, terms: int = TERMS) -> Tensor:
    """Expand functions that are known at the quadrature nodes.

    Args:
        values: (n, nodes).

    Returns:
        c (n, terms + 1), float64.
    """
    _, basis = _basis(terms, values.shape[1])
    return values @ basis


def transformed_covariance(c: Tensor, d: Tensor, correlations: Tensor) -> Tensor:
    """Sum c_k(i) d_k(j) R_ij^k over k >= 1: the covariance of f(z_i) and g(z_j).

    Args:
        c, d: coefficients (n, terms + 1) and (m, terms + 1).
        correlations: R (n, m) in [-1, 1].

    Returns:
        (n, m), float64.
    """
    order = c.shape[1] - 1
    total = torch.outer(c[:, order], d[:, order])
    for k in range(order - 1, 0, -1):
        total = total.mul_(correlations).addr_(c[:, k], d[:, k])
    return total.mul_(correlations)


def product_covariance(
    means: tuple[Tensor, Tensor], covariances: tuple[Tensor, Tensor], cross: Tensor | None = None
) -> Tensor:
    """Covariance (n, n) of the products a_i b_i of two vectors.

    Exact for independent factors of any distribution, and for jointly Gaussian ones (Isserlis).

    Args:
        means: of a and b, (n,) each, or (1,) where all products share a factor.
        covariances: A and B, (n, n) each, or (1, 1).
        cross: C_ij = Cov(a_i, b_j) (n, n); None for independent factors.

    >>> one = torch.ones(1, 1)
    >>> product_covariance((torch.zeros(1), torch.zeros(1)), (one, one), one)  # Var(x^2) = 2
    tensor([[2.]])
    """
    (p, q), (a, b) = means, covariances
    covariance = a * b + a * torch.outer(q, q) + b * torch.outer(p, p)
    if cross is not None:
        mixed = cross * torch.outer(q, p)
        covariance += cross * cross.T + mixed + mixed.T
    return covariance


def correlation(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Split a covariance (n, n) into correlation (n, n) and standard deviation (n,).

    A variable without spread has correlation zero with all others.
    """
    std = covariance.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(std > 0, 1 / std.clamp_min(1e-150), 0.0)
    return (covariance * inverse * inverse[:, None]).clamp_(-1, 1), std
