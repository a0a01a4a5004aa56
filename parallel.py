"""Many processes, or one: meeting, sharing out the model, and finding out who is missing.

`torchrun` starts a process for each GPU. All of them run the same program; each holds a part of
the model (FSDP, HSDP) or a copy of it (DDP), and computes a part of each batch. A process that
nobody has started so is alone: rank 0 of 1, and nothing here does anything.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import kernels  # noqa: F401  (registers the operator that SAC_SAVE_OPS names)
from configs import Config, UserError, nearest
from model import LLaMA


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather_object(value: Any) -> list[Any]:
    """What each process has as `value`, by rank; all of them must call this."""
    # Pickled by PyTorch, but only between the processes of one run, never from a file.
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def on_rank_zero(work: Callable[[], Any]) -> Any:
    """Do `work` in the first process alone; all of them return its result, or raise its error."""
    # The error travels like a result: without it the other processes would wait for the first.
    result, error = None, None
    if rank() == 0:
        try:
            result = work()
        except (OSError, UserError) as caught:
            error = caught
    result, error = all_gather_object((result, error))[0]
    if error:
        raise error
    return result


def init_distributed(config: Config) -> None:
    """Meet the other processes, if torchrun started this one; alone there is no process group."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    how: dict[str, Any] = {"timeout": timedelta(minutes=config.timeout_minutes)}
    backend = "gloo"
    if torch.cuda.is_available():
        # gloo beside nccl: manifests, notes and file names travel as objects, on the CPU.
        backend = "cpu:gloo,cuda:nccl"
        # With the device NCCL connects now, where a bad link is seen at once, and hsdp's groups are
        # split off from what is connected.
        how["device_id"] = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's own store outlives a restart, with the addresses of processes that are gone.
        store, number, world = next(dist.rendezvous("env://", timeout=how["timeout"]))
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        how |= {"store": dist.PrefixStore(f"start_{start}", store), "rank": number,
                "world_size": world}
    dist.init_process_group(backend, **how)


@contextlib.contextmanager
def naming_missing_ranks(config: Config) -> Iterator[None]:
    """A collective that fails says that it has waited, and not for whom: find out."""
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no class of their own.
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        if not dist.is_initialized():
            raise UserError(f"The processes that torchrun has started did not meet: {error}")
        missing = ", ".join(map(str, missing_ranks())) or "none"
        raise UserError(f"A collective failed or took longer than timeout_minutes ="
                        f" {config.timeout_minutes:g} ({str(error).splitlines()[0]}). Of ranks 0 to"
                        f" {world_size() - 1} there was no answer from: {missing} (ended, frozen,"
                        " or waiting for one that is). The same command goes on from the newest"
                        " checkpoint.")


def missing_ranks(seconds: float = 5) -> list[int]:
    """After a collective has failed: the processes in which none fails within `seconds`."""
    # Each process writes its number into the store, which needs none of the groups that failed.
    store, give_up = dist.distributed_c10d._get_default_store(), time.monotonic() + seconds
    missing = []
    try:
        store.set(f"answers_{rank()}", "")
        for r in range(world_size()):
            left = timedelta(seconds=max(0.1, give_up - time.monotonic()))
            try:
                store.wait([f"answers_{r}"], left)
            except dist.DistStoreError:  # a time-out
                missing.append(r)
    except dist.DistNetworkError:
        return [0]  # whose process keeps the store
    return missing


# ---------------------------------------------------------------------------------------------
# sharing out the model


