"""python -m benchmarks.tune: measures which tiles serve a step best on the GPU at hand.

candidates.py: what is tried for which key; compiling.py: candidates compiled in worker processes; bench.py:
data, check and times; contest.py: which candidate wins, and when a table's row is replaced.
"""
