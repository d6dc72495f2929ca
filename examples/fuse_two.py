"""Fuse two networks that were trained apart into one of the same size.

The page docs/tutorials/fuse-two.md explains each part.
"""

import copy

import torch

import intrafuse
from intrafuse.catalog.data import load_data
from intrafuse.catalog.zoo import resolve_model
from intrafuse.study.evaluate import accuracy
from intrafuse.study.training import PRESETS, train

images, test = load_data("digits", split="train"), load_data("digits")
settings = PRESETS["short"].model_copy(update={"epochs": 10, "batch": 64})


def trained(seed):
    """Train a multi-layer perceptron from a start of its own."""
    torch.manual_seed(seed)
    return train(resolve_model("mlp").model, images, settings, seed=seed)


first, second = trained(1), trained(2)
x = resolve_model("mlp").example_inputs
print(f"first: {accuracy(first, test):.1f} %, second: {accuracy(second, test):.1f} %")

average = copy.deepcopy(first)
with torch.no_grad():
    for mine, other in zip(average.parameters(), second.parameters(), strict=True):
        mine.lerp_(other, 0.5)
print(f"plain average: {accuracy(average, test):.1f} %")

fused = intrafuse.fuse([first, second], x)
print(f"OT on weights, no data: {accuracy(fused.model, test):.1f} %")
print(fused.report)

samples = [images.unlabelled(200)]
aligned = intrafuse.fuse([first, second], x, features="activations", data=samples)
print(f"OT on activations of 200 images: {accuracy(aligned.model, test):.1f} %")

solved = intrafuse.fuse([first, second], x, method="moment", features="activations", data=samples)
print(f"moment on 200 images: {accuracy(solved.model, test):.1f} %")

intrafuse.save("fused", solved.model, architecture="mlp", plan=solved.plan)
print(f"loaded again: {accuracy(intrafuse.load('fused'), test):.1f} %")
