"""Code that makes the host wait for its device, found without one: the meta device stands for it.

A GPU works through a queue. A copy from ordinary memory, or a value that Python reads, waits until
all that is queued before is done; meanwhile nothing new is queued, and the GPU then idles.
"""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What reads values, or the number of results, from the device.
READS = {
    *("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero"),
    *("aten::masked_select", "aten::repeat_interleave", "aten::bincount", "aten::_unique2"),
}
# Made by copying from a Python value. Their copy is hidden from TorchDispatchMode.
FROM_VALUES = {torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor}
# Takes its layout on the CPU, where alone it runs.
ON_CPU_ONLY = {"pref::branch_attention", "pref::branch_attention_backward"}


class Waits(Exception):
    """Not one of the errors that the meta device raises itself."""


class NoWaitingOperators(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, inputs = operator.name().partition(".")[0], tensors_in([args, kwargs])
        if name in READS and any(tensor.is_meta for tensor in inputs):
            raise Waits(f"{name} reads from the device")
        result = operator(*args, **kwargs)
        devices = {t.is_meta for t in inputs + tensors_in(result) if t.ndim or name == COPY}
        if len(devices) == 2 and name not in ON_CPU_ONLY and not is_queued(operator, args, kwargs):
            raise Waits(f"{name} copies between host and device")
        return result


COPY = "aten::_to_copy"


def is_queued(operator, args: tuple, kwargs: dict) -> bool:
    """Whether this is a copy to the device for which the host does not wait: from pinned memory,
    which there is none of without a GPU.
    """
    names = [argument.name for argument in operator._schema.arguments]
    given = dict(zip(names, args)) | kwargs
    return bool(given.get("non_blocking")) and not tensors_in(args)[-1].is_meta


class NoWaitingFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in FROM_VALUES and result.is_meta:
            raise Waits(f"{function.__name__} copies from the host")
        return result


def tensors_in(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
