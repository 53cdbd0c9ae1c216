"""Freeze running statistics, in layers of this package and of torch, so that ``train()`` does not undo it."""

from __future__ import annotations

from typing import Any

from torch import nn

from flexnorm._messages import nothing_done
from flexnorm.engine import FlexNorm
from flexnorm.nn import called_norms
from flexnorm.probe import Place, Selection, find_places, select_places


def has_statistics(module: nn.Module) -> bool:
    """Whether the layer ``module`` keeps running statistics."""
    normalizes = isinstance(module, (FlexNorm, nn.modules.batchnorm._NormBase))
    return normalizes and module._buffers.get("running_mean") is not None


def places_with_statistics(
    said: str, model: nn.Module, include: Selection | None, exclude: Selection | None, *, frozen: bool = True
) -> list[Place]:
    """The chosen layers of a model that keep running statistics; ``frozen`` tells whether frozen ones count.

    If there is none, what was ``said`` is a :class:`flexnorm.NothingDone`, with the norms and why each is none.
    """
    places = select_places(find_places(model, has_statistics), include, exclude)
    if not any(frozen or not is_frozen(place.module) for place in places):
        advice = "It is for norms that keep running statistics, as batch normalization does."
        nothing_done(said, "norms", without_statistics(model, places), advice, stacklevel=4)
    return places


def without_statistics(model: nn.Module, places: list[Place]) -> list[tuple[str, str]]:
    """Name of every norm of a model, and why no running statistics of it can be changed, but for those of ``places``.

    Of those in ``places`` the reason is that they are frozen.
    """
    chosen = {place.module for place in places}

    def reason(module: nn.Module) -> str:
        if has_statistics(module):
            return "is frozen" if module in chosen else "left out by include or exclude"
        kept = "has some, in a class that is not known here" if "running_mean" in module._buffers else "keeps none"
        kept = "track_running_stats=False" if getattr(module, "track_running_stats", None) is False else kept
        return f"{type(module).__name__}, {kept}"

    return [(name, reason(module)) for name, module in called_norms(model).items()]


class Frozen:
    """Mixin that holds a layer of torch in evaluation mode. Made by :func:`freeze`.

    The class of the module is exchanged, as torch's parametrizations do, and nothing else of it: parameters, buffers,
    momentum, counter and hooks stay the very same objects. ``training`` reads false, and what ``train()`` sets
    meanwhile is remembered for :func:`unfreeze`.
    """

    thawed: type[nn.Module]

    @property
    def training(self) -> bool:
        """False: the layer uses its running statistics."""
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["_training_when_thawed"] = mode

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (self.thawed,), self.__dict__

    def extra_repr(self) -> str:
        """The arguments of the layer, and that it is frozen."""
        return f"{super().extra_repr()}, frozen=True"  # type: ignore[misc]


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _frozen_class(thawed: type[nn.Module]) -> type[nn.Module]:
    if thawed not in _classes:
        body = {"thawed": thawed, "__module__": thawed.__module__, "__doc__": thawed.__doc__}
        _classes[thawed] = type(thawed.__name__, (Frozen, thawed), body)
    return _classes[thawed]


def _empty(thawed: type[nn.Module]) -> nn.Module:
    cls = _frozen_class(thawed)
    return cls.__new__(cls)


def is_frozen(module: nn.Module) -> bool:
    """Whether :func:`freeze` holds the statistics of the layer ``module``."""
    return isinstance(module, Frozen) or (isinstance(module, FlexNorm) and module.frozen)


def freeze_layer(module: nn.Module) -> None:
    """Freeze one layer, ``module``, that has running statistics and is not frozen yet."""
    if isinstance(module, FlexNorm):
        module.freeze()
        return
    training = module.training
    module.__class__ = _frozen_class(type(module))
    module.__dict__["training"] = False
    module.__dict__["_training_when_thawed"] = training


_TRAINABLE = "_trainable_when_thawed"


def freeze(
    model: nn.Module, *, include: Selection | None = None, exclude: Selection | None = None, affine: bool = False
) -> nn.Module:
    """Make normalization layers use their running statistics and leave them alone, whatever ``train()`` says.

    For fine-tuning with the statistics of the pre-training, as detectors and segmentation models do. Works in place on
    ``BatchNorm1d/2d/3d``, ``SyncBatchNorm`` and ``InstanceNorm*`` of torch (and subclasses that read ``training``, such
    as timm's) and on every layer of this package. Layers without running statistics are left as they are. State dicts
    do not change, and :func:`unfreeze` restores everything: momentum, counter, the training flag.

    Args:
        model: Any model; its layers are changed in place.
        include: Only these layers, as in :func:`flexnorm.probe.select`: a name (with everything below it), a glob
            pattern, ``"re:..."``, a class, a module, a function of (name, module), or a list of these; ``None``: all.
        exclude: Not these layers; takes the same.
        affine: Also stop gradients of ``weight`` and ``bias``.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: If ``include`` or ``exclude`` names a layer that does not exist.

    Warns:
        flexnorm.NothingDone: If there is no layer with running statistics; :func:`unfreeze` says so too.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> freeze(model).train()[1].training
        False
    """
    for place in places_with_statistics("freeze(model) changed nothing", model, include, exclude):
        module = place.module
        if not is_frozen(module):
            freeze_layer(module)
        if affine and _TRAINABLE not in module.__dict__:
            parameters = {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}
            module.__dict__[_TRAINABLE] = tuple(parameters)
            for parameter in parameters.values():
                parameter.requires_grad_(False)
    return model


def unfreeze(model: nn.Module, *, include: Selection | None = None, exclude: Selection | None = None) -> nn.Module:
    """Undo :func:`freeze`: the layers train again, with the training flag that ``train()`` has set meanwhile.

    Args:
        model: Any model; its layers are changed in place.
        include: Only these layers, as of :func:`freeze`.
        exclude: Not these layers.

    Returns:
        ``model`` itself. Layers that are not frozen are left as they are.

    Raises:
        ValueError: If ``include`` or ``exclude`` names a layer that does not exist.
    """
    for place in places_with_statistics("unfreeze(model) changed nothing", model, include, exclude):
        module = place.module
        if isinstance(module, FlexNorm):
            module.freeze(False)
        elif isinstance(module, Frozen):
            training = module.__dict__.pop("_training_when_thawed")
            module.__class__ = module.thawed  # type: ignore[assignment]
            module.__dict__["training"] = training
        for name in module.__dict__.pop(_TRAINABLE, ()):
            module.get_parameter(name).requires_grad_(True)
    return model
