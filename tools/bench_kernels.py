"""How fast is every kernel beside its alternatives on one GPU, and a 7B layer and step with them?

    python tools/bench_kernels.py                    everything; a table, and a .csv file in runs/
    python tools/bench_kernels.py attention swiglu   some of: attention rms_norm layer_norm swiglu
                                                     rope linear_cross_entropy layer step
    python tools/bench_kernels.py --sequences=8      of 2048 tokens in a batch (default 4)
    python tools/bench_kernels.py --sweep            attention with other tiles than the frozen ones
    python tools/bench_kernels.py --smoke            tiny shapes on the CPU: does this still run?

All rivals get the same inputs at the shapes of Amber 7B, in bf16 with fp32 norm weights as in
training. The time is a median between two CUDA events, with the L2 cache flushed before each run.
Bytes count each input read once and each output written once. FLOPs of attention count the causal
half, and its backward pass as 5 products. `of ceiling` compares with a large copy or a large matrix
product that is measured first. `ratio` is the rival's time over ours: above 1, ours is faster.
Before anything is timed, ours must agree with PyTorch and give the same bits twice.
"""

import argparse
import csv
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kernels  # noqa: E402
from configs import ModelConfig, UserError, run_command  # noqa: E402
from model import LLaMA, rotary_table  # noqa: E402

OUT = Path("runs/bench_kernels.csv")
WHAT = ("attention", "rms_norm", "layer_norm", "swiglu", "rope", "linear_cross_entropy", "layer",
        "step")
# Tiles worth a try on the GPU, (BLOCK_M, BLOCK_N, warps, stages). All compile without spilling.
SWEEP = {
    "forward": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2)],
    "dkdv": [(64, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2)],
    "dq": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3)],
}


@dataclass
class Case:
    """One operation at one shape: ours first among `rivals`, PyTorch's formula second."""

    name: str
    inputs: tuple[Tensor, ...]
    rivals: dict[str, Callable]
    flops: float = 0  # of the forward pass; 0 = its time is the bytes it moves
    bytes: float = 0  # moved by the forward pass
    backward_flops: float = 0
    backward_bytes: float = 0
    whole: bool = False  # time forward and backward together, as one


class Clock:
    """Medians, and the two ceilings of this machine."""

    def __init__(self, device: str, repetitions: int) -> None:
        self.device, self.repetitions = device, repetitions
        # Writing 1 GB empties L2 and takes long enough for the host to queue what is timed.
        self.flush = torch.empty((1 << 30) if device == "cuda" else 1, dtype=torch.int8,
                                 device=device)
        n, m = (1 << 29, 8192) if device == "cuda" else (1 << 20, 128)
        a, b = torch.randn(2, m, m, device=device, dtype=torch.bfloat16)
        self.flops = 2 * m**3 / self.seconds(lambda: a @ b)
        x, y = torch.zeros(2, n, dtype=torch.float32, device=device)
        self.bandwidth = 8 * n / self.seconds(lambda: y.copy_(x))

    def seconds(self, run: Callable) -> float:
        # The GPU stamps an event when it gets there, so a host that lags behind would be timed,
        # too: the flush before it gives the host time to queue the run.
        times = []
        for i in range(self.repetitions + 3):
            self.flush.zero_()
            if self.device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                end.synchronize()
                elapsed = start.elapsed_time(end) / 1e3
            else:
                began = time.perf_counter()
                run()
                elapsed = time.perf_counter() - began
            if i >= 3:  # the first runs compile and allocate
                times.append(elapsed)
        return statistics.median(times)


def fixed(choice: str, op: Callable) -> Callable:
    """op with the kernels' choice made before every call."""
    def run(*inputs):
        kernels.use(choice)
        return op(*inputs)
    return run


def compiled(op: Callable) -> Callable:
    return torch.compile(op, dynamic=False, mode="max-autotune-no-cudagraphs")


def with_rivals(ours: Callable, formula: Callable, smoke: bool, **others: Callable) -> dict:
    rivals = {"ours": fixed("torch" if smoke else "triton", ours), "eager": formula}
    if not smoke:
        rivals["torch.compile"] = compiled(formula)
    return rivals | others


