"""Estimate the time and disk of a run, and measure its memory, without the machines for it.

    python tools/dry_run.py configs/amber_7b.py --world_size=224

The real model is wrapped and run as train.py does it, on FakeTensors, which have no storage.
"""

import bisect
import dataclasses
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker  # noqa: E402
from torch.distributed._tools.mem_tracker import MemTracker  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

import kernels  # noqa: E402
import parallel  # noqa: E402
import train  # noqa: E402
from configs import Config, load, run_command  # noqa: E402
from kernels.lang import INSTALLED  # noqa: E402
from model import meta_model  # noqa: E402

KINDS = {  # names of torch's memory trackers -> ours
    "Sharded Param": "weights", "Parameter": "weights", "Sharded Grad": "gradients",
    "Gradient": "gradients", "OptState": "AdamW", "Optstate": "AdamW",
    "Unsharded Param": "weights in use", "All Gather": "weights in use",
    "Unsharded Grad": "gradient buffers", "Reduce Scatter": "gradient buffers",
    "Activation": "activations", "Temp": "temporary",
}


@dataclass
class Flags:
    """What this tool takes beside the settings."""

    world_size: int = 1  # GPUs
    gpu_gb: float = 80.0  # memory of a GPU
    mfu: float = 0.357  # model FLOPs utilization, a guess: Amber's


def measure_memory(config: Config, dtype: torch.dtype, world: int) -> dict[str, float]:
    """Bytes of rank 0 of `world` at the peak of a step, by kind."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        cpu = torch.device("cpu")
        mesh = parallel.build_device_mesh(config, "cpu") if world > 1 else None
        with FakeTensorMode():
            eager = dataclasses.replace(config, compile=False)
            model = parallel.build_model(eager, cpu, dtype, mesh)
            [optimizer] = train.make_optimizers(config, model)
            ids = torch.zeros(config.micro_batch_size, config.seq_len, dtype=torch.int64)
            # One step before the tracker looks, so that AdamW's state is there: the tracker counts
            # sharded optimizer steps at their unsharded size.
            model(ids, ids)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            if mesh:
                tracker = FSDPMemTracker(model, optimizer)
            else:
                tracker = MemTracker()
                tracker.track_external(model, optimizer)
            with tracker:
                # Two micro-batches are enough: the second meets the gradients of the first.
                for _ in range(min(2, parallel.micro_batches(config, world))):
                    tracker.reset_mod_stats()
                    model(ids, ids)[0].backward()
                if not mesh:  # of a sharded gradient, too, it counts the unsharded size
                    train.clip_gradients(SimpleNamespace(model=model, config=config))
    finally:
        dist.destroy_process_group()
    memory = dict.fromkeys(KINDS.values(), 0.0)
    for kind, n_bytes in tracker.get_tracker_snapshot("peak")[cpu].items():
        if name := KINDS.get(getattr(kind, "value", kind)):
            memory[name] += n_bytes
    return memory


def main(argv: list[str]) -> None:
    config, flags = load(argv, Flags)
    world, kept = flags.world_size, config.keep_train_state or config.n_chunks
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    backend = config.kernels
    if backend == "auto":  # what it comes to on a GPU
        backend = "triton" if INSTALLED and config.head_dim in (64, 128) else "torch"
    kernels.use(backend, dry=True)
    model = meta_model(config)
    lines = train.run_summary(model, None, world)
    peak, per_token = config.peak_tflops or 312, model.flops_per_token(config.seq_len)
    tokens_per_s = flags.mfu * peak * 1e12 * world / per_token
    steps = int(lines["steps"].split(" ")[0].replace(",", ""))
    hours = steps * config.tokens_per_step / tokens_per_s / 3600
    weights = 4e-9 * model.n_params  # GB
    lines |= {
        "time": f"{hours / 24:.1f} days, {hours * world:,.0f} GPU hours at {tokens_per_s:,.0f}"
                f" tokens/s, if MFU is {flags.mfu:.1%} of {peak:g} TFLOP/s (--mfu=)",
        "checkpoint": f"{weights:.1f} GB of weights, {2 * weights:.1f} GB of optimizer state; while"
                      f" it is written {3 * weights / world:.2f} GB of host memory per process",
        "all checkpoints": f"{(config.n_chunks + 2 * kept) * weights / 1e3:.2f} TB:"
                           f" {config.n_chunks}, {kept} of them with optimizer state",
    }
    for key, value in lines.items():
        print(f"{key:>16}: {value}")
    print(f"\nGB per GPU at the peak ({str(dtype)[6:]}, {backend} kernels)")
    memory = measure_memory(config, dtype, world)
    for kind, n_bytes in {**memory, "in all": (total := sum(memory.values()))}.items():
        print(f"{kind:>30} {n_bytes / 1e9:9.2f}")
    most = flags.gpu_gb * 1e9 - 2e9
    print(f"\nThis {'fits' if total <= most else 'does not fit'} {flags.gpu_gb:g} GB, of which"
          " PyTorch and CUDA take 2. The fastest that does:", flush=True)
    sizes = [n for n in range(1, 33) if config.global_batch_size // world % n == 0]

    def peak(kind: str, size: int) -> float:
        other = dataclasses.replace(config, activation_checkpointing=kind, micro_batch_size=size)
        return sum(measure_memory(other, dtype, world).values())

    for kind in ("none", "full"):  # the less is computed again, the faster
        # The larger a micro-batch, the more memory and the faster.
        if n_fit := bisect.bisect_right(sizes, most, key=functools.partial(peak, kind)):
            size = sizes[n_fit - 1]
            print(f"  --activation_checkpointing={kind} --micro_batch_size={size} --compile=true")
            break
    else:
        print("  none: take more GPUs, and --parallel=fsdp, which shares out the most.")


if __name__ == "__main__":
    run_command(main)
