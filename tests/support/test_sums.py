"""Streaming moments against those of all samples at once."""

import pytest
import torch

from intrafuse.support.sums import Sums


def samples(mean=0.0, dtype=torch.double):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(5, 5, generator=generator, dtype=torch.double)
    return (torch.randn(90, 5, generator=generator, dtype=torch.double) @ mixing + mean).to(dtype)


@pytest.mark.parametrize("sizes", [[90], [1, 89], [30, 0, 59, 1]])
@pytest.mark.parametrize(("mean", "dtype"), [(3.0, torch.double), (1e4, torch.float32)])
def test_moments_are_those_of_all_samples_at_once(mean, dtype, sizes):
    """Also of float32 far from zero, whose squares hold nothing of the variance."""
    whole = samples(mean, dtype)
    plain, joint = Sums(), Sums((0, 0), (1, 1), (0, 1))
    for part in whole.split(sizes):
        plain.add(part)
        joint.add(part[:, :2], part[:, 2:])
    expected = whole.double().T.cov(correction=0)
    near = {"atol": 1e-3, "rtol": 1e-4} if dtype is torch.float32 else {}
    assert plain.count == joint.count == 90 and plain.additions == len(sizes)
    torch.testing.assert_close(plain.mean(), whole.double().mean(0), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(plain.variance(), expected.diagonal(), **near)
    torch.testing.assert_close(joint.covariance(0, 0), expected[:2, :2], **near)
    torch.testing.assert_close(joint.covariance(0, 1), expected[:2, 2:], **near)
    torch.testing.assert_close(joint.covariance(1, 1), expected[2:, 2:], **near)
    torch.testing.assert_close(joint.mean(1), plain.mean()[2:])


def test_a_constant_has_no_variance():
    sums = Sums()
    for _ in range(3):
        sums.add(torch.full((7, 2), 0.1))
    assert sums.variance().tolist() == [0.0, 0.0]
    assert sums.mean().tolist() == [torch.tensor(0.1).item()] * 2
