"""What a normalization layer declares about itself, in its own file, and the norms by name.

Whatever handles norms in general (the factory, conversion, folding, recalibration, optimizers) reads the declaration;
none of them keeps a list of norms. So a new norm is one class.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

from torch import nn

from flexnorm._messages import unknown_name

_CLASSES: dict[str, dict[int, type[Norm]]] = {}

NORMS: Mapping[str, Mapping[int, type[Norm]]] = MappingProxyType(_CLASSES)
"""Every declared norm: its layers by the number of spatial axes (1 also stands for none), by its name."""


class Checked(nn.Module):
    """A module that refuses keyword arguments its constructor does not name, in the words of the class that was called.

    Constructors of families of layers hand ``**kwargs`` upwards, where an error would name another class, or where an
    argument that means nothing here would be accepted.
    """

    def __new__(cls, *_: Any, **kwargs: Any) -> Self:
        """Check the names; copies and pickles come without arguments, constructors of users know their own."""
        ours = next(base for base in cls.__mro__ if "__init__" in base.__dict__).__module__.startswith("flexnorm.")
        if ours and kwargs and (unknown := kwargs.keys() - (valid := constructor_arguments(cls))):
            raise TypeError(unknown_name(f"argument of {cls.__name__}", min(unknown), valid))
        return super().__new__(cls)


class Norm(Checked):
    """The declaration of a normalization layer. All of it is for others to read; the forward does not use it.

    A subclass that sets :attr:`norm_name` is known by that name at once, everywhere. Where a norm has a class for each
    number of spatial axes, their common base sets the name and each of them, in the same module, its ``ndims`` (``class
    CubeNorm2d(CubeNorm, ndims=(4,))``).

    Attributes:
        ndims: Numbers of axes that the input may have.
        norm_name: Name of the norm: of :func:`flexnorm.nn.make_norm`, of conversions and of configurations.
        statistics_from: Whose statistics normalize in training: those of the ``"batch"`` (samples mix), of each
            ``"sample"``, of the ``"population"`` (running statistics in training too, of biased variances), or
            ``"none"``. Running statistics are those of batches, except of ``"sample"``: averages of the samples' own.
        options: The constructor arguments that decide the function. Each is an attribute of the same name.
        defaults: Arguments that the factory gives where the layer's own defaults do not suit a network.
        torch_layer: The nearest layer of torch: ``"batch"``, ``"group"``, ``"layer"``, ``"instance"`` or ``"rms"`` (of
            single positions); ``""`` if there is none.
        pools_positions: Whether it is made of the moments of each channel of each sample over its positions, so that a
            position cannot be a sample of its own.
        positions_matter: Whether it makes a difference if each position is a sample of its own. It makes none to rules
            that read the moments of the whole batch, or given ones, and nothing else.
        learned: Parameters of its own beside weight and bias: size (``None`` for one per channel) and initial value.
        no_decay: Names of parameters that take no weight decay, whatever other vectors take.

    Raises:
        ValueError: Of a subclass, if another class has its name.
    """

    ndims: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)
    norm_name: ClassVar[str] = ""
    statistics_from: ClassVar[Literal["batch", "sample", "population", "none"]] = "batch"
    options: ClassVar[tuple[str, ...]] = ("eps",)
    defaults: ClassVar[Mapping[str, Any]] = {}
    torch_layer: ClassVar[str] = ""
    pools_positions: ClassVar[bool] = False
    positions_matter: ClassVar[bool] = True
    learned: ClassVar[Mapping[str, tuple[int | None, float]]] = {}
    no_decay: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, ndims: tuple[int, ...] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if ndims is not None:
            cls.ndims = ndims
        name = cls.norm_name
        if "norm_name" in cls.__dict__ and name:
            present = next(iter(_CLASSES.get(name, {}).values()), None)
            taken = next((c for c in present.__mro__ if "norm_name" in c.__dict__), None) if present else None
            # The same class again is one that was edited and run once more.
            if taken and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(
                    f"{cls.__module__}.{cls.__qualname__} declares norm_name = {name!r}, which is that of "
                    f"{taken.__module__}.{taken.__qualname__}; choose another name"
                )
            _CLASSES[name] = dict.fromkeys(cls.spatial(), cls)
        elif "ndims" in cls.__dict__ and any(
            base.__dict__.get("norm_name") and base.__module__ == cls.__module__ for base in cls.__bases__
        ):
            _CLASSES[name].update(dict.fromkeys(cls.spatial(), cls))

    @classmethod
    def spatial(cls) -> tuple[int, ...]:
        """Return the numbers of spatial axes of the inputs, from 1 to 3; 1 also stands for none."""
        return tuple(sorted({max(axes - 2, 1) for axes in cls.ndims}))

    @classmethod
    def placed(cls, channel_axis: int = 1, per_position: bool | None = None) -> type[Norm]:  # noqa: ARG003
        """Return the class of the norm's layers for a place of the channels: this one, unless the norm has another.

        Args:
            channel_axis: 1 or -1, as of :func:`flexnorm.flex_norm`.
            per_position: Whether each position is a sample of its own, as of :func:`flexnorm.flex_norm`.
        """
        return cls

    @classmethod
    def build(cls, num_features: int, **kwargs: Any) -> Norm:
        """Build the layer for a number of channels, with the factory's defaults.

        Args:
            num_features: Number of channels C.
            **kwargs: Arguments of the constructor.
        """
        return cls(num_features, **{**cls.defaults, **kwargs})

    def same_as(self, training: bool) -> str:  # noqa: ARG002 - for those to whom it matters
        """Return the name of the simplest norm that computes the same function as this layer, as it is now.

        Args:
            training: The mode: in training by the present batch, or in evaluation (or frozen) by running statistics.
        """
        return self.norm_name

    def function(self, training: bool) -> tuple[Any, ...]:
        """Return what decides the function beside parameters and statistics: of equal functions, equal tuples.

        Args:
            training: The mode.
        """
        training = training and not getattr(self, "frozen", False)
        name = self.same_as(training) or f"{type(self).__module__}.{type(self).__qualname__}"
        known = next(iter(NORMS[name].values())) if name in NORMS else type(self)
        running = not training and getattr(self, "running_mean", None) is not None
        values = tuple(getattr(self, option) for option in known.options)
        axes = getattr(self, "channel_axis", 1), known.positions_matter and getattr(self, "per_position", False)
        return (name, running, *values, *(axes if axes != (1, False) else ()))


def constructor_arguments(cls: type[nn.Module]) -> frozenset[str]:
    """Return the names of a layer's constructor arguments, those behind its ``**kwargs`` included.

    Args:
        cls: A class of layers. Behind ``**kwargs`` are the arguments of the class above, unless their type
            (``**kwargs: Unpack[Keywords]``) says which they are.
    """
    names: set[str] = set()
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    for base in cls.__mro__:
        if "__init__" not in base.__dict__ or base in (nn.Module, object):
            continue
        init = base.__dict__["__init__"]
        parameters = inspect.signature(init).parameters.values()
        names.update(p.name for p in parameters if p.kind in kinds)
        keywords = next((p for p in parameters if p.kind is p.VAR_KEYWORD), None)
        typed = keywords and init.__globals__.get(str(keywords.annotation).removeprefix("Unpack[").removesuffix("]"))
        names.update(typed.__annotations__ if typed else ())
        if typed or not keywords:
            break
    return frozenset(names - {"self"})
