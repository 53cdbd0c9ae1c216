"""The base of the NormProp layers with a linear map: unit filters, activation and standardization in one module.

Paper: Arpit, Zhou, Kota, Govindaraju, "Normalization Propagation" (ICML 2016, arXiv 1603.01431), Eqs. 9, 11, 12. What
deviates from it is an option whose other value is the paper's, except: ``eps`` is added to the variance, so that a unit
whose activation has become constant is quiet instead of infinite; a zero filter yields zero and a finite gradient.

The forward pass is not written as the equation. For a positively homogeneous activation, 1 / std moves into the
weight and bias, since ``act(k u) = k act(u)`` for ``k > 0``, and one elementwise pass over the activations
disappears::

    (act(gamma W x / ||W|| + bias) - mean) / std = act(gamma / (std ||W||) W x + bias / std) - mean / std
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexnorm._messages import nothing_done
from flexnorm.nn.normprop.activation import NormPropUnits, UnitOptions
from flexnorm.nn.normprop.checks import positive
from flexnorm.nn.normprop.elementwise import ActivationLike, UnitizeSamples, unitize_samples


def length_or_one(rows: Tensor) -> Tensor:
    """Euclidean length of each row, with 1 in place of a length that is zero (or too small to be squared).

    A zero row then maps to zero, and its gradient is that of an unnormalized row: finite, so the row can leave zero.
    Dividing by ``length + eps`` instead would multiply that gradient by 1 / eps, and dividing by the length yields NaN
    forward and backward.

    Args:
        rows: ``(C, K)``; half precision is accumulated in float32, and the result ``(C,)`` at least float32.
    """
    dtype = torch.float32 if rows.dtype in (torch.float16, torch.bfloat16) else rows.dtype
    length = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    return torch.where(length > torch.finfo(dtype).tiny ** 0.5, length, 1.0)


class LayerOptions(UnitOptions, total=False):
    """Constructor arguments that the layers with a linear map take by keyword: also those of :class:`UnitOptions`.

    Attributes:
        unitize: Divide each sample by its root mean square (over channels and positions) first; False by default.
    """

    unitize: bool


class NormPropLayer(NormPropUnits):
    """Base class of the linear, convolutional and transposed layers; not used by itself.

    ``weight`` is divided by the norm of each filter in the forward pass, so the function does not depend on the
    filters' lengths: optimizers on the sphere may treat every row of it as a scale-invariant vector.

    The constructor takes the shape of the weight, the number of filters, and what :class:`NormPropLinear` and
    :class:`LayerOptions` explain.

    Attributes:
        weight: Filters; every filter starts with unit norm.
        in_channels: Channels (features) of the input.
        groups: Groups of channels that the linear map keeps apart (1 for linear).
        fan_gain: Factor by which a unit-norm filter must be enlarged to give unit variance: 1, or, of a transposed
            convolution, whose output positions receive that much less, the root of the product of the strides.
    """

    in_channels: int
    fan_gain: float = 1.0
    shared: ClassVar[tuple[str, ...]]  # constructor arguments and attributes that torch's own layer has, too

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        out_channels: int,
        activation: ActivationLike | None,
        constants: str,
        *,
        groups: int = 1,
        unitize: bool = False,
        **options: Unpack[UnitOptions],
    ) -> None:
        super().__init__(out_channels, activation, constants, **options)
        self.groups = groups
        self.unitize = bool(unitize)
        self.weight = nn.Parameter(torch.empty(weight_shape, device=options.get("device"), dtype=options.get("dtype")))
        # Before gamma, bias and slope, as optimizers and state dicts have always met it.
        for name in ("gamma", "bias", "slope"):
            self._parameters[name] = self._parameters.pop(name)
        self.reset_parameters()

    # -- the pieces that depend on the kind of linear map

    def filters(self, weight: Tensor) -> Tensor:
        """A ``weight`` as (C, fan-in): one row per unit."""
        return weight.flatten(1)

    def scaled(self, weight: Tensor, scale: Tensor) -> Tensor:
        """A ``weight`` with the filter of unit c multiplied by ``scale[c]``."""
        return weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _check(self, x: Tensor) -> None:
        raise NotImplementedError

    # -- parameters

    def reset_parameters(self) -> None:
        """Draw new filters of unit norm and reset gamma, bias and slope.

        The directions are uniform on the sphere for ``init="stable"`` and Glorot's for ``"paper"``.
        """
        (nn.init.normal_ if self.init == "stable" else nn.init.xavier_uniform_)(self.weight)
        self.unit_norm_()
        super().reset_parameters()

    @torch.no_grad()
    def unit_norm_(self) -> None:
        """Scale every filter to unit norm in place, as the paper does after every update. Zero filters stay zero."""
        self.weight.copy_(self.scaled(self.weight, self.filter_norms().reciprocal()))

    def filter_norms(self) -> Tensor:
        """Euclidean norm of each filter, ``(C,)``; 1 in place of a zero norm (see :func:`length_or_one`)."""
        return length_or_one(self.filters(self.weight))

    def unit_rows(self) -> Tensor:
        """The filters divided by their norms, ``(C, fan_in)``, differentiable."""
        rows = self.filters(self.weight)
        return rows / length_or_one(rows).unsqueeze(1)

    # -- forward

    def preactivations(self, x: Tensor) -> Tensor:
        """Normalized pre-activations ``W x / ||W||``, which propagation takes to be N(0, 1): for diagnosis."""
        return self._linear_part(unitize_samples(x, 1 + self.spatial) if self.unitize else x, None, None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the standardized activation of the linear map of ``x``.

        Raises:
            ValueError: If ``x`` has the wrong number of axes or channels.
        """
        self._check(x)
        if self.unitize:
            x = unitize_samples(x, 1 + self.spatial)
        return self._units(lambda scale, shift: self._linear_part(x, scale, shift))

    def _linear_part(self, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        scale, shift = self._calibrated(scale, shift)
        factor = self.fan_gain / self.filter_norms()
        weight = self.scaled(self.weight, factor if scale is None else factor * scale).to(self.weight.dtype)
        return self._mapped(x, weight, shift, factor)

    def _mapped(self, x: Tensor, weight: Tensor, shift: Tensor | None, factor: Tensor) -> Tensor:  # noqa: ARG002
        """``weight`` applied to ``x``, plus ``shift`` (C,); ``factor`` makes unit filters of the stored ones."""
        return self._linear(x, weight, None if shift is None else shift.to(weight.dtype))

    # -- inference

    def _fold_into(self, linear: nn.Module) -> nn.Module:
        scale, bias, tail = self._folded_units()
        weight, target = self.weight.detach().double(), linear.get_parameter("weight")
        factor = self.fan_gain / length_or_one(self.filters(weight))
        target.copy_(self.scaled(weight, factor if scale is None else factor * scale))
        if bias is not None:
            linear.get_parameter("bias").copy_(bias)
        head: list[nn.Module] = [UnitizeSamples(1 + self.spatial)] if self.unitize else []
        linear.train(self.training)
        return nn.Sequential(*head, linear, *tail) if head or tail else linear


class NormPropLinear(NormPropLayer):
    """Linear map with unit rows, activation and standardization, ``(*, in_features) -> (*, out_features)``.

    ``y = (act(gamma W x / ||W|| + bias) - mean) / sqrt(var + eps)`` with mean and variance of ``act(gamma z +
    bias)``, z ~ N(0, 1) (Eq. 9 of arXiv 1603.01431 for ``constants="paper"``). With unit rows and an input of zero
    mean and unit variance, every pre-activation before gamma and bias has unit variance, so every output again has
    zero mean and unit variance.

    Args:
        in_features: Size of the last axis of the input.
        out_features: Size of the last axis of the output, and the number of units.
        activation: Name, module, elementwise function or :class:`Activation`; None for a last layer: the affine map
            ``gamma W x / ||W|| + bias``, not standardized. ``"identity"``: ``W x / ||W||`` with no other parameter
            (for a shortcut that changes shape).
        constants: ``"exact"``: mean and variance follow gamma and bias. ``"paper"``: those of gamma = 1, bias = 0.
        **options: ``init``, ``unitize``, ``eps``, ``device`` and ``dtype``, see :class:`LayerOptions` and
            :class:`UnitOptions`.

    Raises:
        ValueError: For sizes that are not positive integers, unknown names, a negative eps, or slopes of PReLU that are
            not one per channel.
        TypeError: For an activation or dtype of the wrong kind.

    Examples:
        >>> layer = NormPropLinear(64, 32)
        >>> layer(torch.randn(8, 64)).shape
        torch.Size([8, 32])
    """

    shared = ("in_features", "out_features")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: ActivationLike | None = "relu",
        constants: str = "exact",
        **options: Unpack[LayerOptions],
    ) -> None:
        shape = positive("out_features", out_features), positive("in_features", in_features)
        super().__init__(shape, out_features, activation, constants, **options)
        self.in_features = self.in_channels = in_features
        self.out_features = out_features

    def _check(self, x: Tensor) -> None:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"NormPropLinear expects a last axis of {self.in_features} features, "
                f"got an input of shape {tuple(x.shape)}"
            )

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _folded(self) -> nn.Module:
        options = {"device": self.weight.device, "dtype": self.weight.dtype}
        return self._fold_into(nn.Linear(self.in_features, self.out_features, bias=self._has_shift(), **options))

    def extra_repr(self) -> str:
        """Arguments that define the layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._options()}"


def normalize_weights_(model: nn.Module) -> nn.Module:
    """Scale every filter of every NormProp layer in ``model`` to unit Euclidean norm, in place, and return the model.

    Call it after ``optimizer.step()``, or let :func:`register_unit_norm` do so. The network computes the same
    function before and after. Zero filters stay zero.

    Examples:
        >>> layer = NormPropLinear(3, 2)
        >>> _ = layer.weight.data.mul_(7.0)
        >>> normalize_weights_(layer).weight.norm(dim=1).allclose(torch.ones(2))
        True
    """
    for layer in normprop_layers(model, "normalize_weights_(model) changed nothing"):
        layer.unit_norm_()
    return model


def normprop_layers(model: nn.Module, said: str = "") -> list[NormPropLayer]:
    """All NormProp layers of a model; if there is none, what is ``said`` is a warning."""
    layers = [module for module in model.modules() if isinstance(module, NormPropLayer)]
    if said and not layers:
        advice = "flexnorm.convert_to_normprop(model, example_input) makes some."
        nothing_done(said, "NormProp layers", [], advice, stacklevel=4)
    return layers


def register_unit_norm(optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
    """Make ``optimizer`` end every step with :func:`normalize_weights_` on ``model``.

    Args:
        optimizer: Any torch optimizer. One that already keeps filters on the sphere (SGD-G, Adam-G) does not need it.
        model: The model whose NormProp layers are meant.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        TypeError: If ``optimizer`` is no ``torch.optim.Optimizer``.

    Warns:
        flexnorm.NothingDone: If the model has no NormProp layer, as :func:`normalize_weights_` does.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; unwrap it first")

    def after_step(_optimizer: torch.optim.Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        for layer in normprop_layers(model):
            layer.unit_norm_()

    normprop_layers(model, "register_unit_norm(optimizer, model) has nothing to do")
    return optimizer.register_step_post_hook(after_step)
