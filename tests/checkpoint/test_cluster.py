"""Groups of a streamed checkpoint that are planned on a Ray cluster."""

from __future__ import annotations

import os
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
from language_models import SIZES, transformers
from safetensors.torch import load_file

from intrafuse import IntrafuseError, prune_checkpoint
from intrafuse.methods import IntraFusion


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    shim = {  # of this test environment: see tests/conftest.py
        "env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        "worker_process_setup_hook": "architectures.import_torchvision",
    }
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init(num_cpus=2, runtime_env=shim, **quiet)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 2})
    folder = tmp_path_factory.mktemp("ray") / "source"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["select", "intra-fusion"])
def test_a_cluster_plans_the_same_checkpoint(cluster, source, tmp_path, method):
    alone = prune_checkpoint(source, tmp_path / "alone", channels=0.5, method=method)
    spread = prune_checkpoint(
        source, tmp_path / "spread", channels=0.5, method=method, workers="ray"
    )
    assert spread.widths == alone.widths
    one, other = (load_file(made.folder / "model.safetensors") for made in (alone, spread))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "moment"},
        {"method": IntraFusion(features="all")},
        {"method": "select", "repair": "analytic"},
    ],
)
def test_groups_that_depend_on_each_other_are_refused(source, tmp_path, settings):
    with pytest.raises(IntrafuseError, match="do not depend on each other"):
        prune_checkpoint(source, tmp_path / "out", channels=0.5, workers="ray", **settings)
    assert not (tmp_path / "out").exists()
