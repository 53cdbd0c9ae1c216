"""From a configuration to runs to results."""
