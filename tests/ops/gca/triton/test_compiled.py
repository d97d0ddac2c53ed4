"""The kernels compiled for GPUs that are not there: registers, spills, shared memory."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

# Largest shared memory of a program, and whether the widest matrix instructions are to be had.
LIMITS = {
    80: (166912, "mma.sync"),
    86: (101376, "mma.sync"),
    90: (232448, "wgmma"),
    100: (232448, "tcgen05.mma"),
}
# Bytes a thread. None is best; so few cost less than what a smaller tile would.
MOST_SPILLED = 128

QUICK = ["128M, landmark in the block", "H 32 G 8 D 128", "decoding"]
REST = [
    *("128M", "H 12 G 4", "H 12 G 4, landmark in the block", "fp16", "chunk encoder", "D 256"),
    *(
        "H 32 G 8 D 128, landmark in the block",
        "D 80, S 33",
        "decoding, H 32 G 8 D 128",
    ),
]


def report(path: Path, shapes: list[str], archs: list[int]) -> list[dict]:
    command = [sys.executable, "-m", "drt.ops.gca.triton.report", "--json", str(path)]
    command += ["--shape", *shapes, "--arch", *map(str, archs)]
    # A process of its own: in this one Triton interprets.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    rows = json.loads(path.read_text())
    kernels = ("forward_kernel", "query_kernel", "memory_kernel")
    found = {(row["shape"], row["arch"], row["kernel"]) for row in rows}
    assert found >= set(product(shapes, archs, kernels))
    return rows


def check(rows: list[dict]) -> None:
    for row in rows:
        shared, matrix = LIMITS[row["arch"]]
        assert row["registers"] <= 255, row
        assert row["spilled"] <= MOST_SPILLED, row
        assert row["shared"] <= shared, row
        if row["kernel"] == "reduce_kernel":
            continue
        # A few queries are too few rows for anything but the small instructions.
        small = row["shape"].startswith(("decoding", "one")) or row["shape"] == "D 80, S 33"
        assert row["matrix"] == matrix or small, row


def test_main_shapes(tmp_path: Path) -> None:
    check(report(tmp_path / "rows.json", QUICK, [80, 90, 100]))


def test_counts_of_one(tmp_path: Path) -> None:
    """Triton compiles numbers that are 1 in, unless it is told not to; its interpreter does not."""
    check(report(tmp_path / "rows.json", ["one slot", "one shared segment"], [90]))


def test_the_interpreter_has_nothing_to_report() -> None:
    command = [sys.executable, "-m", "drt.ops.gca.triton.report", "--arch", "90"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


@pytest.mark.slow
def test_other_shapes(tmp_path: Path) -> None:
    check(report(tmp_path / "rows.json", REST, [80, 90, 100]))


@pytest.mark.slow
def test_float32_fits_every_gpu(tmp_path: Path) -> None:
    """It is there to be exact: it may spill, and must not ask for more than there is."""
    shapes = ["fp32", "fp32 D 128", "fp32 D 256"]
    for row in report(tmp_path / "rows.json", shapes, list(LIMITS)):
        assert row["shared"] <= LIMITS[row["arch"]][0], row


def test_programs_cover_all_rows() -> None:
    """Tiles of any sizes hold every row of a chunk once."""
    pytest.importorskip("triton")
    from drt.ops.gca.triton.tiles import FORWARD, QUERY, Gpu, Sizes, memory_tiles, query_tiles

    for rows in (1, 3, 16, 17, 63, 64, 65, 100, 192, 195, 256, 260, 520, 2049):
        for size, width in ((1, 16), (33, 80), (64, 64), (65, 64), (64, 128), (256, 256)):
            for itemsize in (2, 4):
                for gpu in (Gpu(), Gpu(101376, reads_shared=False)):
                    sizes = Sizes(rows, size, width, itemsize, gpu)
                    for tiles in (query_tiles(sizes, FORWARD), query_tiles(sizes, QUERY)):
                        covered = sum(tiles.blocks) * tiles.parts
                        assert rows <= covered
                        assert tiles.block_size * tiles.splits >= size
                        assert all(block & (block - 1) == 0 for block in tiles.blocks)
                        # No program is without rows.
                        assert sum(tiles.blocks) * (tiles.parts - 1) < rows
                    tiles = memory_tiles(sizes)
                    full, last = tiles.blocks
                    assert rows % full <= last or last == 0
                    assert tiles.block_size * tiles.splits >= size
