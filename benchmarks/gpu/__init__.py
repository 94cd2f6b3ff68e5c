"""python -m benchmarks.gpu: what one command turns a GPU into. Its own imports are the standard library's
alone."""
