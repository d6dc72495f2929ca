"""Trace a model to channel groups: symbolic axes, and one rule for each operator."""

from intrafuse.graph.axes import Block, Product, Sum, Tree
from intrafuse.graph.groups import ChannelGraph, ChannelGroup, Layer, Norm, Slot
from intrafuse.graph.trace import ExampleInputs, trace

__all__ = [
    "Block",
    "ChannelGraph",
    "ChannelGroup",
    "ExampleInputs",
    "Layer",
    "Norm",
    "Product",
    "Slot",
    "Sum",
    "Tree",
    "trace",
]
