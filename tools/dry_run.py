"""What would a run take? Memory, time and disk on machines one does not have.

    python tools/dry_run.py configs/amber_7b.py --world_size=224

Memory is measured, not estimated: the real model is wrapped and run as train.py does, under a fake
process group of --world_size ranks, with FakeTensors (which have a shape and no storage).
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

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
from configs import Config, UserError, load, run_command  # noqa: E402
from model import meta_model  # noqa: E402

KINDS = {  # torch's names for what its memory trackers tell apart -> ours
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
            optimizer = train.make_optimizer(config, model)
            ids = torch.zeros(config.micro_batch_size, config.seq_len, dtype=torch.int64)

            def forward_backward() -> None:
                loss, _ = model(ids, ids)
                loss.backward()

            # One step before the tracker looks, so that AdamW's state is there: the tracker counts
            # sharded optimizer steps at their unsharded size.
            forward_backward()
            optimizer.step()
            optimizer.zero_grad()
            if mesh:
                tracker = FSDPMemTracker(model, optimizer)
                tracker.track_inputs((ids,))
            else:
                tracker = MemTracker()
                tracker.track_external(model, optimizer, ids)
            with tracker:
                # Two micro-batches are enough: the second meets the gradients of the first.
                for _ in range(min(2, parallel.micro_batches(config, world))):
                    tracker.reset_mod_stats()
                    forward_backward()
    finally:
        dist.destroy_process_group()
    found = dict.fromkeys(KINDS.values(), 0.0)
    for kind, n_bytes in tracker.get_tracker_snapshot("peak")[cpu].items():
        name = KINDS.get(getattr(kind, "value", kind))
        if name:
            found[name] += n_bytes
    return found


def dry_run(config: Config, world: int, mfu: float) -> str:
    """What a run on `world` GPUs would take, as a table. mfu: model FLOPs utilization, a guess."""
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    try:
        here = config.head_dim in (64, 128)  # what a GPU's "auto" comes to
        backend = kernels.use("triton" if config.kernels == "auto" and here else config.kernels,
                              dry=True)
    except RuntimeError:  # no Triton on this machine: PyTorch's operations keep more
        backend = kernels.use("torch")
    prepared = (Path(config.data_dir) / "manifest.json").exists()
    data = train.data_for(config) if prepared else None
    model = meta_model(config)
    lines = train.run_summary(model, data, world)
    memory = measure_memory(config, dtype, world)
    steps = int(lines["steps"].split(" ")[0].replace(",", ""))
    peak, per_token = config.peak_tflops or 312, model.flops_per_token(config.seq_len)
    tokens_per_s = mfu * peak * 1e12 * world / per_token
    hours = steps * config.tokens_per_step / tokens_per_s / 3600
    six_n = mfu * 6 * model.n_params / per_token
    weights = 4 * model.n_params
    n = len(data.manifest["chunks"]) if data else config.n_chunks
    kept = min(n, config.keep_train_state or n)
    lines |= {
        "time": (f"{hours / 24:.1f} days, {hours * world:,.0f} GPU hours at " if steps else "")
                + f"{tokens_per_s:,.0f} tokens/s, if MFU is {mfu:.1%} ({six_n:.1%} by 6 FLOPs a"
                f" parameter) of {peak:g} TFLOP/s (--mfu=, --peak_tflops=)",
        "checkpoint": f"{weights / 1e9:.1f} GB of weights, {2 * weights / 1e9:.1f} GB of optimizer"
                      f" state; {3 * weights / world / 1e9:.2f} GB of host memory per process while"
                      f" it is written, {3 * weights / 1e9:,.0f} s at 1 GB/s in all",
        "all checkpoints": f"{(n + 2 * kept) * weights / 1e12:.2f} TB: {n}, {kept} of them with"
                           " optimizer state",
    }
    text = [f"{key:>16}: {value}" for key, value in lines.items()]
    text += ["", f"{'GB per GPU at the peak':>30}"]
    for kind, n_bytes in memory.items():
        text.append(f"{kind:>30} {n_bytes / 1e9:9.2f}")
    text.append(f"{'in all':>30} {sum(memory.values()) / 1e9:9.2f}")
    text.append(f"(measured: the model itself, {str(dtype)[6:]}, {backend} kernels, activation"
                f" checkpointing {config.activation_checkpointing!r}, in tensors without memory"
                f"{', not compiled' * config.compile})")
    return "\n".join(text)


def main(argv: list[str]) -> None:
    config, flags = load(argv, Flags)
    if not 0 < flags.mfu <= 1:
        raise UserError(f"--mfu must be more than 0 and at most 1, found {flags.mfu}.")
    print(dry_run(config, flags.world_size, flags.mfu))


if __name__ == "__main__":
    run_command(main)
