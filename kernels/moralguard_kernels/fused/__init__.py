"""Triton kernels of the ops in ``moralguard_kernels.reference_ops``: same names, same arguments, same results.

``launch`` holds the entry points; the other modules hold device code, imports pointing down: numerics, noise, terms, then the
kernels. Nothing here is imported before a CUDA tensor asks for it.
"""
