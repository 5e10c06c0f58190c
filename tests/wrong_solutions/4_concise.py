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
        "the result is (5,), not (50,)",
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
    (
        """
def top_k_probs(logits, temperature, k):
    values, ids = torch.topk(logits, k)
    return torch.zeros_like(logits).scatter(0, ids, torch.softmax(values, dim=0) / temperature)
""",
        "sum to 2.00, not to 1: divide the logits by the temperature, not the probabilities",
    ),
    (
        """
def top_k_probs(logits, temperature, k):
    scaled = logits / temperature
    return torch.softmax(scaled.where(scaled > scaled.topk(k).values[-1], float("-inf")), dim=0)
""",
        "4 ids can be drawn, not 5: keep the k-th most likely too",
    ),
    (
        """
def top_k_probs(logits, temperature, k):
    values, ids = torch.topk(torch.softmax(logits, dim=0), k)
    return torch.zeros_like(logits).scatter(0, ids, torch.softmax(values / temperature, dim=0))
""",
        "is there one softmax, of the logits?",
    ),
    (
        """
def top_k_probs(logits, temperature, k):
    values, ids = torch.topk(logits[None] / temperature, k)
    return torch.zeros_like(logits[None]).scatter(1, ids, torch.softmax(values, dim=1))
""",
        "the result is (1, 50), not (50,)",
    ),
    (
        """
def top_k_probs(logits, temperature, k):
    values, ids = torch.topk(logits / temperature, k)
    torch.zeros_like(logits).scatter(0, ids, torch.softmax(values, dim=0))
""",
        "returns nothing",
    ),
]
WRONG["4.2"] = [
    ("def lora_weight(W, A, B, alpha):\n    return W + alpha * B @ A\n", "alpha is not divided by r"),
    ("def lora_weight(W, A, B, alpha):\n    return alpha / len(A) * B @ A\n", "the update alone"),
    ("def lora_weight(W, A, B, alpha):\n    return W + alpha / A.shape[1] * B @ A\n", "the number of its rows"),
    ("def lora_weight(W, A, B, alpha):\n    W += alpha / len(A) * B @ A\n    return W\n", "writes into W"),
    ("def lora_weight(W, A, B, alpha):\n    return W + alpha / len(A) * A @ B\n", "cannot be multiplied"),
    ("def lora_weight(W, A, B, alpha):\n    return W + B @ A / len(A)\n", "alpha is missing"),
    ("def lora_weight(W, A, B, alpha):\n    return W + B @ A\n", "the factor alpha / r is missing"),
    ("def lora_weight(W, A, B, alpha):\n    return W + alpha / RANK * B @ A\n", "not RANK"),
    ("def lora_weight(W, A, B, alpha):\n    return W + ALPHA / len(A) * B @ A\n", "not ALPHA"),
    ("def lora_weight(W, A, B, alpha):\n    return W + alpha / len(B) * B @ A\n", "the number of its columns"),
    ("def lora_weight(W, A, B, alpha):\n    return W + len(A) / alpha * B @ A\n", "is the factor alpha / r?"),
    ("def lora_weight(W, A, B, alpha):\n    W + alpha / len(A) * B @ A\n", "returns nothing"),
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
    (
        """
def lora_parameters(config, rank):
    C = config.n_embd
    return config.n_layer * rank * ((3 * C + C) + (C + C) + (4 * C + C) + (C + C))
""",
        "mlp.c_proj goes from 4 C to C",
    ),
    (
        """
def lora_parameters(config, rank):
    C = config.n_embd
    return config.n_layer * rank * ((C + C) + (C + C) + (4 * C + C) + (C + 4 * C))
""",
        "c_attn is counted as C to C: it goes from C to 3 C",
    ),
    (
        "def lora_parameters(config, rank):\n    return 16 * RANK * config.n_embd * config.n_layer\n",
        "use the argument rank, not RANK",
    ),
    (
        "def lora_parameters(config, rank):\n    return 16 * 3 * config.n_embd * config.n_layer\n",
        "right for rank 3 only",
    ),
    (
        "def lora_parameters(config, rank):\n    return 16 * rank * config.n_embd * config.n_layer / 1\n",
        "no whole number",
    ),
    (
        "def lora_parameters(config, rank):\n    16 * rank * config.n_embd * config.n_layer\n",
        "returns nothing",
    ),
]
