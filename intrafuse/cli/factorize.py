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
    """Say what to do: by options, by a file, or by options that change a file's settings."""

    scheme: Annotated[str, typer.Argument(metavar="SCHEME", help="whole, paf or fap.")]
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="As for prune; or in the recipe.")
    ] = None
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML; options take precedence over it.")
    ] = None
    data: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Data set; by default the digits.")
    ] = None
    split: Annotated[
        str | None,
        typer.Option(help="disjoint, k-fold, overlapping, dirichlet, files or places."),
    ] = None
    folds: Annotated[int | None, typer.Option(help="Into how many subsets; 2 by default.")] = None
    overlap: Annotated[
        float | None, typer.Option(help="Share of each part drawn from the others.")
    ] = None
    alpha: Annotated[float | None, typer.Option(help="Of --split dirichlet.")] = None
    file: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Positions of a part's images; repeatable."),
    ] = None
    private: Annotated[
        bool | None, typer.Option(help="Read each part's images by its worker only.")
    ] = None
    preset: Annotated[
        str | None, typer.Option(help="Training settings: short (default) or paper.")
    ] = None
    epochs: Annotated[int | None, typer.Option(help="Of the first training.")] = None
    finetune_epochs: Annotated[
        str | None,
        typer.Option(metavar="N[,N]", help="After a pruning, and after the fusion."),
    ] = None
    augment: Annotated[str | None, typer.Option(help="none, crop-flip or auto.")] = None
    precision: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None
    channels: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of channels to remove; 0.5.")
    ] = None
    steps: Annotated[int | None, typer.Option(help="Prune in so many steps.")] = None
    method: Annotated[str | None, typer.Option(help="Of pruning, as for prune.")] = None
    importance: Annotated[str | None, typer.Option(help="Of channels, as for prune.")] = None
    fusion: Annotated[str | None, typer.Option(help="ot, assignment or moment.")] = None
    features: Annotated[str | None, typer.Option(help="auto, weights or activations.")] = None
    repair: Annotated[
        str | None, typer.Option(help="auto, none, batchnorm, synthetic or analytic.")
    ] = None

    def build(self, seed: int | None) -> Recipe:
        """Make the recipe; without a seed it is the file's, or 0."""
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
            raise IntrafuseError("a MODEL is needed, or a --recipe that names one", usage=True)
        return make_recipe(given)

    def _stages(self) -> dict[str, Any]:
        """Give the settings of the three trainings, where options change them."""
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
        found = {}
        for i, stage in enumerate(("training", "pruned", "fused")):
            name = f"{preset}-finetune" if i else preset
            base = {} if preset is None else PRESETS[name or ""].model_dump()
            epochs = self.epochs if i == 0 else later[i - 1] if later else None
            common = {"epochs": epochs, "augment": self.augment, "precision": self.precision}
            found[stage] = {**base, **_given(common)}
        return found


@dataclass(frozen=True, kw_only=True)
class TrainingCommon(Common):
    """Take what every command takes, by default a GPU where there is one and the recipe's seed."""

    seed: Annotated[  # type: ignore[assignment] - None leaves that of a recipe file
        int | None, typer.Option(min=0, max=2**31 - 1, help="Seed everything random; 0.")
    ] = None
    device: Annotated[
        str, typer.Option(help="Where to compute; auto: a GPU where a worker finds one.")
    ] = "auto"

    def require_device(self) -> None:
        """Refuse a device that cannot be used; `auto` can."""
        if self.device != "auto":
            super().require_device()


def factorize(
    options: RecipeOptions,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run; kept on failure.")],
    workers: Annotated[str, typer.Option(help="local processes, or ray.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster; by default one is started here.")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Workers at once; by default as many as cores.")
    ] = None,
    worker_threads: Annotated[
        int | None, typer.Option(min=1, help="Of each worker; by default the cores are divided.")
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="How often a worker that failed is started again.")
    ] = 1,
    common: TrainingCommon = TrainingCommon(),
) -> None:
    """Train on parts of the data in parallel, and make one small network of the results."""
    common.start()
    import intrafuse

    recipe = options.build(common.seed)
    with progress() as advance:
        found = intrafuse.factorize(
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
    result = found.result
    title = f"{recipe.model} on {recipe.data}"
    show_record(common, "factorized", result.record(recipe.model_dump(mode="json")), title)
    if result.workers is not None:
        show_note(f"bytes to the workers {result.sent:,}, from the workers {result.received:,}")
    show_note(f"saved in {found.folder}")


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """Drop settings that are None, also in nested ones."""
    nested = {k: _given(v) if isinstance(v, dict) else v for k, v in settings.items()}
    return {key: value for key, value in nested.items() if value is not None and value != {}}
