"""FlexNorm: the module around one rule, with torch's constructor arguments, parameter and buffer names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from flexnorm.engine.declaration import Norm, constructor_arguments
from flexnorm.engine.functional import flex_norm, in_one
from flexnorm.engine.moments import Moments, active_group
from flexnorm.engine.segments import Segments
from flexnorm.kernels.tables import track

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def recomputing() -> bool:
    """Whether this forward runs inside a backward, as activation checkpointing does to recompute what it dropped."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _documented(text: str, cls: type[FlexNorm]) -> str:
    """The docstring of a layer with the arguments that it shares with all, as they are explained there."""
    shared = re.findall(
        r"^    ((\w+): .*?)(?=\n    \S|\n\n)", inspect.cleandoc(FlexNorm.__doc__ or ""), re.DOTALL | re.MULTILINE
    )
    have = constructor_arguments(cls)
    wanted = [f"    {entry}" for entry, name in shared if name in have and f"\n    {name}: " not in text]
    before, found, own = text.partition("\n\nArgs:\n")
    if not found:
        before, raises, own = text.partition("\n\nRaises:\n")
        own = f"\nRaises:\n{own}" if raises else ""
    return "\n".join([f"{before}\n\nArgs:", *wanted, own])


class FlexNorm(Norm):
    """Base class of all normalization layers: parameters, running statistics and one rule.

    A subclass implements :meth:`rule` and gets training, evaluation, synchronization over processes, mixed precision,
    both memory formats, compilation and export from the engine. State dicts have torch's names, so those of
    ``nn.BatchNorm*`` load as they are.

    Args:
        num_features: Number of channels C of the input (N, C) or (N, C, *spatial).
        eps: Added to variances before the square root.
        momentum: Weight of the new batch in the running statistics (torch's meaning, ``0.1`` = slow); ``None`` for the
            cumulative average over all batches so far.
        affine: Whether to learn a ``weight`` (C,), initialized to 1, and a ``bias`` (C,), initialized to 0.
        track_running_stats: Whether to keep ``running_mean``, ``running_var`` (of unbiased variances, as torch does)
            and ``num_batches_tracked`` for evaluation.
        bias: ``False`` leaves out the bias only.
        channel_axis: Where the channels of the input are: 1, or -1 for (..., C) with any number of axes.
        per_position: Whether each position (token) is a sample of its own, as of :func:`flexnorm.flex_norm`. Default:
            with ``channel_axis=-1`` it is, unless the norm is made of the moments of each sample's positions.
        process_group: Pool the batch statistics over the processes of this group (any backend, gloo on CPU included);
            ``"world"`` for the default group, resolved at the first forward; ``None`` for this process only.
        device: Device of parameters and buffers.
        dtype: Type of the parameters. Running statistics are kept in float32 at least, whatever the parameters are cast
            to: in bfloat16 a running mean of 100 would stop at 96.

    Attributes:
        frozen: While true the layer uses its running statistics and leaves them alone, in training mode too, however
            often ``train()`` is called. Set it with :meth:`freeze`.

    Raises:
        ValueError: If ``num_features``, ``eps`` or ``momentum`` is out of range.
    """

    twin_at_any_size: ClassVar[bool] = False
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        channel_axis: int = 1,
        per_position: bool | None = None,
        process_group: ProcessGroup | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 0:
            raise ValueError(f"num_features must not be negative, got {num_features}")
        if eps < 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        if momentum is not None and not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must lie in [0, 1] or be None (cumulative average), got {momentum}")
        if channel_axis not in (1, -1):
            raise ValueError(f"channel_axis must be 1 or -1 (the last axis), got {channel_axis!r}")
        if per_position and self.pools_positions:
            raise ValueError(
                f"{type(self).__name__} is made of moments over positions: per_position=True leaves it none"
            )
        active_group(process_group)  # refuses what is none
        self.channel_axis = channel_axis
        self.per_position = channel_axis == -1 and not self.pools_positions if per_position is None else per_position
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.process_group = process_group
        self.frozen = False
        wanted = {"weight": affine, "bias": affine and bias, **dict.fromkeys(self.learned, True)}
        for name, learn in wanted.items():
            size = self.learned.get(name, (None, 1.0))[0]
            table = torch.empty(num_features if size is None else size, device=device, dtype=dtype) if learn else None
            self.register_parameter(name, None if table is None else nn.Parameter(table))
        if track_running_stats:
            kept = torch.float64 if dtype == torch.float64 else torch.float32
            self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=kept))
            self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=kept))
            self.register_buffer("num_batches_tracked", torch.zeros((), device=device, dtype=torch.long))
        else:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                self.register_buffer(name, None)
        self.reset_parameters()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "rule" in cls.__dict__ and "twin" not in cls.__dict__ and not cls.__module__.startswith("flexnorm."):
            cls.twin = FlexNorm.twin  # type: ignore[method-assign]  # torch's function is that of the rule above it
        for parent in cls.__bases__:
            # The 1d, 2d and 3d forms of a layer share a private parent, which documents them.
            if parent.__name__.startswith("_") and cls.__doc__ and parent.__doc__ and "\n    Args:" not in cls.__doc__:
                cls.__doc__ = _documented(f"{cls.__doc__}\n\n{inspect.cleandoc(parent.__doc__)}", cls)

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1 and the counter to 0."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Set weight to 1, bias to 0, parameters of its own to what they start with, and reset the statistics."""
        self.reset_running_stats()
        for name, (_, value) in self.learned.items():
            nn.init.constant_(self.get_parameter(name), value)
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def freeze(self, frozen: bool = True) -> FlexNorm:
        """Use the running statistics and keep them as they are until ``freeze(False)``, whatever ``train()`` says.

        Raises:
            RuntimeError: If the layer has no running statistics to freeze.
        """
        if frozen and self.running_mean is None:
            raise RuntimeError(
                f"{type(self).__name__} has no running statistics (track_running_stats=False): nothing to freeze"
            )
        self.frozen = frozen
        return self

    def rule(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Turn the moments of the input into ``(scale, shift)``, each broadcastable to (N, C)."""
        raise NotImplementedError(f"{type(self).__name__} must implement rule(moments) -> (scale, shift)")

    def twin(self, x: Tensor) -> Tensor | None:  # noqa: ARG002
        """Normalize ``x`` in one node, running statistics included: by torch's own function, or a kernel, of this norm.

        Called for small inputs, or whatever their size where the class says :attr:`twin_at_any_size`.

        Args:
            x: (N, C, *spatial), or tokens (R, C), on the CPU; the layer's input has been checked.

        Returns:
            The result, or ``None`` where there is no such function: then the rule serves.
        """
        return None

    def batch_or_running(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Return the mean and biased variance to normalize with, (1, C) or (C,), and keep the running statistics.

        In training: those of the batch, pooled over processes, which also enter the running statistics. In evaluation
        or while frozen: the running ones (those of the batch if none are tracked).
        """
        if self.running_mean is not None and self.running_var is not None and (self.frozen or not self.training):
            return self.kept_statistics()
        if self.pools_positions:
            _ = moments.tables  # needed in any case: read first, those of the batch are pooled from them
        pooled = moments.pool("batch")
        if self.training:
            self.track(pooled)
        return pooled.mean, pooled.var

    def kept_statistics(self) -> tuple[Tensor, Tensor]:
        """Return the running mean and variance (C,); copies if autograd may save them, since training changes them."""
        assert self.running_mean is not None
        assert self.running_var is not None
        # What torch.jit.trace has traced, it checks against a trace without gradients.
        traced = not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None
        if torch.is_grad_enabled() or traced:
            return self.running_mean.clone(), self.running_var.clone()
        return self.running_mean, self.running_var

    @torch.no_grad()
    def track(self, pooled: Moments) -> None:
        """Let batch moments (1, C) enter the running statistics, unless the layer is frozen or tracks none.

        A batch with a non-finite mean or variance in any channel does not count, nor does the recomputation of
        activation checkpointing.
        """
        mean, var, tracked = self.running_mean, self.running_var, self.num_batches_tracked
        if mean is None or var is None or tracked is None or self.frozen or recomputing():
            return
        if not (isinstance(pooled.count, int) and pooled.count == 0):
            track(pooled.tables, (mean, var), tracked, self.momentum, pooled.count, pooled.backend)

    def group(self) -> ProcessGroup | None:
        """Return the process group to synchronize over, or ``None`` where there is nothing to synchronize."""
        return active_group(self.process_group)

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError if ``x`` has the wrong number of axes or channels for this layer."""
        fits = x.dim() in self.ndims if self.channel_axis == 1 else x.dim() > 1 + self.pools_positions
        if not fits:
            wanted = " or ".join(f"{n}-D" for n in self.ndims) + " input (N, C, ...)"
            if self.channel_axis == -1:
                form = "(..., C)" if self.per_position else "(N, ..., C)"
                wanted = f"{form} input with at least {2 + self.pools_positions} axes"
            raise ValueError(f"{type(self).__name__} expects {wanted}, got shape {tuple(x.shape)}")
        if x.shape[self.channel_axis] != self.num_features:
            raise ValueError(
                f"{type(self).__name__} was built for {self.num_features} channels, got {x.shape[self.channel_axis]} "
                f"at axis {self.channel_axis} of shape {tuple(x.shape)}"
            )

    def forward(self, x: Tensor, mask: Tensor | None = None, segments: Segments | Tensor | None = None) -> Tensor:
        """Normalize ``x``.

        Args:
            x: (N, C) or (N, C, *spatial), or (N, ..., C) with ``channel_axis=-1``.
            mask: What counts, of the shape of ``x`` without the channel axis: booleans, or weights of at least 0.
            segments: The sample of each row of ``x`` (R, C), as of :func:`flexnorm.flex_norm`.

        Returns:
            A tensor of the shape, type and memory format of ``x``.
        """
        # Rows in segments are the positions of one long sequence, as far as its shape goes.
        self.check_input(x if segments is None else x.unsqueeze(0).movedim(-1, self.channel_axis))
        if mask is None and segments is None:
            y = in_one(x, self.channel_axis, self.per_position, self.twin, self.twin_at_any_size)
            if y is not None:
                return y
        return flex_norm(
            x,
            self.rule,
            channel_axis=self.channel_axis,
            per_position=self.per_position and segments is None,
            mask=mask,
            segments=segments,
            process_group=self.group(),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FlexNorm:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._keep_precision()
        return self

    def _keep_precision(self) -> None:
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype in (torch.float16, torch.bfloat16):
                # fn has already rounded; statistics restart from the rounded value but accumulate in float32.
                self._buffers[name] = buffer.float()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        key = f"{prefix}num_batches_tracked"
        if self.num_batches_tracked is not None and key not in state_dict and f"{prefix}running_mean" in state_dict:
            # Written by a torch before 0.4.1, or by a layer without the counter.
            state_dict[key] = torch.zeros((), dtype=torch.long)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._keep_precision()

    def extra_repr(self) -> str:
        """Show the constructor arguments, the norm's own options among them, and ``frozen`` when it is set."""
        arguments = constructor_arguments(type(self))
        common = [name for name in ("eps", "momentum", "affine", "track_running_stats") if name in arguments]
        own = [name for name in self.options if name not in common]
        shown = [str(self.num_features), *(f"{name}={getattr(self, name)!r}" for name in (*common, *own))]
        return ", ".join([*shown, *self.shown_place(), *["frozen=True"] * self.frozen])

    def shown_place(self) -> list[str]:
        """Return the arguments that say where the channels are, as text, if they are not the usual ones."""
        if self.channel_axis == 1 and not self.per_position:
            return []
        return [f"channel_axis={self.channel_axis}", f"per_position={self.per_position}"]