def liger(name: str) -> Callable | None:
    """A function of Liger Kernel, where that is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    import liger_kernel.transformers.functional as functional

    return getattr(functional, name, None)


def attention_case(B: int, T: int, c: ModelConfig, make: Callable, smoke: bool) -> Case:
    H, D = c.num_attention_heads, c.head_dim
    q, k, v = (make(B, T, H, D) for _ in "qkv")
    rivals = {"ours": fixed("torch" if smoke else "triton", kernels.attention)}

    def sdpa(backend: SDPBackend) -> Callable:
        def run(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
        return run

    rivals["SDPA flash"] = sdpa(SDPBackend.FLASH_ATTENTION)
    if not smoke:
        rivals["SDPA cuDNN"] = sdpa(SDPBackend.CUDNN_ATTENTION)
    flops = 2 * 2 * B * H * T * T * D / 2
    return Case("attention", (q, k, v), rivals, flops=flops, backward_flops=2.5 * flops)


def memory_cases(B: int, T: int, c: ModelConfig, make: Callable, smoke: bool) -> list[Case]:
    """The operations whose time is the bytes they move."""
    # `kernels.rope` is the operation, so its file is named in full.
    from kernels.layernorm import layer_norm_reference
    from kernels.rmsnorm import rms_norm_reference
    from kernels.rope import rope_reference
    from kernels.swiglu import swiglu_reference

    x = make(B, T, c.hidden_size)
    w, b = make(c.hidden_size).float(), make(c.hidden_size).float()
    gate, up = make(B, T, c.intermediate_size), make(B, T, c.intermediate_size)
    q, k = (make(B, T, c.num_attention_heads, c.head_dim) for _ in "qk")
    tables = rotary_table(c, 0, T, x.device)
    n, m = 2 * x.numel(), 2 * gate.numel()  # bytes of a bf16 tensor of each kind

    def norm(f: Callable) -> Callable:
        return lambda *tensors: f(*tensors, 1e-6)

    def rotate(f: Callable) -> Callable:
        return lambda q, k: f(q, k, *tables)

    def case(name, inputs, wrap, ours, formula, forward, backward) -> Case:
        others = {}
        if theirs := liger(f"liger_{name}"):
            others["Liger"] = wrap(theirs)
        rivals = with_rivals(wrap(ours), wrap(formula), smoke, **others)
        return Case(name, inputs, rivals, bytes=forward, backward_bytes=backward)

    rope = with_rivals(rotate(kernels.rope), rotate(rope_reference), smoke)
    return [
        case("rms_norm", (x, w), norm, kernels.rms_norm, rms_norm_reference, 2 * n, 3 * n),
        case("layer_norm", (x, w, b), norm, kernels.layer_norm, layer_norm_reference, 2 * n, 3 * n),
        case("swiglu", (gate, up), lambda f: f, kernels.swiglu, swiglu_reference, 3 * m, 5 * m),
        Case("rope", (q, k), rope, bytes=4 * n, backward_bytes=4 * n),
    ]


def head_case(B: int, T: int, c: ModelConfig, make: Callable, smoke: bool) -> Case:
    from kernels.cross_entropy import linear_cross_entropy_reference

    x, w = make(B * T, c.hidden_size), make(c.vocab_size, c.hidden_size) * 0.02
    w = w.detach().requires_grad_()
    targets = torch.randint(c.vocab_size, (B * T,), device=x.device)
    others = {}
    if f := liger("liger_fused_linear_cross_entropy"):
        others["Liger"] = lambda x, w: f(x, w, targets)
    rivals = with_rivals(lambda x, w: kernels.linear_cross_entropy(x, w, targets)[0],
                         lambda x, w: linear_cross_entropy_reference(x, w, targets)[0],
                         smoke, **others)
    return Case("linear_cross_entropy", (x, w), rivals, whole=True,
                flops=3 * 2 * B * T * c.hidden_size * c.vocab_size)


def layer_case(B: int, T: int, c: ModelConfig, make: Callable, smoke: bool) -> Case:
    """One transformer block of the model, fp32 weights and bf16 arithmetic."""
    x = make(B, T, c.hidden_size)
    with torch.device(x.device):
        block = LLaMA(ModelConfig(**{**vars(c), "num_hidden_layers": 1, "vocab_size": 64}),
                      torch.bfloat16).model.layers[0]
    tables = rotary_table(c, 0, T, x.device)

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return block(x, *tables)

    rivals = {"ours": fixed("torch" if smoke else "triton", run), "PyTorch": fixed("torch", run)}
    if not smoke:
        rivals["ours + torch.compile"] = fixed("triton", torch.compile(run, dynamic=False))
        rivals["PyTorch + torch.compile"] = fixed("torch", torch.compile(run, dynamic=False))
    d, f = c.hidden_size, c.intermediate_size
    products = 2 * B * T * (4 * d * d + 3 * d * f) + 2 * B * T * T * d
    return Case("7B layer", (x, *block.parameters()), rivals, whole=True, flops=3 * products)


def passes(case: Case, run: Callable) -> dict[str, Callable]:
    """What is timed: {"forward": …, "backward": …}, or the two as one."""
    # The graph of one forward pass is kept, and each timed backward pass walks it again.
    outputs = run(*case.inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    dys = [torch.randn_like(y) for y in outputs]
    if case.whole:
        def both() -> list[Tensor]:
            y = run(*case.inputs)
            return [y, *torch.autograd.grad(y, case.inputs, dys[0])]
        return {"forward+backward": both}
    return {"forward": lambda: run(*case.inputs),
            "backward": lambda: torch.autograd.grad(outputs, case.inputs, dys, retain_graph=True)}


def verify(case: Case) -> None:
    """Ours against the second rival, forward and gradients; and against itself, bit for bit."""
    def everything(run: Callable) -> list[Tensor]:
        torch.manual_seed(0)
        y = run(*case.inputs)
        ys = y if isinstance(y, tuple) else (y,)
        return [*ys, *torch.autograd.grad(ys, case.inputs, [torch.randn_like(y) for y in ys])]

    (_, ours), (rival, theirs) = list(case.rivals.items())[:2]
    first, again, other = everything(ours), everything(ours), everything(theirs)
    if not all(torch.equal(a, b) for a, b in zip(first, again)):
        raise UserError(f"{case.name}: two runs of one kernel gave different bits.")
    error = max(((a.double() - b.double()).norm() / b.double().norm()).item()
                for a, b in zip(first, other))
    # These are two computations of one thing in bf16. The sharp comparison, with float64, is in
    # tests/test_kernels.py.
    if not error < 0.05:
        raise UserError(f"{case.name}: ours is {error:.1e} away from {rival}, and 0.05 is allowed:"
                        " run python -m pytest tests/test_kernels.py.")


def time_case(case: Case, clock: Clock) -> list[dict]:
    """One row per rival and pass."""
    verify(case)
    rows, ours = [], {}
    for rival, run in case.rivals.items():
        try:
            timed = {name: clock.seconds(f) for name, f in passes(case, run).items()}
        except RuntimeError as error:  # a backend that does not take this shape or this GPU
            print(f"{case.name}: {rival} left out: {str(error).splitlines()[0][:90]}",
                  file=sys.stderr)
            continue
        # Ours comes first, and every ratio is to it.
        ours = ours or timed
        for name, seconds in timed.items():
            back = name == "backward"
            flops = case.backward_flops if back else case.flops
            moved = case.backward_bytes if back else case.bytes
            rate, ceiling, unit = ((flops / seconds / 1e12, clock.flops / 1e12, "TFLOP/s") if flops
                                   else (moved / seconds / 1e12, clock.bandwidth / 1e12, "TB/s"))
            rows.append({"what": case.name, "pass": name, "who": rival,
                         "us": round(seconds * 1e6, 1), "rate": round(rate, 2), "unit": unit,
                         "of ceiling": f"{rate / ceiling:.0%}",
                         "ratio": round(seconds / ours[name], 2)})
    return rows


def time_step(B: int, T: int, c: ModelConfig, clock: Clock, choice: str) -> list[dict]:
    """Whole training steps: forward, backward, clipping, AdamW; fp32 weights and state."""
    if clock.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.device(clock.device):
        model = LLaMA(c, torch.bfloat16)
        ids = torch.randint(c.vocab_size, (B, T + 1))
    # init_weights draws on the CPU, which takes minutes for 7B numbers that do not matter here.
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(std=c.initializer_range)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=clock.device == "cuda")

    def step() -> None:
        kernels.use(choice)
        loss, _ = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    try:
        seconds = clock.seconds(step)
    except torch.OutOfMemoryError:
        print(f"{B} sequences do not fit: try a smaller --step_sequences", file=sys.stderr)
        return []
    flops = B * T * model.flops_per_token(T) / seconds
    peak = torch.cuda.max_memory_allocated() / 1e9 if clock.device == "cuda" else 0.0
    return [{"what": f"step, {B * T / seconds:,.0f} tokens/s, {peak:.1f} GB",
             "pass": "forward+backward+AdamW", "who": choice, "us": round(seconds * 1e6, 1),
             "rate": round(flops / 1e12, 2), "unit": "TFLOP/s",
             "of ceiling": f"{flops / clock.flops:.0%}", "ratio": ""}]


def sweep(case: Case, clock: Clock) -> list[dict]:
    """Attention once per alternative tile; the table in attention.py is restored afterwards."""
    from kernels.attention import HOPPER

    rows, run = [], case.rivals["ours"]
    for kernel, tiles in SWEEP.items():
        frozen = HOPPER[kernel]
        for tile in tiles:
            # A tile that computes something else is no candidate.
            HOPPER[kernel] = tile
            verify(case)
            part = "forward" if kernel == "forward" else "backward"
            seconds = clock.seconds(passes(case, run)[part])
            rows.append({"kernel": kernel, "tile, warps, stages": tile, "timed": part,
                         "us": round(seconds * 1e6, 1), "frozen": tile == frozen})
        HOPPER[kernel] = frozen
    return rows


def show(rows: list[dict], path: Path | None) -> None:
    """A Markdown table on the screen, the same as CSV in a file."""
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        print(f"\n{path}")


def measure(args: argparse.Namespace) -> list[dict]:
    """The rows of the table that the command line asks for."""
    # Compiled backwards free their inputs unless told that there will be another one.
    torch._functorch.config.donated_buffer = False
    device = "cpu" if args.smoke else "cuda"
    c, B, T = ModelConfig(), args.sequences, 2048
    if args.smoke:
        B, T = 1, 32
        c = ModelConfig(vocab_size=64, hidden_size=128, intermediate_size=96, num_hidden_layers=2,
                        num_attention_heads=2)
    torch.manual_seed(0)
    clock = Clock(device, 2 if args.smoke else 30)
    print(f"ceilings: {clock.flops / 1e12:.2f} TFLOP/s bf16 matmul, "
          f"{clock.bandwidth / 1e12:.3f} TB/s copy; torch {torch.__version__}, "
          f"{'CPU' if args.smoke else torch.cuda.get_device_name()}; "
          f"{B} x {T} tokens\n", flush=True)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()

    if args.sweep:
        return sweep(attention_case(B, T, c, make, args.smoke), clock)
    wanted = args.what or WHAT
    rows = []
    if "attention" in wanted:
        rows += time_case(attention_case(B, T, c, make, args.smoke), clock)
    for case in memory_cases(B, T, c, make, args.smoke):
        if case.name in wanted:
            rows += time_case(case, clock)
    if "linear_cross_entropy" in wanted:
        rows += time_case(head_case(B, T, c, make, args.smoke), clock)
    if "layer" in wanted:
        rows += time_case(layer_case(B, T, c, make, args.smoke), clock)
    if "step" in wanted:
        clock.repetitions = min(clock.repetitions, 5)
        for choice in ("torch",) if args.smoke else ("triton", "torch"):
            rows += time_step(min(B, args.step_sequences), T, c, clock, choice)
            gc.collect()  # the first model must be gone before the second is made
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="NAME", help=", ".join(WHAT))
    parser.add_argument("--sequences", type=int, default=4, help="of 2048 tokens in a batch")
    parser.add_argument("--step_sequences", type=int, default=2, help="the same for `step`")
    parser.add_argument("--out", type=Path, default=OUT, help=f"default: {OUT}")
    parser.add_argument("--sweep", action="store_true", help="other tiles of attention")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args(argv)
    if unknown := set(args.what) - set(WHAT):
        raise UserError(f"There is nothing to time with the name {min(unknown)!r}: choose some of"
                        f" {', '.join(WHAT)}.")
    if not (args.smoke or torch.cuda.is_available()):
        raise UserError("This measures on a CUDA GPU, and there is none: --smoke runs tiny shapes"
                        " on the CPU, and python tools/aot.py needs no GPU.")
    show(measure(args), None if args.smoke or args.sweep else args.out)


if __name__ == "__main__":
    run_command(main)
