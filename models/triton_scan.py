"""Mamba's selective scan as one Triton kernel forward and one backward, for CUDA GPUs.

It imports triton, so only `models.mamba_backend` imports it, when a kernel is asked for. A program
walks all tokens of one image for BLOCK_E channels, its state (N, BLOCK_E) in registers (Gu and Dao
2023, section 3.3.2 and appendix D). Every SEGMENT-th state goes to memory; backward computes those
between again, into scratch memory of its own, and walks back. What programs share, the gradients of
A to D, each writes to its own place for a sum: no atomics, so runs are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from models.selective_scan import GPU_SEGMENT, LN_2, LOG2_E, keep_states

BLOCK_E, SEGMENT = tl.constexpr(32), tl.constexpr(GPU_SEGMENT)  # channels: a warp's threads
TO_BASE_2, TO_BASE_E = tl.constexpr(LOG2_E), tl.constexpr(LN_2)  # exp2 is the cheaper one


@triton.jit
def _load(tensor, at, mask):
    return tl.load(tensor + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _constants(A, D, E, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """The channels e and states n of this program, which of them exist, and their weights."""
    e, n = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    real_e, real_n = e < E, n < N
    real = real_n[:, None] & real_e[None, :]
    rate = _load(A, n[:, None] * E + e[None, :], real) * TO_BASE_2
    return e, n, real_e, real_n, real, rate, _load(D, e, real_e)


@triton.jit
def _forward_kernel(
    u, dt, A, B, C, D, z, y, states, length, E, N: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    e, n, real_e, real_n, real, rate, skip = _constants(A, D, E, N, BLOCK_N)
    image, num_segments = tl.program_id(0).to(tl.int64), tl.cdiv(length, SEGMENT)
    h = tl.zeros_like(rate)
    for i in range(num_segments):
        at_state = ((image * num_segments + i) * N + n[:, None]) * E + e[None, :]
        tl.store(states + at_state, h, mask=real)
        for t in range(i * SEGMENT, tl.minimum((i + 1) * SEGMENT, length)):
            at_e, at_n = (image * length + t) * E + e, (image * length + t) * N + n
            u_t, dt_t = _load(u, at_e, real_e), _load(dt, at_e, real_e)
            B_t, C_t = _load(B, at_n, real_n)[:, None], _load(C, at_n, real_n)[:, None]
            h = tl.exp2(dt_t[None, :] * rate) * h + (dt_t * u_t)[None, :] * B_t
            y_t, gate = tl.sum(h * C_t, axis=0) + skip * u_t, _load(z, at_e, real_e)
            tl.store(y + at_e, y_t * gate * tl.sigmoid(gate), mask=real_e)


@triton.jit
def _backward_kernel(
    u, dt, A, B, C, D, z, states, grad_y, scratch, grad_u, grad_dt, grad_z, grad_tokens,
    grad_weights, length, E, N: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """With g_t the gradient of h_t: g_t = grad_y_t C_t + a_(t+1) g_(t+1), a_t = exp(dt_t A)."""
    e, n, real_e, real_n, real, rate, skip = _constants(A, D, E, N, BLOCK_N)
    image, num_segments = tl.program_id(0).to(tl.int64), tl.cdiv(length, SEGMENT)
    block, tile = tl.program_id(1), n[:, None] * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    own = scratch + (image * tl.num_programs(1) + block) * SEGMENT * BLOCK_N * BLOCK_E + tile
    g, grad_A, grad_D = tl.zeros_like(rate), tl.zeros_like(rate), tl.zeros_like(skip)
    for i in range(num_segments - 1, -1, -1):
        start, end = i * SEGMENT, tl.minimum((i + 1) * SEGMENT, length)
        h = _load(states, ((image * num_segments + i) * N + n[:, None]) * E + e[None, :], real)
        for t in range(start, end):
            tl.store(own + (t - start) * BLOCK_N * BLOCK_E, h)  # the state before token t
            at_e, at_n = (image * length + t) * E + e, (image * length + t) * N + n
            dt_t, B_t = _load(dt, at_e, real_e), _load(B, at_n, real_n)[:, None]
            input_t = (dt_t * _load(u, at_e, real_e))[None, :] * B_t
            h = tl.exp2(dt_t[None, :] * rate) * h + input_t
        tl.debug_barrier()  # what one thread has written another may read
        for t in range(end - 1, start - 1, -1):
            at_e, at_n = (image * length + t) * E + e, (image * length + t) * N + n
            u_t, dt_t = _load(u, at_e, real_e), _load(dt, at_e, real_e)
            B_t, C_t = _load(B, at_n, real_n)[:, None], _load(C, at_n, real_n)[:, None]
            decay = tl.exp2(dt_t[None, :] * rate)
            kept = decay * tl.load(own + (t - start) * BLOCK_N * BLOCK_E)
            h = kept + (dt_t * u_t)[None, :] * B_t
            gate, grad_t = _load(z, at_e, real_e), _load(grad_y, at_e, real_e)
            y_t, sigmoid = tl.sum(h * C_t, axis=0) + skip * u_t, tl.sigmoid(gate)
            of_gate = sigmoid * (1 + gate * (1 - sigmoid))
            tl.store(grad_z + at_e, grad_t * y_t * of_gate, mask=real_e)
            grad_t *= gate * sigmoid
            g += C_t * grad_t[None, :]
            at_own = grad_tokens + ((block * tl.num_programs(0) + image) * length + t) * 2 * N + n
            tl.store(at_own, tl.sum(g * (dt_t * u_t)[None, :], axis=1), mask=real_n)
            tl.store(at_own + N, tl.sum(h * grad_t[None, :], axis=1), mask=real_n)
            from_B, r = tl.sum(B_t * g, axis=0), g * kept
            tl.store(grad_u + at_e, from_B * dt_t + skip * grad_t, mask=real_e)
            from_decay = tl.sum(r * rate, axis=0) * TO_BASE_E
            tl.store(grad_dt + at_e, from_decay + from_B * u_t, mask=real_e)
            grad_A += r * dt_t[None, :]
            grad_D += grad_t * u_t
            g *= decay
        tl.debug_barrier()  # the next segment writes to the same scratch
    weights = grad_weights + image * (N + 1) * E + e
    tl.store(weights[None, :] + n[:, None] * E, grad_A, mask=real)
    tl.store(weights + N * E, grad_D, mask=real_e)


def gated_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """`models.mamba.gated_scan` in fp32; y has the precision of z. Differentiable once."""
    inputs = (u, F.softplus(dt.float() + bias), A.t(), B, C, D, z)  # channels side by side
    return _scan(*(tensor.contiguous() for tensor in inputs))[0]


def _launch(kernel: triton.JITFunction, *tensors: Tensor) -> None:
    """Start one program for every image and BLOCK_E channels."""
    (batch, length, width), num_states = tensors[0].shape, len(tensors[2])
    block = triton.next_power_of_2(num_states)
    options = dict(N=num_states, BLOCK_N=block, num_warps=min(max(block // 16, 1), 16))
    tensors = [tensor.contiguous() for tensor in tensors]  # as they are, unless a compiler moved
    with torch.cuda.device_of(tensors[0]):
        kernel[(batch, triton.cdiv(width, BLOCK_E.value))](*tensors, length, width, **options)


# Custom operators, so that torch.compile takes each kernel as it is. Here A is (N, E).
@torch.library.custom_op("diffusion_models::triton_scan", mutates_args=())
def _scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns y (B, L, E) and the states before each segment (B, S, N, E)."""
    outputs = _empty_outputs(u, dt, A, B, C, D, z)
    _launch(_forward_kernel, u, dt, A, B, C, D, z, *outputs)
    return outputs


