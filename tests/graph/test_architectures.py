"""A sample of the zoo sweep: whole architectures of other libraries, pruned and verified.

`benchmarks/zoo.py` runs all of them; docs/architectures.md has its table.
"""

from __future__ import annotations

import importlib.util
import math

import pytest
from architectures import ARCHITECTURES
from zoo import examine
from zoo_methods import METHODS

LIBRARIES = {
    "torchvision": "torchvision",
    "backbone": "torchvision",
    "timm": "timm",
    "hf": "transformers",
}
# The least share of the parameters that can be pruned.
SAMPLE = {
    "own:unet_pixelshuffle": 0.99,
    "own:speech_gru": 0.99,
    "torchvision:squeezenet1_1": 0.99,
    "torchvision:shufflenet_v2_x0_5": 0.95,
    "torchvision:mobilenet_v3_small": 0.99,
    "backbone:ssdlite320_mobilenet_v3_large": 0.95,
    "timm:lcnet_050": 0.99,
    "hf:t5_gated": 0.9,
}


@pytest.mark.parametrize("name", SAMPLE)
def test_pruned_architectures_equal_their_masked_originals(name):
    library = LIBRARIES.get(name.partition(":")[0])
    if library is not None and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is absent")
    row = examine(name)
    assert row["status"] == "pass", row
    assert row["relative"] < 1e-5 < 1e-3 < row["effect"]
    assert row["prunable"] >= SAMPLE[name] and row["removed"] > 0.35
    errors = [row["methods"][method] for method in METHODS]
    assert all(isinstance(error, float) and math.isfinite(error) for error in errors), errors


def test_the_sweep_is_large_and_lists_each_architecture_once():
    assert len(set(ARCHITECTURES)) == len(ARCHITECTURES) >= 150
    assert set(SAMPLE) <= set(ARCHITECTURES)
