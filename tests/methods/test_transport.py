"""Ground cost, marginals, transport, assignment: known answers, then laws, then refusals."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment

from intrafuse.methods.transport import (
    Transport,
    assignment,
    encode_matrix,
    ground_cost,
    marginal,
    onto_channels,
    transport,
)
from intrafuse.support.errors import IntrafuseError

ORDERS = [1, 1.5, 2, 3, np.inf]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def uniform(n):
    return np.full(n, 1 / n)


def problem(n, m, seed=0):
    """Draw a cost (n, m) and two marginals that are not uniform."""
    rng = np.random.default_rng(seed)
    source, target = rng.random(n) + 0.1, rng.random(m) + 0.1
    return rng.random((n, m)), source / source.sum(), target / target.sum()


# --- ground cost


def loop_cost(x, y, p):
    """The definition, written with two loops."""
    x, y = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (x, y))
    cost = np.zeros((len(x), len(y)))
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            cost[i, j] = np.linalg.norm(a - b, ord=p)
    return cost


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("features", [1, 5, 31, 32, 33, 100])
def test_ground_cost_is_its_definition(p, features):
    rng = np.random.default_rng(features)
    x, y = rng.standard_normal((6, features)), rng.standard_normal((4, features))
    found = ground_cost(torch.from_numpy(x), torch.from_numpy(y), p=p)
    np.testing.assert_allclose(found, loop_cost(x, y, p), atol=2e-6)


@pytest.mark.parametrize("p", ORDERS)
def test_ground_cost_does_not_see_the_scale_of_channels(p):
    x, y = torch.randn(5, 7), torch.randn(3, 7)
    scaled = ground_cost(x * torch.rand(5, 1).add(0.1) * 100, y * torch.rand(3, 1).add(0.1), p=p)
    np.testing.assert_allclose(scaled, ground_cost(x, y, p=p), atol=2e-6)


@pytest.mark.parametrize("p", ORDERS)
def test_ground_cost_is_a_distance(p):
    x = torch.randn(6, 9)
    cost = ground_cost(x, x, p=p)
    np.testing.assert_allclose(np.diag(cost), 0, atol=1e-3)  # p = 2 takes a root of rounding
    np.testing.assert_allclose(cost, cost.T, atol=2e-6)
    assert (cost[:, None] <= cost[:, :, None] + cost[None] + 1e-5).all()


def test_ground_cost_of_unit_vectors():
    cost = ground_cost(torch.eye(3), torch.eye(3)[:2])
    np.testing.assert_allclose(cost, [[0, 2], [2, 0], [2, 2]])


def test_a_channel_of_zeros_is_at_a_finite_distance():
    cost = ground_cost(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0]]))
    np.testing.assert_allclose(cost, [[1.0], [0.8]], atol=1e-6)


@pytest.mark.parametrize("p", [0.99, 0, -1, float("nan")])
def test_an_order_below_one_is_refused(p):
    with pytest.raises(IntrafuseError, match=r"order p .* at least 1"):
        ground_cost(torch.eye(2), torch.eye(2), p=p)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(bad):
    x = torch.eye(3)
    x[1, 1] = bad
    with pytest.raises(IntrafuseError, match="finite"):
        ground_cost(x, torch.eye(3))


def test_other_numbers_of_features_are_refused():
    with pytest.raises(IntrafuseError, match="equally many features"):
        ground_cost(torch.eye(3), torch.eye(2))


# --- marginals


@pytest.mark.parametrize("kind", ["uniform", "importance", "softmax"])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_marginals_sum_to_one(kind, n):
    mass = marginal(kind, torch.rand(n) * 50 + 0.1)
    assert mass.shape == (n,) and mass.dtype == np.float64 and (mass >= 0).all()
    np.testing.assert_allclose(mass.sum(), 1)


def test_known_marginals():
    scores = torch.tensor([1.0, 3.0, 0.0])
    np.testing.assert_allclose(marginal("uniform", scores), [1 / 3] * 3)
    np.testing.assert_allclose(marginal("importance", scores), [0.25, 0.75, 0])
    powers = np.exp([1, 3, 0])
    np.testing.assert_allclose(marginal("softmax", scores), powers / powers.sum())


@pytest.mark.parametrize("scores", [[1.0, -0.1], [0.0, 0.0]])
def test_importance_that_cannot_be_mass_is_refused(scores):
    with pytest.raises(IntrafuseError, match="not negative and not all zero"):
        marginal("importance", torch.tensor(scores))


@pytest.mark.parametrize("kind", ["importance", "softmax", "uniform"])
def test_scores_that_are_not_finite_are_refused(kind):
    with pytest.raises(IntrafuseError, match="finite"):
        marginal(kind, torch.tensor([1.0, float("nan")]))


def test_an_unknown_marginal_is_refused():
    with pytest.raises(IntrafuseError, match="uniform, importance, softmax; got 'even'"):
        marginal("even", torch.ones(2))


# --- transport: known answers


@pytest.mark.parametrize("n", [1, 2, 5])
def test_identity(n):
    solution = transport(1 - np.eye(n), uniform(n), uniform(n))
    np.testing.assert_allclose(solution.matrix, np.eye(n) / n)
    assert solution.value == 0 and solution.error < 1e-12


@given(st.permutations(range(6)))
def test_a_permutation_is_found(order):
    cost = np.ones((6, 6))
    cost[np.arange(6), order] = 0
    solution = transport(cost, uniform(6), uniform(6))
    np.testing.assert_allclose(solution.matrix, np.eye(6)[list(order)] / 6)
    assert assignment(cost).tolist() == list(order)


def test_diracs():
    """All mass of one source goes to all targets, and all sources to one target."""
    cost, source, target = problem(4, 3)
    dirac = np.array([0, 0, 1.0, 0])
    np.testing.assert_allclose(transport(cost, dirac, target).matrix, np.outer(dirac, target))
    one = np.array([0, 1.0, 0])
    np.testing.assert_allclose(transport(cost, source, one).matrix, np.outer(source, one))


def test_mass_on_a_line_is_transported_in_order():
    cost = np.abs(np.arange(4.0)[:, None] - np.array([0.0, 3.0]))
    solution = transport(cost, uniform(4), uniform(2))
    np.testing.assert_allclose(solution.matrix * 4, [[1, 0], [1, 0], [0, 1], [0, 1]])
    np.testing.assert_allclose(solution.value, 0.5)


# --- transport: laws

SHAPES = [(1, 1), (5, 1), (1, 5), (6, 6), (9, 4), (4, 9)]


@pytest.mark.parametrize("regularisation", [None, 0, 0.1, 1.0])
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_marginals_hold(n, m, regularisation):
    solution = transport(*problem(n, m), regularisation=regularisation)
    assert (solution.matrix >= 0).all() and solution.error < 1e-5
    np.testing.assert_allclose(solution.matrix.sum(1), solution.source, atol=1e-5)
    np.testing.assert_allclose(solution.matrix.sum(0), solution.target, atol=1e-5)


@pytest.mark.parametrize("regularisation", [0, 0.2])
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_symmetry(n, m, regularisation):
    cost, source, target = problem(n, m)
    there = transport(cost, source, target, regularisation=regularisation)
    back = transport(cost.T, target, source, regularisation=regularisation)
    np.testing.assert_allclose(there.matrix, back.matrix.T, atol=1e-5)


@given(
    hnp.arrays(np.float64, (5, 5), elements=st.floats(0, 10)),
    st.integers(0, 2**31),
)
def test_no_coupling_is_cheaper(cost, seed):
    """The optimum costs no more than the product coupling or any permutation."""
    solution = transport(cost, uniform(5), uniform(5))
    order = np.random.default_rng(seed).permutation(5)
    assert solution.value <= cost[np.arange(5), order].mean() + 1e-9
    assert solution.value <= cost.mean() + 1e-9


@pytest.mark.parametrize("n", [1, 2, 3, 8, 20])
def test_assignment_agrees_with_scipy_and_with_transport(n):
    cost = np.random.default_rng(n).random((n, n))
    found = assignment(cost)
    rows, columns = linear_sum_assignment(cost)
    assert found.tolist() == columns[np.argsort(rows)].tolist()
    solution = transport(cost, uniform(n), uniform(n))
    np.testing.assert_allclose(solution.matrix, np.eye(n)[found] / n, atol=1e-12)


@pytest.mark.parametrize("mass", ["uniform", "random"])
@pytest.mark.parametrize("p", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("n, m", [(7, 7), (9, 1), (12, 5), (12, 11), (16, 8)])
def test_mass_that_channel_and_target_share_may_stay(n, m, p, mass):
    """Transport onto kept channels costs as little as the best of all transports."""
    generator = torch.Generator().manual_seed(n * m)
    x = torch.randn(n, 6, generator=generator)
    keep = torch.randperm(n, generator=generator)[:m].sort().values
    mu, nu = np.full(n, 1 / n), np.full(m, 1 / m)
    if mass == "random":  # some kept channels have more mass than their targets
        mu, nu = (torch.rand(k, generator=generator).double().numpy() for k in (n, m))
        mu, nu = mu / mu.sum(), nu / nu.sum()
    best = transport(ground_cost(x, x[keep], p=p), mu, nu)
    found = Transport(onto_channels(x, keep, mu, nu, p=p), best.cost, mu, nu)
    assert found.error < 1e-9
    np.testing.assert_allclose(found.value, best.value, rtol=1e-6, atol=1e-7)


def test_scaling_and_shifting_the_cost_changes_nothing():
    cost, source, target = problem(8, 5)
    base = transport(cost, source, target).matrix
    np.testing.assert_allclose(transport(7 * cost, source, target).matrix, base, atol=1e-12)
    np.testing.assert_allclose(transport(cost + 3, source, target).matrix, base, atol=1e-12)
    entropic = [transport(c, source, target, regularisation=0.3) for c in (cost, 7 * cost)]
    np.testing.assert_allclose(entropic[0].matrix, entropic[1].matrix, atol=1e-6)


def test_entropic_transport_tends_to_the_exact_one():
    cost, source, target = problem(10, 6)
    exact = transport(cost, source, target, regularisation=0)
    found = [transport(cost, source, target, regularisation=r) for r in (10, 1, 0.1, 0.01, 0.003)]
    values = [solution.value for solution in found]
    assert values == sorted(values, reverse=True) and values[-1] >= exact.value - 1e-6
    np.testing.assert_allclose(found[-1].matrix, exact.matrix, atol=5e-3)
    np.testing.assert_allclose(found[0].matrix, np.outer(source, target), atol=1e-2)


def test_entropic_transport_of_zero_cost_or_mass():
    _, source, target = problem(4, 3)
    flat = transport(np.zeros((4, 3)), source, target, regularisation=0.1)
    np.testing.assert_allclose(flat.matrix, np.outer(source, target), atol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        none = transport(np.ones((2, 2)), np.array([0.0, 1]), uniform(2), regularisation=0.1)
    np.testing.assert_allclose(none.matrix, [[0, 0], [0.5, 0.5]], atol=1e-9)


# --- transport: refusals


@pytest.mark.parametrize("regularisation", [-0.1, float("nan"), float("inf")])
def test_a_bad_regularisation_is_refused(regularisation):
    with pytest.raises(IntrafuseError, match="regularisation must be finite and not negative"):
        transport(*problem(3, 2), regularisation=regularisation)


@pytest.mark.parametrize("regularisation", [0, 0.1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_numbers_that_are_not_finite_are_refused(part, bad, regularisation):
    arrays = problem(3, 2)
    arrays[part].flat[1] = bad
    with pytest.raises(IntrafuseError, match="must be finite"):
        transport(*arrays, regularisation=regularisation)


def test_a_problem_that_is_not_one_of_transport_is_refused():
    cost, source, target = problem(3, 2)
    with pytest.raises(IntrafuseError, match=r"must be \(2, 3\); got \(3, 2\)"):
        transport(cost, target, source)
    with pytest.raises(IntrafuseError, match="must have the same total"):
        transport(cost, 2 * source, target)
    with pytest.raises(IntrafuseError, match="must not be negative"):
        transport(cost, np.array([1.5, -1, 0.5]), target)


@pytest.mark.parametrize("cost", [np.ones((2, 3)), np.full((2, 2), np.nan), np.ones(3)])
def test_an_assignment_needs_a_square_finite_cost(cost):
    with pytest.raises(IntrafuseError, match="square and finite"):
        assignment(cost)


# --- encode matrix


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_encode_matrices_conserve_mass_or_average(n, m):
    solution = transport(*problem(n, m))
    paper, mean = (encode_matrix(solution.matrix, kind) for kind in ("paper", "barycentric"))
    assert paper.shape == mean.shape == (m, n) and paper.dtype == torch.float32
    torch.testing.assert_close(paper.sum(0), torch.ones(n))  # a channel spreads its whole mass
    torch.testing.assert_close(mean.sum(1), torch.ones(m))  # a new channel is a mean
    source, target = (torch.from_numpy(s).float() for s in (solution.source, solution.target))
    torch.testing.assert_close(paper @ source, target)
    torch.testing.assert_close(mean.T @ target, source)


def test_channels_and_targets_without_mass_give_zeros():
    matrix = np.array([[0.0, 0.0], [1.0, 0.0]])
    for kind in ("paper", "barycentric"):
        torch.testing.assert_close(
            encode_matrix(matrix, kind), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        )


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(IntrafuseError, match="paper or barycentric; got 'rows'"):
        encode_matrix(transport(*problem(2, 2)).matrix, "rows")
