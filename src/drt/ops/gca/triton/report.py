"""What the kernels take of a GPU, from compiling them without one.

    python -m drt.ops.gca.triton.report [--arch 80 90 100] [--json PATH]

For a list of calls, each kernel is compiled for each architecture as it would be launched, and its
registers per thread, spilled bytes, shared memory and matrix instructions are printed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget

from drt.ops.gca.inverse import SEGMENT, InverseIndex
from drt.ops.gca.layout import new_memory_gradient
from drt.ops.gca.triton import launch
from drt.ops.gca.triton.tiles import Gpu

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages")

GPUS = {
    80: Gpu(166912, reads_shared=False),
    86: Gpu(101376, reads_shared=False),
    89: Gpu(101376, reads_shared=False),
    90: Gpu(232448),
    100: Gpu(232448),
    120: Gpu(101376, reads_shared=False),
}
"""The limits of an architecture."""


class Shape(NamedTuple):
    """The sizes of a call that decide what is compiled; letters as in docs/method.md."""

    Q: int = 64
    H: int = 12
    G: int = 12
    S: int = 64
    D: int = 64
    dtype: torch.dtype = torch.bfloat16
    ragged: bool = False
    """Whether chunks have lengths."""
    in_order: bool = False
    """Whether the memory is what was retrieved, as in decoding."""
    C: int = 256
    K: int = 8


SHAPES = {
    "128M": Shape(),
    "128M, landmark in the block": Shape(Q=65),
    "H 12 G 4": Shape(G=4),
    "H 12 G 4, landmark in the block": Shape(Q=65, G=4, ragged=True),
    "H 32 G 8 D 128": Shape(H=32, G=8, D=128),
    "H 32 G 8 D 128, landmark in the block": Shape(Q=65, H=32, G=8, D=128),
    "fp16": Shape(dtype=torch.float16),
    "fp32": Shape(dtype=torch.float32),
    "fp32 D 128": Shape(D=128, dtype=torch.float32),
    "fp32 D 256": Shape(Q=48, H=8, G=8, D=256, dtype=torch.float32),
    "chunk encoder": Shape(Q=65, S=65, in_order=True),
    "S 256": Shape(S=256, Q=256),
    "D 256": Shape(D=256, H=8, G=8),
    "D 80, S 33": Shape(D=80, S=33, Q=34, ragged=True),
    "decoding": Shape(Q=1, in_order=True),
    "decoding, H 32 G 8 D 128": Shape(Q=4, H=32, G=8, D=128, in_order=True, ragged=True),
    "one slot": Shape(Q=1, H=1, G=1, S=128, D=16, C=1, K=1),
    "one shared segment": Shape(G=2, H=2, D=32, S=32, C=2),
}


class Resources(NamedTuple):
    """What one compiled kernel takes."""

    registers: int
    """Per thread."""
    spilled: int
    """Bytes of local memory per thread, mostly spilled registers."""
    shared: int
    """Bytes of shared memory per program."""
    matrix: str
    """The widest matrix instruction: wgmma, tcgen05, mma or none."""


def launches(shape: Shape, arch: int) -> list[launch.Launch]:
    """All launches of a call of this shape with its backward, on tensors without memory."""
    call = _call(shape, GPUS[arch])
    grad = call.query.new_empty(call.query.shape)
    parts, row_sums = launch.new_weight_parts(call), launch.new_row_sums(call)
    d_memory = new_memory_gradient(call.key)
    pairs, sources = call.weights.numel(), call.key.shape[1]
    sizes = (pairs, sources + 1, sources + pairs // SEGMENT, sources + 1, sources + 1)
    lists = InverseIndex(*(torch.empty(n, dtype=torch.int32, device="meta") for n in sizes))
    return [
        launch.forward_launch(call, grad),
        launch.query_launch(call, grad, grad, parts, row_sums),
        *launch.memory_launches(call, grad, row_sums, d_memory, d_memory, lists),
    ]


def _call(shape: Shape, gpu: Gpu) -> launch.Call:
    def empty(*sizes: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    chunks, topk = shape.C, shape.K
    in_memory = chunks * topk if shape.in_order else chunks
    memory = empty(1, in_memory, shape.G, shape.S, shape.D).transpose(2, 3)
    indices = None if shape.in_order else empty(1, chunks, topk, dtype=torch.int64)
    lengths = empty(1, in_memory, dtype=torch.int64) if shape.ragged else None
    return launch.Call(
        empty(1, chunks, shape.Q, shape.H, shape.D),
        memory,
        memory,
        indices,
        empty(1, chunks, topk, dtype=torch.float32),
        lengths,
        shape.D**-0.5,
        True,
        gpu,
    )


def compile_launch(step: launch.Launch, arch: int) -> Any:
    """Compile a launch for sm_`arch` as Triton's launcher would specialize it."""
    names = step.kernel.arg_names
    constants = {p.name for p in step.kernel.params if p.is_constexpr}
    typed = {p.name for p in step.kernel.params if p.do_not_specialize}
    signature, constexprs, attributes = {}, {}, {}
    for position, name in enumerate(names):
        argument = step.arguments[name]
        kind, divisible = (_integer(argument), False) if name in typed else _kind(argument)
        fixed = name in constants or kind is None
        signature[name] = "constexpr" if fixed else kind
        if fixed:
            constexprs[name] = step.arguments[name]
        elif divisible:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(step.kernel, signature, constexprs, attributes)
    options = {name: step.arguments[name] for name in _OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _kind(argument: Any) -> tuple[str | None, bool]:
    """Type of an argument, None if it is compiled in, and whether it is a multiple of 16."""
    if argument is None or (isinstance(argument, int) and argument == 1):
        return None, False
    if isinstance(argument, Tensor):
        return _POINTERS[argument.dtype], True
    if isinstance(argument, int):
        return _integer(argument), argument % 16 == 0
    return "fp32", False


def _integer(number: int) -> str:
    return "i32" if abs(number) < 2**31 else "i64"


def resources(compiled: Any) -> Resources:
    """Read off a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        listing = subprocess.run(
            [tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
    registers = re.search(r"REG:(\d+)", listing)
    spilled = re.search(r"LOCAL:(\d+)", listing)
    stack = re.search(r"STACK:(\d+)", listing)
    assert registers is not None
    assert spilled is not None
    assert stack is not None
    kinds = (kind for kind in ("tcgen05.mma", "wgmma", "mma.sync") if kind in compiled.asm["ptx"])
    return Resources(
        int(registers[1]),
        int(spilled[1]) + int(stack[1]),
        compiled.metadata.shared,
        next(kinds, "none"),
    )


def rows(archs: list[int], names: list[str]) -> Iterator[dict[str, Any]]:
    """One row per shape, architecture and kernel."""
    for name in names:
        for arch in archs:
            for step in launches(SHAPES[name], arch):
                found = resources(compile_launch(step, arch))
                kernel = step.kernel.__name__
                yield {"shape": name, "kernel": kernel, "arch": arch, **found._asdict()}


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description="What the kernels take of a GPU.")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=list(GPUS))
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: what is interpreted cannot be compiled; unset it")
    found = []
    for row in rows(options.arch, options.shape):
        found.append(row)
        print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
