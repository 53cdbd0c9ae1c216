"""Internal covariate shift: Wasserstein distances, certified bounds, and a monitor for any model."""
