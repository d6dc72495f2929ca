"""Networks of the zoo sweep that no library has: U-nets and recurrent networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["OWN"]


def _twice(inputs: int, outputs: int, norm: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        convolution = nn.Conv2d(width, outputs, 3, padding=1)
        layers += [convolution, norm(outputs, affine=True), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Convolutions down and up again, with the maps of the way down laid beside those up."""

    def __init__(self, up: str = "transposed", norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        widths = (16, 32, 64)
        self.down = nn.ModuleList(
            _twice(a, b, norm) for a, b in zip((3, *widths), widths, strict=False)
        )
        self.ups = nn.ModuleList()
        self.across = nn.ModuleList()
        for wide, narrow in ((64, 32), (32, 16)):
            if up == "transposed":
                self.ups.append(nn.ConvTranspose2d(wide, narrow, 2, 2))
            elif up == "shuffled":
                self.ups.append(nn.Sequential(nn.Conv2d(wide, 4 * narrow, 1), nn.PixelShuffle(2)))
            else:
                resize = nn.Upsample(scale_factor=2, mode="bilinear")
                self.ups.append(nn.Sequential(resize, nn.Conv2d(wide, narrow, 1)))
            self.across.append(_twice(2 * narrow, narrow, norm))
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for i, stage in enumerate(self.down):
            x = stage(x if i == 0 else F.max_pool2d(x, 2))
            maps.append(x)
        for up, across, skipped in zip(self.ups, self.across, reversed(maps[:-1]), strict=True):
            x = across(torch.cat([skipped, up(x)], 1))
        return self.head(x)


class Recurrent(nn.Module):
    """Words, a recurrent body, and an answer for each word or for the sequence."""

    def __init__(self, body: type[nn.RNNBase], tagging: bool, **settings) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(100, 24), body(24, 32, batch_first=True, **settings)
        self.tagging = tagging
        directions = 2 if settings.get("bidirectional") else 1
        self.hidden = nn.Linear((settings.get("proj_size", 0) or 32) * directions, 40)
        self.head = nn.Linear(40, 7)

    def forward(self, words: Tensor) -> Tensor:
        steps, states = self.body(self.embed(words))
        last = states[0] if isinstance(states, tuple) else states
        ends = torch.cat([*last[-2:]], 1) if self.body.bidirectional else last[-1]
        return self.head(F.relu(self.hidden(steps if self.tagging else ends)))


class Translator(nn.Module):
    """Read one sequence, then write another from the state that it left."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 24)
        self.reader = nn.LSTM(24, 32, num_layers=2)
        self.writer = nn.LSTM(24, 32, num_layers=2)
        self.head = nn.Linear(32, 100)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        state = self.reader(self.embed(source))[1]
        return self.head(self.writer(self.embed(target), state)[0])


class Convolved(nn.Module):
    """A spectrogram through convolutions, then a recurrent layer, as speech networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = _twice(1, 8, nn.BatchNorm2d)
        self.body = nn.GRU(8 * 16, 24, num_layers=2, bidirectional=True)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.convolutions(x)  # (batch, channels, frequencies, time)
        return self.head(self.body(maps.flatten(1, 2).permute(2, 0, 1))[0])


IMAGES = [(2, 3, 32, 32)]


def _words(*sizes: int) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(0, 100, (size, 5), generator=generator) for size in sizes)]


OWN = {
    "unet": lambda: (UNet(), IMAGES),
    "unet_pixelshuffle": lambda: (UNet("shuffled"), IMAGES),
    "unet_bilinear_instancenorm": lambda: (UNet("resized", nn.InstanceNorm2d), IMAGES),
    "lstm_tagger": lambda: (Recurrent(nn.LSTM, True, num_layers=2, bidirectional=True), _words(3)),
    "lstm_projected": lambda: (Recurrent(nn.LSTM, True, proj_size=12), _words(3)),
    "gru_classifier": lambda: (Recurrent(nn.GRU, False, bidirectional=True), _words(3)),
    "rnn_classifier": lambda: (Recurrent(nn.RNN, False, num_layers=2), _words(3)),
    "lstm_translator": lambda: (Translator(), _words(4, 6)),
    "speech_gru": lambda: (Convolved(), [(2, 1, 16, 10)]),
}
