"""The step's kernels in Triton. This file imports nothing, so that importing the package on a CPU does not
need Triton."""
