"""The rules: every normalization as a few lines that turn moments into a scale and a shift.

Each function has the signature ``rule(moments, *params) -> (scale, shift)`` of :func:`flexnorm.flex_norm` and can be
used with it directly; the layers call the same functions, and each stands in the file of its layer. In all of them
``moments`` are those of the input, tables (N, C); ``weight`` and ``bias`` are (C,) or ``None``; ``eps`` is added to
variances and mean squares before the root.
"""

from flexnorm.nn._base import standardize
from flexnorm.nn.batch import batch
from flexnorm.nn.batch_instance import batch_instance
from flexnorm.nn.filter_response import filter_response
from flexnorm.nn.group import group
from flexnorm.nn.instance import instance
from flexnorm.nn.layer import layer
from flexnorm.nn.mean_only import mean_only
from flexnorm.nn.population import population
from flexnorm.nn.renorm import renorm, renormalize
from flexnorm.nn.rms import rms
from flexnorm.nn.switchable import switch
from flexnorm.nn.unitized import unitize, unitized
from flexnorm.nn.variance_only import variance_only

__all__ = ["batch", "batch_instance", "filter_response", "group", "instance", "layer", "mean_only", "population"]
__all__ += ["renorm", "renormalize", "rms", "standardize", "switch", "unitize", "unitized", "variance_only"]
