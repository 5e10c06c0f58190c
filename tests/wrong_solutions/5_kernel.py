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
        (
            """
def moved_bytes(rows, width, itemsize):
    return 4 * rows * width, 2 * rows * width
""",
            "you count elements",
        ),
        (
            """
def moved_bytes(rows, width, itemsize):
    return 4 * rows * width * itemsize + width * itemsize
""",
            "return two numbers",
        ),
        (
            """
def moved_bytes(rows, width, itemsize):
    x = rows * width * itemsize
    return 5 * x, 3 * x
""",
            "not again for every row",
        ),
    ],
    "5.2": [
        (
            """
@triton.jit
def scale_shift_kernel(x_ptr, y_ptr, a, b, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    x = tl.load(x_ptr + offs, mask=mask)
    tl.store(y_ptr + offs, a * x + b)
""",
            "elements behind the N-th were overwritten",
        ),
        (
            """
@triton.jit
def scale_shift_kernel(x_ptr, y_ptr, a, b, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) + tl.arange(0, BLOCK)
    mask = offs < N
    x = tl.load(x_ptr + offs, mask=mask)
    tl.store(y_ptr + offs, a * x + b, mask=mask)
""",
            "begin at pid * BLOCK",
        ),
        (
            """
@triton.jit
def scale_shift_kernel(x_ptr, y_ptr, a, b, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    x = tl.load(x_ptr + offs, mask=mask)
    tl.store(y_ptr + offs, a * (x + b), mask=mask)
""",
            "multiply first, then add b",
        ),
        (
            """
@triton.jit
def scale_shift_kernel(x_ptr, y_ptr, a, b, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, a * x + b, mask=mask)
""",
            "tl.load needs the mask too",
        ),
    ],
    "5.3": [
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
        (
            """
def tile_offsets(pid_m, pid_n, BLOCK_M, BLOCK_N, M, N, stride_m, stride_n):
    offs_m, offs_n = pid_m + torch.arange(BLOCK_M), pid_n + torch.arange(BLOCK_N)
    offsets = offs_m[:, None] * stride_m + offs_n[None, :] * stride_n
    return offsets, (offs_m < M)[:, None] & (offs_n < N)[None, :]
""",
            "multiply pid by BLOCK",
        ),
    ],
    "5.4": [
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
        (
            """
def layer_norm_dx(g, xhat, rstd):
    sum_g, sum_g_xhat = g.sum(-1, keepdim=True), (g * xhat).sum(-1, keepdim=True)
    return rstd[:, None] * (g - sum_g - xhat * sum_g_xhat)
""",
            "means over the row, not sums",
        ),
        (
            """
def layer_norm_dx(g, xhat, rstd):
    return rstd * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
""",
            "rstd belongs to the rows",
        ),
    ],
    "5.5": [
        (
            """
def merge_partial(m1, total1, acc1, m2, total2, acc2):
    return torch.maximum(m1, m2), total1 + total2, acc1 + acc2
""",
            "the two totals are relative to different maxima",
        ),
        (
            """
def merge_partial(m1, total1, acc1, m2, total2, acc2):
    m = torch.maximum(m1, m2)
    return m, total1 * torch.exp(m1 - m) + total2 * torch.exp(m2 - m), acc1 + acc2
""",
            "acc is relative to m too",
        ),
        (
            """
def merge_partial(m1, total1, acc1, m2, total2, acc2):
    m = torch.maximum(m1, m2)
    e1, e2 = torch.exp(m1), torch.exp(m2)
    e = torch.exp(m)
    return m, (total1 * e1 + total2 * e2) / e, (acc1 * e1[:, None] + acc2 * e2[:, None]) / e[:, None]
""",
            "exp(m) overflows",
        ),
        (
            """
def merge_partial(m1, total1, acc1, m2, total2, acc2):
    m = torch.maximum(m1, m2)
    a, b = torch.exp(m1 - m), torch.exp(m2 - m)
    total = total1 * a + total2 * b
    return m, total, (acc1 * a[:, None] + acc2 * b[:, None]) / total[:, None]
""",
            "acc is the sum itself, not divided by total",
        ),
        (
            """
def merge_partial(m1, total1, acc1, m2, total2, acc2):
    m = torch.maximum(m1, m2)
    return m, total1 * torch.exp(m1 - m) + total2, acc1 * torch.exp(m1 - m)[:, None] + acc2
""",
            "each total is rescaled by exp(its own m - the new m)",
        ),
        (
            """
def merge_partial(m1, total1, acc1, m2, total2, acc2):
    alpha = torch.exp(m1 - m2).clamp(max=1)
    return m2, total1 * alpha + total2, acc1 * alpha[:, None] + acc2
""",
            "m is the larger of the two maxima",
        ),
    ],
    "5.6": [
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
        (
            """
def visited_tiles(start_m, BLOCK_M, BLOCK_N, T):
    end = min(start_m + BLOCK_M, T)
    tiles = range((end + BLOCK_N - 1) // BLOCK_N)
    full = [i for i in tiles if (i + 1) * BLOCK_N - 1 <= start_m]
    return full, [i for i in tiles if i not in full]
""",
            "hold the first keys of tiles",
        ),
    ],
    "5.7": [
        (
            """
@triton.jit
def bias_relu2_backward_kernel(
    dy_ptr, x_ptr, b_ptr, dx_ptr, stride_dy, stride_x, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    dy = tl.load(tile_of_pointers(dy_ptr, stride_dy, offs_m, offs_n), mask=mask, other=0.0).to(tl.float32)
    x = tl.load(tile_of_pointers(x_ptr, stride_x, offs_m, offs_n), mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    dx = 2.0 * tl.maximum(x + b[None, :], 0.0) * dy
    tl.store(tile_of_pointers(dx_ptr, (N, 1), offs_m, offs_n), dx.to(dx_ptr.dtype.element_ty))
""",
            "numbers behind dx were overwritten",
        ),
        (
            """
@triton.jit
def bias_relu2_backward_kernel(
    dy_ptr, x_ptr, b_ptr, dx_ptr, stride_dy, stride_x, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    dy = tl.load(tile_of_pointers(dy_ptr, stride_dy, offs_m, offs_n), mask=mask, other=0.0).to(tl.float32)
    x = tl.load(tile_of_pointers(x_ptr, stride_x, offs_m, offs_n)).to(tl.float32)
    b = tl.load(b_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    dx = 2.0 * tl.maximum(x + b[None, :], 0.0) * dy
    tl.store(tile_of_pointers(dx_ptr, (N, 1), offs_m, offs_n), dx.to(dx_ptr.dtype.element_ty), mask=mask)
""",
            "a tl.load lacks its mask",
        ),
        (
            """
@triton.jit
def bias_relu2_backward_kernel(
    dy_ptr, x_ptr, b_ptr, dx_ptr, stride_dy, stride_x, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    dy = tl.load(tile_of_pointers(dy_ptr, stride_dy, offs_m, offs_n), mask=mask, other=0.0).to(tl.float32)
    x = tl.load(tile_of_pointers(x_ptr, stride_x, offs_m, offs_n), mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    dx = tl.maximum(x + b[None, :], 0.0) * dy
    tl.store(tile_of_pointers(dx_ptr, (N, 1), offs_m, offs_n), dx.to(dx_ptr.dtype.element_ty), mask=mask)
""",
            "the factor 2 is missing",
        ),
        (
            """
@triton.jit
def bias_relu2_backward_kernel(
    dy_ptr, x_ptr, b_ptr, dx_ptr, stride_dy, stride_x, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    dy = tl.load(tile_of_pointers(dy_ptr, stride_dy, offs_m, offs_n), mask=mask, other=0.0).to(tl.float32)
    x = tl.load(tile_of_pointers(x_ptr, stride_x, offs_m, offs_n), mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    dx = 2.0 * (x + b[None, :]) * dy
    tl.store(tile_of_pointers(dx_ptr, (N, 1), offs_m, offs_n), dx.to(dx_ptr.dtype.element_ty), mask=mask)
""",
            "the relu is missing",
        ),
        (
            """
@triton.jit
def bias_relu2_backward_kernel(
    dy_ptr, x_ptr, b_ptr, dx_ptr, stride_dy, stride_x, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    dy = tl.load(tile_of_pointers(dy_ptr, stride_x, offs_m, offs_n), mask=mask, other=0.0).to(tl.float32)
    x = tl.load(tile_of_pointers(x_ptr, stride_x, offs_m, offs_n), mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    dx = 2.0 * tl.maximum(x + b[None, :], 0.0) * dy
    tl.store(tile_of_pointers(dx_ptr, (N, 1), offs_m, offs_n), dx.to(dx_ptr.dtype.element_ty), mask=mask)
""",
            "dy has stride_dy",
        ),
        (
            """
@triton.jit
def bias_relu2_backward_kernel(
    dy_ptr, x_ptr, b_ptr, dx_ptr, stride_dy, stride_x, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = 0 + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    dy = tl.load(tile_of_pointers(dy_ptr, stride_dy, offs_m, offs_n), mask=mask, other=0.0).to(tl.float32)
    x = tl.load(tile_of_pointers(x_ptr, stride_x, offs_m, offs_n), mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    dx = 2.0 * tl.maximum(x + b[None, :], 0.0) * dy
    tl.store(tile_of_pointers(dx_ptr, (N, 1), offs_m, offs_n), dx.to(dx_ptr.dtype.element_ty), mask=mask)
""",
            "one tile is right, but the check fails in",
        ),
    ],
}
