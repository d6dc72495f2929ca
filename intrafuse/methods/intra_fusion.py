"""Intra-Fusion: transport every channel of a group onto the kept channels.

Theus et al., "Towards Meta-Pruning via Optimal Transport", ICLR 2024, arXiv 2402.07839.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from intrafuse.graph.groups import ChannelGroup
from intrafuse.graph.typed import from_numpy
from intrafuse.methods.method import Method
from intrafuse.methods.select import most_important
from intrafuse.methods.transport import (
    ENTROPIC_FROM,
    Marginal,
    encode_matrix,
    ground_cost,
    marginal,
    onto_channels,
    transport,
)
from intrafuse.support.arguments import check_choices
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.context import Context
from intrafuse.surgery.merge_map import MergeMap

__all__ = ["IntraFusion", "channel_features"]

Compared = Literal["writers", "all"]
Target = Literal["important", "k-means", "mixture"]
Normalisations = Literal["paper", "barycentric", "projected"]
CHOICES = {
    "features": Compared,
    "target": Target,
    "source_marginal": Marginal,
    "target_marginal": Marginal,
    "normalisation": Normalisations,
}
MIXTURE_DIMENSIONS = 32  # in thousands of dimensions a mixture has more parameters than data


def channel_features(group: ChannelGroup, context: Context, kind: Compared = "writers") -> Tensor:
    """Concatenate the weights that describe each channel.

    Args:
        group: the channel group, of n channels.
        context: the state of planning.
        kind: `writers` takes the weights that write the channel; `all` adds the writers' biases
            and the readers' weights.

    Returns:
        (n, F) in float32. Batch norm enters through the layer that it was folded into.

    Raises:
        IntrafuseError: the kind is unknown, or the group has no writers and readers.
    """
    if kind not in ("writers", "all"):
        raise IntrafuseError("features must be writers or all", value=kind)
    slots = [s for s in context.weights.present(group.writers) if s.kind == "weight"]
    if kind == "all" or not slots:
        slots = context.weights.present(group.writers + group.readers)
    rows = [context.weights.rows(group, slot).float() for slot in slots]
    if not rows:
        raise IntrafuseError(
            "a group without writers and readers has no features", layer=group.name
        )
    return torch.cat(rows, 1)


@dataclass(frozen=True, kw_only=True)
class IntraFusion(Method):
    """Fuse the channels of a group by optimal transport (sections 3 and 4 of the paper).

    Attributes:
        features: weights that the ground cost compares: the `writers`' weights, or `all` weights
            and biases of writers and readers (section 4 of the paper). `writers` keeps more
            accuracy when many channels are removed (docs/research.md), and makes the maps of the
            groups independent.
        target: the targets of the transport: the most `important` channels, the centroids of
            `k-means`, or those of a Gaussian `mixture`.
        source_marginal, target_marginal: mass of channels and targets: `uniform`, proportional to
            `importance`, or its `softmax`. A centroid has the mean importance of its members.
        p: order of the norm of the ground cost, at least 1.
        regularisation: None chooses the solver by size; 0 is exact; above 0 is entropic.
        normalisation: `paper`: each channel spreads its whole mass. `barycentric`: each new
            channel is a mean, and readers still get the whole mass. `projected`: kept channels
            keep their own weights, and the mass that readers get from a lost channel is scaled by
            the cosine of its features with those of its target. `projected` keeps more accuracy
            of the MLPs of a sentence encoder and less of every convolutional network
            (docs/research.md).
    """

    name: ClassVar[str] = "intra-fusion"
    folds_batchnorm: ClassVar[bool] = True
    order: ClassVar[Literal["forward", "backward"]] = "backward"  # index 0 first, as in the paper

    features: Compared = "writers"
    target: Target = "important"
    source_marginal: Marginal = "uniform"
    target_marginal: Marginal = "uniform"
    p: float = 1.0
    regularisation: float | None = None
    normalisation: Normalisations = "paper"

    def __post_init__(self) -> None:
        check_choices(self, CHOICES)
        if self.normalisation == "projected" and self.target != "important":
            raise IntrafuseError(
                'normalisation="projected" needs channels as targets',
                value=self.target,
                remedy='use target="important"',
                usage=True,
            )
        if not self.p >= 1:
            raise IntrafuseError("p must be at least 1", value=self.p, usage=True)
        if self.regularisation is not None and not self.regularisation >= 0:
            raise IntrafuseError(
                "regularisation must not be negative", value=self.regularisation, usage=True
            )

    @property
    def independent(self) -> bool:
        """From output to input, the writers of a group are still the original ones."""
        return self.features == "writers"

    def __call__(
        self, group: ChannelGroup, scores: Tensor, width: int, context: Context
    ) -> MergeMap:
        features, scores = channel_features(group, context, self.features), scores.cpu()
        solved = self._transported(features, scores, width, context.seed % 2**32)
        decode = encode_matrix(solved, "paper").T
        if self.normalisation == "projected":
            return _projected(group, features, most_important(scores, width), decode)
        return MergeMap.linear(group.name, encode_matrix(solved, self.normalisation), decode)

    def _transported(
        self, features: Tensor, scores: Tensor, width: int, seed: int
    ) -> NDArray[np.float64]:
        """Return the transport T (n, m) of the channels onto the targets."""
        source = marginal(self.source_marginal, scores)
        exact = self.regularisation == 0 or (
            self.regularisation is None and len(scores) < ENTROPIC_FROM
        )
        if self.target == "important":
            keep = most_important(scores, width)
            target = marginal(self.target_marginal, scores[keep])
            if exact:
                return onto_channels(features, keep, source, target, p=self.p)
            targets = features[keep.to(features.device)]
        else:
            targets, target_scores = self._centroids(features, scores, width, seed)
            target = marginal(self.target_marginal, target_scores)
        cost = ground_cost(features, targets, p=self.p)
        return transport(cost, source, target, regularisation=self.regularisation).matrix

    def _centroids(
        self, features: Tensor, scores: Tensor, width: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Return the centroids' features (m, F) and scores (m,)."""
        points = torch.nn.functional.normalize(features, dim=1).cpu().numpy()
        assign = _means_members if self.target == "k-means" else _mixture_members
        members = assign(points, width, seed)
        belongs = torch.nn.functional.one_hot(from_numpy(members).long(), width).T.float()
        share = belongs / belongs.sum(1, keepdim=True).clamp_min(1)
        share = share.to(features)
        return share @ from_numpy(points).to(features), (share.cpu() @ scores.float())


