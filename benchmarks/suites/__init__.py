"""The suites by name. One is a module with

cases(selection, on_gpu) -> list of cases     a case has a `label`, which begins with the suite's name and is unique
run(case, context) -> rows                    what was measured, as records.py describes it; checked before it is timed
"""

from . import host, kernel, memory, refresh, rso, step

SUITES = {"step": step, "kernel": kernel, "refresh": refresh, "memory": memory, "rso": rso, "host": host}
