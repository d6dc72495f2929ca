"""Watching a network while it runs: what is seen, what is left behind, and when it fails."""

import pytest
import torch
from torch import nn

from intrafuse import IntrafuseError
from intrafuse.surgery.watch import measure, run, watching


class Named(nn.Module):
    """Calls one layer twice, once by name, and one never."""

    def __init__(self):
        super().__init__()
        self.layer, self.idle = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))

    def forward(self, x):
        return self.layer(input=self.layer(x))


def hooks(model):
    return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


def test_inputs_are_seen_by_position_and_by_name():
    model, seen, x = Named().train(), [], torch.tensor([[1.0, 1.0]])
    with watching([(model.layer, seen.append), (model.idle, seen.append)], inputs=True):
        assert run(model, [x, (x,), {"x": x}]) == 3
    assert [t.tolist() for t in seen] == [[[1.0, 1.0]], [[1.0, 2.0]]] * 3
    assert not hooks(model) and model.training


def test_what_is_returned_goes_on():
    model, x = Named(), torch.ones(1, 2)
    with watching([(model.layer, lambda output: output + 1)]):
        assert model(x).tolist() == [[3.0, 7.0]]
    with watching([(model.layer, lambda output: None)]):
        assert model(x).tolist() == [[1.0, 4.0]]


def test_moments_of_what_has_one_name_are_measured_together():
    model = Named()
    data = [torch.tensor([[1.0, 1.0], [3.0, 1.0]]), torch.tensor([[5.0, 1.0]])]
    watched = [("one", model.layer, lambda x: x), ("none", model.idle, lambda x: x)]
    sums, batches = measure(model, watched, data)
    assert batches == 2 and list(sums) == ["one"] and sums["one"].additions == 4
    torch.testing.assert_close(sums["one"].mean(), torch.tensor([3.0, 3.0]).double())
    torch.testing.assert_close(sums["one"].variance(), torch.tensor([8 / 3, 1.0]).double())


@pytest.mark.parametrize("inputs", [False, True])
def test_hooks_come_off_when_something_fails(inputs):
    model = Named()

    def fail(_):
        raise KeyError("seen")

    def broken():
        yield model.layer, lambda x: None
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"), watching(broken(), inputs=inputs):
        pass
    with pytest.raises(KeyError), watching([(model.layer, fail)], inputs=inputs):
        model(torch.ones(1, 2))
    assert not hooks(model)


def test_a_refused_batch_is_named_with_what_to_do():
    with pytest.raises(IntrafuseError, match=r"refused batch 2 of the data.*look at it"):
        run(Named(), [torch.ones(1, 2), torch.ones(1, 3)], advice="look at it")
