"""Options that several commands share, and a function that makes commands.

Each set of options is a frozen dataclass. A command with such a parameter gets all fields of the
class as options, and receives an object of the class.
"""

from __future__ import annotations

import inspect
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, get_type_hints

import typer

from intrafuse.support.errors import IntrafuseError, printable
from intrafuse.support.files import file_target

if TYPE_CHECKING:
    from intrafuse.catalog.data import Images
    from intrafuse.catalog.zoo import ResolvedModel
    from intrafuse.pruning.settings import Settings

__all__ = [
    "COMMAND",
    "RANDOM",
    "SETTINGS",
    "Common",
    "DataOptions",
    "GroupOptions",
    "ModelOptions",
    "PruneOptions",
    "add_command",
    "discard",
    "numbers",
    "show_error",
    "show_note",
]

RANDOM = "note: without --weights the network has random weights"
COMMAND: ContextVar[str] = ContextVar("COMMAND", default="")  # the running command, for its record
KEYWORD = inspect.Parameter.KEYWORD_ONLY
SETTINGS: ContextVar[dict[str, str]] = ContextVar("SETTINGS", default={})  # noqa: B039 - read only
CALIBRATION = 1024  # images for metrics and repair, without --limit


def add_command(app: typer.Typer, function: Callable[..., None]) -> None:
    """Make a command from a function, with the common errors and exit codes."""
    hints = get_type_hints(function, include_extras=True)
    hints.pop("return", None)
    sets: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        chosen = sets.get(name)
        if chosen is None:
            parameters.append(parameter.replace(annotation=hints[name]))
        else:
            parameters += _parameters(chosen)

    def run(context: typer.Context, **values: Any) -> None:
        SETTINGS.set(context.meta.get("intrafuse.cli.method", {}))
        COMMAND.set(_typed(context))
        with _reporting_errors():
            made = {
                name: kind(**{field.name: values.pop(field.name) for field in fields(kind)})
                for name, kind in sets.items()
            }
            function(**made, **values)

    kinds = [p.replace(kind=KEYWORD) for p in parameters]
    kinds.insert(0, inspect.Parameter("context", KEYWORD, annotation=typer.Context))
    run.__signature__ = inspect.Signature(kinds)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in kinds}
    run.__doc__ = function.__doc__
    kind = next((k.COMMAND for k in sets.values() if hasattr(k, "COMMAND")), None)
    app.command(function.__name__, cls=kind)(run)


def _parameters(kind: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            KEYWORD,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(kind)
    ]


def _typed(context: typer.Context) -> str:
    """Return the command line that repeats the command: arguments, then given options."""
    words, options = ["intrafuse", str(context.info_name)], []
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[str(parameter.name)]
        for item in value if isinstance(value, list | tuple) else [value]:
            if parameter.param_type_name == "argument":
                words.append(str(item))
            elif item is True or item is False:
                options.append((parameter.opts if item else parameter.secondary_opts)[0])
            else:
                options += [parameter.opts[0], str(item)]
    options += [word for option in SETTINGS.get().items() for word in option]
    return shlex.join([*words, *options])


@contextmanager
def _reporting_errors() -> Iterator[None]:
    try:
        yield
    except IntrafuseError as error:
        show_error(str(error))
        raise typer.Exit(2 if error.usage else 1) from error
    except SystemExit as error:  # raised by the network's own code
        show_error(f"the network's own code ended the program; got exit({error.code!r})")
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def show_error(text: str) -> None:
    """Print an error as one line to standard error."""
    show_note(f"intrafuse: error: {' '.join(text.split())}")


def show_note(text: str) -> None:
    """Print a line to standard error; continue if it cannot be written."""
    try:
        typer.echo(printable(text), err=True)
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Discard buffered and later output of a stream, which Python would flush at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of all commands."""

    json: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write the figures as JSON; - is standard output."),
    ] = None
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of all random choices.")] = 0
    device: Annotated[str, typer.Option(help="Device, such as cpu or cuda:0.")] = "cpu"
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="PyTorch threads; default: PyTorch's choice."),
    ] = None

    def start(self) -> None:
        """Seed PyTorch, set its threads, and refuse an unusable device or JSON file."""
        import torch
        from torch._logging import set_logs  # type: ignore[attr-defined]

        if self.json not in (None, "-"):
            if os.path.isdir(self.json):
                rule = "--json takes a file, not a folder"
                raise IntrafuseError(rule, value=self.json, usage=True)
            file_target(Path(self.json))
        set_logs(all=logging.CRITICAL)  # errors are reported in one line
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.manual_seed(self.seed or 0)
        self.require_device()

    def require_device(self) -> None:
        """Refuse an unusable device."""
        from intrafuse.support.device import require_device

        require_device(self.device)


ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A name in the zoo, package.module:factory, torchvision:NAME, timm:NAME or hf:FOLDER.",
    ),
]
NumClasses = Annotated[int | None, typer.Option(min=1, help="Number of outputs of the network.")]
InputShape = Annotated[
    str | None, typer.Option(metavar="C,H,W", help="Shape of one input, such as 3,32,32.")
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options that name a network and its weights."""

    model: ModelName
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights of the network, as safetensors.")
    ] = None
    num_classes: NumClasses = None
    input_shape: InputShape = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the network's factory."""
        return {} if self.num_classes is None else {"num_classes": self.num_classes}

    @property
    def is_random(self) -> bool:
        """Whether the network has random weights; a user's factory may load its own."""
        source, colon, _ = self.model.partition(":")
        return self.weights is None and (not colon or source in ("torchvision", "timm"))

    def record(self) -> dict[str, Any]:
        """Return the fields of a record that identify the network."""
        from intrafuse.catalog.zoo import file_sha256

        digest = None if self.weights is None else file_sha256(self.weights)
        return {"model": self.model, "weights_sha256": digest}

    def resolve(self, device: str) -> ResolvedModel:
        """Build the network on a device."""
        from dataclasses import replace

        from intrafuse.catalog.zoo import load_weights, resolve_model
        from intrafuse.support.batches import map_tensors

        shape = self.input_shape
        shape = None if shape is None else tuple(numbers("--input-shape", shape, int))
        resolved = resolve_model(self.model, input_shape=shape, **self.arguments)
        if self.weights is not None:
            load_weights(resolved.model, self.weights)
        example = map_tensors(lambda tensor: tensor.to(device), resolved.example_inputs)
        return replace(resolved, model=resolved.model.to(device), example_inputs=example)


