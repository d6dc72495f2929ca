"""Networks by name: the zoo itself, MODEL strings, and weights from safetensors files."""

from __future__ import annotations

from intrafuse.catalog.zoo.registry import ZOO, ResolvedModel, ZooEntry, from_zoo, resolve_model
from intrafuse.catalog.zoo.weights import file_sha256, load_weights

__all__ = [
    "ZOO",
    "ResolvedModel",
    "ZooEntry",
    "file_sha256",
    "from_zoo",
    "load_weights",
    "resolve_model",
]
