"""What `cnnfast bench` runs: cnnfast timed against what a user would otherwise pick, outputs compared first.

timing    interleaved samples, quantiles, bootstrap intervals, peak memory
ceilings  what this machine can do at all: GEMM rate, copy bandwidth
peers     the same layers run by eager PyTorch and by torch.compile
measure   one case in one process; many cases in fresh processes
ops       the cases of `cnnfast bench ops`;  conv_ops, channel_ops, backward: their kinds, the last gradients alone
models    the cases of `cnnfast bench models`;  train: those of `cnnfast bench train`
gpu       the parts of `cnnfast bench gpu`;  gpu_tests: the first of them;  device: a GPU's times and ceilings
report    samples -> rows, JSON;  tables: rows as text;  plot: as a picture;  environment: where they were measured
performance  JSON files -> docs/performance.md;  cells: what is in them, and the bars that they are held against
"""
