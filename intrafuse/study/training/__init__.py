"""Train and fine-tune classifiers: settings, presets of the paper, and one resumable loop."""

from __future__ import annotations

from intrafuse.study.training.loop import train
from intrafuse.study.training.settings import PRESETS, Training

__all__ = ["PRESETS", "Training", "train"]
