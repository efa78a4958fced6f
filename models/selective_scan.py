"""The state-space recurrences of Mamba and Mamba-2 in plain PyTorch, for any device.

Both compute h_t = a_t h_(t-1) + input_t, y_t = C_t . h_t with the state h in R^N per channel, and
never hold all states at once. Letters: B batch, L tokens, E inner width, N state size, H heads,
P channels of a head, G groups. `selective_scan` is Mamba-1 (Gu and Dao 2023, section 3): a decay
for every channel and state, walked step by step. `chunked_scan` is Mamba-2 (Dao and Gu 2024, SSD):
one decay per head, so that a chunk of tokens becomes matrix products.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LN_2 = math.log(2)
LOG2_E = 1 / LN_2

CPU_SEGMENT = 16  # tokens between two stored states; a segment is recomputed in backward
GPU_SEGMENT, GPU_CHUNK = 64, 8  # there launches cost more than arithmetic: 8 chunks advance at once
MAX_SCRATCH = 2**20  # elements of one scratch tensor on a CPU: keeps it near the caches
SSD_CHUNK = 64  # tokens that become one matrix product


def selective_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """h_t = exp(dt_t A) h_(t-1) + dt_t u_t B_t;  y_t = C_t . h_t + D u_t, from a state of zeros.

    Computes in float32 (float64 if an input is), whatever autocast says. Differentiable once.

    Args:
        u, dt: (B, L, E); dt > 0 is the step size, softplus already applied.
        A: (E, N), negative.
        B, C: (B, L, N).
        D: (E,).

    Returns:
        y (B, L, E).
    """
    u, dt, A, B, C, D = _same_dtype(u, dt, A, B, C, D)
    with torch.autocast(u.device.type, enabled=False):
        y, _ = _selective_scan(u, dt, A.t() * LOG2_E, B, C)  # exp2 is the cheaper one
        return torch.addcmul(y, D, u)


def _same_dtype(*tensors: Tensor) -> list[Tensor]:
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return [tensor.to(torch.float64 if wide else torch.float32) for tensor in tensors]


def _segment(tensor: Tensor) -> int:
    return CPU_SEGMENT if tensor.device.type == "cpu" else GPU_SEGMENT


# Custom operators, so that torch.compile takes the loops as they are instead of unrolling them.
@torch.library.custom_op("diffusion_models::selective_scan", mutates_args=())
def _selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns y (B, L, E) and the states before each segment (B, S, N, E).

    Here A is (N, E), as with E innermost all operations run along contiguous memory, and to the
    base of two: decays are 2^(dt A).
    """
    y, states = _empty_outputs(u, dt, A, B, C)
    length, segment = u.shape[1], _segment(u)
    A = A.contiguous()
    for rows in _row_blocks(u, A, segment):
        h = torch.zeros_like(states[rows, 0])
        decay, k = (_scratch(u[rows], A, segment) for _ in range(2))
        for i, start in enumerate(range(0, length, segment)):
            part = (rows, slice(start, min(start + segment, length)))
            states[rows, i] = h
            h = _states(dt[part], u[part], A, B[part], states[rows, i], decay, k)[:, -1]
            y[part] = _dot_n(C[part], k[:, : y[part].shape[1]])
    return y, states


