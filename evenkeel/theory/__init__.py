"""What BatchNorm does: population normalization plus gamma decay, learning dynamics, generalization."""
