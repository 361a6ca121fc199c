"""The figures that README quotes: `make bench` prints them and writes bench/results/cpu.json.

Every row is a ratio measured side by side: alternating rounds, medians.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import attn_ext
from bench.measure import Comparison, compare, machine, peak_mebibytes

RESULTS = pathlib.Path(__file__).parent / "results" / "cpu.json"
Row = tuple[str, Callable[[], object], Callable[[], object]]

SHAPES = (
    (1, 8, 4096, 64),
    (1, 8, 2048, 128),
    (2, 8, 1024, 64),
    (2, 8, 128, 64),
    (32, 8, 32, 64),
    (1, 1, 4, 64),
)
MODULES = ((8, 512, 512, 8), (2, 2048, 768, 12))
LAYERS = ((8, 512, 512, 8), (32, 128, 256, 4), (1, 16, 256, 4))
MEMORY_LENGTH = 16384


def attention_rows() -> Iterator[Row]:
    """Forward, and forward with backward, against F.scaled_dot_product_attention."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            for causal in (False, True):
                tensors = [torch.randn(shape).to(dtype) for _ in range(3)]
                leaves = [x.clone().requires_grad_() for x in tensors]

                def ours(x: list[Tensor], causal: bool = causal) -> Tensor:
                    return attn_ext.scaled_dot_product_attention(*x, is_causal=causal)

                def theirs(x: list[Tensor], causal: bool = causal) -> Tensor:
                    return F.scaled_dot_product_attention(*x, is_causal=causal)

                name = f"{shape} {str(dtype).removeprefix('torch.')}{', causal' * causal}"
                yield (
                    f"forward {name}",
                    lambda f=ours, x=tensors: f(x),
                    lambda f=theirs, x=tensors: f(x),
                )
                yield (
                    f"forward and backward {name}",
                    lambda f=ours, x=leaves: torch.autograd.grad(f(x).sum(), x),
                    lambda f=theirs, x=leaves: torch.autograd.grad(f(x).sum(), x),
                )


def module_rows() -> Iterator[Row]:
    """MultiheadAttention against nn.MultiheadAttention, (batch, length, embed_dim, heads)."""
    for batch, length, width, heads in MODULES:
        stock = nn.MultiheadAttention(width, heads, batch_first=True)
        swapped = attn_ext.MultiheadAttention.from_module(stock)
        dropping = nn.MultiheadAttention(width, heads, batch_first=True, dropout=0.1)
        swapped_dropping = attn_ext.MultiheadAttention.from_module(dropping)
        x = torch.randn(batch, length, width)

        def forward(module: nn.Module, weights: bool, x: Tensor = x) -> None:
            with torch.no_grad():
                module(x, x, x, need_weights=weights)

        def train(module: nn.Module, x: Tensor = x) -> None:
            module(x, x, x, need_weights=False)[0].sum().backward()

        name = f"({batch}, {length}, {width}, {heads}) float32"
        for label, function, pair in (
            ("default arguments", lambda m, f=forward: f(m, True), (swapped, stock)),
            ("need_weights=False", lambda m, f=forward: f(m, False), (swapped, stock)),
            ("training step", train, (swapped, stock)),
            ("training step, dropout 0.1", train, (swapped_dropping, dropping)),
        ):
            yield (
                f"module {name}, {label}",
                lambda f=function, m=pair[0]: f(m),
                lambda f=function, m=pair[1]: f(m),
            )


def layer_rows() -> Iterator[Row]:
    """nn.TransformerEncoderLayer in eval, swapped against stock, which runs a native operator."""
    for batch, length, width, heads in LAYERS:
        stock = nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True).eval()
        swapped = copy.deepcopy(stock)
        attn_ext.replace_multihead_attention(swapped)
        x = torch.randn(batch, length, width)

        def forward(layer: nn.Module, x: Tensor = x) -> None:
            with torch.inference_mode():
                layer(x)

        yield (
            f"encoder layer ({batch}, {length}, {width}, {heads}) float32, eval",
            lambda f=forward, m=swapped: f(m),
            lambda f=forward, m=stock: f(m),
        )


def memory_row(length: int) -> dict[str, float | str]:
    """Peak memory of forward and backward of one head, beside its inputs and outputs."""
    code = f"""
import torch, attn_ext
def work(length={length}):
    x = [torch.randn(1, 1, length, 64, requires_grad=True) for _ in range(3)]
    attn_ext.attention(*x).sum().backward()
def warm_up():
    work(256)
"""
    tensors = 9 * length * 64 * 4 / 2**20  # query, key, value, out, dout and their gradients, sums
    return {
        "work": f"memory of forward and backward, (1, 1, {length}, 64) float32",
        "peak_mebibytes": round(peak_mebibytes(code), 1),
        "inputs_and_outputs_mebibytes": tensors,
    }


def print_table(console: Console, rows: list[tuple[str, Comparison]]) -> None:
    table = Table("work (B, H, L, D)", "ours, ms", "PyTorch, ms", "ratio")
    for name, result in rows:
        milliseconds = (f"{seconds * 1e3:.3f}" for seconds in (result.ours, result.theirs))
        table.add_row(name, *milliseconds, f"{result.ratio:.2f}x")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="rounds for each row")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, help="where to write")
    arguments = parser.parse_args()
    console = Console()
    work = [*attention_rows(), *module_rows(), *layer_rows()]
    results = []
    with Progress(console=console, transient=True) as progress:
        for name, ours, theirs in progress.track(work, description="measuring"):
            results.append((name, compare(ours, theirs, arguments.rounds)))
    print_table(console, results)
    memory = memory_row(MEMORY_LENGTH)
    console.print(memory)
    report = {
        "command": "make bench",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "rounds": arguments.rounds,
        "rows": [
            {
                "work": name,
                "ours_ms": round(result.ours * 1e3, 4),
                "pytorch_ms": round(result.theirs * 1e3, 4),
                "ratio": round(result.ratio, 2),
            }
            for name, result in results
        ],
        "memory": memory,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"{machine()}\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
