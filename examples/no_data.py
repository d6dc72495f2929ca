"""Prune a trained network without any data: moments, predicted widths, synthetic inputs.

The page docs/tutorials/no-data.md explains each part.
"""

import torch

import intrafuse
from intrafuse.catalog.data import load_data
from intrafuse.catalog.zoo import resolve_model
from intrafuse.study.evaluate import accuracy
from intrafuse.study.training import PRESETS, train

torch.manual_seed(0)
network = resolve_model("digits_resnet")
model, x = network.model, network.example_inputs
settings = PRESETS["short"].model_copy(update={"epochs": 5, "batch": 64})
train(model, load_data("digits", split="train"), settings)

test = load_data("digits")
print(f"unpruned: {accuracy(model, test):.1f} %")

selected = intrafuse.prune(model, x, channels=0.3, method="select")
print(f"select: {accuracy(selected.model, test):.1f} %")

merged = intrafuse.prune(model, x, channels=0.3, method="moment")
print(f"moment: {accuracy(merged.model, test):.1f} %")

same = intrafuse.prune(model, x, params=0.6, method="moment")
free = intrafuse.prune(model, x, params=0.6, method="moment", scope="predicted")
print(f"60 % of the parameters, equal shares: {accuracy(same.model, test):.1f} %")
print(f"60 % of the parameters, predicted widths: {accuracy(free.model, test):.1f} %")
print(free.plan)

inputs = intrafuse.synthesise(model, x, images=64, steps=20)
repaired = intrafuse.prune(
    model, x, params=0.6, method="moment", scope="predicted", repair="batchnorm", data=inputs
)
print(f"repaired on synthetic inputs: {accuracy(repaired.model, test):.1f} %")
