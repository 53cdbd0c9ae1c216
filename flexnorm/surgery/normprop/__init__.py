"""Conversion of trained networks to Normalization Propagation."""
