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
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
# Takes its layout on the CPU, the only device that it is for.
ON_CPU_ONLY = {"pref::branch_attention_2", "pref::branch_attention_2_backward"}


class Waits(Exception):
    """Not one of the errors that the meta device raises itself."""


class NoWaitingOperators(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, inputs = operator.name().partition(".")[0], tensors_in([args, kwargs])
        if name in READS and any(tensor.is_meta for tensor in inputs):
            raise Waits(f"{name} reads from the device")
        is_fine = name in ON_CPU_ONLY or is_queued(operator, args, kwargs)
        # A number in a tensor without dimensions is handed over with the operator, not copied.
        mixed = {t.is_meta for t in inputs if t.ndim or name == "aten::copy_"} == {True, False}
        if mixed and not is_fine:
            raise Waits(f"{name} mixes tensors of host and device")
        result = operator(*args, **kwargs)
        if not is_fine and name == COPY and inputs[0].is_meta != result.is_meta:
            raise Waits(f"{name} copies between host and device")
        return result


COPY = "aten::_to_copy"


def is_queued(operator, args: tuple, kwargs: dict) -> bool:
    """Whether this is a copy to the device for which the host does not wait: from pinned memory.
    Without a GPU there is none, but it is known where it would be: `packing.in_one` makes bytes.
    """
    names = [argument.name for argument in operator._schema.arguments]
    given = dict(zip(names, args)) | kwargs
    if not given.get("non_blocking"):
        return False
    source = tensors_in(args)[-1]
    return source.dtype == torch.uint8 and not source.is_meta


class NoWaitingFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in FROM_VALUES and result.is_meta:
            raise Waits(f"{function.__name__} copies from the host")
        if function in INDEXING and args[0].is_meta and has_list(args[1]):
            raise Waits(f"{function.__name__} copies a list from the host")
        return result


def has_list(index: object) -> bool:
    return any(isinstance(one, list) for one in (index if isinstance(index, tuple) else (index,)))


def tensors_in(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
