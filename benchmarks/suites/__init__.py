"""The suites by name. One is a module with

cases(selection, on_gpu) -> list of cases  a case has a unique `label`, which begins with the suite's name
run(case, context) -> rows                    what was measured, as records.py has it; checked before timed
"""

from . import gradients, host, kernel, memory, refresh, rso, step

SUITES = {"step": step, "kernel": kernel, "refresh": refresh, "memory": memory, "rso": rso, "gradients": gradients, "host": host}
