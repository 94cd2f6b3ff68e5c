"""The IR lane: every kernel executed from the compiler's own intermediate representation, on a machine
without a GPU.

    python -m benchmarks.ir                 # every row of the tables
    python -m benchmarks.ir --sample        # a part of it, under two minutes
    python -m benchmarks.ir --out FILE      # the log in a file as well

`ttsem` executes TTIR and TTGIR, what Triton compiles a kernel to before LLVM. A case is one launch of one row
of builtin.py, made by the launcher's own code; it goes through three stages:

- sanitize: its TTIR, with every access held against the size of its tensor and every two programs against
  each other; the results within the bounds of tests/tolerances.py of lowrank_kernels.backends.reference in
  fp64.
- validate: the module that each compiler pass receives, from there up to the lowering to LLVM, against the
  results of sanitize.
- races: the last of these modules with the barriers that the lowering puts in, for accesses of two warps that
  no barrier separates, in shared memory and in the memory of the tensors.

What none of them sees: LLVM, ptxas, the GPU; addresses from a table, which the lane replaces by the matrices
themselves; the host's code.
"""
