"""The PyTorch scans of models/selective_scan.py beside plain autograd loops over the tokens.

python -m benchmarks.selective_scan
python -m benchmarks.selective_scan --device cuda --batch_size 32

Time: forward and backward, all variants interleaved in every round, medians. Memory: growth of the
peak over the inputs, each variant in a process of its own (CPU: resident set; CUDA: allocator).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import set_up
from models.selective_scan import chunked_scan, selective_scan

HEAD_CHANNELS = 64
MAMBA2_STATE_FACTOR = 4  # Mamba-2 at its usual state, four times that of Mamba-1
MIB = 2**20


def loop(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The definition: index a token, discretise, step."""
    h, ys = u.new_zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * A)
        h = decay * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(2))
    return torch.stack(ys, 1) + D * u


def loop_unbound(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The same, its inputs cut into tokens beforehand: spares a full-size gradient per index."""
    h, ys = u.new_zeros(u.shape[0], *A.shape), []
    for u_t, dt_t, B_t, C_t in zip(*(tensor.unbind(1) for tensor in (u, dt, B, C)), strict=True):
        h = torch.exp(dt_t[..., None] * A) * h + (dt_t * u_t)[..., None] * B_t[:, None]
        ys.append((h * C_t[:, None]).sum(2))
    return torch.stack(ys, 1) + D * u


def loop_upfront(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """All decays and inputs (B, L, E, N) at once, then the loop."""
    decay = torch.exp(dt[..., None] * A)
    added = (dt * u)[..., None] * B[:, :, None]
    h, ys = u.new_zeros(u.shape[0], *A.shape), []
    for a_t, k_t, C_t in zip(decay.unbind(1), added.unbind(1), C.unbind(1), strict=True):
        h = a_t * h + k_t
        ys.append((h * C_t[:, None]).sum(2))
    return torch.stack(ys, 1) + D * u


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention on as many channels, for orientation."""
    return F.scaled_dot_product_attention(q, k, v)


def triton_scan(*inputs: Tensor) -> Tensor:
    """Our Triton kernel, with the step sizes before softplus and a gate; on CUDA alone."""
    from models.triton_scan import gated_scan

    return gated_scan(*inputs)


OURS = "selective_scan (Mamba-1)"
TRITON = "Triton kernel (Mamba-1, gated)"
VARIANTS: dict[str, Callable[..., Tensor]] = {
    OURS: selective_scan,
    "loop over tokens": loop,
    "loop, inputs unbound": loop_unbound,
    "loop, discretised up front": loop_upfront,
    "chunked_scan (Mamba-2)": chunked_scan,
    "attention": attention,
    TRITON: triton_scan,
}


def draw(variant: str, args: argparse.Namespace) -> list[Tensor]:
    """Inputs with the step sizes of a fresh network."""
    generator = torch.Generator().manual_seed(0)
    b, length, e, n = args.batch_size, args.length, args.width, args.state_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def steps(*shape: int) -> Tensor:
        return 1e-3 * 100 ** torch.rand(shape, generator=generator)

    heads = e // HEAD_CHANNELS
    if variant == "attention":
        inputs = [normal(b, heads, length, HEAD_CHANNELS) for _ in range(3)]
    elif variant.startswith("chunked"):
        x = normal(b, length, heads, HEAD_CHANNELS)
        B, C = (normal(b, length, 1, MAMBA2_STATE_FACTOR * n) for _ in range(2))
        A = -torch.linspace(1, 16, heads)
        inputs = [x, steps(b, length, heads), A, B, C, torch.ones(heads)]
    else:
        A = -torch.arange(1.0, n + 1).repeat(e, 1)
        B, C = (normal(b, length, n) for _ in range(2))
        inputs = [normal(b, length, e), steps(b, length, e), A, B, C, torch.ones(e)]
        if variant == TRITON:
            inputs[1] = inputs[1].expm1().log()  # before softplus
            inputs += [normal(b, length, e), torch.zeros(e)]
    return [tensor.to(args.device).requires_grad_() for tensor in inputs]


def run(variant: str, inputs: list[Tensor], weights: Tensor | None) -> None:
    """Forward and backward once."""
    y = VARIANTS[variant](*inputs)
    torch.autograd.grad(y, inputs, torch.ones_like(y) if weights is None else weights)


def seconds(variant: str, inputs: list[Tensor], weights: Tensor) -> float:
    synchronize = torch.cuda.synchronize if inputs[0].is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    run(variant, inputs, weights)
    synchronize()
    return time.perf_counter() - start


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return 1024 * float(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def peak_growth(variant: str, args: argparse.Namespace) -> float:
    """Bytes beyond what stands after drawing the inputs. In a fresh process."""
    inputs = draw(variant, args)
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        run(variant, inputs, None)
        return torch.cuda.max_memory_allocated() - before
    tiny = argparse.Namespace(**{**vars(args), "batch_size": 1, "length": 2})
    run(variant, draw(variant, tiny), None)  # libraries load on first use
    before = resident("VmRSS")
    run(variant, inputs, None)
    return resident("VmHWM") - before


def memory_of(variant: str) -> float:
    command = [sys.executable, "-m", "benchmarks.selective_scan", *sys.argv[1:]]
    output = subprocess.run(
        [*command, "--memory_of", variant], check=True, capture_output=True, text=True
    ).stdout
    return float(output.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens")
    parser.add_argument("--width", type=int, default=768, help="inner width E")
    parser.add_argument("--state_size", type=int, default=16, help="N of Mamba-1")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--memory_of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    set_up(args)
    if args.memory_of:
        print(peak_growth(args.memory_of, args))
        return

    if args.device == "cpu":
        del VARIANTS[TRITON]
    inputs = {variant: draw(variant, args) for variant in VARIANTS}
    weights = {
        variant: torch.randn_like(VARIANTS[variant](*inputs[variant])) for variant in VARIANTS
    }
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for number in range(args.rounds + 1):
        for variant in VARIANTS:
            spent = seconds(variant, inputs[variant], weights[variant])
            if number:  # the first round warms up
                times[variant].append(spent)

    print(
        f"B={args.batch_size} L={args.length} E={args.width} N={args.state_size}, fp32, forward "
        f"and backward, {args.device}, {args.threads} thread(s), torch {torch.__version__}, "
        f"medians of {args.rounds} interleaved rounds\n"
    )
    print("| variant | ms | x ours (quartiles) | MiB | x ours |")
    print("| --- | --- | --- | --- | --- |")
    ours_memory = memory_of(OURS)
    for variant in VARIANTS:
        ratios = [a / b for a, b in zip(times[variant], times[OURS], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        memory = memory_of(variant)
        print(
            f"| {variant} | {1000 * statistics.median(times[variant]):.1f} "
            f"| {middle:.2f} ({low:.2f} to {high:.2f}) "
            f"| {memory / MIB:.0f} | {memory / ours_memory:.1f} |"
        )


if __name__ == "__main__":
    main()
