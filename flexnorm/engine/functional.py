"""flex_norm: any normalization, written as a rule on two small tables, at the speed of a fused kernel.

Whether positions share their moments decides who runs it: :mod:`flexnorm.engine.samples` or
:mod:`flexnorm.engine.tokens`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from flexnorm.engine.moments import Moments, broadcasts, pool_positions
from flexnorm.engine.ragged import Part, Ragged
from flexnorm.engine.samples import SampleMoments, Samples
from flexnorm.engine.segments import Segments, weights_of
from flexnorm.engine.tokens import TokenMoments, Tokens
from flexnorm.kernels import passes
from flexnorm.kernels.layout import Layout, best_by_torch, layout_of, positions_of, table_dtype, token_layout_of
from flexnorm.kernels.passes import transformed
from flexnorm.kernels.ragged import Spans

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Rule: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
_Twin = TypeVar("_Twin", bound=Callable[..., Any])
_TWINS: dict[Any, tuple[Callable[..., Tensor | None], bool]] = {}


def _left_to_torch(x: Tensor) -> bool:
    """Where the plain composition has to run: traced, transformed or forward-mode code, and tensors without strides."""
    return (
        torch.compiler.is_compiling()
        or transformed()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or x.is_meta
        or type(x) not in (Tensor, torch.nn.Parameter)
        or (x.requires_grad and not x.is_floating_point())
    )


def _apply_rule(
    rule: Rule, moments: Moments, params: tuple[Any, ...], x: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Scale and shift of a rule as tables of two axes that broadcast to ``size``, in the type of the tables."""
    scale, shift = _pair(rule(moments, *params))
    return _table(scale, "scale", x, size), _table(shift, "shift", x, size)


def _pair(result: Any) -> tuple[Any, Any]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"a rule returns the pair (scale, shift), got {type(result).__name__}")
    return result


def _table(table: Tensor | float, name: str, x: Tensor, size: tuple[int, int]) -> Tensor:
    if not isinstance(table, Tensor):
        if not isinstance(table, (int, float)):
            raise TypeError(f"the rule returned {table!r} as {name}; it must be a tensor or a number (0.0 for none)")
        table = torch.as_tensor(float(table), device=x.device)
    dtype = table_dtype(x.dtype)
    flat = table if table.dtype == dtype else table.to(dtype)
    if flat.dim() < 2:
        flat = flat.reshape(1, -1)
    if not broadcasts(flat, *size):
        raise ValueError(
            f"the rule returned a {name} of shape {tuple(table.shape)}, which does not broadcast to (N, C) = {size}"
        )
    return flat


