"""Normalizations by name, and what a layer is: of this package, or torch's, which declare nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flexnorm._messages import unknown_name
from flexnorm.engine import NORMS, Norm, Segments
from flexnorm.nn.normprop import NormPropUnits


class NoNorm(Norm):
    """An identity that marks where a normalization would be, so that monitors can compare networks with and without.

    Args:
        num_features: Number of channels, for the record.
        channel_axis: Where the channels are, for the record: 1 or -1.
        per_position: Whether a norm there would take each position by itself, for the record. Default: with
            ``channel_axis=-1``.
    """

    norm_name = "none"
    statistics_from = "none"
    options = ()

    def __init__(self, num_features: int, *, channel_axis: int = 1, per_position: bool | None = None) -> None:
        super().__init__()
        self.num_features = num_features
        self.channel_axis = channel_axis
        self.per_position = channel_axis == -1 if per_position is None else per_position

    def forward(self, x: Tensor, mask: Tensor | None = None, segments: Segments | Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Return ``x``, whatever counts in it."""
        return x

    def extra_repr(self) -> str:
        """Show the number of channels, and where they are if not on axis 1."""
        return str(self.num_features) if self.channel_axis == 1 else f"{self.num_features}, channel_axis=-1"


def norm_class(name: str, ndim: int | None = None) -> type[Norm]:
    """Return the layer class of a norm, whose attributes say what the norm is: see :class:`flexnorm.engine.Norm`.

    Args:
        name: One of :data:`NORMS`.
        ndim: Number of spatial axes of the input, 0 to 3 (0 and 1 give the 1d layers); ``None`` for any class of the
            norm, all of which declare the same.

    Raises:
        ValueError: For an unknown name or a wrong ``ndim``.

    Examples:
        >>> norm_class("unitized", 3).__name__, norm_class("unitized").statistics_from
        ('UnitizedBatchNorm3d', 'batch')
    """
    if name not in NORMS:
        raise ValueError(unknown_name("norm", name, NORMS))
    layers = NORMS[name]
    if ndim is None:
        return next(iter(layers.values()))
    if not 0 <= ndim <= 3:
        raise ValueError(f"ndim is the number of spatial axes, 0 to 3, got {ndim}")
    if max(ndim, 1) not in layers:
        raise ValueError(f"the norm {name!r} has no layer for {ndim} spatial axes, only for {[*layers]}")
    return layers[max(ndim, 1)]


def make_norm(name: str, num_features: int, ndim: int | None = 2, **kwargs: Any) -> Norm:
    """Build the normalization of that name for inputs with ``ndim`` spatial axes.

    Args:
        name: One of :data:`NORMS`: ``"none"``, ``"batch"``, ``"group"``, ``"instance"`` (with affine parameters),
            ``"layer"``, ``"population"``, ``"unitized"``, ``"rms"``, ``"frn"`` (without its thresholded unit, so that
            any activation may follow), ``"renorm"``, ``"switchable"``, ``"batch_instance"``, ``"mean_only"``,
            ``"variance_only"``; or the ``norm_name`` of a layer of your own.
        num_features: Number of channels C.
        ndim: Number of spatial axes, 0 to 3 (0 and 1 give the 1d layers); ``None`` for any class of the norm. It does
            not matter with ``channel_axis=-1``.
        **kwargs: Handed to the layer: ``channel_axis=-1`` for tokens (``"layer"`` and ``"rms"`` are then
            :class:`LayerNorm` and :class:`RMSNorm`), ``per_position=True`` for each position by itself. For
            ``"group"``, ``num_groups`` defaults to 16 channels a group where that divides C, else to one group.

    Raises:
        ValueError: For an unknown name or a wrong ``ndim``.

    Examples:
        >>> make_norm("unitized", 16, track_running_stats=False)
        UnitizedBatchNorm2d(16, eps=1e-05, momentum=0.1, affine=True, track_running_stats=False, unit_norm='paper', \
constrain_alpha=False)
        >>> make_norm("layer", 16, channel_axis=-1)
        LayerNorm((16,), eps=1e-05, elementwise_affine=True)
    """
    where = {key: kwargs[key] for key in ("channel_axis", "per_position") if key in kwargs}
    return norm_class(name, ndim).placed(**where).build(num_features, **kwargs)


TORCH_LAYERS: dict[str, tuple[type[nn.Module], ...]] = {
    "batch": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    "instance": (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    "group": (nn.GroupNorm,),
    "layer": (nn.LayerNorm,),
    "rms": (nn.RMSNorm,),
}
"""Torch's layers by the name of the norm that computes the same (``"layer"``, ``"rms"``: where they normalize channels
and positions); the first three of a name are those for 1, 2 and 3 spatial axes."""

_BASES: dict[type[nn.Module], str] = {
    nn.modules.batchnorm._BatchNorm: "batch",
    nn.modules.instancenorm._InstanceNorm: "instance",
    **{cls: name for name, classes in TORCH_LAYERS.items() for cls in classes},
}


def norm_of(module: nn.Module) -> type[Norm] | None:
    """Return the class that declares what a layer is: its own, or for torch's layers the one that computes the same.

    Args:
        module: Any module.

    Returns:
        The class; ``None`` if the module is no such layer (Normalization Propagation layers declare nothing either).

    Examples:
        >>> norm_of(nn.SyncBatchNorm(8)).statistics_from, norm_of(nn.Conv2d(1, 1, 1))
        ('batch', None)
    """
    if isinstance(module, Norm):
        return type(module)
    name = next((_BASES[base] for base in type(module).__mro__ if base in _BASES), None)
    return None if name is None else norm_class(name)


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` normalizes: a layer of this package, one of torch's, or the marker :class:`NoNorm`.

    Normalization Propagation layers, whose linear map, activation and standardization are one module, count too.
    """
    return norm_of(module) is not None or isinstance(module, (NormPropUnits, nn.LocalResponseNorm))


def called_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the norms of a model by name, and modules of unknown classes that are called norms; each once.

    Args:
        model: Any model.

    Examples:
        >>> class MyNorm(nn.Module): ...
        >>> list(called_norms(nn.Sequential(nn.Linear(1, 1), nn.LayerNorm(1), MyNorm())))
        ['1', '2']
    """

    def called(module: nn.Module) -> bool:
        kind = type(module)  # weight normalization is of weights
        return (
            "norm" in kind.__name__.lower() and not any(module.children()) and "torch.nn.utils" not in kind.__module__
        )

    return {name: module for name, module in model.named_modules() if is_norm(module) or called(module)}


def needs_batch(module: nn.Module) -> bool:
    """Whether ``module`` mixes the samples of a training batch, so that it cannot learn from one sample at a time."""
    norm = norm_of(module)
    return norm is not None and norm.statistics_from == "batch" and not getattr(module, "frozen", False)


def undecayed(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model's norms that take no weight decay, whatever other vectors take.

    Args:
        model: Any model.
    """
    named = [(m._parameters, name) for m in model.modules() if isinstance(m, Norm) for name in m.no_decay]
    return [p for parameters, name in named if (p := parameters.get(name)) is not None]
