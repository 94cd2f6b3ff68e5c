"""Ahead-of-time compilation of every row of tiles, for GPUs that need not be here.

It reports registers, spills inside and outside of loops, waits, asynchronous copies and access widths.

    python -m benchmarks.aot                # a table of all cases
    python -m benchmarks.aot --out FILE     # the same in a file
    python -m benchmarks.aot --json FILE    # the reports as JSON, for tests/kernels/test_aot.py to judge
    python -m benchmarks.aot --sample       # only a few cases
    python -m benchmarks.aot --only TEXT    # cases with all of these texts in their line

The launchers run for real on unfilled CPU tensors; dry.py explains how. cases.py says which launches,
launch.py makes them, report.py reads what the compiler made of one, table.py prints.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