@_scan.register_fake
def _empty_outputs(u, dt, A, B, C, D, z):
    shape = (u.shape[0], triton.cdiv(u.shape[1], SEGMENT.value), *A.shape)
    return torch.empty_like(z), u.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("diffusion_models::triton_scan_backward", mutates_args=())
def _scan_backward(grad_y: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of u, dt and z, those of B and C of every block of channels
    (E / BLOCK_E, B, L, 2, N), and those of A and D of every image (B, N + 1, E)."""
    grads, block = _empty_gradients(grad_y, saved), triton.next_power_of_2(len(saved[2]))
    scratch = saved[-1].new_empty(len(grad_y), len(grads[3]), SEGMENT.value, block, BLOCK_E.value)
    _launch(_backward_kernel, *saved, grad_y, scratch, *grads)
    return grads


@_scan_backward.register_fake
def _empty_gradients(grad_y, saved):
    u, dt, A, _, _, _, z, states = saved
    batch, length, width = u.shape
    tokens = states.new_empty(triton.cdiv(width, BLOCK_E.value), batch, length, 2, len(A))
    weights = states.new_empty(batch, len(A) + 1, width)
    return [*map(torch.empty_like, (u, dt, z)), tokens, weights]


def _backward(ctx, grad_y, _):
    saved = ctx.saved_tensors  # read once: activation checkpointing hands them out only once
    grad_u, grad_dt, grad_z, tokens, weights = _scan_backward(grad_y.contiguous(), saved)
    weights, (grad_B, grad_C) = weights.sum(0), tokens.sum(0).to(saved[3].dtype).unbind(2)
    return grad_u, grad_dt, weights[:-1], grad_B, grad_C, weights[-1], grad_z


_scan.register_autograd(_backward, setup_context=keep_states)
