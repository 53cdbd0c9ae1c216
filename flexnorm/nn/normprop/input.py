"""The data layer of NormProp (section 3.2 of arXiv 1603.01431): the only place of the network that uses statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexnorm.engine import Pool
from flexnorm.nn.normprop.checks import one_of, sizes


class NormPropInput(nn.Module):
    """Standardize the input of the network, element by element, ``(N, *shape) -> (N, *shape)``.

    Args:
        shape: Shape of one sample, such as ``(3, 32, 32)`` or ``(784,)``.
        mode: ``"global"``: mean and variance of the whole training set, set by :meth:`fit`; works for batches of one
            sample. ``"batch"``: those of the mini-batch while training, and running estimates in evaluation; the
            paper finds that its noise regularizes a little.
        per: ``"element"`` (the paper: every pixel of every channel has its own mean and variance) or ``"channel"``.
        momentum: Weight of the newest batch in the running estimates: ``running = (1 - momentum) * running + momentum
            * batch``.
        eps: Added to the variance.
        device: Of the buffers.
        dtype: Of the buffers; at least float32 is wise.

    Attributes:
        mean: Buffer, shape ``shape`` (``(C,)`` per channel): mean that is subtracted in evaluation (and always in
            global mode).
        var: Buffer: the (biased) variance likewise.
        samples: Buffer, int64: how many values per entry :meth:`fit` has seen; batches, in batch mode.
        fitted: Whether statistics have been set (or, in batch mode, any batch been seen or loaded).

    Raises:
        ValueError: For unknown modes, a bad shape or momentum; while training in batch mode with fewer than two
            values per entry.
        RuntimeError: In global mode before :meth:`fit`.

    Examples:
        >>> layer = NormPropInput((3, 8, 8)).fit(torch.rand(100, 3, 8, 8))
        >>> abs(float(layer(torch.rand(50, 3, 8, 8)).mean())) < 0.1
        True
    """

    mean: Tensor
    var: Tensor
    samples: Tensor

    def __init__(
        self,
        shape: int | Sequence[int],
        mode: str = "global",
        *,
        per: str = "element",
        momentum: float = 0.1,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mode = one_of("mode", mode, ("global", "batch"))
        self.per = one_of("per", per, ("element", "channel"))
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must lie in (0, 1], got {momentum!r}")
        dims = 1 if isinstance(shape, int) else len(shape)
        self.shape = sizes("shape", shape, max(dims, 1), 1)
        self.momentum = float(momentum)
        self.eps = float(eps)
        entries = self.shape if per == "element" else self.shape[:1]
        self.register_buffer("mean", torch.zeros(entries, device=device, dtype=dtype))
        self.register_buffer("var", torch.ones(entries, device=device, dtype=dtype))
        self.register_buffer("samples", torch.zeros((), dtype=torch.int64, device=device))
        # A Python flag, so that the forward pass never waits for a device to read the counter.
        self.fitted = False

    def _flat(self, x: Tensor) -> Tensor:
        """(values, entries): one column per mean and variance."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"NormPropInput expects (N, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        return x.flatten(1) if self.per == "element" else x.movedim(1, -1).flatten(0, -2)

    @torch.no_grad()
    def fit(self, data: Tensor | Iterable[Any]) -> NormPropInput:
        """Set mean and variance to those of ``data``, and return the layer.

        Args:
            data: ``(N, *shape)``, or an iterable of such batches (the first element is taken of a batch that is a
                tuple or list). Batches are merged exactly, in float64, whatever their sizes.

        Raises:
            ValueError: If there is no sample at all, or a batch has the wrong shape.
        """
        pool = Pool(self.mean.numel(), self.mean.device)
        for item in [data] if isinstance(data, Tensor) else data:
            flat = self._flat(item[0] if isinstance(item, tuple | list) else item)
            if len(flat):
                pool.add_values(flat.to(pool.mean))
        if not pool.batches:
            raise ValueError("fit() got no sample; pass a tensor (N, *shape) or an iterable of such batches")
        self.mean.copy_(pool.mean.view_as(self.mean))
        self.var.copy_(pool.var.view_as(self.var))
        self.samples.copy_(pool.count)
        self.fitted = True
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return the standardized ``x``, in its dtype."""
        flat = self._flat(x)
        if self.mode == "batch" and self.training:
            if len(flat) < 2:
                raise ValueError(
                    f"NormPropInput(mode='batch') needs at least 2 values per entry to train, got a batch of "
                    f"{len(flat)}; use mode='global', which works for single samples"
                )
            self.fitted = True
            self.samples.add_(1)
            values, running = flat if self.per == "element" else x, (self.mean.view(-1), self.var.view(-1))
            return F.batch_norm(values, *running, None, None, True, self.momentum, self.eps).view_as(x)
        if self.mode == "global" and not self.fitted:
            raise RuntimeError(
                "NormPropInput(mode='global') has no statistics yet; call fit(training_data) first, or use mode='batch'"
            )
        tail = (1,) * (x.dim() - 1 - self.mean.dim())
        scale = torch.rsqrt(self.var + self.eps)
        return ((x - self.mean.view(*self.mean.shape, *tail)) * scale.view(*scale.shape, *tail)).to(x.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        samples = state_dict.get(prefix + "samples")
        if isinstance(samples, Tensor) and samples.device.type != "meta":
            self.fitted = bool(samples > 0)

    def extra_repr(self) -> str:
        """Arguments and whether statistics are known."""
        return f"{self.shape}, mode={self.mode!r}, per={self.per!r}, fitted={self.fitted}"
