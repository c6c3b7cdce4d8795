"""Machines, and what fits on them. Knows trials; knows nothing of sweeps."""
