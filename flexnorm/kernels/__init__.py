"""Everything compiled: building the C files, memory layouts, and functions that choose between C and torch inside."""

from flexnorm.kernels.normalization import status

__all__ = ["status"]
