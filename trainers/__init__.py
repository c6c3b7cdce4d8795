"""One trial in, measurements out. Knows nothing of Ray, MLflow or sweeps."""
