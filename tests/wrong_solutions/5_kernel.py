"""Wrong solutions of notebook 5's exercises: (code, a part of the message that it gets), by exercise."""

WRONG: dict[str, list[tuple[str, str]]] = {
    "5.1": [
        (
            """
def moved_bytes(rows, width, itemsize):
    x, bias = rows * width * itemsize, width * itemsize
    return 2 * x + bias, 2 * x + bias
""",
            "x + bias goes through memory",
        ),
        (
            """
def moved_bytes(rows, width, itemsize):
    x = rows * width * itemsize
    return 4 * x, 2 * x
""",
            "the bias is read too, once",
        ),
        (
            """
def moved_bytes(rows, width, itemsize):
    x, bias = rows * width, width
    return 4 * x + bias, 2 * x + bias
""",
            "you count elements",
        ),
        (
            """
def moved_bytes(rows, width, itemsize):
    x, bias = rows * width * itemsize, width * itemsize
    return 4 * x + bias, 4 * x + bias
""",
            "keeps x + bias in registers",
        ),
    ],
    "5.2": [
        (
            """
def tile_offsets(pid_m, pid_n, BLOCK_M, BLOCK_N, M, N, stride_m, stride_n):
    offs_m = pid_m * BLOCK_M + torch.arange(BLOCK_M)
    offs_n = pid_n * BLOCK_N + torch.arange(BLOCK_N)
    offsets = offs_m[:, None] * stride_m + offs_n[None, :] * stride_n
    return offsets, offsets < M * N
""",
            "element (0, 7) of a (5, 7) matrix in tile (0, 1) with strides (7, 1) does not exist",
        ),
        (
            """
def tile_offsets(pid_m, pid_n, BLOCK_M, BLOCK_N, M, N, stride_m, stride_n):
    offs_m, offs_n = torch.arange(BLOCK_M), torch.arange(BLOCK_N)
    offsets = offs_m[:, None] * stride_m + offs_n[None, :] * stride_n
    return offsets, (offs_m < M)[:, None] & (offs_n < N)[None, :]
""",
            "is given the place of tile (0, 0): add pid * BLOCK",
        ),
        (
            """
def tile_offsets(pid_m, pid_n, BLOCK_M, BLOCK_N, M, N, stride_m, stride_n):
    offs_m = pid_m * BLOCK_M + torch.arange(BLOCK_M)
    offs_n = pid_n * BLOCK_N + torch.arange(BLOCK_N)
    offsets = offs_m[:, None] * stride_n + offs_n[None, :] * stride_m
    return offsets, (offs_m < M)[:, None] & (offs_n < N)[None, :]
""",
            "rows step by stride_m, columns by stride_n",
        ),
        (
            """
def tile_offsets(pid_m, pid_n, BLOCK_M, BLOCK_N, M, N, stride_m, stride_n):
    offs_m = pid_m * BLOCK_M + torch.arange(BLOCK_M)
    offs_n = pid_n * BLOCK_N + torch.arange(BLOCK_N)
    return offs_m * stride_m, offs_m < M
""",
            "offsets must be (BLOCK_M, BLOCK_N) = (2, 4), not (2,)",
        ),
    ],
    "5.3": [
        (
            """
def layer_norm_dx(g, xhat, rstd):
    return rstd[:, None] * (g - xhat * (g * xhat).mean(-1, keepdim=True))
""",
            "its dx must sum to 0",
        ),
        (
            """
def layer_norm_dx(g, xhat, rstd):
    return rstd[:, None] * (g - g.mean(-1, keepdim=True))
""",
            "the sum of dx * xhat must be 0",
        ),
        (
            """
def layer_norm_dx(g, xhat, rstd):
    return rstd[:, None] * (g - g.mean(0) - xhat * (g * xhat).mean(0))
""",
            "the means are over the row",
        ),
        (
            """
def layer_norm_dx(g, xhat, rstd):
    return g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)
""",
            "multiplied by rstd",
        ),
    ],
    "5.4": [
        (
            """
def merge_partial(m1, sum1, o1, m2, sum2, o2):
    return torch.maximum(m1, m2), sum1 + sum2, o1 + o2
""",
            "the two sums are relative to different maxima",
        ),
        (
            """
def merge_partial(m1, sum1, o1, m2, sum2, o2):
    m = torch.maximum(m1, m2)
    return m, sum1 * torch.exp(m1 - m) + sum2 * torch.exp(m2 - m), o1 + o2
""",
            "o is relative to m too",
        ),
        (
            """
def merge_partial(m1, sum1, o1, m2, sum2, o2):
    m = torch.maximum(m1, m2)
    e1, e2 = torch.exp(m1), torch.exp(m2)
    return m, (sum1 * e1 + sum2 * e2) / torch.exp(m), (o1 * e1[:, None] + o2 * e2[:, None]) / torch.exp(m)[:, None]
""",
            "exp(m) overflows",
        ),
        (
            """
def merge_partial(m1, sum1, o1, m2, sum2, o2):
    m = torch.maximum(m1, m2)
    a, b = torch.exp(m1 - m), torch.exp(m2 - m)
    total = sum1 * a + sum2 * b
    return m, total, (o1 * a[:, None] + o2 * b[:, None]) / total[:, None]
""",
            "must not be divided by the sum yet",
        ),
    ],
    "5.5": [
        (
            """
def visited_tiles(start_m, BLOCK_M, BLOCK_N, T):
    return list(range(0, start_m, BLOCK_N)), [start_m]
""",
            "BLOCK_M 32, BLOCK_N 16, T 100, queries from 0: the tile at key 16 is missing",
        ),
        (
            """
def visited_tiles(start_m, BLOCK_M, BLOCK_N, T):
    full = [n for n in range(0, T, BLOCK_N) if n + BLOCK_N - 1 <= start_m]
    return full, [n for n in range(0, T, BLOCK_N) if n not in full]
""",
            "holds no key that a query sees: skip it",
        ),
        (
            """
def visited_tiles(start_m, BLOCK_M, BLOCK_N, T):
    end = min(start_m + BLOCK_M, T)
    full = [n for n in range(0, end, BLOCK_N) if n < start_m]
    return full, [n for n in range(0, end, BLOCK_N) if n >= start_m]
""",
            "the tile at key 0 is not full",
        ),
        (
            """
def visited_tiles(start_m, BLOCK_M, BLOCK_N, T):
    return [], list(range(0, min(start_m + BLOCK_M, T), BLOCK_N))
""",
            "needs no mask: it is full",
        ),
    ],
}
