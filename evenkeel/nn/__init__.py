"""What a user puts into a model: normalization modules as rules of the engine, and Normalization Propagation layers."""
