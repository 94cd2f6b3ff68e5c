"""The step's kernels in Triton. Nothing is imported here, so that importing the package on a CPU stays free
of Triton."""
