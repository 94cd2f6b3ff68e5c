"""python -m lowrank_kernels: the environment report."""

from .environment import report

if __name__ == "__main__":
    print(report())
