"""The engine: moments of an activation, a rule on two small tables, one affine pass."""