class Batches:
    """Training images in batches, loaded on first use; can be iterated repeatedly."""

    def __init__(self, options: DataOptions, spec: str, common: Common) -> None:
        self._options, self._spec, self._common = options, spec, common
        self._images: Images | None = None

    def __iter__(self) -> Iterator:
        options = self._options
        if self._images is None:
            self._images = options.images(self._spec, "train", options.limit or CALIBRATION)
        return self._images.batches(options.batch_size, device=self._common.device)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Options that name a data set: training images for metrics and repair, test for accuracy."""

    data: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="digits, cifar10:FOLDER, cifar100:FOLDER or imagefolder:FOLDER[@SIZE].",
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=f"Images per split; default: all, or {CALIBRATION} for repair.",
        ),
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 100

    def images(self, spec: str, split: str, limit: int | None) -> Images:
        """Load one split."""
        from intrafuse.catalog.data import load_data

        return load_data(spec, split=split, limit=limit)

    def spec(self, input_shape: tuple[int, ...] | None) -> str:
        """Return the data set that the options name, or the digits if they fit the network.

        Raises:
            IntrafuseError: the options name no data set, and the digits do not fit.
        """
        if self.data is None and input_shape != (1, 8, 8):
            raise IntrafuseError(
                "accuracy needs data, and the included digits have the shape 1 x 8 x 8",
                value=input_shape,
                remedy="give --data SPEC",
                usage=True,
            )
        return self.data or "digits"

    def batches(self, spec: str | None, common: Common) -> Batches | None:
        """Return the training images for metrics and repair; None without a data set."""
        return None if spec is None else Batches(self, spec, common)


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """Options that choose the groups to prune."""

    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Prune only these groups or layers; repeatable."),
    ] = None
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Do not prune these groups or layers; repeatable."),
    ] = None

    def chosen(self) -> dict[str, Any]:
        """Return the fields of `Settings` that were given."""
        given = {"include": self.include, "exclude": self.exclude}
        return {name: value for name, value in given.items() if value}


@dataclass(frozen=True, kw_only=True)
class PruneOptions(GroupOptions):
    """Settings of pruning, except budget and method."""

    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Settings in YAML or JSON; options override them."),
    ] = None
    importance: Annotated[
        str | None,
        typer.Option(help="Importance metric, such as taylor; default: l1; x lists all."),
    ] = None
    scope: Annotated[
        str | None,
        typer.Option(help="uniform (default), global (one ranking) or predicted (by damage)."),
    ] = None
    override: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=SHARE", help="Share to remove there; repeatable."),
    ] = None
    floor: Annotated[
        float | None,
        typer.Option(help="Least share of channels to keep, except for uniform; 0.1."),
    ] = None
    round_to: Annotated[int | None, typer.Option(help="Round widths to multiples of this.")] = None
    repair: Annotated[
        str | None,
        typer.Option(help="Repair of statistics: batchnorm (needs --data), synthetic or analytic."),
    ] = None

    def settings(self, common: Common, **given: Any) -> Settings:
        """Make settings from the recipe, overridden by the given options.

        Args:
            common: its seed applies if it is not 0, or if the recipe has no seed.
            given: further fields of `Settings`; None means not given.
        """
        from intrafuse.pruning.settings import Settings
        from intrafuse.support.recipes import read_mapping

        named = ("importance", "scope", "floor", "round_to", "repair")
        fields = {name: getattr(self, name) for name in named} | given
        fields = {name: value for name, value in fields.items() if value is not None}
        if self.override:
            fields["overrides"] = dict(map(_override, self.override))
        recipe = {} if self.recipe is None else read_mapping(self.recipe)
        if common.seed or "seed" not in recipe:
            fields["seed"] = common.seed
        return Settings.of(Settings.from_data(recipe), {**fields, **self.chosen()})


def _override(item: str) -> tuple[str, float]:
    pattern, equals, share = item.rpartition("=")
    if not equals or not pattern:
        raise IntrafuseError("--override takes PATTERN=SHARE", value=item, usage=True)
    return pattern, numbers("--override", share, float)[0]


def numbers(option: str, text: str, kind: type) -> list:
    """Read comma-separated numbers.

    Raises:
        IntrafuseError: a part of the text is not a number.

    >>> numbers("--channels", "0.3,0.5", float)
    [0.3, 0.5]
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise IntrafuseError(
            f"{option} takes {'whole ' if kind is int else ''}numbers, separated by commas",
            value=text,
            usage=True,
        ) from error
