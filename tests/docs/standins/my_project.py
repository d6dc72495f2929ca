"""What the pages call `my_project`: a reader's own network and data."""

import torch
from torch import nn


class MyNet(nn.Module):
    """A stem, a convolution and two classes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


batches = [torch.zeros(4, 3, 32, 32), torch.ones(4, 3, 32, 32)]
