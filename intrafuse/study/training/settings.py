"""Settings of training, which are checked when built, and the paper's presets."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["PRESETS", "Training"]


class Training(BaseModel):
    """Settings of stochastic gradient descent with momentum.

    Attributes:
        epochs: passes over the data; 0 skips training.
        batch: images in a step.
        rate: initial learning rate, or the highest rate of `one-cycle`.
        momentum, weight_decay: as in torch.optim.SGD.
        schedule: `halving` multiplies the rate by 0.5 every `halve_every` epochs, as the paper does
            (Theus et al., appendix A). `one-cycle` rises to the rate and falls to zero, which is
            better for short trainings (Smith and Topin, arXiv 1708.07120).
        halve_every: number of epochs between halvings.
        augment: `crop-flip` shifts images by up to 4 pixels and mirrors them at random; `auto` does
            so for color images of at least 16 pixels (digits must not be mirrored).
        precision: `bfloat16` computes the layers in bfloat16 and keeps float32 weights; `auto`
            does so on GPUs that support it.

    >>> Training(epochs=60, rate=0.05).rate_at(30, 60)
    0.025
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=10, ge=0)
    batch: int = Field(default=128, ge=1)
    rate: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    schedule: Literal["halving", "one-cycle"] = "halving"
    halve_every: int = Field(default=30, ge=1)
    augment: Literal["none", "auto", "crop-flip"] = "none"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def augments(self, shape: tuple[int, int, int]) -> bool:
        """Tell whether images of shape (channels, height, width) are shifted and mirrored."""
        colour = shape[0] == 3 and min(shape[1:]) >= 16
        return self.augment == "crop-flip" or (self.augment == "auto" and colour)

    def rate_at(self, epoch: float, epochs: int) -> float:
        """Return the learning rate at a time of the training.

        Args:
            epoch: completed epochs, including the fraction of the present one.
            epochs: total number of epochs.
        """
        if self.schedule == "halving":
            return self.rate * 0.5 ** (int(epoch) // self.halve_every)
        rise, done = 0.3, epoch / max(epochs, 1)
        low, high, share = (
            (0.04, 1.0, done / rise) if done < rise else (1.0, 0.0, (done - rise) / (1 - rise))
        )
        return self.rate * (low + (high - low) * (1 - math.cos(math.pi * share)) / 2)


PRESETS = {
    "paper": Training(epochs=300),
    "paper-finetune": Training(epochs=200, rate=0.01),
    "short": Training(epochs=10, rate=0.1, weight_decay=5e-4, schedule="one-cycle", augment="auto"),
    "short-finetune": Training(
        epochs=2, rate=0.02, weight_decay=5e-4, schedule="one-cycle", augment="auto"
    ),
}
"""Settings by name. `paper`: appendix A of Theus et al.; `short`: for a few epochs."""
