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
from math import factorial, prod

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "correlation",
    "expanded",
    "hermite_coefficients",
    "product_moments",
    "quadrature_values",
    "scaled_covariance",
    "spread",
    "transformed_covariance",
]

TERMS, NODES, ROWS = 24, 200, 64
WIDE = 256  # channels from which correlations are float32


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
    """Return the covariance (n, m) of f(z_i) and g(z_j), float64; see `scaled_covariance`."""
    among, own, other = scaled_covariance(c, d, correlations)
    return among.double().mul_(own[:, None]).mul_(other)


def scaled_covariance(c: Tensor, d: Tensor, correlations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum c_k(i) d_k(j) R_ij^k over k >= 1: the covariance of f(z_i) and g(z_j), scaled.

    Args:
        c, d: coefficients (n, terms + 1) and (m, terms + 1).
        correlations: R (n, m) in [-1, 1]; symmetric if d is c, the same object.

    Returns:
        The sum (n, m), divided by the deviations of f(z_i) and g(z_j), and these, (n,) and (m,).
    """
    alike = c is d  # and then the result is symmetric
    (c, own), (d, other) = _scaled(c, correlations), _scaled(d, correlations)
    order = _order(c, d)
    total = torch.empty_like(correlations)
    for rows, columns in _tiles(len(c), alike):
        r, x, y = correlations[rows, columns], c[rows], d[columns]
        part = torch.outer(x[:, order], y[:, order])
        for k in range(order - 1, 0, -1):
            part.mul_(r).addr_(x[:, k], y[:, k])
        total[rows, columns] = part.mul_(r)
    return _whole(total, alike), own, other


def _scaled(c: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Scale expansions to variance one, so that float32 can hold them; return their deviations."""
    own = c[:, 1:].norm(dim=1)
    return torch.where(own > 0, 1 / own.clamp_min(1e-300), 0.0)[:, None].mul(c).to(like), own


def _order(c: Tensor, d: Tensor) -> int:
    """Return the order whose terms are the last that matter to the precision of scaled c and d."""
    left, right = (x.square().flip(1).cumsum(1).amax(0).flip(0).sqrt() for x in (c, d))
    return max(1, int((left * right > torch.finfo(c.dtype).eps).sum()) - 1)


def _tiles(n: int, symmetric: bool) -> list[tuple[slice, slice]]:
    """Split a matrix of n rows into few rows that fit a core's cache; a symmetric one above it."""
    starts = range(0, n, ROWS)
    return [(slice(i, i + ROWS), slice(i if symmetric else 0, None)) for i in starts]


def _whole(total: Tensor, symmetric: bool) -> Tensor:
    """Mirror what `_tiles` left out."""
    for rows, _ in _tiles(len(total), True) if symmetric else ():
        total[rows.stop :, rows] = total[rows, rows.stop :].T
    return total


def product_moments(
    f: Tensor, g: Tensor, among: tuple[Tensor, Tensor, Tensor], *, degree: int = 3
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Compute mean and covariance of products f_i(x_i) g_i(y_i) of jointly Gaussian x and y.

    With D_pq(i) = E[f_i^(p)(x_i) g_i^(q)(y_i)], the expectations of derivatives, and i != j,

        Cov = sum R_xx^a R_xy^b R_yx^c R_yy^e D_{a+b,c+e}(i) D_{a+c,b+e}(j) / (a! b! c! e!)

    over a + b + c + e >= 1 (the formula of Stroock 1987, element by element). The sum is truncated
    at a degree; mean and variances are not. The matrix stays positive semidefinite.

    Args:
        f, g: values (n, nodes) at the quadrature nodes of x and y.
        among: correlations R_xx, R_xy and R_yy, (n, n) each.
        degree: highest a + b + c + e.

    Returns:
        Mean (n,), correlation (n, n) and standard deviation (n,).
    """
    own = among[1].diagonal()
    c, d = expanded(f), expanded(g)
    slopes = {
        (p, q): _mehler(_derivative(c, p), _derivative(d, q), own)
        for p in range(degree + 1)
        for q in range(degree + 1 - p)
    }
    mean = slopes[0, 0]
    variance = _mehler(expanded(f.square()), expanded(g.square()), own) - mean.square()
    std = variance.clamp_min(0).sqrt()
    inverse = torch.where(std > 0, 1 / std.clamp_min(1e-300), 0.0)
    slopes = {powers: (inverse * slope).to(among[0]) for powers, slope in slopes.items()}
    total = _series(slopes, among, degree)
    own = total.diagonal().clamp_min(1.0)  # where the sum exceeds the exact variance
    scale = own.rsqrt()
    total.mul_(scale).mul_(scale[:, None]).fill_diagonal_(1.0)
    return mean, (total, std * own.double().sqrt())


def _series(
    slopes: dict[tuple[int, int], Tensor], among: tuple[Tensor, Tensor, Tensor], degree: int
) -> Tensor:
    """Sum the terms of `product_moments` up to a degree, nested by powers of each correlation."""
    total = torch.empty_like(among[0])
    for rows, columns in _tiles(len(total), True):
        xy, yx = among[1][rows, columns], among[1][columns, rows].T.contiguous()
        factors = [among[0][rows, columns], xy, yx, among[2][rows, columns]]

        def nested(powers: tuple[int, ...], rows=rows, columns=columns, factors=factors) -> Tensor:
            most = degree - sum(powers)
            if len(powers) < 3:
                found = nested((*powers, most))
                for power in range(most - 1, -1, -1):
                    found.mul_(factors[len(powers)]).add_(nested((*powers, power)))
                return found
            found = torch.zeros_like(factors[0])
            x, xy, yx = powers
            for y in range(most, -1, -1):
                weight = prod(map(factorial, (*powers, y))) if any((*powers, y)) else torch.inf
                left, right = slopes[x + xy, yx + y][rows], slopes[x + yx, xy + y][columns]
                found.mul_(factors[3]).addr_(left / weight, right)
            return found

        total[rows, columns] = nested(())
    return _whole(total, True)


def _derivative(c: Tensor, times: int) -> Tensor:
    """Differentiate an expansion: he_k' = sqrt(k) he_{k-1}."""
    for _ in range(times):
        c = c[:, 1:] * torch.arange(1, c.shape[1], dtype=c.dtype).sqrt()
    return c


def _mehler(c: Tensor, d: Tensor, correlations: Tensor) -> Tensor:
    """E[f_i(x_i) g_i(y_i)] (n,) for correlations (n,): the sum of c_k d_k R^k over k >= 0."""
    k = torch.arange(min(c.shape[1], d.shape[1]))
    return (c[:, k] * d[:, k] * correlations[:, None] ** k).sum(1)


def spread(correlations: Tensor, std: Tensor) -> Tensor:
    """Return the covariance (n, n), float64, of correlations (n, n) and deviations (n,)."""
    return (correlations * std.double()).mul_(std[:, None])


def correlation(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Split a covariance (n, n) into correlation (n, n) and standard deviation (n,).

    A variable with zero variance has correlation zero with all others. Correlations of many
    variables are float32: their rounding is far below what is assumed about them.
    """
    std = covariance.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(std > 0, 1 / std.double().clamp_min(1e-150), 0.0)
    if len(std) >= WIDE:
        inverse = inverse.to(covariance)
    found = (covariance * inverse).mul_(inverse[:, None]).clamp_(-1, 1)
    return found if len(found) < WIDE else found.float(), std.double()
