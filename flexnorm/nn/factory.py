"""Normalizations by name, and what counts as one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from flexnorm._messages import unknown_name
from flexnorm.engine import FlexNorm
from flexnorm.nn import batch, mixture, partial, population, renorm, sample, unitized
from flexnorm.nn.normprop import NormPropUnits

__all__ = ["NORMS", "NoNorm", "is_norm", "make_norm", "needs_batch"]


class NoNorm(nn.Module):
    """An identity that marks where a normalization would be, so that monitors can compare networks with and without.

    Args:
        num_features: Number of channels, for the record.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x

    def extra_repr(self) -> str:
        """Show the number of channels."""
        return str(self.num_features)


def _group(num_features: int, *, num_groups: int | None = None, **kwargs: Any) -> nn.Module:
    if num_groups is None:
        # 16 channels a group, the setting that Wu & He (2018, table 3) found best beside 32 groups, where C allows it.
        num_groups = num_features // 16 if num_features % 16 == 0 else 1
    return batch.GroupNorm(num_groups, num_features, **kwargs)


def _affine_instance(maker: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def build(num_features: int, **kwargs: Any) -> nn.Module:
        return maker(num_features, **{"affine": True, **kwargs})

    return build


def _without_threshold(maker: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def build(num_features: int, **kwargs: Any) -> nn.Module:
        return maker(num_features, **{"threshold": False, **kwargs})

    return build


_MAKERS: dict[str, tuple[Callable[..., nn.Module], ...]] = {
    "none": (NoNorm,) * 3,
    "batch": (batch.BatchNorm1d, batch.BatchNorm2d, batch.BatchNorm3d),
    "group": (_group,) * 3,
    "instance": tuple(map(_affine_instance, (batch.InstanceNorm1d, batch.InstanceNorm2d, batch.InstanceNorm3d))),
    "layer": (batch.LayerNorm1d, batch.LayerNorm2d, batch.LayerNorm3d),
    "population": (population.PopulationNorm1d, population.PopulationNorm2d, population.PopulationNorm3d),
    "rms": (sample.RMSNorm1d, sample.RMSNorm2d, sample.RMSNorm3d),
    "frn": tuple(
        map(_without_threshold, (sample.FilterResponseNorm1d, sample.FilterResponseNorm2d, sample.FilterResponseNorm3d))
    ),
    "renorm": (renorm.BatchRenorm1d, renorm.BatchRenorm2d, renorm.BatchRenorm3d),
    "switchable": (mixture.SwitchableNorm1d, mixture.SwitchableNorm2d, mixture.SwitchableNorm3d),
    "batch_instance": (mixture.BatchInstanceNorm1d, mixture.BatchInstanceNorm2d, mixture.BatchInstanceNorm3d),
    "mean_only": (partial.MeanOnlyBatchNorm1d, partial.MeanOnlyBatchNorm2d, partial.MeanOnlyBatchNorm3d),
    "variance_only": (
        partial.VarianceOnlyBatchNorm1d,
        partial.VarianceOnlyBatchNorm2d,
        partial.VarianceOnlyBatchNorm3d,
    ),
    "unitized": (unitized.UnitizedBatchNorm1d, unitized.UnitizedBatchNorm2d, unitized.UnitizedBatchNorm3d),
}

NORMS: tuple[str, ...] = tuple(_MAKERS)
"""Names that :func:`make_norm` knows."""


def make_norm(name: str, num_features: int, ndim: int = 2, **kwargs: Any) -> nn.Module:
    """Build the normalization of that name for inputs with ``ndim`` spatial axes.

    Args:
        name: One of :data:`NORMS`: ``"none"``, ``"batch"``, ``"group"``, ``"instance"`` (with affine parameters),
            ``"layer"``, ``"population"``, ``"unitized"``, ``"rms"``, ``"frn"`` (without its thresholded unit, so that
            any activation may follow), ``"renorm"``, ``"switchable"``, ``"batch_instance"``, ``"mean_only"``,
            ``"variance_only"``.
        num_features: Number of channels C.
        ndim: Number of spatial axes, 0 to 3 (0 and 1 give the 1d layers).
        **kwargs: Handed to the layer. For ``"group"``, ``num_groups`` defaults to 16 channels a group where that
            divides C, else to one group.

    Raises:
        ValueError: For an unknown name or a wrong ``ndim``.

    Examples:
        >>> make_norm("unitized", 16)
        UnitizedBatchNorm2d(16, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, norm='paper')
    """
    if name not in _MAKERS:
        raise ValueError(unknown_name("norm", name, _MAKERS))
    if not 0 <= ndim <= 3:
        raise ValueError(f"ndim is the number of spatial axes, 0 to 3, got {ndim}")
    return _MAKERS[name][max(ndim, 1) - 1](num_features, **kwargs)


_TORCH_NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` normalizes: a layer of this package, one of torch's, or the marker :class:`NoNorm`.

    Normalization Propagation layers, whose linear map, activation and standardization are one module, count too.
    """
    return isinstance(module, (FlexNorm, NoNorm, NormPropUnits, *_TORCH_NORMS))


def needs_batch(module: nn.Module) -> bool:
    """Whether ``module`` mixes the samples of a training batch, so that it cannot learn from one sample at a time."""
    mixing: tuple[type[nn.Module], ...] = (
        batch._BatchNorm,
        unitized._UnitizedBatchNorm,
        nn.modules.batchnorm._BatchNorm,
    )
    return isinstance(module, mixing) and not getattr(module, "frozen", False)


# Families whose running statistics are those of the batch, so that they pass from one to the other.
BATCH_LIKE = frozenset(
    {"batch", "unitized", "population", "renorm", "switchable", "batch_instance", "mean_only", "variance_only"}
)


def blank(family: str, ndim: int = 2) -> nn.Module:
    """A small layer of a family, to look at."""
    return _blank(family, ndim)


@functools.cache
def _blank(family: str, ndim: int) -> nn.Module:
    return make_norm(family, 4, ndim, device="meta") if family != "none" else NoNorm(4)


@functools.cache
def _our_classes() -> dict[type[nn.Module], tuple[str, int | None]]:
    found: dict[type[nn.Module], tuple[str, int | None]] = {}
    for family in NORMS:
        for ndim in (1, 2, 3):
            cls = type(blank(family, ndim))
            found[cls] = (family, None) if cls in found else (family, ndim)
    return found


def our_family(cls: type[nn.Module]) -> tuple[str, int | None] | None:
    """Family and spatial axes of one of this package's classes."""
    return _our_classes().get(cls)
