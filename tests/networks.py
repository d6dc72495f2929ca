"""Tiny networks that many tests share: one for each way in which channels can be coupled.

`NETWORKS` lists them by name. `build(name)` gives a network in evaluation mode with seeded
weights, whose batch norms look trained: random statistics, scales (some negative) and shifts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafuse.catalog.data import load_data
from intrafuse.catalog.zoo import ZOO
from intrafuse.graph.blocks import positions

__all__ = [
    "FAMILIES",
    "NETWORKS",
    "Net",
    "Network",
    "build",
    "copy_channels",
    "covering",
    "learn_digits",
    "outputs",
    "randomise",
    "same_state",
]


# Of networks of the zoo that differ in depth only, the first: laws hold or fail for all of them.
FAMILIES = [name for name in ZOO if name not in ("resnet32", "resnet44", "resnet56")]


@dataclass(frozen=True)
class Network:
    """A factory and the shape (batch included) of its input."""

    factory: Callable[[], nn.Module]
    shape: tuple[int, ...]


def chain() -> nn.Module:
    """Convolutions with batch norm and ReLU, with and without bias."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3, stride=2, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 10, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 5)),
    )


class Residual(nn.Module):
    """A stem and a block whose shortcut is a convolution with its own norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 10, 3, stride=2, padding=1), nn.BatchNorm2d(10)
        self.conv2, self.bn2 = nn.Conv2d(10, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.short = nn.Sequential(nn.Conv2d(8, 10, 1, stride=2, bias=False), nn.BatchNorm2d(10))
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.head(F.relu(y + self.short(x)).mean((2, 3)))


class PreActivation(nn.Module):
    """Norms stand before the activation and read sums: none can fold into a layer before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.bn3, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv1(F.relu(self.bn1(x)))
        x = x + self.conv2(F.relu(self.bn2(x)))
        return self.head(F.relu(self.bn3(x)).mean((2, 3)))


class Dense(nn.Module):
    """Layers read the concatenation of all earlier outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
        self.bn2, self.conv3 = nn.BatchNorm2d(10), nn.Conv2d(10, 6, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = torch.cat([x, self.conv2(F.relu(self.bn(x)))], 1)
        x = torch.cat([x, self.conv3(F.relu(self.bn2(x)))], 1)
        return self.head(F.relu(x).mean((2, 3)))


def grouped() -> nn.Module:
    """A convolution of four groups, and one transposed of two: whole groups go."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 6, 1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.ConvTranspose2d(6, 8, 2, groups=2), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def separable() -> nn.Module:
    """Depthwise convolutions, one of them with two outputs for each channel."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)),
        *(nn.Conv2d(6, 12, 3, padding=1, groups=6), nn.BatchNorm2d(12), nn.Hardswish()),
        *(nn.Conv2d(12, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)),
    )


def flat() -> nn.Module:
    """A linear layer reads a block of positions for each channel of a convolution."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(24, 10), nn.ReLU(), nn.Dropout(0.1), nn.Linear(10, 5)),
    )


def autoencoder() -> nn.Module:
    """Convolutions down, transposed convolutions up."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.Tanh()),
        *(nn.ConvTranspose2d(6, 8, 2, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.ConvTranspose2d(8, 3, 3, 1, 1), nn.Sigmoid()),
    )


def conv1d() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.GELU()),
        *(nn.Conv1d(8, 6, 3, bias=False), nn.BatchNorm1d(6), nn.GELU(), nn.MaxPool1d(2)),
        *(nn.ConvTranspose1d(6, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(30, 5)),
    )


def conv3d() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU()),
        *(nn.ConvTranspose3d(6, 4, 2, bias=False), nn.BatchNorm3d(4), nn.ReLU()),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 5)),
    )


def prelus() -> nn.Module:
    """One slope for each channel, and one for all."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8)),
        *(nn.Conv2d(8, 6, 3), nn.PReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 7), nn.PReLU(7)),
        nn.Linear(7, 5),
    )


