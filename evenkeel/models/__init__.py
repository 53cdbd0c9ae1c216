"""The reference networks of the papers, each built around any normalization."""
