"""`intrafuse factorize`: train on parts of the data in parallel, then prune and fuse."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intrafuse.cli.options import Common, numbers
from intrafuse.cli.output import progress, show_note, show_record
from intrafuse.support.errors import IntrafuseError

if TYPE_CHECKING:
    from intrafuse.study.factorize import Recipe

__all__ = ["factorize"]


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Options that make a recipe: a file, single settings, or settings that override the file."""

    scheme: Annotated[str, typer.Argument(metavar="SCHEME", help="whole, paf or fap.")]
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="As for prune; may stand in --recipe.")
    ] = None
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML or JSON; options override it.")
    ] = None
    data: Annotated[str | None, typer.Option(metavar="SPEC", help="Data set; default: digits.")] = (
        None
    )
    split: Annotated[
        str | None,
        typer.Option(
            help="How to split the data: disjoint, k-fold, overlapping, dirichlet, files or places."
        ),
    ] = None
    folds: Annotated[int | None, typer.Option(help="Number of subsets; default: 2.")] = None
    overlap: Annotated[
        float | None, typer.Option(help="Share of each part that comes from other parts.")
    ] = None
    alpha: Annotated[float | None, typer.Option(help="Parameter of --split dirichlet.")] = None
    file: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Positions of a part's images, or its SPEC; repeatable."),
    ] = None
    private: Annotated[
        bool | None, typer.Option(help="Let only its worker read each part's images.")
    ] = None
    preset: Annotated[
        str | None, typer.Option(help="Training settings: short (default) or paper.")
    ] = None
    epochs: Annotated[int | None, typer.Option(help="Epochs of the first training.")] = None
    finetune_epochs: Annotated[
        str | None,
        typer.Option(metavar="N[,N]", help="Epochs after each pruning, and after fusing."),
    ] = None
    augment: Annotated[str | None, typer.Option(help="Augmentation: none, crop-flip, auto.")] = None
    precision: Annotated[
        str | None, typer.Option(help="Precision of training: auto, float32 or bfloat16.")
    ] = None
    channels: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of channels to remove; 0.5.")
    ] = None
    steps: Annotated[int | None, typer.Option(help="Number of pruning steps.")] = None
    method: Annotated[str | None, typer.Option(help="Method of pruning, as for prune.")] = None
    importance: Annotated[str | None, typer.Option(help="Importance metric, as for prune.")] = None
    fusion: Annotated[
        str | None, typer.Option(help="Method of fusing: ot, assignment or moment.")
    ] = None
    features: Annotated[
        str | None, typer.Option(help="Features to fuse by: auto, weights or activations.")
    ] = None
    repair: Annotated[
        str | None,
        typer.Option(help="Repair after fusing: auto, none, batchnorm, synthetic or analytic."),
    ] = None

    def build(self, seed: int | None) -> Recipe:
        """Make the recipe. `seed=None` uses the seed of the file, or 0."""
        from intrafuse.study.factorize.recipe import make_recipe, read_recipe

        stages = self._stages()
        chosen: dict[str, Any] = {
            "scheme": self.scheme,
            "model": self.model,
            "data": self.data,
            "private": self.private,
            "splits": {
                "scheme": self.split,
                "folds": self.folds,
                "overlap": self.overlap,
                "alpha": self.alpha,
                "files": self.file or None,
            },
            **stages,
            "pruning": {
                "channels": self.channels,
                "steps": self.steps,
                "method": self.method,
                "importance": self.importance,
            },
            "fusing": {"method": self.fusion, "features": self.features, "repair": self.repair},
        }
        given = _given({**chosen, "seed": seed})
        if self.recipe is not None:
            return read_recipe(self.recipe, given)
        if self.model is None:
            raise IntrafuseError("name a MODEL, or a --recipe that names one", usage=True)
        return make_recipe(given)

    def _stages(self) -> dict[str, Any]:
        """Return the settings of the three trainings that the options set."""
        from intrafuse.study.training import PRESETS

        preset = self.preset or (None if self.recipe else "short")
        if preset is not None and preset not in ("short", "paper"):
            raise IntrafuseError("--preset must be short or paper", value=preset, usage=True)
        later: list[int] = []
        if self.finetune_epochs is not None:
            later = numbers("--finetune-epochs", self.finetune_epochs, int)
            if len(later) > 2:
                raise IntrafuseError(
                    "--finetune-epochs takes one or two numbers",
                    value=self.finetune_epochs,
                    usage=True,
                )
            later = [later[0], later[-1]]
        stages = {}
        for i, stage in enumerate(("training", "pruned", "fused")):
            name = f"{preset}-finetune" if i else preset
            base = {} if preset is None else PRESETS[name or ""].model_dump()
            epochs = self.epochs if i == 0 else later[i - 1] if later else None
            common = {"epochs": epochs, "augment": self.augment, "precision": self.precision}
            stages[stage] = {**base, **_given(common)}
        return stages


@dataclass(frozen=True, kw_only=True)
class TrainingCommon(Common):
    """The common options, with the recipe's seed and any GPU as defaults."""

    seed: Annotated[  # type: ignore[assignment] - None keeps the recipe's seed
        int | None, typer.Option(min=0, max=2**31 - 1, help="Seed of all random choices; 0.")
    ] = None
    device: Annotated[str, typer.Option(help="Device; auto: a GPU if a worker finds one.")] = "auto"

    def require_device(self) -> None:
        """Refuse an unusable device; `auto` is always usable."""
        if self.device != "auto":
            super().require_device()


def factorize(
    options: RecipeOptions,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run; kept on failure.")],
    workers: Annotated[str, typer.Option(help="local processes, or ray.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster; default: start one here.")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Workers at once; default: number of cores.")
    ] = None,
    worker_threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each worker; default: divide the cores.")
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="Restarts of a failed worker.")] = 1,
    common: TrainingCommon = TrainingCommon(),
) -> None:
    """Train on parts of the data in parallel, and make one small network of the results."""
    common.start()
    import intrafuse

    recipe = options.build(common.seed)
    with progress() as advance:
        run = intrafuse.factorize(
            recipe,
            out,
            workers=workers,  # type: ignore[arg-type]
            address=address,
            parallel=parallel,
            threads=worker_threads,
            retries=retries,
            device=common.device,
            progress=advance,
        )
    result = run.result
    title = f"{recipe.model} on {recipe.data}"
    show_record(common, "factorized", result.record(recipe.model_dump(mode="json")), title)
    if result.workers is not None:
        show_note(f"bytes to the workers {result.sent:,}, from the workers {result.received:,}")
    show_note(f"saved in {run.folder}")


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """Drop settings that are None, also inside nested settings."""
    nested = {k: _given(v) if isinstance(v, dict) else v for k, v in settings.items()}
    return {key: value for key, value in nested.items() if value is not None and value != {}}
