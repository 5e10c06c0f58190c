"""Wrong solutions of notebook 3's exercises: (code, a part of the message that it gets), by exercise."""

WRONG: dict[str, list[tuple[str, str]]] = {}

WRONG["3.1"] = [
    (
        """
def normalize_tokens(x, weight, bias, eps=1e-5):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True)  # of a sample: divided by C - 1
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias
""",
        "divide by C, not by C - 1",
    ),
    (
        """
def normalize_tokens(x, weight, bias, eps=1e-5):
    mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True, correction=0)
    return (x - mean) / (deviation + eps) * weight + bias
""",
        "eps is added inside the root",
    ),
    (
        """
def normalize_tokens(x, weight, bias, eps=1e-5):
    return (x - x.mean()) / torch.sqrt(x.var(correction=0) + eps) * weight + bias
""",
        "subtract the mean of each token",
    ),
    (
        """
def normalize_tokens(x, weight, bias, eps=1e-5):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    return (x - mean) / torch.sqrt(variance) * weight + bias
""",
        "add eps before you divide",
    ),
    (
        """
def normalize_tokens(x, weight, bias, eps=1e-5):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    return (x - mean) / torch.sqrt(variance + eps)
""",
        "weight and bias have no effect",
    ),
    (
        """
def normalize_tokens(x, weight, bias, eps=1e-5):
    return (x - x.mean(-1)) / torch.sqrt(x.var(-1, correction=0) + eps) * weight + bias
""",
        "keepdim=True",
    ),
    (
        """
def normalize_tokens(x, weight, bias, eps=1e-5):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    y = (x - mean) / torch.sqrt(variance + eps) * weight + bias
""",
        "is `return` missing?",
    ),
]
WRONG["3.2"] = [
    (
        """
def through_block(x, ln_1, attn, ln_2, mlp):
    x = ln_1(x + attn(x))
    return ln_2(x + mlp(x))
""",
        "LayerNorm lies across the stream",
    ),
    (
        """
def through_block(x, ln_1, attn, ln_2, mlp):
    x = x + attn(ln_1(x))
    return mlp(ln_2(x))
""",
        "the second shortcut is missing",
    ),
    (
        """
def through_block(x, ln_1, attn, ln_2, mlp):
    return x + attn(ln_1(x)) + mlp(ln_2(x))
""",
        "the mlp reads the old x",
    ),
    (
        """
def through_block(x, ln_1, attn, ln_2, mlp):
    x = x + attn(ln_1(x))
    return x + mlp(ln_1(x))
""",
        "each branch has a LayerNorm of its own",
    ),
]
WRONG["3.3"] = [
    ("def count_block(C):\n    return 12 * C * C", "biases and LayerNorms are missing"),
    ("def count_block(C):\n    return 12 * C * C + 4 * C", "the biases of the four linear layers"),
    ("def count_block(C):\n    return 12 * C * C + 9 * C", "two LayerNorms, with a weight and a bias each"),
    ("def count_block(C):\n    return 10 * C * C + 13 * C", "c_attn has 3 C²"),
    ("def count_block(C):\n    return 12 * C * C + 11 * C", "the bias of c_attn has 3 C numbers"),
    ("def count_block(C):\n    return 12 * C * C + 14 * C", "1 C too many"),
    ("def count_block(C):\n    return 198272", "the formula must follow C"),
]
WRONG["3.4"] = [
    (
        """
def loss_from_logits(logits, targets):
    probs = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return -probs[torch.arange(len(targets)), targets].log().mean()
""",
        "subtract the row's largest logit before exp",
    ),
    (
        """
def loss_from_logits(logits, targets):
    m = logits.max()
    log_sum_exp = m + (logits - m).exp().sum(-1).log()
    return (log_sum_exp - logits[torch.arange(len(targets)), targets]).mean()
""",
        "subtract each row's own largest logit",
    ),
    (
        """
def loss_from_logits(logits, targets):
    log_probs = logits - logits.logsumexp(-1, keepdim=True)
    return -log_probs[torch.arange(len(targets)), targets].sum()
""",
        "take the mean",
    ),
    (
        """
def loss_from_logits(logits, targets):
    log_probs = logits - logits.logsumexp(-1, keepdim=True)
    return log_probs[torch.arange(len(targets)), targets].mean()
""",
        "the sign is wrong",
    ),
    (
        """
def loss_from_logits(logits, targets):
    m = logits.amax(-1, keepdim=True)
    log_sum_exp = (logits - m).exp().sum(-1).log()
    return (log_sum_exp - logits[torch.arange(len(targets)), targets]).mean()
""",
        "m is not added back",
    ),
    (
        """
def loss_from_logits(logits, targets):
    return (logits.logsumexp(-1) - logits[:, targets]).mean()
""",
        "takes every target in every row",
    ),
]
WRONG["3.5"] = [
    (
        """
def rate_of_step(step, lr, min_lr, warmup, steps):
    if step < warmup:
        return lr * step / warmup
    u = (step - warmup) / (steps - warmup)
    return min_lr + 0.5 * (1 + math.cos(math.pi * u)) * (lr - min_lr)
""",
        "the first batch is wasted",
    ),
    (
        """
def rate_of_step(step, lr, min_lr, warmup, steps):
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    u = step / steps
    return min_lr + 0.5 * (1 + math.cos(math.pi * u)) * (lr - min_lr)
""",
        "u is (step - warmup) / (steps - warmup)",
    ),
    (
        """
def rate_of_step(step, lr, min_lr, warmup, steps):
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    u = (step - warmup) / (steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * u)) * lr
""",
        "the rate ends at 0, not at min_lr",
    ),
    (
        """
def rate_of_step(step, lr, min_lr, warmup, steps):
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    u = (step - warmup) / (steps - warmup)
    return min_lr + (1 + math.cos(math.pi * u)) * (lr - min_lr)
""",
        "half of (1 + cos) is at most 1",
    ),
    (
        """
def rate_of_step(step, lr, min_lr, warmup, steps):
    if step < warmup:
        return (step + 1) / (warmup + 1)
    u = (step - warmup) / (steps - warmup)
    return min_lr + 0.5 * (1 + math.cos(math.pi * u)) * (1 - min_lr)
""",
        "is lr in every line?",
    ),
    (
        """
def rate_of_step(step, lr, min_lr, warmup, steps):
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    u = (step - warmup) / (steps - warmup)
    return max(min_lr, 0.5 * (1 + math.cos(math.pi * u)) * lr)
""",
        "without max()",
    ),
    (
        """
def rate_of_step(step, lr, min_lr, warmup, steps):
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    u = (step - warmup) / (steps - warmup)
    rate = min_lr + 0.5 * (1 + math.cos(math.pi * u)) * (lr - min_lr)
""",
        "is a `return` missing?",
    ),
]
WRONG["3.6"] = [
    (
        """
def keep_top_p(probs, p):
    ordered, ids = probs.sort(descending=True)
    kept = torch.where(ordered.cumsum(-1) <= p, ordered, 0.0)
    return torch.zeros_like(probs).scatter(0, ids, kept / kept.sum())
""",
        "the token that crosses p stays in",
    ),
    (
        """
def keep_top_p(probs, p):
    ordered, ids = probs.sort(descending=True)
    kept = torch.where(ordered.cumsum(-1) - ordered < p, ordered, 0.0)
    return kept / kept.sum()
""",
        "undo the sorting",
    ),
    (
        """
def keep_top_p(probs, p):
    ordered, ids = probs.sort(descending=True)
    kept = torch.where(ordered.cumsum(-1) - ordered < p, ordered, 0.0)
    return torch.zeros_like(probs).scatter(0, ids, kept)
""",
        "divide by its sum",
    ),
    (
        """
def keep_top_p(probs, p):
    ordered, ids = probs.sort()
    kept = torch.where(ordered.cumsum(-1) - ordered < p, ordered, 0.0)
    return torch.zeros_like(probs).scatter(0, ids, kept / kept.sum())
""",
        "sort downwards",
    ),
]