class OptionA(nn.Module):
    """A shortcut without parameters: every second position, padded with channels of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.head(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))).mean((2, 3)))


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU()),
        *(nn.Linear(12, 9, bias=False), nn.BatchNorm1d(9, affine=False), nn.ReLU()),
        nn.Linear(9, 5),
    )


class Tied(nn.Module):
    """Two layers hold the same weight: their channels are one group, and the tie must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.bn, self.head = nn.BatchNorm1d(8), nn.Linear(8, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enter(x))
        return self.head(F.relu(self.second(F.relu(self.bn(self.first(x))))))


class Twice(nn.Module):
    """A convolution with its norm is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(2):
            x = F.relu(self.bn(self.conv(x)))
        return self.head(x).mean((2, 3))


def group_norms() -> nn.Module:
    """Group norm keeps its groups whole."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    )


IMAGES = (2, 3, 6, 6)
NETWORKS: dict[str, Network] = {
    "chain": Network(chain, IMAGES),
    "residual": Network(Residual, IMAGES),
    "preactivation": Network(PreActivation, IMAGES),
    "dense": Network(Dense, IMAGES),
    "grouped": Network(grouped, IMAGES),
    "separable": Network(separable, IMAGES),
    "flat": Network(flat, IMAGES),
    "autoencoder": Network(autoencoder, IMAGES),
    "conv1d": Network(conv1d, (2, 2, 12)),
    "conv3d": Network(conv3d, (2, 2, 3, 4, 4)),
    "prelu": Network(prelus, IMAGES),
    "option-a": Network(OptionA, IMAGES),
    "mlp": Network(mlp, (4, 6)),
    "tied": Network(Tied, (4, 6)),
    "twice": Network(Twice, IMAGES),
    "groupnorm": Network(group_norms, IMAGES),
}


def randomise(model: nn.Module) -> nn.Module:
    """Give norms and PReLU values that training could have left, from the global seed."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.2, 3.0)
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.3, 2.0)
            with torch.no_grad():
                module.weight[::3].neg_()
            nn.init.normal_(module.bias)
        elif isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, -0.5, 0.5)
    return model


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Make a network of the table in evaluation mode, and a random input for it."""
    network = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = randomise(network.factory()).eval()
        return model, torch.randn(network.shape)


def covering(*axes: Iterable) -> list[tuple]:
    """Combine axes so that each of their values appears, in as many cases as the longest has."""
    values = [list(axis) for axis in axes]
    return [tuple(v[i % len(v)] for v in values) for i in range(max(map(len, values)))]


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Evaluate a network without touching its mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        result = model(inputs)
    for module, mode in modes:
        module.training = mode
    return result


def same_state(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Tell whether a state dict has the same keys and bits as one that was cloned before."""
    now = model.state_dict()
    return list(now) == list(state) and all(
        now[k].dtype == t.dtype and torch.equal(now[k], t) for k, t in state.items()
    )


def learn_digits(model: nn.Module) -> nn.Module:
    """Train a classifier of the digits in place for three epochs, and return it."""
    data = load_data("digits", split="train")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(3):
        for images, labels in data.batches(64, shuffle=True, seed=epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model


class Net(nn.Module):
    """A network from its parts and a function of itself and its inputs."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs):
        return self.run(self, *inputs)


def copy_channels(model, graph):
    """Make every odd channel of each group a copy of the even one before it."""
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for group in graph.groups:
            for slot in (*group.writers, *group.carriers):
                if slot.parameter in state:
                    rows = positions(slot.blocks, group.size)
                    odd, even = rows[1::2], rows[0 : group.size - 1 : 2]
                    front = state[slot.parameter].movedim(slot.axis, 0)
                    front[torch.from_numpy(odd.ravel())] = front[
                        torch.from_numpy(even.ravel())
                    ].clone()
    return model


class CalledTwice(nn.Module):
    """Calls one layer twice, once by name, and one never."""

    def __init__(self):
        super().__init__()
        self.layer, self.idle = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))

    def forward(self, x):
        return self.layer(input=self.layer(x))
