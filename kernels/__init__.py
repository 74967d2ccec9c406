"""Triton kernels, one op a file: kernels first, launchers below them. Nothing of cnnfast is imported here.

<op>_weight.py has the gradient of an op's weight, where one file would be long; spatial.py and products.py have what
several ops' kernels share; stats.py has the launchers of the ops that return more than an image.

Prefixes: p_ pointers, b_ blocks of values, o_ offsets, m_ masks, i_ program ids; x, weight, y, ... are base pointers.
Launchers take the arguments of the op's schema (csrc/ops.cpp) in its order, less `backend`.
"""
