"""The networks of the zoo: VGG, two families of residual networks, and a multilayer perceptron.

Every factory takes ``width``, a factor on all channel counts. Tests use it for tiny networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from intrafuse.support.errors import IntrafuseError

__all__ = [
    "MLP",
    "VGG",
    "ResNet",
    "ZeroPadShortcut",
    "digits_resnet",
    "mlp",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "vgg11_bn",
]


class VGG(nn.Module):
    """A plain chain of convolutions and pooling, then a linear classifier of the last pixel.

    Args:
        channels: output channels of each 3 x 3 convolution with batch norm and ReLU; 0 stands for
            a 2 x 2 max-pool.
        in_channels: channels of the images.
        num_classes: outputs.
    """

    def __init__(self, channels: Sequence[int], *, in_channels: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        last = in_channels
        for n in channels:
            if n == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            convolution = nn.Conv2d(last, n, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(n), nn.ReLU()]
            last = n
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, 32, 32) to logits (N, num_classes)."""
        return self.classifier(self.features(x).flatten(1))


class ZeroPadShortcut(nn.Module):
    """Keep every second pixel and pad with zero channels (option A of He et al. 2016).

    Args:
        before, after: number of zero channels before and after the channels of the input.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, before + C + after, H / 2, W / 2), rounded up."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class _Block(nn.Module):
    """Add two 3 x 3 convolutions with batch norm to a shortcut."""

    def __init__(self, before: int, after: int, *, stride: int, zero_pad: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module
        if stride == 1 and before == after:
            self.shortcut = nn.Identity()
        elif zero_pad:
            self.shortcut = ZeroPadShortcut(after // 4, after // 4)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Residual blocks after a 3 x 3 stem without pooling, as is usual for small images.

    Args:
        channels: channels of each stage. Each stage except the first halves height and width.
        blocks: number of blocks in each stage.
        zero_pad: True for option-A shortcuts, False for 1 x 1 convolutions with batch norm.
        in_channels: channels of the images.
        num_classes: outputs.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        blocks: int,
        zero_pad: bool,
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        last = channels[0]
        self.stages = tuple(f"layer{i}" for i in range(1, len(channels) + 1))
        for name, n in zip(self.stages, channels, strict=True):
            first = _Block(last, n, stride=1 if name == "layer1" else 2, zero_pad=zero_pad)
            rest = [_Block(n, n, stride=1, zero_pad=zero_pad) for _ in range(blocks - 1)]
            setattr(self, name, nn.Sequential(first, *rest))
            last = n
        self.linear = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class MLP(nn.Module):
    """Linear layers with ReLU between them, on flattened images.

    Args:
        features: size of the flattened image, of each hidden layer, and of the output.
    """

    def __init__(self, features: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(features):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        return self.layers(x)


def _scaled(channels: Sequence[int], width: float, *, step: int = 1) -> list[int]:
    """Multiply channel counts by width; round to positive multiples of step."""
    if type(width) not in (int, float) or not 0 < width < float("inf"):
        raise IntrafuseError("width must be above 0", value=width)
    if isinstance(channels, str) or not all(type(n) is int and n > 0 for n in channels):
        raise IntrafuseError("channels must be whole numbers of at least 1", value=channels)
    return [step * max(1, round(n * width / step)) for n in channels]


def vgg11_bn(*, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> VGG:
    """Build VGG-11 with batch norm for 32 x 32 images (Simonyan and Zisserman 2015).

    >>> sum(p.numel() for p in vgg11_bn().parameters())
    9228362
    """
    plan = [[64], [128], [256, 256], [512, 512], [512, 512]]
    channels = [n for stage in plan for n in [*_scaled(stage, width), 0]]
    return VGG(channels, in_channels=in_channels, num_classes=num_classes)


def resnet18(*, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """Build ResNet-18 with a 3 x 3 stem for 32 x 32 images (He et al. 2016).

    >>> sum(p.numel() for p in resnet18().parameters())
    11173962
    """
    return ResNet(
        _scaled([64, 128, 256, 512], width),
        blocks=2,
        zero_pad=False,
        in_channels=in_channels,
        num_classes=num_classes,
    )


def _cifar_resnet(blocks: int, num_classes: int, in_channels: int, width: float) -> ResNet:
    # Each stage has twice the channels of the stage before. The shortcut pads a quarter of them on
    # each side, so the first stage needs an even number.
    (first,) = _scaled([16], width, step=2)
    return ResNet(
        [first, 2 * first, 4 * first],
        blocks=blocks,
        zero_pad=True,
        in_channels=in_channels,
        num_classes=num_classes,
    )


def resnet20(*, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """Build the 20-layer CIFAR network of He et al. 2016, section 4.2, with option-A shortcuts.

    >>> sum(p.numel() for p in resnet20().parameters())
    269722
    """
    return _cifar_resnet(3, num_classes, in_channels, width)


def resnet32(*, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """Build the 32-layer CIFAR network of He et al. 2016, section 4.2, with option-A shortcuts."""
    return _cifar_resnet(5, num_classes, in_channels, width)


def resnet44(*, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """Build the 44-layer CIFAR network of He et al. 2016, section 4.2, with option-A shortcuts."""
    return _cifar_resnet(7, num_classes, in_channels, width)


def resnet56(*, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """Build the 56-layer CIFAR network of He et al. 2016, section 4.2, with option-A shortcuts."""
    return _cifar_resnet(9, num_classes, in_channels, width)


def digits_resnet(*, num_classes: int = 10, in_channels: int = 1, width: float = 1.0) -> ResNet:
    """Build a small residual network for the 8 x 8 digits; it trains in seconds on a laptop.

    >>> digits_resnet().linear.in_features
    64
    """
    return ResNet(
        _scaled([16, 32, 64], width),
        blocks=1,
        zero_pad=False,
        in_channels=in_channels,
        num_classes=num_classes,
    )


def mlp(
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    width: float = 1.0,
    image_size: int = 8,
    hidden: Sequence[int] = (128, 64),
) -> MLP:
    """Build a multilayer perceptron for square images.

    Args:
        image_size: height and width of the images in pixels.
        hidden: features of each hidden layer, before multiplication by width.

    >>> [layer.out_features for layer in mlp(width=0.5).layers[1::2]]
    [64, 32, 10]
    """
    return MLP([in_channels * image_size**2, *_scaled(hidden, width), num_classes])
