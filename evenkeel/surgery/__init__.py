"""On any model: convert normalizations, fold for inference, freeze, re-estimate population statistics."""
