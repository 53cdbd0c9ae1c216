"""What counts and what belongs together: masks over the positions of an activation, and samples of various sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from flexnorm.kernels.layout import table_dtype
from flexnorm.kernels.ragged import Spans


def weights_of(mask: Tensor, x: Tensor, channel_axis: int) -> Tensor:
    """Return a mask as weights in the type of the tables of ``x``, of its shape without the channel axis.

    Raises:
        TypeError: If it is no tensor, or one of complex numbers.
        ValueError: If its shape is another one, or a weight is negative or not finite.
    """
    if not isinstance(mask, Tensor) or mask.is_complex():
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a tensor of booleans or weights, got {kind}")
    expected = list(x.shape)
    del expected[channel_axis]
    if mask.dim() == x.dim() and mask.shape[channel_axis] == 1:
        mask = mask.squeeze(channel_axis)
    if list(mask.shape) != expected:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not fit x of shape {tuple(x.shape)}: {tuple(expected)} does"
        )
    weights = mask.detach().to(device=x.device, dtype=table_dtype(x.dtype))
    if mask.dtype not in (torch.bool, torch.uint8) and not torch.compiler.is_compiling():
        wrong = weights[~(weights.isfinite() & (weights >= 0))]
        if wrong.numel():
            raise ValueError(
                f"mask has weights that are negative or not finite: {float(wrong[0])} and {wrong.numel() - 1} more; "
                "a weight says how much a value counts, 0 for not at all"
            )
    return weights


class Segments:
    """Which sample each row belongs to, in samples of various sizes: the nodes of the graphs of a batch.

    Make it once for a batch and hand it to all layers: then the number of samples is found once.

    Args:
        index: Number of the sample of each row, int64 (R,), from 0; in any order, sorted or not.
        count: Number of samples S; ``None`` takes the largest index plus one.

    Raises:
        TypeError: If ``index`` is no tensor of integers.
        ValueError: If it has another shape than (R,), or a number is negative or not below ``count``.

    Examples:
        >>> Segments(torch.tensor([0, 0, 0, 1, 1])).sizes()
        tensor([[3.],
                [2.]])
    """

    def __init__(self, index: Tensor, count: int | None = None) -> None:
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        if kind not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise TypeError(f"segments must be a tensor of integers, one for each row, got {kind}")
        if index.dim() != 1:
            raise ValueError(f"segments must have shape (R,), one number for each row, got {tuple(index.shape)}")
        if count is not None and count < 0:
            raise ValueError(f"count is the number of samples, 0 at least, got {count}")
        self.index = index.long()
        self._spans: Spans | None = None
        if torch.compiler.is_compiling() and count is not None:
            self.count = count
            return
        low, high = (int(index.min()), int(index.max())) if index.numel() else (0, -1)
        self.count = high + 1 if count is None else count
        if low < 0 or high >= self.count:
            raise ValueError(
                f"segments must number the samples from 0 to {self.count - 1}, got numbers from {low} to {high}"
            )

    @classmethod
    def of(cls, segments: Segments | Tensor, x: Tensor) -> Segments:
        """Return the segments of the rows of ``x`` (R, C).

        Raises:
            ValueError: If they are not as many as rows.
        """
        made = segments if isinstance(segments, Segments) else cls(segments)
        if made.index.shape[0] != x.shape[0]:
            raise ValueError(
                f"there are {made.index.shape[0]} segment numbers for {x.shape[0]} rows of x {tuple(x.shape)}"
            )
        return made

    def sizes(self, weights: Tensor | None = None, like: Tensor | None = None) -> Tensor:
        """Return how many rows each sample has, or the sum of their ``weights`` (R,): (S, 1)."""
        dtype = torch.float32 if like is None else like.dtype
        ones = torch.ones(self.index.shape[0], dtype=dtype, device=self.index.device) if weights is None else weights
        return ones.new_zeros(self.count).index_add(0, self.index, ones).unsqueeze(1)

    def spans(self, weights: Tensor | None) -> Spans:
        """Return what the kernels ask for: where the rows of each sample are."""
        if self._spans is None:
            self._spans = Spans.of(self.index, self.count)
        return self._spans._replace(weights=weights)

    def moments(self, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and biased variance (S, C) of rows ``x`` (R, C), and count (S, 1); zeros where nothing counts."""
        values = x.to(table_dtype(x.dtype))
        count = self.sizes(weights, values)
        share = None if weights is None else weights.unsqueeze(1)
        some = torch.where(count > 0, count, 1)
        if share is not None:
            values = torch.where(share > 0, values, 0)
        mean = self._total(values if share is None else share * values) / some
        square = (values - mean.index_select(0, self.index)).square()
        return mean, self._total(square if share is None else share * square) / some, count

    def _total(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.count, values.shape[1]).index_add(0, self.index, values)

    def affine(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Return ``scale * x + shift`` with tables that broadcast to (S, C)."""
        scale, shift = (
            t.index_select(0, self.index) if t.shape[0] == self.count and self.count > 1 else t for t in (scale, shift)
        )
        return torch.addcmul(shift, x.to(scale.dtype), scale).to(x.dtype)
