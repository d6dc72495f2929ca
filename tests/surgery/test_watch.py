"""Watching modules while a network runs: what is seen, and what is left behind when it fails."""

import pytest
import torch
from networks import CalledTwice

from intrafuse.surgery.watch import watching


def hooks(model):
    return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


def test_inputs_are_seen_by_position_and_by_name():
    model, seen, x = CalledTwice(), [], torch.tensor([[1.0, 1.0]])
    with watching([(model.layer, seen.append), (model.idle, seen.append)]):
        model(x)
        model(x=x)
    assert [t.tolist() for t in seen] == [[[1.0, 1.0]], [[1.0, 2.0]]] * 2
    assert not hooks(model)


def test_hooks_come_off_when_something_fails():
    model = CalledTwice()

    def fail(_):
        raise KeyError("seen")

    def broken():
        yield model.layer, lambda x: None
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"), watching(broken()):
        pass
    with pytest.raises(KeyError), watching([(model.layer, fail)]):
        model(torch.ones(1, 2))
    assert not hooks(model)
