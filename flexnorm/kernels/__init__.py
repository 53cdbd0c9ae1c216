"""Everything compiled: C files and Triton's kernels, memory layouts, and functions that choose among them inside.

The modules: :mod:`~flexnorm.kernels.build`, :mod:`~flexnorm.kernels.layout`, :mod:`~flexnorm.kernels.passes` over
activations (and gradients where no kernel can run), :mod:`~flexnorm.kernels.tokens` over each position by itself,
:mod:`~flexnorm.kernels.rowwise` and :mod:`~flexnorm.kernels.unitize` of some norms of tokens in one pass,
:mod:`~flexnorm.kernels.ragged` over samples of unlike sizes, :mod:`~flexnorm.kernels.tables` between passes,
:mod:`~flexnorm.kernels.gpu` for the Triton kernels and when they run,
:mod:`~flexnorm.kernels.shift_clamp` of Normalization Propagation, :mod:`~flexnorm.kernels.sphere` of the optimizers.
"""

from flexnorm.kernels.normalization import status

__all__ = ["status"]
