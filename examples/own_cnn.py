"""Prune a CNN of your own with your own data: train, look, prune, fine-tune, save, load.

The page docs/tutorials/own-cnn.md explains each part.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import intrafuse


class SmallNet(nn.Module):
    """A stem, a residual block of two convolutions, and two linear layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.block = nn.Sequential(
            *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)),
        )
        self.head = nn.Sequential(nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.block(x))
        return self.head(nn.functional.max_pool2d(x, 2).flatten(1))


torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
y = torch.tensor(labels)
train_x, train_y, test_x, test_y = x[:1300], y[:1300], x[1300:], y[1300:]


def train(model, epochs, rate):
    """Train by Adam on batches of 64."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(train_x)).split(64):
            loss = nn.functional.cross_entropy(model(train_x[batch]), train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def accuracy(model):
    """Give the share of the test images that are classified correctly, in percent."""
    model.eval()
    with torch.inference_mode():
        return 100 * (model(test_x).argmax(1) == test_y).float().mean().item()


model = SmallNet()
train(model, epochs=6, rate=3e-3)
print(f"trained: {accuracy(model):.1f} %")

graph = intrafuse.trace(model, x[:1])
for group in graph.groups:
    print(group.name, group.size)

for method in ("select", "intra-fusion", "moment"):
    pruned = intrafuse.prune(model, x[:1], channels=0.5, method=method)
    print(f"{method}: {accuracy(pruned.model):.1f} %")

pruned = intrafuse.prune(model, x[:1], params=0.6, method="auto", exclude=["stem"])
print(pruned.report)
print(f"auto: {accuracy(pruned.model):.1f} %")

train(pruned.model, epochs=1, rate=1e-3)
print(f"fine-tuned: {accuracy(pruned.model):.1f} %")

intrafuse.save("small", pruned)
again = intrafuse.load("small", model=SmallNet())
print(f"loaded again: {accuracy(again):.1f} %")