def flex_norm(
    x: Tensor,
    rule: Rule,
    *params: Any,
    channel_axis: int = 1,
    per_position: bool | None = None,
    mask: Tensor | None = None,
    segments: Segments | Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Normalize ``x`` by a rule: ``y[n, c, ...] = scale[n, c] * x[n, c, ...] + shift[n, c]``.

    What n stands for: the samples, whose positions share their moments (images); or, with ``per_position``, every
    position by itself (tokens, features, nodes of a graph).

    Args:
        x: (N, C) or (N, C, *spatial), or (..., C) with ``channel_axis=-1``; float64, float32, bfloat16 or float16;
            contiguous, channels last, or any strides.
        rule: Called as ``rule(moments, *params)`` with the :class:`Moments` of ``x``; returns ``(scale, shift)``, each
            broadcastable to (N, C). Plain PyTorch on small tables; it may have side effects (running statistics).
            Tables of large inputs of tokens act as tensors in torch's operations and methods without being any: a
            :class:`torch.autograd.Function` or ``torch.vmap`` inside a rule takes ``table[:]``, which is one.
        *params: Handed to the rule, typically ``weight`` and ``bias``. Gradients also reach tensors that the rule
            captures by itself.
        channel_axis: Where the channels are: 1, or -1 for the last axis: (B, T, C) tokens, (B, H, W, C) images,
            (nodes, C).
        per_position: Whether each position is a sample of its own, so that ``pool("channels")`` are the moments of one
            token and ``pool("batch")`` those of all of them. Default: with ``channel_axis=-1`` it is, with 1 it is not.
            ``channel_axis=1, per_position=True`` is ConvNeXt's normalization over channels at each position of an
            image; ``channel_axis=-1, per_position=False`` normalizes a sequence or an image channels last as a whole.
        mask: What counts, of the shape of ``x`` without the channel axis (or with 1 there): true for a value that
            counts, false for padding, or weights of at least 0. Only what counts enters the moments (anything may stand
            elsewhere; for what is not finite there, 0 is taken), and gradients through moments go only there; the
            result is computed everywhere. Counts are then tensors.
        segments: For ``x`` (R, C) whose rows are the positions of samples of various sizes, as the nodes of a batch of
            graphs: the number of the sample of each row, int64 (R,), or :class:`Segments` of it. The moments of a rule
            are then those of the S samples: (S, C), with counts (S, 1).
        process_group: Pool ``moments.pool("batch")`` over the processes of this group too, on any backend.

    Returns:
        A tensor of the shape, type and memory format of ``x`` (contiguous if ``x`` has holes or overlaps). Only ``x``
        and tables of the rule's own size are kept for the backward.

    Raises:
        TypeError: If ``x`` is no floating-point tensor, or the rule returns no pair.
        ValueError: If ``x`` has too few or too many axes, a table does not broadcast to (N, C), ``channel_axis`` is
            another axis, or ``mask`` or ``segments`` do not fit ``x``.

    Examples:
        >>> def rms(moments, weight):                       # root mean square normalization, in two lines
        ...     scale = weight * (moments.pool("channels").mean_square + 1e-6).rsqrt()
        ...     return scale, torch.zeros_like(scale)
        >>> x = torch.randn(8, 16, 4, 4)
        >>> y = flex_norm(x, rms, torch.ones(16))
        >>> y.square().mean((1, 2, 3)).allclose(torch.ones(8), atol=1e-4)
        True
        >>> tokens = torch.randn(8, 10, 16)
        >>> y = flex_norm(tokens, rms, torch.ones(16), channel_axis=-1)
        >>> y.square().mean(-1).allclose(torch.ones(8, 10), atol=1e-4)
        True
    """
    _check(x, channel_axis)
    if mask is None and segments is None and process_group is None:
        keywords = rule.keywords if isinstance(rule, functools.partial) and not rule.args else {}
        named = _TWINS.get(rule.func if isinstance(rule, functools.partial) and not rule.args else rule)
        if named is not None:
            each, twin = channel_axis == -1 if per_position is None else per_position, named[0]
            y = in_one(x, channel_axis, each, functools.partial(twin, params, keywords), named[1])
            if y is not None:
                return y
    flat = x.dim() == 2
    last = flat or channel_axis == -1
    weights = None if mask is None else weights_of(mask, x, 1 if not last else -1)
    if weights is not None:
        x = _without_hidden(x, weights.unsqueeze(1 if not last else -1))
    if segments is not None:
        if per_position:
            raise ValueError("segments make the rows of a sample its positions: they contradict per_position=True")
        if not last or not flat:
            raise ValueError(f"segments go with x (R, C), one row a position, got shape {tuple(x.shape)}; flatten it")
        return _in_segments(x, rule, params, Segments.of(segments, x), weights, process_group)
    if (channel_axis == -1 and per_position is None) or per_position or flat:
        return _per_position(x, rule, params, channel_axis, weights, process_group)
    if channel_axis == -1:
        y = flex_norm(x.movedim(-1, 1), rule, *params, per_position=False, mask=mask, process_group=process_group)
        return y.movedim(1, -1)
    if weights is not None:
        return _masked(x, rule, params, weights, process_group)
    return _per_sample(x, rule, params, process_group)


def twin_of(rule: Rule, at_any_size: bool = False) -> Callable[[_Twin], _Twin]:
    """Declare torch's own function of the norm that a rule makes, for small inputs on the CPU, or `at_any_size`.

    What is decorated takes ``x``, (N, C, *spatial) or tokens (R, C), and the rule's parameters; it returns the
    normalized ``x``, or ``None`` where torch's function does not take them.
    """

    def declare(function: _Twin) -> _Twin:
        def checked(params: tuple[Any, ...], keywords: dict[str, Any], x: Tensor) -> Tensor | None:
            tables = (*params, keywords.get("weight"), keywords.get("bias"))
            # A rule takes numbers and whatever broadcasts, torch's functions one number for each channel.
            alike = all(p is None or _of_channels(p, x) for p in tables)
            return function(x, *params, **keywords) if alike else None

        _TWINS[rule] = checked, at_any_size
        return function

    return declare


def _of_channels(parameter: Any, x: Tensor) -> bool:
    return isinstance(parameter, Tensor) and parameter.dtype == x.dtype and parameter.shape == x.shape[1:2]


def in_one(
    x: Tensor,
    channel_axis: int,
    per_position: bool,
    twin: Callable[[Tensor], Tensor | None],
    at_any_size: bool = False,
) -> Tensor | None:
    """Normalize ``x`` by a function that does all of a norm at once; ``None`` where that does not serve.

    Args:
        x: As of :func:`flex_norm`; arguments checked.
        channel_axis: As of :func:`flex_norm`.
        per_position: As of :func:`flex_norm`.
        twin: Maps (N, C, *spatial), or tokens (R, C), to the result or to ``None`` if it can't.
        at_any_size: Whether it serves inputs of any size, and not small ones only.
    """
    # In this order: what is traced does not ask for kernels, which a compiler warns of.
    if _left_to_torch(x) or x.device.type != "cpu" or x.numel() == 0 or not (at_any_size or best_by_torch(x)):
        return None
    if x.dim() == 2 or (channel_axis == 1 and not per_position):
        return twin(x)
    if channel_axis == 1 or not per_position or not x.is_contiguous():
        return None
    y = twin(x.view(-1, x.shape[-1]))
    return y if y is None else y.view(x.shape)


def _without_hidden(x: Tensor, weights: Tensor) -> Tensor:
    """``x`` with 0 for what is not finite where nothing counts: 0 times not-a-number would reach every gradient."""
    if x.device.type == "cpu" and not _left_to_torch(x) and bool(x.detach().sum().isfinite()):
        return x
    return torch.where((weights > 0) | x.isfinite(), x, 0)


def _check(x: Tensor, channel_axis: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"flex_norm needs a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"flex_norm needs a real floating-point tensor, got {x.dtype}; convert it with x.float()")
    if channel_axis not in (1, -1):
        raise ValueError(
            f"channel_axis must be 1 or -1 (the last axis), got {channel_axis}; move the axis with movedim"
        )
    if x.dim() < 2 or (channel_axis == 1 and x.dim() > 5):
        form = "(N, C) or (N, C, *spatial) with 1 to 3 spatial axes" if channel_axis == 1 else "(..., C)"
        raise ValueError(f"flex_norm needs {form}, got shape {tuple(x.shape)}")


def _in_segments(
    x: Tensor,
    rule: Rule,
    params: tuple[Any, ...],
    segments: Segments,
    weights: Tensor | None,
    process_group: ProcessGroup | None,
) -> Tensor:
    """Rows (R, C) that are the positions of samples of various sizes."""
    layout = None if _left_to_torch(x) else token_layout_of(x, -1)
    if layout is not None and layout.backend == "c":
        if layout.order != "cols":
            x, layout = x.contiguous(), layout._replace(order="cols")
        part = Part(segments.spans(weights), functools.partial(segments.moments, weights=weights), segments.affine)
        return _by_parts(x, rule, params, part, layout, process_group)
    moments = Moments(*segments.moments(x, weights), process_group=process_group)
    scale, shift = _apply_rule(rule, moments, params, x, (segments.count, x.shape[1]))
    return segments.affine(x, scale, shift)


def _masked(
    x: Tensor, rule: Rule, params: tuple[Any, ...], weights: Tensor, process_group: ProcessGroup | None
) -> Tensor:
    """Samples (N, C, *spatial) whose positions do not all count."""

    def composed(v: Tensor) -> tuple[Tensor, Tensor, Any]:
        values = v.flatten(2).movedim(1, 2).to(table_dtype(v.dtype))
        return pool_positions(values, weights.reshape(v.shape[0], -1, 1))

    layout = None if _left_to_torch(x) else layout_of(x)
    if layout is not None and layout.order == "none":
        x = x.contiguous()
        layout = layout_of(x)
    if layout is not None and layout.backend == "c":
        part = Part(Spans(weights.reshape(x.shape[0], -1)), composed, passes.composed_affine)
        return _by_parts(x, rule, params, part, layout, process_group)
    moments = Moments(*composed(x), process_group=process_group)
    return passes.composed_affine(x, *_apply_rule(rule, moments, params, x, (x.shape[0], x.shape[1])))


def _by_parts(
    x: Tensor, rule: Rule, params: tuple[Any, ...], part: Part, layout: Layout, process_group: ProcessGroup | None
) -> Tensor:
    source = Ragged(x, part, layout)
    mean, var, count = source.moments()
    moments = Moments(mean, var, count, process_group=process_group)
    return source.affine(*_apply_rule(rule, moments, params, x, (mean.shape[0], mean.shape[1])))


def _per_position(
    x: Tensor,
    rule: Rule,
    params: tuple[Any, ...],
    channel_axis: int,
    weights: Tensor | None,
    process_group: ProcessGroup | None,
) -> Tensor:
    """Each position by itself: R rows of C channels."""
    layout = None if _left_to_torch(x) else token_layout_of(x, channel_axis)
    if layout is not None and layout.order == "none":
        x = x.contiguous()
        layout = token_layout_of(x, channel_axis)
    if layout is not None and layout.order == "rows" and channel_axis == -1 and x.dim() > 2:
        # In memory it is (N, C, *spatial); the passes and their compositions shall see it so.
        return _per_position(x.movedim(-1, 1), rule, params, 1, weights, process_group).movedim(1, -1)
    source = Tokens(x, channel_axis, layout, None if weights is None else weights.reshape(-1))
    scale, shift = _pair(rule(TokenMoments(source, process_group), *params))
    return source.affine(source.terms(scale, "scale"), source.terms(shift, "shift"))


def _per_sample(x: Tensor, rule: Rule, params: tuple[Any, ...], process_group: ProcessGroup | None) -> Tensor:
    """Samples whose positions share their moments: (N, C, *spatial)."""
    count, size = positions_of(x), (x.shape[0], x.shape[1])
    if _left_to_torch(x):
        moments = Moments(count=count, process_group=process_group, _compute=lambda _: passes.composed_moments(x))
        scale, shift = _apply_rule(rule, moments, params, x, size)
        return passes.composed_affine(x, scale, shift)
    layout = layout_of(x)
    if layout.order == "none":
        x = x.contiguous()
        layout = layout_of(x)
    source = Samples(x, layout)
    scale, shift = _apply_rule(rule, SampleMoments(source, count, process_group), params, x, size)
    return source.affine(scale, shift)
