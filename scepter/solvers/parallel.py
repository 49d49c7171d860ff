"""Several processes, one network: whole on each of them (PARALLEL: ddp), or each holding a share of every weight (fsdp).

Whole networks: gradients are averaged here, once per step, and not by PyTorch's DistributedDataParallel: that averages within one backward
pass which must reach every weight, and after one that does not (EVERY, two losses) leaves gradients as they are without a word
(docs/benchmarks.md). Shares: PyTorch's FSDP2 gathers the weights of one block after the other for
its forward and backward pass, and hands each process the averaged gradient of its shares; what an optimizer, an average and a checkpoint
see are DTensors (core/shards.py).
"""
from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scepter.core import pulse
from scepter.core.env import we
from scepter.core.faults import ConfigError
from scepter.core.shards import is_share, local
from scepter.solvers.optim import NOT_FUSED, NamedOptimizer

BUCKET = 25 * 2 ** 20     # bytes; large enough for a network's full speed, small enough not to double the gradients' memory


# ------------------------------------------------------------------------------------------------ whole networks
def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace each gradient by its mean over all processes, in buckets of one type. That of a share is the mean already.

    One that only some processes have counts as zero in the others; one that none has stays absent, or an optimizer would let such
    weights decay on several processes and not on one. Called once per optimizer step, after the last of ACCU_STEP backward passes:
    nothing is sent for the others.
    """
    if not we.is_distributed or not (parameters := [p for p in parameters if not is_share(p)]):
        return
    has_grad = we.all_reduce(torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=we.device), 'max').tolist()
    for parameter, is_there in zip(parameters, has_grad):
        if is_there and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    _in_buckets([p.grad for p in parameters if p.grad is not None], lambda flat: we.all_reduce(flat, 'mean'))


def share_buffers(buffers: Sequence[Tensor]) -> None:
    """Give all processes the main one's buffers. Each has counted its own samples' statistics, as batch normalisation does; a checkpoint
    holds one set of them, so a resumed run would go on with others than an undisturbed one."""
    if we.is_distributed:
        import torch.distributed as dist
        with pulse.waiting():
            _in_buckets(buffers, lambda flat: dist.broadcast(flat, src=0))


def _in_buckets(tensors: Sequence[Tensor], exchange: Callable[[Tensor], Any]) -> None:
    """Call exchange, which works in place, on all values, few large tensors of one type in the place of many small ones."""
    bucket: list[Tensor] = []
    held = 0
    for i, tensor in enumerate(tensors):
        bucket.append(tensor)
        held += tensor.nbytes
        following = tensors[i + 1] if i + 1 < len(tensors) else None
        if following is None or following.dtype != tensor.dtype or held > BUCKET:
            flat = torch.cat([t.flatten() for t in bucket])
            exchange(flat)
            torch._foreach_copy_(bucket, [v.view_as(t) for t, v in zip(bucket, flat.split([t.numel() for t in bucket]))])
            bucket, held = [], 0


def with_shared_statistics(model: nn.Module) -> nn.Module:
    """The network with batch normalisation over the samples of all processes. Raises ConfigError where PyTorch has none."""
    if we.device.type != 'cuda':
        raise ConfigError(f'SYNC_BATCH_NORM is true, but PyTorch can do that on CUDA alone, and ENV.DEVICE is {we.device.type}: '
                          'group normalisation does not depend on the batch')
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


# ------------------------------------------------------------------------------------------------ both
def total_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The global norm of all gradients, float32 []; the same on every process."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([g for g in gradients if not is_share(g)], foreach=True)
    if not any(map(is_share, parameters)):
        return norm
    shares = [local(g) for g in gradients if is_share(g)]
    # squared in float64: a norm that float32 can hold has a square that it cannot
    squares = torch.nn.utils.get_total_norm(shares, foreach=True).double().square().to(we.device)
    return (norm.double().square().to(we.device) + we.all_reduce(squares)).sqrt().float()


def clip(parameters: Sequence[Tensor], limit: float, norm: Tensor) -> None:
    """Scale all gradients down so that their global norm, which is larger, comes to be the limit."""
    torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], limit / (norm + 1e-6))


# ------------------------------------------------------------------------------------------------ shares
def shard(model: nn.Module, dtype: torch.dtype) -> None:
    """Leave each process its share of every weight of a network, on its device, and have FSDP2 gather them where they are computed with.

    What is gathered together: each of a part's main_blocks(); a part whose forward_methods are called from outside; all the rest, for
    the whole of the network's call. Blocks are gathered in `dtype`, the type of the arithmetic, but for parts that keep full precision;
    gradients are averaged in float32. Weights without a dimension cannot be cut: every process has them whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(we.device.type, (we.world_size,))
    uncut = {p for p in model.parameters() if p.ndim == 0 or p.is_meta}    # on no device: a part that rests (models/resting.py)
    for p in [p for p in model.parameters() if not p.is_meta]:
        p.data = p.data.to(we.device) if p.ndim == 0 else p.data.contiguous()    # FSDP2 takes no other layout

    def cut(module: nn.Module, kind: torch.dtype | None = None) -> None:
        name = type(module).__name__
        policy = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=uncut)
        type(module).__name__ = name    # of the class that FSDP2 puts in its place: messages name the user's

    with model.same_weights():
        for part in reversed([m for m in model.modules() if hasattr(m, 'main_blocks')]):    # inner ones first
            if part is not model and any(p.is_meta for p in part.parameters()):
                continue
            for block in part.main_blocks():
                cut(block, None if part.keeps_float32 or dtype == torch.float32 else dtype)
            if part is not model and part.forward_methods and any(True for _ in part.parameters()):
                cut(part)
                for name in part.forward_methods:
                    _gather_for(part, name)
        cut(model)


