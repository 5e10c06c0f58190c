"""GPT-2 around the kernels: configuration, network, tokens, data, training state, text generation."""

import os

# PyTorch's CPU wheels spin in OpenMP barriers; on a busy machine a step then takes three to five times as
# long. GNU OpenMP reads this once, so it must be set before torch is imported: the commands import this package first.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
