"""From trained networks with statistics to networks of Normalization Propagation that compute the same."""

from flexnorm.surgery.propagation.network import normprop_plan, to_normprop

__all__ = ["normprop_plan", "to_normprop"]