def _gather_for(part: nn.Module, name: str) -> None:
    """Have the weights of a part gathered for one of its methods, which keeps its signature: FSDP2's wrapper loses the first argument."""
    from torch.distributed.fsdp import register_fsdp_forward_method
    signature = inspect.signature(getattr(type(part), name))
    register_fsdp_forward_method(part, name)
    getattr(part, name).__func__.__signature__ = signature


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a share of this network's weights."""
    fsdp = sys.modules.get('torch.distributed.fsdp')    # half a second of imports, spared where nobody has sharded anything
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def release(model: nn.Module) -> None:
    """Leave of all weights the shares alone. A backward pass does it by itself; here for a step without one."""
    for part in _sharded_parts(model):
        part.reshard()


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every process has the network whole, for passes of which each makes as many as it has samples; within itself nothing.

    All processes enter and leave together.
    """
    parts = [] if 'is_gathered' in model.__dict__ else _sharded_parts(model)
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    if parts:
        model.__dict__['is_gathered'] = True
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)    # the outermost is needed again at once
            part.reshard()
        if parts:
            del model.__dict__['is_gathered']


def _sharded_parts(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if is_sharded(m)] if is_sharded(model) else []


def compile_blocks(model: nn.Module) -> None:
    """Compile, in place, each block that FSDP2 will gather by itself: what gathers it cannot be compiled. Without blocks, the network."""
    blocks = [block for part in model.modules() if hasattr(part, 'main_blocks') for block in part.main_blocks()
              if any(p.requires_grad for p in block.parameters())]
    for block in blocks:
        block.compile()
    if not blocks:
        model.compile_network()


def refuse_unfit(optimizers: Sequence[NamedOptimizer]) -> None:
    """Raises ConfigError where shares cannot be trained so."""
    if len(losses := {o.loss for o in optimizers}) > 1:
        raise ConfigError(f'PARALLEL is fsdp, which gathers weights for one backward pass, but the optimizers follow {len(losses)} losses '
                          f'({", ".join(sorted(losses))}): use PARALLEL: ddp')
    for o in optimizers:
        kind = type(o.optimizer).__name__
        if kind in NOT_BY_SHARES:
            raise ConfigError(f'PARALLEL is fsdp, but {kind} {NOT_BY_SHARES[kind]}: use another optimizer, or PARALLEL: ddp')
        if o.optimizer.defaults.get('fused') and kind in NOT_FUSED:
            raise ConfigError(f'PARALLEL is fsdp, but PyTorch cannot step shares by the fused {kind}: leave FUSED away')


# PyTorch 2.14, tried with two processes: Muon even steps without a word, and wrongly
NOT_BY_SHARES = {'Adafactor': 'looks at whole rows and columns of a weight', 'Muon': 'looks at whole matrices',
                 'Rprop': 'writes where a sign changes, which PyTorch cannot do to a share'}
