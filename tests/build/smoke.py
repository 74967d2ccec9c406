"""Run by test_wheel.py in other environments: calls the ops of the installed files, prints facts as JSON."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

import cnnfast
from cnnfast.ops.cuda_kernels import KERNELS

torch.manual_seed(0)
x = torch.randn(2, 24, 15, 17).to(memory_format=torch.channels_last)
weight, bias, pointwise = torch.randn(24, 1, 3, 3), torch.randn(24), torch.randn(40, 24, 1, 1)
depthwise = F.conv2d(x, weight, bias, padding=1, groups=24)
errors = (
    cnnfast.depthwise_conv2d(x, weight, bias, padding=1, activation="relu") - depthwise.relu(),
    cnnfast.separable_conv2d(x, weight, pointwise, bias, padding=1) - F.conv2d(depthwise, pointwise),
)
facts = {
    "torch": torch.__version__,
    "from": str(Path(cnnfast.__file__).parent),
    "error": max(error.abs().max().item() for error in errors),
    "cuda_missing": cnnfast._library.cuda_missing,
}
if facts["cuda_missing"] is None:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    facts["cuda_kernels"] = [op for op in KERNELS if has_kernel(f"cnnfast_cuda::{op}", "CUDA")]
print(json.dumps(facts))
