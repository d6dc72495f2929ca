"""Train and fine-tune classifiers: settings with the paper's presets, one loop, resumable."""

from __future__ import annotations

from intrafuse.study.training.loop import train
from intrafuse.study.training.settings import PRESETS, Training

__all__ = ["PRESETS", "Training", "train"]