def shard_size(config: Config, world: int) -> int:
    """Processes that share one copy of weights, gradients and optimizer state."""
    if config.parallel == "fsdp":
        return world
    if config.parallel == "ddp":
        return 1
    # A group of hsdp is a node (8 GPUs where torchrun does not say): its members exchange the most,
    # and NVLink inside a node is about ten times as fast as the network between nodes.
    size = min(world, config.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", 8)))
    if world % size:
        raise UserError(f"hsdp: {world} processes cannot be divided into groups of {size};"
                        " give a --shard_size that divides them.")
    return size


def build_device_mesh(config: Config, device_type: str) -> DeviceMesh | None:
    """The processes as FSDP sees them: a line, or hsdp's groups; None without FSDP."""
    if not dist.is_initialized() or config.parallel == "ddp":
        return None
    size = shard_size(config, world_size())
    if config.parallel == "fsdp":
        return init_device_mesh(device_type, (size,))
    return init_device_mesh(device_type, (world_size() // size, size),
                            mesh_dim_names=("replicate", "shard"))


def build_model(config: Config, device: torch.device, dtype: torch.dtype,
                mesh: DeviceMesh | None) -> LLaMA:
    """The model, sharded over a mesh of processes if there is one; no values in its weights yet."""
    # What is to be sharded is made on the meta device and only then given memory: no process ever
    # holds more than its share.
    with torch.device("meta" if mesh else device):
        model = LLaMA(config, dtype)
    for block in model.model.layers:
        apply_activation_checkpointing(block, config.activation_checkpointing)
        if config.compile:
            block.compile()
    # FSDP2: each process holds a float32 shard of every weight. Block after block, the weights are
    # gathered in `dtype` just before they are used, and let go after it.
    if mesh:
        # Inputs are not cast to `dtype`, because the rotary table must stay float32.
        policy = MixedPrecisionPolicy(None if config.same_bits else dtype,
                                      getattr(torch, config.reduce_dtype),
                                      cast_forward_inputs=False)
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
            if config.same_bits:
                module.set_gradient_divide_factor(1.0)
                module.set_custom_reduce_scatter(
                    OrderedReduceScatter(micro_batches(config, world_size())))
        model.materialize(device)
    return model


class OrderedReduceScatter:
    """FSDP's sum of the gradients, in the order of the micro-batches, for `same_bits`.

    Process r of N computes the micro-batches r, N + r, 2N + r, ... After each, every process gets
    all N gradients of its shard, and adds them one by one to those before. So each number is
    ((g0 + g1) + g2) + ..., as one process adds them in .grad, and no bit depends on N. The bytes
    are those of the reduce-scatter; a second shard of the gradients is held.
    """

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches, self.done = micro_batches, 0
        self.total: Tensor | None = None  # (this shard of all gradients,), flat

    def allocate(self, size: tuple[int, ...], **how: Any) -> Tensor:
        return torch.empty(*size, **how)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup,
                 op: Any, async_op: bool = False) -> None:
        pieces = torch.empty_like(input_tensor)  # (N * shard,): every process's gradient of mine
        dist.all_to_all_single(pieces, input_tensor, group=group)
        for piece in pieces.chunk(group.size()):  # (shard,)
            self.total = piece.clone() if self.total is None else self.total.add_(piece)
        # FSDP adds what it is given to .grad: nothing, until the last micro-batch.
        self.done += 1
        output_tensor.zero_()
        if self.done % self.micro_batches == 0:
            output_tensor.copy_(self.total)
            self.total = None


# What selective activation checkpointing keeps of a block: products of matrices and attention.
SAC_SAVE_OPS = [getattr(torch.ops.aten, name).default for name in (
    "mm", "addmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention_for_cpu")]
SAC_SAVE_OPS.append(torch.ops.kernels.attention.default)


def apply_activation_checkpointing(block: nn.Module, kind: str) -> None:
    """Compute a block again in the backward pass: "full" keeps its input alone, "selective" also
    what SAC_SAVE_OPS have computed."""
    if kind == "none":
        return
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kind == "selective":
        how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, SAC_SAVE_OPS)
    inner = block.forward
    # A closure and not a functools.partial, which torch.compile does not look into.
    block.forward = lambda *inputs: checkpoint(inner, *inputs, **how)


def wrap_ddp(model: LLaMA, config: Config, device: torch.device) -> nn.Module:
    """DDP around the model, if that is what was asked for."""
    if not dist.is_initialized() or config.parallel != "ddp":
        return model
    wrapped = DistributedDataParallel(model, [device] if device.type == "cuda" else None,
                                      gradient_as_bucket_view=True)
    if config.reduce_dtype == "bfloat16":  # under its own name the hook is refused on CPUs
        wrapped.register_comm_hook(None, lambda state, bucket: default_hooks.bf16_compress_hook(
            state, bucket))
    return wrapped


def micro_batches(config: Config, world: int) -> int:
    """Micro-batches of a process in one step; UserError if they do not come out even."""
    # The global batch is part of the experiment: it is never rounded to fit the machines.
    unit = config.micro_batch_size * world
    if config.global_batch_size % unit:
        raise UserError(f"global_batch_size ({config.global_batch_size}) must be a multiple of"
                        f" micro_batch_size x processes ({config.micro_batch_size} x {world} ="
                        f" {unit}); {nearest(config.global_batch_size, unit)}.")
    if config.same_bits and world > 1 and config.parallel != "fsdp":
        raise UserError(f"same_bits needs parallel = 'fsdp', found {config.parallel!r}: it is in"
                        " FSDP's sums that the order is kept.")
    return config.global_batch_size // unit
