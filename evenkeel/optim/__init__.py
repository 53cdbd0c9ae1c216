"""Riemannian optimizers for the scale-invariant weights that normalization creates."""
