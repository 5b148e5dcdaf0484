"""`python -m oracle.speed`: the time of the PyTorch oracle on this machine, for the shapes that need its speed."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from oracle import recurrent_kda

# name: (lengths of the packed sequences, heads)
SHAPES = {
    "one sequence of 8192 x 96 heads": ([8192], 96),
    "packed 1300, 547, 2048, 963, 271, 3063 x 4 heads": ([1300, 547, 2048, 963, 271, 3063], 4),
    "one sequence of 200 x 4 heads": ([200], 4),
    "20,000 sequences of 1 x 1 head": ([1] * 20_000, 1),
}


def main() -> None:
    argparse.ArgumentParser(prog="python -m oracle.speed", description=__doc__.partition(": ")[2]).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device}, {torch.get_num_threads()} CPU threads, K = V = 128, bf16 inputs")
    for name, (lengths, heads) in SHAPES.items():
        print(f"{name}: {seconds(lengths, heads, device):.3f} s", flush=True)


def seconds(lengths: list[int], heads: int, device: str) -> float:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    tokens = sum(lengths)
    q, k, v, g = (normal(1, tokens, heads, 128) for _ in range(4))
    beta = normal(1, tokens, heads)
    A_log, dt_bias = normal(heads, dtype=torch.float32), normal(heads, 128, dtype=torch.float32)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    began = time.perf_counter()
    out, _ = recurrent_kda(
        q, k, v, g, beta, scale=128**-0.5, A_log=A_log, dt_bias=dt_bias, lower_bound=-5.0, cu_seqlens=cu_seqlens
    )
    float(out.sum())  # waits for a GPU
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
