"""Kernels for GPUs in Triton's language. Imported only where they run (:mod:`flexnorm.kernels.gpu`).

One view serves images and tokens: N samples of C channels at P positions, (N, C, P) in ROWS or else (N, P, C). What is
contiguous is a multiple of ALIGN long, which the compiler must know to load several values at once. A program works on
tiles [BC, BP] of one sample. Tokens that lie one after the other, (R, C), are the R positions of one sample.

A *term* (row, grouped, column, stride_n, stride_c) is an outer product: row (R,) or grouped (R, G) per token and group
of ``width`` channels, column (N, C) with two strides (the first 0 if it is the same for all samples); ``None`` stands
for ones. Sums and tables are of type ACC. Offsets within a tile fit 32 bits; where it begins may need 64.
"""

import triton
import triton.language as tl


@triton.jit
def _product(term, n, r, c, ok_r, ok_c, G, width, ACC: tl.constexpr):
    """An outer product on the channels c and tokens r: a tile that broadcasts to [BC, BP]."""
    value = tl.full((1, 1), 1, ACC)
    if term[0] is not None:
        value = value * tl.load(term[0] + r, mask=ok_r, other=0)[None, :]
    if term[1] is not None:
        inside = ok_c[:, None] & ok_r[None, :]
        value = value * tl.load(term[1] + (r * G)[None, :] + (c // width)[:, None], mask=inside, other=0)
    if term[2] is not None:
        value = value * tl.load(term[2] + n * term[3] + c * term[4], mask=ok_c, other=0)[:, None]
    return value


@triton.jit
def _sum(terms, n, r, c, ok_r, ok_c, G, width, ACC: tl.constexpr):
    value = _product(terms[0], n, r, c, ok_r, ok_c, G, width, ACC)
    if len(terms) > 1:
        value = value + _product(terms[1], n, r, c, ok_r, ok_c, G, width, ACC)
    return value


@triton.jit
def _at(c, p, C, P, ROWS: tl.constexpr):
    """Where the value of a channel at a position lies in its sample."""
    if ROWS:
        return c * P + p
    else:  # noqa: RET505 - one of the two is compiled
        return p * C + c


@triton.jit
def _tile(C, P, ROWS: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    """Sample, channels and positions of a program of an elementwise pass, and the places of their values."""
    blocks_p = tl.cdiv(P, BP)
    blocks_c = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    n = (pid // blocks_p // blocks_c).to(tl.int64)
    first_c = pid // blocks_p % blocks_c * BC
    first_p = pid % blocks_p * BP
    i, j = tl.arange(0, BC), tl.arange(0, BP)
    begin = n * C * P + _at(first_c.to(tl.int64), first_p.to(tl.int64), C, P, ROWS)
    return n, first_c + i, first_p + j, begin, _at(i[:, None], j[None, :], C, P, ROWS)


@triton.jit
def affine(x, y, scale, shift, C, P, G, width, ROWS: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
           BC: tl.constexpr, BP: tl.constexpr):  # fmt: skip
    """``scale * x + shift``; tuples of terms, no shift stands for zero."""
    if ROWS:
        P = P // ALIGN * ALIGN
    else:
        C = C // ALIGN * ALIGN
    n, c, p, begin, offsets = _tile(C, P, ROWS, BC, BP)
    ok_c, ok_p, r = c < C, p < P, n * P + p
    inside = ok_c[:, None] & ok_p[None, :]
    value = tl.load(x + begin + offsets, mask=inside, other=0).to(ACC)
    value = value * _sum(scale, n, r, c, ok_p, ok_c, G, width, ACC)
    if shift is not None:
        value = value + _sum(shift, n, r, c, ok_p, ok_c, G, width, ACC)
    tl.store(y + begin + offsets, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _through(source, x, n, r, c, ok_r, ok_c, G, width, ACC: tl.constexpr):
    """What comes back through moments: (mean, dmean, dvar, count, weights), the tables as terms."""
    value = tl.zeros((1, 1), ACC)
    if source[2] is not None:
        slope = _product(source[2], n, r, c, ok_r, ok_c, G, width, ACC)
        value = 2 * slope * (x - _product(source[0], n, r, c, ok_r, ok_c, G, width, ACC))
    if source[1] is not None:
        value = value + _product(source[1], n, r, c, ok_r, ok_c, G, width, ACC)
    value = value / source[3]
    if source[4] is not None:
        share = tl.load(source[4] + r, mask=ok_r, other=0).to(ACC)[None, :]
        value = tl.where(share > 0, share * value, 0)
    return value


@triton.jit
def combine(g, x, dx, scale, rows, columns, C, P, G, width, ROWS: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
            BC: tl.constexpr, BP: tl.constexpr):  # fmt: skip
    """``scale * g`` (no scale stands for one) and what comes back through the moments of tokens and of channels."""
    if ROWS:
        P = P // ALIGN * ALIGN
    else:
        C = C // ALIGN * ALIGN
    n, c, p, begin, offsets = _tile(C, P, ROWS, BC, BP)
    ok_c, ok_p, r = c < C, p < P, n * P + p
    inside = ok_c[:, None] & ok_p[None, :]
    total = tl.load(g + begin + offsets, mask=inside, other=0).to(ACC)
    value = tl.load(x + begin + offsets, mask=inside, other=0).to(ACC)
    if scale is not None:
        total = total * _sum(scale, n, r, c, ok_p, ok_c, G, width, ACC)
    if rows is not None:
        total = total + _through(rows, value, n, r, c, ok_p, ok_c, G, width, ACC)
    if columns is not None:
        total = total + _through(columns, value, n, r, c, ok_p, ok_c, G, width, ACC)
    tl.store(dx + begin + offsets, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _part(N, C, P, steps, ROWS: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    """A program of a reduction: which partial result, sample, channels and positions; where the channels begin."""
    blocks_c = tl.cdiv(C, BC)
    part = tl.program_id(0) // blocks_c
    n = (part % N).to(tl.int64)
    first_c = tl.program_id(0) % blocks_c * BC
    begin = part // N * steps * BP
    end = tl.minimum(begin + steps * BP, P)
    i, j = tl.arange(0, BC), tl.arange(0, BP)
    base = n * C * P + _at(first_c.to(tl.int64), 0, C, P, ROWS)
    return part.to(tl.int64), n, first_c + i, j, begin, end, base, _at(i[:, None], j[None, :], C, P, ROWS)


@triton.jit
def _counting(x, weights, start, n, j, place, offsets, ok_c, P, ACC: tl.constexpr):
    """A tile of values, 0 where they do not count, and how much its positions count."""
    ok_p = start + j < P
    share = ok_p.to(ACC)
    if weights is not None:
        share = tl.load(weights + n * P + start + j, mask=ok_p, other=0).to(ACC)
        ok_p = share > 0
    value = tl.load(x + place + offsets, mask=ok_c[:, None] & ok_p[None, :], other=0).to(ACC)
    return value, share


@triton.jit(do_not_specialize=["N", "steps"])
def moments(x, weights, mean, rest, var, count, N, C, P, steps, ROWS: tl.constexpr, ALIGN: tl.constexpr,
            ACC: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):  # fmt: skip
    """Mean and biased variance (parts, N, C), and weight (parts, N), over ``steps`` tiles of positions; 0 for none.

    Each value of the tile follows moments of its own (Welford 1962), which are merged at the end (Chan et al. 1979),
    about the mean of the first tile: a large mean takes no digits from the variance. For that the mean of a part comes
    as the sum of two, mean and rest.
    """
    if ROWS:
        P = P // ALIGN * ALIGN
    else:
        C = C // ALIGN * ALIGN
    part, n, c, j, begin, end, base, offsets = _part(N, C, P, steps, ROWS, BC, BP)
    ok_c = c < C
    place = base + _at(0, tl.cast(begin, tl.int64), C, P, ROWS)
    value, share = _counting(x, weights, begin, n, j, place, offsets, ok_c, P, ACC)
    total = tl.sum(share, 0)
    pivot = tl.sum(value * share[None, :], 1) / tl.where(total > 0, total, 1)
    own, square, seen = tl.zeros((BC, BP), ACC), tl.zeros((BC, BP), ACC), tl.zeros((BP,), ACC)
    for start in range(begin, end, BP):
        place = base + _at(0, tl.cast(start, tl.int64), C, P, ROWS)
        value, share = _counting(x, weights, start, n, j, place, offsets, ok_c, P, ACC)
        seen += share
        before = value - pivot[:, None] - own
        own += before * (share / tl.where(seen > 0, seen, 1))[None, :]
        square += share[None, :] * before * (value - pivot[:, None] - own)
    total = tl.sum(seen, 0)
    divisor = tl.where(total > 0, total, 1)
    center = tl.sum(own * seen[None, :], 1) / divisor
    between = own - center[:, None]
    square = tl.sum(square + seen[None, :] * between * between, 1)
    if rest is not None:
        tl.store(rest + part * C + c, center, mask=ok_c)
    else:
        pivot += center
    tl.store(mean + part * C + c, pivot, mask=ok_c)
    tl.store(var + part * C + c, square / divisor, mask=ok_c)
    tl.store(count + part, total)


@triton.jit(do_not_specialize=["M", "K"])
def merge(means, rests, variances, counts, mean, var, M, K, C, ACC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Moments (M, K) of M disjoint parts of weights (M, K / C) become those of their union, (K,): Chan et al. 1979."""
    k = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)
    total, first, second = tl.zeros((BK,), ACC), tl.zeros((BK,), ACC), tl.zeros((BK,), ACC)
    pivot = tl.load(means + k, mask=k < K, other=0)  # a large mean takes no digits from what is summed
    for start in range(0, M, BM):
        i = (start + tl.arange(0, BM)).to(tl.int64)[:, None]
        inside = (i < M) & (k < K)[None, :]
        weight = tl.load(counts + i * (K // C) + (k // C)[None, :], mask=inside, other=0)
        total += tl.sum(weight, 0)
        middle = tl.load(means + i * K + k[None, :], mask=inside, other=0) - pivot[None, :]
        middle += tl.load(rests + i * K + k[None, :], mask=inside, other=0)
        first += tl.sum(weight * middle, 0)
    total = tl.where(total > 0, total, 1)
    center = first / total
    for start in range(0, M, BM):
        i = (start + tl.arange(0, BM)).to(tl.int64)[:, None]
        inside = (i < M) & (k < K)[None, :]
        weight = tl.load(counts + i * (K // C) + (k // C)[None, :], mask=inside, other=0)
        middle = tl.load(means + i * K + k[None, :], mask=inside, other=0) - pivot[None, :]
        between = middle + tl.load(rests + i * K + k[None, :], mask=inside, other=0) - center[None, :]
        within = tl.load(variances + i * K + k[None, :], mask=inside, other=0)
        second += tl.sum(weight * (within + between * between), 0)
    tl.store(mean + k, pivot + center, mask=k < K)
    tl.store(var + k, second / total, mask=k < K)


@triton.jit(do_not_specialize=["N", "steps"])
def sums(g, x, center, center_n, s1, s0, N, C, P, steps, WHOLE: tl.constexpr, ROWS: tl.constexpr,
         ALIGN: tl.constexpr, ACC: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):  # fmt: skip
    """``sum g * (x - center)`` and ``sum g`` over ``steps`` tiles: (parts, N, C). If WHOLE, ``sum g * x``."""
    if ROWS:
        P = P // ALIGN * ALIGN
    else:
        C = C // ALIGN * ALIGN
    part, n, c, j, begin, end, base, offsets = _part(N, C, P, steps, ROWS, BC, BP)
    ok_c = c < C
    middle = tl.zeros((BC,), ACC)
    if center is not None:
        middle = tl.load(center + n * center_n + c, mask=ok_c, other=0)
    first, zeroth = tl.zeros((BC, BP), ACC), tl.zeros((BC, BP), ACC)
    for start in range(begin, end, BP):
        inside = ok_c[:, None] & (start + j < P)[None, :]
        place = base + _at(0, tl.cast(start, tl.int64), C, P, ROWS)
        incoming = tl.load(g + place + offsets, mask=inside, other=0).to(ACC)
        first += incoming * (tl.load(x + place + offsets, mask=inside, other=0).to(ACC) - middle[:, None])
        zeroth += incoming
    total = tl.sum(zeroth, 1)
    product = tl.sum(first, 1)
    if WHOLE:
        product += middle * total
    tl.store(s1 + part * C + c, product, mask=ok_c)
    tl.store(s0 + part * C + c, total, mask=ok_c)


@triton.jit
def _contract(term, far, near, block, r, k, c, ok_r, ok_k, ok_c, C, G, ACC: tl.constexpr):
    """Sums of the tile far + near [BP, BG, BW] times one factor, for the gradient of the other.

    A term here goes on with where they belong: (..., of_row (R, G), of_column (blocks, C)). What belongs to the
    channels is written, what belongs to the tokens returned.
    """
    rows = tl.zeros((r.shape[0], k.shape[0]), ACC)
    if term[6] is not None:
        factor = tl.full((1, 1), 1, ACC)
        if term[0] is not None:
            factor = tl.load(term[0] + r, mask=ok_r, other=0)[:, None]
        if term[1] is not None:
            factor = tl.load(term[1] + (r * G)[:, None] + k[None, :], mask=ok_r[:, None] & ok_k[None, :], other=0)
        columns = tl.sum(far * factor[:, :, None], 0)
        if near is not None:
            columns += tl.sum(near * factor[:, :, None], 0)
        tl.store(term[6] + block * C + c, columns, mask=ok_c)
    if term[5] is not None:
        weight = tl.full((1, 1), 1, ACC)
        if term[2] is not None:
            weight = tl.load(term[2] + c * term[4], mask=ok_c, other=0)
        rows = tl.sum(far * weight[None, :, :], 2)
        if near is not None:
            rows += tl.sum(near * weight[None, :, :], 2)
    return rows


@triton.jit
def token_sums(g, x, center, scale0, scale1, shift0, shift1, C, P, G, width, ROWS: tl.constexpr,
               ALIGN: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BG: tl.constexpr,
               BW: tl.constexpr):  # fmt: skip
    """Gradients of the factors of scale (from g * x) and shift (from g), those of the channels in blocks of tokens."""
    if ROWS:
        P = P // ALIGN * ALIGN
    else:
        C = C // ALIGN * ALIGN
    blocks_g, blocks_p = tl.cdiv(G, BG), tl.cdiv(P, BP)
    block = (tl.program_id(0) // blocks_g).to(tl.int64)
    n, first_p = block // blocks_p, block % blocks_p * BP
    p, k, j = first_p + tl.arange(0, BP), tl.program_id(0) % blocks_g * BG + tl.arange(0, BG), tl.arange(0, BW)
    ok_r, ok_k, r = p < P, k < G, n * P + p
    a0, a1 = tl.zeros((BP, BG), ACC), tl.zeros((BP, BG), ACC)
    b0, b1 = tl.zeros((BP, BG), ACC), tl.zeros((BP, BG), ACC)
    for start in range(0, width, BW):
        c = k[:, None] * width + (start + j)[None, :]
        ok_c = ok_k[:, None] & (start + j < width)[None, :]
        inside = ok_r[:, None, None] & ok_c[None, :, :]
        offsets = n * C * P + _at(c.to(tl.int64)[None, :, :], p[:, None, None], C, P, ROWS)
        incoming = tl.load(g + offsets, mask=inside, other=0).to(ACC)
        far = tl.load(x + offsets, mask=inside, other=0).to(ACC)
        near = None
        if center is not None:
            if center[0] is not None:
                middle = tl.load(center[0] + r, mask=ok_r, other=0)[:, None, None]
            elif center[1] is not None:
                mask = ok_r[:, None] & ok_k[None, :]
                middle = tl.load(center[1] + (r * G)[:, None] + k[None, :], mask=mask, other=0)[:, :, None]
            else:
                middle = tl.load(center[2] + c * center[4], mask=ok_c, other=0)[None, :, :]
            far, near = far - middle, incoming * middle
        far = far * incoming
        if scale0 is not None:
            a0 += _contract(scale0, far, near, block, r, k, c, ok_r, ok_k, ok_c, C, G, ACC)
        if scale1 is not None:
            a1 += _contract(scale1, far, near, block, r, k, c, ok_r, ok_k, ok_c, C, G, ACC)
        if shift0 is not None:
            b0 += _contract(shift0, incoming, None, block, r, k, c, ok_r, ok_k, ok_c, C, G, ACC)
        if shift1 is not None:
            b1 += _contract(shift1, incoming, None, block, r, k, c, ok_r, ok_k, ok_c, C, G, ACC)
    _keep(scale0, a0, r, k, ok_r, ok_k, G)
    _keep(scale1, a1, r, k, ok_r, ok_k, G)
    _keep(shift0, b0, r, k, ok_r, ok_k, G)
    _keep(shift1, b1, r, k, ok_r, ok_k, G)


@triton.jit
def _keep(term, rows, r, k, ok_r, ok_k, G):
    """Write what belongs to the tokens."""
    if term is not None:  # noqa: SIM102 - what an absent term has is not even looked at
        if term[5] is not None:
            tl.store(term[5] + (r * G)[:, None] + k[None, :], rows, mask=ok_r[:, None] & ok_k[None, :])
