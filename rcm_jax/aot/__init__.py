"""Compiling for GPUs that are not here, to the end, and reading what came out: memory, FLOPs, collectives, kernels."""
