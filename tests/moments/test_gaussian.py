"""Series of correlations: known answers for products, at widths of float64 and of float32."""

from __future__ import annotations

import pytest
import torch

from intrafuse.moments.gaussian import (
    WIDE,
    correlation,
    expanded,
    product_moments,
    quadrature_values,
    spread,
    transformed_covariance,
)


def drawn(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the covariance of n variables x and n variables y, jointly Gaussian."""
    rows = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(n)).double()
    covariance = rows @ rows.T / n
    return correlation(covariance.float() if n >= WIDE else covariance)


@pytest.mark.parametrize("size", [1.0, 1e30])
@pytest.mark.parametrize("n", [7, WIDE])
def test_products_of_gaussian_variables(n, size):
    """Cov(x_i y_i, x_j y_j) = Cxx Cyy + Cxy Cyx for means of zero (Isserlis), of any size."""
    among, std = drawn(n)
    std = std * size
    x, y = (quadrature_values(torch.zeros(n), part) for part in std.split(n))
    xx, xy, yy = among[:n, :n], among[:n, n:], among[n:, n:]
    mean, (found, own) = product_moments(x, y, (xx, xy, yy))
    whole = spread(among, std) / size**2
    wanted = whole[:n, :n] * whole[n:, n:] + whole[:n, n:] * whole[n:, :n]
    near = {"rtol": 1e-4, "atol": 1e-5} if n >= WIDE else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(mean / size**2, whole[:n, n:].diagonal(), **near)
    torch.testing.assert_close(spread(found, own / size**2), wanted, **near)


@pytest.mark.parametrize("n", [7, WIDE + 70])
def test_squares_of_gaussian_variables(n):
    """Cov(x_i^2, x_j^2) = 2 C_ij^2, also between two sets of variables."""
    among, std = drawn(n)
    c = expanded(quadrature_values(torch.zeros(n), std[:n]).square())
    d = expanded(quadrature_values(torch.zeros(n), std[n:]).square())
    whole = spread(among, std)
    near = {"rtol": 1e-4, "atol": 1e-5} if n >= WIDE else {"rtol": 1e-9, "atol": 1e-9}
    for right, columns in ((c, slice(0, n)), (d, slice(n, None))):
        found = transformed_covariance(c, right, among[:n, columns])
        torch.testing.assert_close(found, 2 * whole[:n, columns].square(), **near)
