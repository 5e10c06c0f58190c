"""GPT-2 around the kernels: configuration, network, tokens, data, training state, text generation."""
