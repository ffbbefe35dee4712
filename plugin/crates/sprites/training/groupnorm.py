"""A faster GroupNorm for channels-last tensors on the CPU.

PyTorch's own backward pass took a fifth of a training step here. ``install`` swaps the forward of every GroupNorm in a
module and leaves its parameters alone; without a C++ compiler the stock one stays in place.
"""
import functools
import pathlib
import types
import warnings

import torch
import torch.nn.functional as F

FLAGS = ["-O3", "-march=native", "-ffast-math"]


@functools.cache
def kernel():
    from torch.utils.cpp_extension import load_inline
    source = pathlib.Path(__file__).with_name("groupnorm.cpp").read_text()
    return load_inline("sprites_groupnorm", source, functions=["group_norm_forward", "group_norm_backward"],
                       extra_cflags=FLAGS)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, groups, eps):
        y, stats = kernel().group_norm_forward(x, gamma.detach(), beta.detach(), groups, eps)
        ctx.save_for_backward(x, gamma, stats)
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gamma, stats = ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx, dgamma, dbeta = kernel().group_norm_backward(x, dy, gamma.detach(), stats, ctx.groups)
        return dx, dgamma, dbeta, None, None


def _forward(self, x):
    if x.dim() == 4 and x.dtype in (torch.bfloat16, torch.float32) and self.weight.dtype == torch.float32:
        x = x.contiguous(memory_format=torch.channels_last)
        return _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
    return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def install(module):
    try:
        kernel()
    except Exception as error:  # no compiler: slower, but the same numbers
        warnings.warn(f"stock GroupNorm stays in place: {error}")
        return module
    for m in module.modules():
        if isinstance(m, torch.nn.GroupNorm):
            m.forward = types.MethodType(_forward, m)
    return module
