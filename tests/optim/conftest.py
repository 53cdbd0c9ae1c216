"""Fixtures for the ways to take a step on the sphere."""

from sphere_fixtures import foreach, torch_only, untraced

__all__ = ["foreach", "torch_only", "untraced"]
