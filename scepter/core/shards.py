"""Tensors of which each process holds a share, which are FSDP2's DTensors: what all floors need to know of them.

How they come to be is solvers/parallel.py. Every function takes plain tensors too, which are whole everywhere.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scepter.core.env import we

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


PLAIN = {Tensor, torch.nn.Parameter}


def is_share(tensor: Tensor) -> bool:
    """Whether this process holds a part of it. Needs no import where there cannot be any: that of DTensor takes half a second."""
    # asked of every weight at every step: the type answers in a tenth of the time of an attribute that is not there
    return type(tensor) not in PLAIN and hasattr(tensor, '__tensor_flatten__') and hasattr(tensor, 'to_local')


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor: the same memory."""
    return tensor.to_local().detach() if is_share(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """The tensor itself. All processes ask for the same tensors in one order: each waits here for the others."""
    return tensor.detach().full_tensor() if is_share(tensor) else tensor


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, which every process has, into one that may be a share. Nobody waits."""
    local(target).copy_(local(laid_out(value, target)))


def laid_out(value: Tensor, like: Any) -> Tensor:
    """This process's share of a whole tensor, cut as another one is; the tensor itself where that one is whole."""
    if not is_share(like):
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.detach(), like.device_mesh, like.placements, src_data_rank=None)


def copy_of(tensor: Any, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """A copy in its own layout and, of a share, a share again; one on the CPU is put together there, on no GPU."""
    copied = local(tensor).detach().to(device, dtype, copy=True)
    if not is_share(tensor):
        return copied
    from torch.distributed.tensor import DTensor
    mesh = tensor.device_mesh if copied.device.type == tensor.device_mesh.device_type else _mesh_of_cpus()
    return DTensor.from_local(copied, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def _mesh_of_cpus() -> DeviceMesh:
    from torch.distributed.device_mesh import DeviceMesh
    return DeviceMesh.from_group(we._talk, 'cpu')
