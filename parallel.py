"""Many processes or one, and the device of each.

`torchrun` starts a process for each GPU. All of them run the same program; each holds a part of
the model (FSDP, HSDP) or a copy of it (DDP), and computes a part of each batch. Without torchrun
there is one process, rank 0 of 1, and no process group.
"""

import ctypes
import math
import os
import platform
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import kernels
from configs import Config, UserError
from model import LLaMA, meta_model

# ---- processes


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather_object(value: Any) -> list[Any]:
    """The `value` of every process, by rank; all of them must call this."""
    # Pickled by PyTorch, but only between the processes of one run, never from a file.
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def on_all_ranks(work: Callable[[], Any]) -> list[Any]:
    """Do `work` in every process; all of them return the results, by rank, or all raise the first
    error. So no process goes on to a collective in which the one that failed is missing."""
    result, error = None, None
    try:
        result = work()
    except (OSError, UserError) as caught:
        error = caught
    gathered = all_gather_object((result, error))
    for _, error in gathered:
        if error:
            raise error
    return [result for result, _ in gathered]


def on_rank_zero(work: Callable[[], Any]) -> Any:
    """Do `work` in process 0 alone; all processes return its result, or all raise its error."""
    return on_all_ranks(lambda: work() if rank() == 0 else None)[0]


def init_distributed(config: Config) -> None:
    """Create the process group if torchrun started this process; otherwise do nothing."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    how: dict[str, Any] = {"timeout": timedelta(minutes=config.timeout_minutes)}
    backend = "gloo"
    if torch.cuda.is_available():
        # gloo beside nccl: manifests, notes and file names travel as objects, on the CPU.
        backend = "cpu:gloo,cuda:nccl"
        # With the device NCCL connects now, so that a bad link shows at once.
        how["device_id"] = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's own store outlives a restart, with the addresses of processes that are gone.
        store, number, world = next(dist.rendezvous("env://", timeout=how["timeout"]))
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        how |= {"store": dist.PrefixStore(f"start_{start}", store), "rank": number,
                "world_size": world}
    dist.init_process_group(backend, **how)


def set_timeout(mesh: DeviceMesh | None, device: torch.device, minutes: float) -> None:
    """A collective on the device that takes longer ends the run."""
    # HSDP's groups do not have the timeout of WORLD, but PyTorch's 10 or 30 minutes.
    for group in (dist.group.WORLD, *mesh.get_all_groups()) if mesh else ():
        group._get_backend(device)._set_default_timeout(timedelta(minutes=minutes))


def micro_batches(config: Config, world: int) -> int:
    """Micro-batches of a process in one step; UserError if the batch is not divisible."""
    # The global batch is part of the experiment: it is never rounded to fit the machines.
    unit = config.micro_batch_size * world
    if config.global_batch_size % unit:
        each, rest = divmod(config.global_batch_size, world)
        fits = math.gcd(each, config.micro_batch_size)
        raise UserError(f"global_batch_size ({config.global_batch_size}) must be a multiple of"
                        f" micro_batch_size x processes ({config.micro_batch_size} x {world} ="
                        f" {unit}): " + ("take another number of processes." if rest else
                        f"--micro_batch_size={fits} would do, and keeps the run."))
    return config.global_batch_size // unit


# ---- the device of a process


def choose_device(config: Config) -> tuple[torch.device, torch.dtype]:
    """The device and the type of the arithmetic; also sets the CPU's threads and malloc. UserError
    if the device is not there."""
    tune_cpu(config.threads)
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # torchrun starts a process for each GPU of a node and numbers them.
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device, n_gpus = torch.device(name), torch.cuda.device_count()
    # A chip without bfloat16 arithmetic emulates it, which is slower than float32.
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    elif device.index < n_gpus:
        torch.cuda.set_device(device)
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        raise UserError(f"device = {name!r} is not here: there are {n_gpus} CUDA devices. \"auto\""
                        " takes what there is.")
    best = "bfloat16" if fast else "float32"
    return device, getattr(torch, best if config.dtype == "auto" else config.dtype)


def tune_cpu(threads: int) -> None:
    """Set the number of threads (0 leaves it), and let malloc keep large buffers."""
    # The number of threads decides the order of sums, so it is part of a run's record.
    if threads:
        torch.set_num_threads(threads)
    # Getting each activation's memory from the system anew costs a small model a third of its step.
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping per large buffer
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap


def check_memory(n_bytes: float, what: str, device: torch.device) -> None:
    """UserError if a process would need more bytes than its device has."""
    if device.type == "cuda":
        have = torch.cuda.mem_get_info(device)[1]
    else:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        n_bytes *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of a machine share it
    if n_bytes > have:
        raise UserError(f"This model needs {n_bytes / 1e9:,.1f} GB here for its {what}, and there"
                        f" are {have / 1e9:,.1f} GB: take a smaller one, or share it among more"
                        ' processes with parallel = "fsdp" (tools/dry_run.py says what it takes).')


def build_for_inference(config: Config) -> LLaMA:
    """The model of a config on its device, without gradients; its weights are uninitialized."""
    kernels.use(config.kernels)
    device, dtype = choose_device(config)
    model = meta_model(config, dtype).cast_for_inference()
    check_memory(sum(p.nbytes for p in model.parameters()), "weights alone", device)
    return model.materialize(device)


# ---- sharing out the model


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
    """The processes as FSDP sees them: a line, or groups; None without torchrun."""
    if not dist.is_initialized():
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
        if config.activation_checkpointing == "full":
            recompute_in_backward(block)
        if config.compile:
            block.compile()
    # FSDP2: each process holds a float32 shard of every weight. Block after block, the weights are
    # gathered in `dtype` just before they are used, and let go after it.
    if mesh:
        # What stays in float32 until it is used (None) has the bits that it has in one process; in
        # DDP's groups of one nothing is gathered, and it costs nothing. Inputs are not cast,
        # because the rotary table must stay float32.
        kept = config.same_bits or config.parallel == "ddp"
        policy = MixedPrecisionPolicy(None if kept else dtype, getattr(torch, config.reduce_dtype),
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
    """FSDP's sum of the gradients in the order of the micro-batches, for `same_bits`: a number is
    ((g0 + g1) + g2) + ..., as one process adds them in .grad. docs/scale.md says what it costs."""

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches, self.done = micro_batches, 0
        self.total: Tensor | None = None  # (this shard of all gradients,), flat

    def allocate(self, size: tuple[int, ...], **how: Any) -> Tensor:
        return torch.empty(*size, **how)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup,
                 op: Any, async_op: bool = False) -> None:
        # Process r of N has computed micro-batch r, N + r, 2N + r, ...: they are in order by rank.
        pieces = torch.empty_like(input_tensor)  # (N * shard,): this shard's gradient, by rank
        dist.all_to_all_single(pieces, input_tensor, group=group)
        for piece in pieces.chunk(group.size()):  # (shard,)
            self.total = piece.clone() if self.total is None else self.total.add_(piece)
        # FSDP adds the output to .grad: zeros, until the last micro-batch.
        self.done += 1
        output_tensor.zero_()
        if self.done % self.micro_batches == 0:
            output_tensor.copy_(self.total)
            self.total = None


def recompute_in_backward(block: nn.Module) -> None:
    """Activation checkpointing: keep only the input of a block, and compute the rest again in the
    backward pass."""
    inner = block.forward
    # A closure and not a functools.partial, which torch.compile does not look into.
    block.forward = lambda *inputs: checkpoint(inner, *inputs, use_reentrant=False,
                                               preserve_rng_state=False)
