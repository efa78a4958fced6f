"""Mamba's selective scan as one Triton kernel forward and one backward, for CUDA GPUs.

Importing this module imports triton, which ships with PyTorch for CUDA and may be absent elsewhere:
only `models.mamba_backend` does, when it is asked for a kernel.

A program walks all tokens of one image for BLOCK_E channels, its state (N, BLOCK_E) in registers
(Gu and Dao 2023, section 3.3.2 and appendix D). Of the states only every SEGMENT-th goes to memory;
backward computes those between again, into scratch memory of its own, and walks back over them.
What programs share, the gradients of B, C and the weights, each writes to a place of its own, and
one sum adds up: without atomics, so two runs are equal bit for bit. Letters: B batch, L tokens,
E inner width, N state size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.selective_scan import GPU_SEGMENT as SEGMENT
from models.selective_scan import LN_2, LOG2_E

BLOCK_E = 32  # channels of a program: one for every thread of a warp
STATES_PER_THREAD = 16
TO_BASE_2, TO_BASE_E = tl.constexpr(LOG2_E), tl.constexpr(LN_2)  # exp2 is the cheaper one


@triton.jit
def _load(tensor, at, mask):
    return tl.load(tensor + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) to all digits, also where it is small: the series of 2 artanh(s)."""
    e = tl.exp2(tl.abs(x) * -TO_BASE_2)
    s = e / (2 + e)
    q = s * s
    series = 1 / 9 + q * (1 / 11 + q * (1 / 13 + q / 15))
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * series)))
    return tl.maximum(x, 0.0) + 2 * s * series


