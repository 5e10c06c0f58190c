"""Measurements: what the kernels compile to, how fast they run, how fast the model trains."""
