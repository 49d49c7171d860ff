"""Tensors of which each process holds a share, which are FSDP2's DTensors: what all floors need to know of them.

How they come to be is solvers/parallel.py. Every function takes plain tensors too, which are whole everywhere.
"""
from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from scepter.core.env import we
from scepter.core.errors import PeerError

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


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, which every process has, into one that may be a share. Nobody waits."""
    local(target).copy_(local(laid_out(value, target)))


@torch.no_grad()
def fill_from(target: Tensor, whole: Callable[[], Tensor], rows: Callable[[int, int], Tensor] | None) -> None:
    """Copy into a tensor what is read for it: of a share, its rows alone, where they can be read alone. Nobody waits."""
    if rows is not None and is_share(target) and isinstance(share := share_of(target), Share):
        share.rows.copy_(rows(*rows_of(target.shape[0], we.rank)))
    else:
        fill(target, whole())


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


# ------------------------------------------------------------------------------------------------ put together, one after the other
class Share(NamedTuple):
    """What this process holds of a tensor that is cut along its first axis; plain memory, which any thread may use."""

    rows: Tensor
    shape: torch.Size       # of the whole


def share_of(tensor: Any) -> Share | Tensor:
    """A Share of what this process holds a share of; what is whole here as it is. Raises ValueError where it is cut in another way."""
    if not is_share(tensor):
        return tensor.detach()
    if all(placement.is_replicate() for placement in tensor.placements):
        return local(tensor)
    share = Share(local(tensor), tensor.shape)
    first, last = rows_of(tensor.shape[0], we.rank)
    if not all(placement.is_shard(0) for placement in tensor.placements) or len(share.rows) != last - first:
        raise ValueError(f'a tensor of shape {list(tensor.shape)} is cut as {tensor.placements}, and {list(share.rows.shape)} of it is '
                         'here: expected equal shares of its first axis')
    return share


def rows_of(length: int, rank: int) -> tuple[int, int]:
    """The rows, from and to, that a process holds of so many: as torch.chunk cuts, and so FSDP2."""
    size = -(-length // we.world_size)
    return min(rank * size, length), min((rank + 1) * size, length)


class Rounds:
    """Puts tensors together on the CPU. In a round each process gets one that it has asked for, and gives its shares of the others', so
    that none ever has more than one whole tensor beside its own shares.

    turns: for each process the keys of what it gets, in its order. line: of `we`, where it is not the run's own.
    """

    def __init__(self, shares: Mapping[Any, Share], turns: Sequence[Sequence[Hashable]], line: Any):
        self.shares, self.turns, self.line = shares, turns, line or we._talk
        self.done, self.count = 0, max(map(len, turns), default=0)

    def get(self) -> Tensor:
        """The next of this process's own. Raises GivenUp where another process has failed."""
        found = self._round()
        assert found is not None, 'more tensors than turns'
        return found

    def finish(self) -> None:
        """Give what the others still ask for."""
        while self.done < self.count:
            self._round()

    def fail(self) -> None:
        """Have the others give up."""
        if self.done < self.count:
            self.done = self.count
            self._vote(True)

    def _vote(self, has_failed: bool) -> bool:
        import torch.distributed as dist
        flag = torch.tensor(int(has_failed))
        with we.waiting():
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.line)
        return bool(flag)

    def _round(self) -> Tensor | None:
        if self._vote(False):
            self.done = self.count
            raise GivenUp
        try:
            mine = self._exchange()
        except Exception as error:     # the others wait for what does not come: only the end of this process ends that
            raise PeerError(f'rank {we.rank}: shares were not exchanged ({type(error).__name__}: {str(error)[:200]})') from error
        self.done += 1
        return mine

    def _exchange(self) -> Tensor | None:
        import torch.distributed as dist
        mine: Tensor | None = None
        waiting: list[Any] = []
        sent: list[Tensor] = []
        for rank, turn in enumerate(self.turns):
            if self.done >= len(turn):
                continue
            share = self.shares[turn[self.done]]
            if rank != we.rank:
                if share.rows.numel():
                    sent.append(_bytes(share.rows.cpu().contiguous()))     # held until it has arrived
                    waiting.append(dist.isend(sent[-1], rank, group=self.line))
                continue
            mine = torch.empty(share.shape, dtype=share.rows.dtype)
            for source in range(we.world_size):
                first, last = rows_of(len(mine), source)
                if source == rank:
                    mine[first:last] = share.rows
                elif last > first:
                    waiting.append(dist.irecv(_bytes(mine[first:last]), source, group=self.line))
        with we.waiting():
            for one in waiting:
                one.wait()
        return mine


class GivenUp(Exception):
    """Another process has failed, and says itself why."""


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
