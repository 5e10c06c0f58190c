"""Wrong solutions of notebook 2's exercises: (code, a part of the message that it gets), by exercise."""

WRONG: dict[str, list[tuple[str, str]]] = {}

WRONG["2.1"] = [
    (
        "def safe_softmax(scores):\n"
        "    powers = torch.exp(scores)\n"
        "    return powers / powers.sum(dim=-1, keepdim=True)",
        "Subtract the maximum before torch.exp",
    ),
    (
        "def safe_softmax(scores):\n"
        "    powers = torch.exp(scores - scores.max())\n"
        "    return powers / powers.sum(dim=-1, keepdim=True)",
        "Subtract the maximum of each row",
    ),
    (
        "def safe_softmax(scores):\n"
        "    powers = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)\n"
        "    return powers / powers.sum()",
        "divide each row by its own sum",
    ),
    (
        "def safe_softmax(scores):\n"
        "    powers = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)\n"
        "    return powers / powers.sum(dim=-1)",
        "divide each row by its own sum",
    ),
    (
        "def safe_softmax(scores):\n"
        "    scores -= scores.max(dim=-1, keepdim=True).values\n"
        "    return torch.exp(scores) / torch.exp(scores).sum(dim=-1, keepdim=True)",
        "changes its input",
    ),
    (
        "def safe_softmax(scores):\n"
        "    powers = torch.exp(scores - scores.amax(dim=-1))\n"
        "    return powers / powers.sum(dim=-1, keepdim=True)",
        "the maximum needs keepdim=True, too",
    ),
    (
        "def safe_softmax(scores):\n"
        "    rows = [torch.exp(row - row.max()) for row in scores]\n"
        "    return torch.stack([row / row.sum() for row in rows])",
        "(5, 5) was right: does a loop",
    ),
    ("def safe_softmax(scores):\n    torch.softmax(scores, dim=-1)", "your function returns nothing"),
]
WRONG["2.2"] = [
    (
        "def causal_weights(scores):\n"
        "    visible = torch.ones(scores.shape[-1], scores.shape[-1]).tril()\n"
        "    return torch.softmax(scores * visible, dim=-1)",
        "exp(0) = 1",
    ),
    (
        "def causal_weights(scores):\n"
        "    future = torch.ones(scores.shape[-1], scores.shape[-1], dtype=torch.bool).triu()\n"
        "    return torch.softmax(scores.masked_fill(future, float('-inf')), dim=-1)",
        "you mask the diagonal too",
    ),
    (
        "def causal_weights(scores):\n"
        "    hidden = torch.ones(scores.shape[-1], scores.shape[-1], dtype=torch.bool).tril(diagonal=-1)\n"
        "    return torch.softmax(scores.masked_fill(hidden, float('-inf')), dim=-1)",
        "you keep the future and mask the past",
    ),
    (
        "def causal_weights(scores):\n    return torch.softmax(scores, dim=-1).tril()",
        "not to 1: mask before the softmax",
    ),
    (
        "def causal_weights(scores):\n"
        "    weights = torch.softmax(scores, dim=-1).tril()\n"
        "    return weights / weights.sum(dim=-1, keepdim=True)",
        "all visible weights are 0 when you divide",
    ),
    (
        "def causal_weights(scores):\n"
        "    future = torch.ones(scores.shape[-1], scores.shape[-1], dtype=torch.bool).triu(diagonal=1)\n"
        "    return torch.softmax(scores.masked_fill(future, float('-inf')), dim=-2)",
        "run along the rows, dim=-1",
    ),
    (
        "def causal_weights(scores):\n"
        "    visible = torch.ones(scores.shape[-1], scores.shape[-1]).tril()\n"
        "    return torch.softmax(scores.masked_fill(visible == 0, float('-inf')), dim=1)",
        "row 0 is nan except on the diagonal",
    ),
    (
        "def causal_weights(scores):\n"
        "    future = torch.ones(scores.shape[-1], scores.shape[-1]).triu(diagonal=1)\n"
        "    return torch.softmax(scores + future * float('-inf'), dim=-1)",
        "0 times -inf is nan",
    ),
    (
        "def causal_weights(scores):\n"
        "    past = torch.ones(scores.shape[-1], scores.shape[-1]).tril()\n"
        "    return torch.softmax(scores.masked_fill(past == 1, float('-inf')), dim=-1)",
        "the last row is nan",
    ),
    (
        "def causal_weights(scores):\n"
        "    visible = torch.tril(torch.ones(8, 8))\n"
        "    return torch.softmax(scores.masked_fill(visible == 0, float('-inf')), dim=-1)",
        "Make the triangle as large as scores",
    ),
]
_JOIN = "def join_heads(x):\n    B, H, T, D = x.shape\n    return x.transpose(1, 2).reshape(B, T, H * D)"
_SPLIT = (
    "def split_heads(x, n_head):\n    B, T, C = x.shape\n    return x.view(B, T, n_head, C // n_head).transpose(1, 2)\n"
)
WRONG["2.3"] = [
    (
        f"def split_heads(x, n_head):\n    B, T, C = x.shape\n    return x.view(B, n_head, T, C // n_head)\n{_JOIN}",
        "split_heads mixes tokens",
    ),
    (
        "def split_heads(x, n_head):\n"
        "    B, T, C = x.shape\n"
        f"    return x.view(B, T, C // n_head, n_head).permute(0, 3, 1, 2)\n{_JOIN}",
        "a head takes D neighbouring ones",
    ),
    (
        f"def split_heads(x, n_head):\n    B, T, C = x.shape\n    return x.view(B, T, n_head, C // n_head)\n{_JOIN}",
        "not (B, H, T, D) = (2, 3, 4, 2)",
    ),
    (
        f"{_SPLIT}def join_heads(x):\n    B, H, T, D = x.shape\n    return x.reshape(B, T, H * D)",
        "back to (B, T, H, D) before you join",
    ),
    (
        f"{_SPLIT}def join_heads(x):\n    B, H, T, D = x.shape\n    return x.transpose(1, 2).view(B, T, H * D)",
        "Your code raised RuntimeError: view size is not compatible",
    ),
    (
        "def split_heads(x, n_head):\n"
        "    B, T, C = x.shape\n"
        f"    return x.view(B, T, n_head, C / n_head).transpose(1, 2)\n{_JOIN}",
        "C // n_head, not C / n_head",
    ),
    (f"{_SPLIT}def join_heads(x):\n    raise NotImplementedError", "Now write join_heads"),
]
_ATTEND = "def attend_new_token(q, k, v, k_cache, v_cache):\n"
_APPEND = "    k_cache, v_cache = torch.cat([k_cache, k], dim=2), torch.cat([v_cache, v], dim=2)\n"
_SCORES = "    scores = q @ k_cache.transpose(2, 3) / q.shape[-1] ** 0.5\n"
_RETURN = "    return torch.softmax(scores, dim=-1) @ v_cache, k_cache, v_cache"
WRONG["2.4"] = [
    (
        f"{_ATTEND}{_SCORES}    o = torch.softmax(scores, dim=-1) @ v_cache\n{_APPEND}    return o, k_cache, v_cache",
        "the new token does not read itself",
    ),
    (f"{_ATTEND}{_APPEND}    scores = q @ k_cache.transpose(2, 3)\n{_RETURN}", "not divided by the root of D"),
    (
        f"{_ATTEND}{_APPEND}{_SCORES}"
        "    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).tril() == 0, float('-inf'))\n"
        f"{_RETURN}",
        "The new token needs no mask",
    ),
    (
        f"{_ATTEND}"
        "    k_cache, v_cache = torch.cat([k, k_cache], dim=2), torch.cat([v, v_cache], dim=2)\n"
        f"{_SCORES}{_RETURN}",
        "the new one belongs at the end",
    ),
    (
        f"{_ATTEND}"
        "    keys, values = torch.cat([k_cache, k], dim=2), torch.cat([v_cache, v], dim=2)\n"
        "    scores = q @ keys.transpose(2, 3) / q.shape[-1] ** 0.5\n"
        "    return torch.softmax(scores, dim=-1) @ values, k_cache, v_cache",
        "one token more is",
    ),
    (
        f"{_ATTEND}{_APPEND}{_SCORES}    return torch.softmax(scores, dim=-1) @ v_cache",
        "return three tensors",
    ),
    (
        f"{_ATTEND}    k_cache, v_cache = torch.cat([k_cache, k]), torch.cat([v_cache, v])\n{_SCORES}{_RETURN}",
        "cat with dim=2",
    ),
    (
        f"{_ATTEND}{_APPEND}    scores = q @ k_cache.transpose(1, 2) / q.shape[-1] ** 0.5\n{_RETURN}",
        "Tokens are dimension 2: cat with dim=2, transpose(2, 3)",
    ),
    (
        f"{_ATTEND}{_APPEND}{_SCORES}    return torch.softmax(scores, dim=2) @ v_cache, k_cache, v_cache",
        "every weight is 1",
    ),
    (
        f"{_ATTEND}{_APPEND}    scores = q @ k_cache.transpose(2, 3) / k_cache.shape[2] ** 0.5\n{_RETURN}",
        "you divide by the root of the number of tokens",
    ),
]