@_selective_scan.register_fake
def _empty_outputs(u, dt, A, B, C):
    num_segments = -(-u.shape[1] // _segment(u))
    return u.new_empty(u.shape), u.new_empty(u.shape[0], num_segments, *A.shape)


@torch.library.custom_op("diffusion_models::selective_scan_backward", mutates_args=())
def _selective_scan_backward(
    grad_y: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, dt, A, B and C, from the last segment to the first.

    With g_t the gradient of h_t: g_t = grad_y_t C_t + a_(t+1) g_(t+1), and
    grad A = ln 2 sum_t dt_t r_t with r_t = g_t a_t h_(t-1).
    """
    grad_u, grad_dt, grad_B, grad_C = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (u, dt, B, C)
    )
    A = A.contiguous()
    A_e, grad_A = A * LN_2, torch.zeros_like(A)
    length, segment = u.shape[1], _segment(u)
    for rows in _row_blocks(u, A, segment):
        carry, next_decay = torch.zeros_like(states[rows, 0]), torch.ones_like(states[rows, 0])
        decay, h, g = (_scratch(u[rows], A, segment) for _ in range(3))
        for i in reversed(range(states.shape[1])):
            part = (rows, slice(i * segment, min((i + 1) * segment, length)))
            u_t, dt_t, B_t, C_t, grad_t = u[part], dt[part], B[part], C[part], grad_y[part]
            size = u_t.shape[1]
            a_t = decay[:, :size]
            h_t = _states(dt_t, u_t, A, B_t, states[rows, i], decay, h)
            g_t = torch.mul(grad_t[:, :, None], C_t[..., None], out=g[:, :size])
            next_decay = _advance_backward(g_t, a_t, carry, next_decay)
            carry = g_t[:, 0].clone()

            grad_C[part] = _dot_e(grad_t, h_t)
            grad_B[part] = _dot_e(dt_t * u_t, g_t)
            q = _dot_n(B_t, g_t)
            grad_u[part] = q * dt_t
            r = g_t.mul_(a_t)
            r[:, 1:].mul_(h_t[:, :-1])
            r[:, 0].mul_(states[rows, i])
            grad_A += torch.mul(r, dt_t[:, :, None], out=h_t).sum((0, 1))
            grad_dt[part] = torch.addcmul(r.mul_(A_e).sum(2), q, u_t)
    return grad_u, grad_dt, grad_A.mul_(LN_2), grad_B, grad_C


@_selective_scan_backward.register_fake
def _(grad_y, u, dt, A, B, C, states):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (u, dt, A, B, C))


def keep_states(ctx, inputs, output) -> None:
    """Save for backward what a scan was given, and its second output, the states of segments."""
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros as large as the stored states, for nothing


def _backward(ctx, grad_y, _):
    if grad_y is None:
        return (None,) * 5
    with torch.autocast(grad_y.device.type, enabled=False):
        return _selective_scan_backward(grad_y, *ctx.saved_tensors)


_selective_scan.register_autograd(_backward, setup_context=keep_states)


def _row_blocks(u: Tensor, A: Tensor, segment: int) -> list[slice]:
    """Which examples are computed together: on a CPU as many as fit the scratch tensors."""
    batch = u.shape[0]
    if u.device.type != "cpu":
        return [slice(0, batch)]
    size = max(1, MAX_SCRATCH // (segment * A.numel()))
    return [slice(start, start + size) for start in range(0, batch, size)]


def _scratch(u: Tensor, A: Tensor, segment: int) -> Tensor:
    """A tensor (b, T, N, E) for the values of a segment, allocated once for a block of rows."""
    return u.new_empty(u.shape[0], min(segment, u.shape[1]), *A.shape)


def _dot_n(weights: Tensor, values: Tensor) -> Tensor:
    """The products (b, T, N) . (b, T, N, E) -> (b, T, E), summed over N."""
    return torch.matmul(weights[:, :, None], values)[:, :, 0]


def _dot_e(weights: Tensor, values: Tensor) -> Tensor:
    """The products (b, T, E) . (b, T, N, E) -> (b, T, N), as a row times a matrix: the other way
    round is slow."""
    return torch.matmul(weights[:, :, None], values.transpose(2, 3))[:, :, 0]


def _states(
    dt: Tensor, u: Tensor, A: Tensor, B: Tensor, state: Tensor, decay: Tensor, out: Tensor
) -> Tensor:
    """Write the states (b, T, N, E) of one segment to `out` and its decays to `decay`."""
    size = dt.shape[1]
    a = torch.mul(dt[:, :, None], A, out=decay[:, :size]).exp2_()
    h = torch.mul((dt * u)[:, :, None], B[..., None], out=out[:, :size])
    _advance(h, a, state)
    return h


def _advance_backward(g: Tensor, decay: Tensor, carry: Tensor, next_decay: Tensor) -> Tensor:
    """In place g_t += a_(t+1) g_(t+1), from the right; `carry` and `next_decay` are those of the
    token after the segment. Returns the decay of the segment's first token."""
    if _chunk(g) == 1:
        for value, a_t in zip(reversed(g.unbind(1)), reversed(decay.unbind(1)), strict=True):
            value.addcmul_(next_decay, carry)
            carry, next_decay = value, a_t
        return next_decay.clone()
    following = torch.cat([decay[:, 1:], next_decay[:, None]], dim=1)
    reverse = g.flip(1)
    _advance(reverse, following.flip(1), carry)
    g.copy_(reverse.flip(1))
    return decay[:, 0].clone()


def _chunk(values: Tensor) -> int:
    """How many tokens a chunk has; 1 means step by step."""
    return 1 if values.device.type == "cpu" else GPU_CHUNK


def _advance(values: Tensor, decay: Tensor, carry: Tensor) -> None:
    """In place h_t = a_t h_(t-1) + values_t over dim 1 of (b, T, N, E), in few launches.

    All chunks run from zero side by side; then one pass hands each chunk the state before it,
    through the product of its decays (at most 1, so nothing overflows). What is in no chunk, on a
    CPU all, goes step by step.
    """
    chunk = _chunk(values)
    whole = values.shape[1] // chunk * chunk if chunk > 1 else 0
    if whole:
        v = values[:, :whole].unflatten(1, (-1, chunk))
        product = decay[:, :whole].unflatten(1, (-1, chunk)).clone()
        for j in range(1, chunk):
            v[:, :, j].addcmul_(product[:, :, j], v[:, :, j - 1])
            product[:, :, j].mul_(product[:, :, j - 1])
        for v_chunk, product_chunk in zip(v.unbind(1), product.unbind(1), strict=True):
            v_chunk.addcmul_(product_chunk, carry[:, None])
            carry = v_chunk[:, -1]
    for value, a_t in zip(values[:, whole:].unbind(1), decay[:, whole:].unbind(1), strict=True):
        carry = value.addcmul_(a_t, carry)


def chunked_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t^T;  y_t = C_t . h_t + D x_t, a head at a time, from
    states of zeros.

    Computes in float32 (float64 if an input is), whatever autocast says.

    Args:
        x: (B, L, H, P).
        dt: (B, L, H) > 0.
        A, D: (H,); A negative.
        B, C: (B, L, G, N); head h uses group h // (H / G).

    Returns:
        y (B, L, H, P).
    """
    x, dt, A, B, C, D = _same_dtype(x, dt, A, B, C, D)
    with torch.autocast(x.device.type, enabled=False):
        return torch.addcmul(_chunked_scan(x, dt, A, B, C), D[:, None], x)


def _chunked_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    batch, length, heads, _ = x.shape
    groups, chunk_size = B.shape[2], min(SSD_CHUNK, length)
    pad = -length % chunk_size  # padded tokens have dt = 0: decay 1, input 0
    x_dt = F.pad(x * dt[..., None], (0, 0, 0, 0, 0, pad))
    log_decay = F.pad(dt * A, (0, 0, 0, pad))
    B, C = (F.pad(tensor, (0, 0, 0, 0, 0, pad)) for tensor in (B, C))

    # M chunks of c tokens, heads as G groups of K: every tensor (B, M, G, K or 1, c, ...)
    x_dt = x_dt.unflatten(1, (-1, chunk_size)).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)
    log_decay = log_decay.unflatten(1, (-1, chunk_size)).unflatten(3, (groups, -1))
    log_decay = log_decay.permute(0, 1, 3, 4, 2)
    B, C = (t.unflatten(1, (-1, chunk_size)).transpose(2, 3)[:, :, :, None] for t in (B, C))

    within = _decay_between(log_decay)  # (B, M, G, K, c, c)
    y = (C @ B.transpose(-1, -2) * within) @ x_dt

    to_end = within[..., -1, :]  # (B, M, G, K, c)
    added = B.transpose(-1, -2) @ (to_end[..., None] * x_dt)  # (B, M, G, K, N, P)
    sources = torch.cat([torch.zeros_like(added[:, :1]), added], dim=1)  # (B, M + 1, G, K, N, P)
    of_chunks = F.pad(log_decay.sum(-1).movedim(1, -1), (1, 0))  # (B, G, K, M + 1)
    carried = torch.einsum("bgkzm,bmgknp->bzgknp", _decay_between(of_chunks), sources)

    from_start = torch.exp(log_decay.cumsum(-1))  # (B, M, G, K, c)
    y = y + from_start[..., None] * (C @ carried[:, :-1])
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, -1, heads, x.shape[-1])
    return y[:, :length]


def _decay_between(log_decay: Tensor) -> Tensor:
    """The decays (..., c, c) from s to t: exp(sum of s < j <= t) of the logarithms, 0 if s > t.

    Every pair has its own sum: the difference of two cumulative sums would lose the digits of
    short ones once the long ones are large.
    """
    pairs = log_decay[..., None].expand(*log_decay.shape, log_decay.shape[-1])  # (..., t, s)
    return torch.exp(pairs.tril(-1).cumsum(-2)).tril()
