"""Measurements: what the kernels compile to, how fast they run, how fast the model trains."""

import model as _model  # noqa: F401  # first: it sets what torch reads from the environment when it is imported