def _projected(group: ChannelGroup, features: Tensor, keep: Tensor, decode: Tensor) -> MergeMap:
    """Select channels; readers add each lost channel's mass, scaled by cosine similarity."""
    merge_map = MergeMap.select(group.name, len(features), keep)
    unit = torch.nn.functional.normalize(features, dim=1)
    alike = (unit @ unit[keep.to(unit.device)].T).clamp_min(0).to(decode)
    decode = decode * alike
    decode[keep] = merge_map.decode[keep]
    return replace(merge_map, decode=decode, keep=None)


def _means_members(points: NDArray[np.float32], width: int, seed: int) -> NDArray[np.int32]:
    """Assign each channel to its cluster of k-means."""
    from sklearn.cluster import KMeans  # pyright: ignore[reportMissingTypeStubs]

    means = KMeans(width, n_init="auto", random_state=seed)
    with _without_warnings():
        members = means.fit(points).labels_  # pyright: ignore[reportUnknownMemberType]
    assert members is not None
    return members


def _mixture_members(points: NDArray[np.float32], width: int, seed: int) -> NDArray[np.int64]:
    """Assign each channel to its most likely component, in the leading principal components."""
    from sklearn.decomposition import PCA  # pyright: ignore[reportMissingTypeStubs]
    from sklearn.mixture import GaussianMixture  # pyright: ignore[reportMissingTypeStubs]

    dimensions = min(MIXTURE_DIMENSIONS, *points.shape)
    components = PCA(dimensions, random_state=seed)
    points = components.fit_transform(points)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    mixture = GaussianMixture(
        width,
        covariance_type="spherical",
        reg_covar=1e-4,
        init_params="k-means++",
        random_state=seed,
    )
    with _without_warnings():
        return mixture.fit(points).predict(points)  # pyright: ignore[reportUnknownMemberType]


@contextmanager
def _without_warnings() -> Generator[None]:
    """Ignore that a clustering did not converge: duplicated channels may leave a cluster empty."""
    from sklearn.exceptions import ConvergenceWarning  # pyright: ignore[reportMissingTypeStubs]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
