"""Wrong solutions of notebook 4's exercises: (code, a part of the message that it gets), by exercise."""

WRONG: dict[str, list[tuple[str, str]]] = {}


WRONG["4.1"] = [
    (
        """
def top_k_probs(logits, temperature, k):
    values, ids = torch.topk(logits * temperature, k)
    return torch.zeros_like(logits).scatter(0, ids, torch.softmax(values, dim=0))
""",
        "distribution of 2.0: divide the logits",
    ),
    (
        """
def top_k_probs(logits, temperature, k):
    values, ids = torch.topk(logits, k)
    probs = torch.softmax(values, dim=0) / temperature
    return torch.zeros_like(logits).scatter(0, ids, probs / probs.sum())
""",
        "distribution of 1.0: it divides the logits, before",
    ),
    (
        """
def top_k_probs(logits, temperature, k):
    probs = torch.softmax(logits / temperature, dim=0)
    return probs.where(probs >= probs.topk(k).values[-1], 0.0)
""",
        "not to 1: drop ids before the softmax",
    ),
    (
        """
def top_k_probs(logits, temperature, k):
    scaled = logits / temperature
    return torch.softmax(scaled.where(scaled >= scaled.topk(k).values[-1], 0.0), dim=0)
""",
        "50 ids can be drawn, not 5: softmax gives 0 for a logit of -inf",
    ),
    (
        """
def top_k_probs(logits, temperature, k):
    return torch.softmax(torch.topk(logits / temperature, k).values, dim=0)
""",
        "5 probabilities for 50 ids",
    ),
    (
        """
def top_k_probs(logits, temperature, k):
    logits[logits < logits.topk(k).values[-1]] = float("-inf")
    return torch.softmax(logits / temperature, dim=0)
""",
        "writes into the logits",
    ),
    (
        """
def top_k_probs(logits, temperature, k):
    probs = torch.zeros_like(logits)
    probs[:k] = torch.softmax(torch.topk(logits / temperature, k).values, dim=0)
    return probs
""",
        "each keeps its own place",
    ),
]
WRONG["4.2"] = [
    ("def lora_weight(W, A, B, alpha):\n    return W + alpha * B @ A\n", "alpha is not divided by r"),
    ("def lora_weight(W, A, B, alpha):\n    return alpha / len(A) * B @ A\n", "the update alone"),
    ("def lora_weight(W, A, B, alpha):\n    return W + alpha / A.shape[1] * B @ A\n", "the number of its rows"),
    ("def lora_weight(W, A, B, alpha):\n    W += alpha / len(A) * B @ A\n    return W\n", "writes into W"),
    ("def lora_weight(W, A, B, alpha):\n    return W + alpha / len(A) * A @ B\n", "cannot be multiplied"),
    ("def lora_weight(W, A, B, alpha):\n    return W + B @ A / len(A)\n", "alpha is missing"),
]
WRONG["4.3"] = [
    (
        "def lora_parameters(config, rank):\n    return 16 * rank * config.n_embd\n",
        "that is one block, and the model has 5",
    ),
    (
        """
def lora_parameters(config, rank):
    C = config.n_embd
    return config.n_layer * rank * ((3 * C + C) + (C + C) + (4 * C + C))
""",
        "c_proj is there twice",
    ),
    (
        """
def lora_parameters(config, rank):
    C = config.n_embd
    return config.n_layer * rank * (C + C + C + 4 * C)
""",
        "that is A alone",
    ),
    (
        """
def lora_parameters(config, rank):
    C = config.n_embd
    return config.n_layer * (3 * C * C + C * C + 4 * C * C + 4 * C * C)
""",
        "those are the frozen matrices",
    ),
    (
        """
def lora_parameters(config, rank):
    return config.n_layer * 4 * rank * (config.n_embd + config.n_embd)
""",
        "each matrix is counted as C to C",
    ),
]