@triton.jit
def _forward_kernel(
    u, dt, A, B, C, D, z, bias, y, states, length, E,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, SEGMENT: tl.constexpr
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    real_e, real_n = e < E, n < N
    real = real_n[:, None] & real_e[None, :]
    decay_rate = _load(A, n[:, None] * E + e[None, :], real) * TO_BASE_2
    skip, offset = _load(D, e, real_e), _load(bias, e, real_e)
    h = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    num_segments = tl.cdiv(length, SEGMENT)
    for segment in range(num_segments):
        at_state = ((image * num_segments + segment) * N + n[:, None]) * E + e[None, :]
        tl.store(states + at_state, h, mask=real)
        for t in range(segment * SEGMENT, tl.minimum((segment + 1) * SEGMENT, length)):
            token = image * length + t
            at_e, at_n = token * E + e, token * N + n
            u_t, gate = _load(u, at_e, real_e), _load(z, at_e, real_e)
            dt_t = _softplus(_load(dt, at_e, real_e) + offset)
            B_t, C_t = _load(B, at_n, real_n), _load(C, at_n, real_n)
            h = tl.exp2(dt_t[None, :] * decay_rate) * h + (dt_t * u_t)[None, :] * B_t[:, None]
            y_t = tl.sum(h * C_t[:, None], axis=0) + skip * u_t
            tl.store(y + at_e, y_t * gate * tl.sigmoid(gate), mask=real_e)


@triton.jit
def _backward_kernel(
    grad_y, u, dt, A, B, C, D, z, bias, states, scratch,
    grad_u, grad_dt, grad_z, grad_tokens, grad_weights, length, E,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, SEGMENT: tl.constexpr
):  # fmt: skip
    """With g_t the gradient of h_t: g_t = grad_y_t C_t + a_(t+1) g_(t+1), a_t = exp(dt_t A)."""
    image, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    real_e, real_n = e < E, n < N
    real = real_n[:, None] & real_e[None, :]
    decay_rate = _load(A, n[:, None] * E + e[None, :], real) * TO_BASE_2
    skip, offset = _load(D, e, real_e), _load(bias, e, real_e)
    program = image * tl.num_programs(1) + block
    own = scratch + program * SEGMENT * BLOCK_N * BLOCK_E
    own += n[:, None] * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    partial = (block * tl.num_programs(0) + image) * length  # the first token of this program
    g = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    grad_A = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    grad_D, grad_bias = tl.zeros((BLOCK_E,), tl.float32), tl.zeros((BLOCK_E,), tl.float32)
    num_segments = tl.cdiv(length, SEGMENT)
    for i in range(num_segments):
        segment = num_segments - 1 - i
        start, end = segment * SEGMENT, tl.minimum((segment + 1) * SEGMENT, length)
        at_state = ((image * num_segments + segment) * N + n[:, None]) * E + e[None, :]
        h = _load(states, at_state, real)
        for t in range(start, end):
            tl.store(own + (t - start) * BLOCK_N * BLOCK_E, h)  # the state before token t
            at_e = (image * length + t) * E + e
            dt_t = _softplus(_load(dt, at_e, real_e) + offset)
            input_t = dt_t * _load(u, at_e, real_e)
            B_t = _load(B, (image * length + t) * N + n, real_n)
            h = tl.exp2(dt_t[None, :] * decay_rate) * h + input_t[None, :] * B_t[:, None]
        tl.debug_barrier()  # what one thread has written another may read
        for j in range(end - start):
            t = end - 1 - j
            at_e, at_n = (image * length + t) * E + e, (image * length + t) * N + n
            u_t, gate = _load(u, at_e, real_e), _load(z, at_e, real_e)
            raw = _load(dt, at_e, real_e) + offset
            dt_t = _softplus(raw)
            B_t, C_t = _load(B, at_n, real_n)[:, None], _load(C, at_n, real_n)[:, None]
            decayed = tl.exp2(dt_t[None, :] * decay_rate)
            kept = decayed * tl.load(own + (t - start) * BLOCK_N * BLOCK_E)
            h = kept + (dt_t * u_t)[None, :] * B_t

            sigmoid, grad_t = tl.sigmoid(gate), _load(grad_y, at_e, real_e)
            y_t = tl.sum(h * C_t, axis=0) + skip * u_t
            grad_gate = grad_t * y_t * sigmoid * (1 + gate * (1 - sigmoid))
            tl.store(grad_z + at_e, grad_gate, mask=real_e)
            grad_t = grad_t * gate * sigmoid
            g += C_t * grad_t[None, :]

            at_tokens = (partial + t) * 2 * N + n
            grad_B, grad_C = g * (dt_t * u_t)[None, :], h * grad_t[None, :]
            tl.store(grad_tokens + at_tokens, tl.sum(grad_B, axis=1), mask=real_n)
            tl.store(grad_tokens + at_tokens + N, tl.sum(grad_C, axis=1), mask=real_n)
            from_B, r = tl.sum(B_t * g, axis=0), g * kept
            tl.store(grad_u + at_e, from_B * dt_t + skip * grad_t, mask=real_e)
            grad_raw = tl.sum(r * decay_rate, axis=0) * TO_BASE_E + from_B * u_t
            grad_raw *= tl.sigmoid(raw)
            tl.store(grad_dt + at_e, grad_raw, mask=real_e)
            grad_A += r * dt_t[None, :]
            grad_D += grad_t * u_t
            grad_bias += grad_raw
            g *= decayed
        tl.debug_barrier()  # the next segment writes to the same scratch
    weights = grad_weights + image * (N + 2) * E + e
    tl.store(weights[None, :] + n[:, None] * E, grad_A, mask=real)
    tl.store(weights + N * E, grad_D, mask=real_e)
    tl.store(weights + (N + 1) * E, grad_bias, mask=real_e)


def gated_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """What `models.mamba.gated_scan` computes: (B, L, E) in the precision of z, computed in fp32.
    Differentiable once, by all arguments."""
    tensors = (u, dt, A.t(), B, C, D, z, bias)
    return _scan(*(tensor.contiguous() for tensor in tensors))[0]


def _launch(kernel: triton.JITFunction, u: Tensor, A: Tensor, *tensors: Tensor) -> None:
    """Start one program for every image and BLOCK_E channels."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise RuntimeError("the kernel reads contiguous tensors only")
    (batch, length, width), states = u.shape, len(A)
    block = triton.next_power_of_2(states)
    warps = min(max(block // STATES_PER_THREAD, 1), 16)
    sizes = dict(N=states, BLOCK_N=block, BLOCK_E=BLOCK_E, SEGMENT=SEGMENT)
    with torch.cuda.device_of(u):
        kernel[(batch, triton.cdiv(width, BLOCK_E))](
            *tensors, length, width, **sizes, num_warps=warps
        )


# Custom operators, so that torch.compile takes each kernel as it is.
@torch.library.custom_op("diffusion_models::triton_scan", mutates_args=())
def _scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns y (B, L, E) and the states before each segment (B, S, N, E). Here A is (N, E), as
    neighbouring threads read neighbouring channels."""
    y, states = _empty_outputs(u, A, z)
    _launch(_forward_kernel, u, A, u, dt, A, B, C, D, z, bias, y, states)
    return y, states


@_scan.register_fake
def _(u, dt, A, B, C, D, z, bias):
    return _empty_outputs(u, A, z)


def _empty_outputs(u: Tensor, A: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    num_segments = -(-u.shape[1] // SEGMENT)
    states = u.new_empty(u.shape[0], num_segments, *A.shape, dtype=torch.float32)
    return torch.empty_like(z), states


@torch.library.custom_op("diffusion_models::triton_scan_backward", mutates_args=())
def _scan_backward(
    grad_y: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    bias: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, dt and z, those of B and C of every block of channels
    (E / BLOCK_E, B, L, 2, N), and those of A, D and bias of every image (B, N + 2, E)."""
    grads = _empty_gradients(u, dt, A, z)
    block = triton.next_power_of_2(len(A))
    scratch = states.new_empty(u.shape[0], len(grads[3]), SEGMENT, block, BLOCK_E)
    tensors = (grad_y, u, dt, A, B, C, D, z, bias, states, scratch, *grads)
    _launch(_backward_kernel, u, A, *tensors)
    return grads


@_scan_backward.register_fake
def _(grad_y, u, dt, A, B, C, D, z, bias, states):
    return _empty_gradients(u, dt, A, z)


def _empty_gradients(u: Tensor, dt: Tensor, A: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    (batch, length, width), states = u.shape, len(A)
    blocks = -(-width // BLOCK_E)
    tokens = u.new_empty(blocks, batch, length, 2, states, dtype=torch.float32)
    weights = u.new_empty(batch, states + 2, width, dtype=torch.float32)
    return torch.empty_like(u), torch.empty_like(dt), torch.empty_like(z), tokens, weights


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, _):
    saved = ctx.saved_tensors  # read once: activation checkpointing hands them out only once
    grad_u, grad_dt, grad_z, tokens, weights = _scan_backward(grad_y.contiguous(), *saved)
    tokens, weights = tokens.sum(0), weights.sum(0)
    grad_B, grad_C = tokens.to(saved[3].dtype).unbind(2)
    return grad_u, grad_dt, weights[:-2], grad_B, grad_C, weights[-2], grad_z, weights[-1]


_scan.register_autograd(_backward, setup_context=_save)
