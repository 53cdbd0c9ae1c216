"""Normalization in deep networks: measure its shift, explain BatchNorm, replace it by something better."""

from evenkeel._version import __version__

__all__ = ["__version__"]
