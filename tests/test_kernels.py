"""Every operation of kernels/, by Triton and by PyTorch, against the same formula in float64.

On a GPU these tests run the compiled kernels; without one, the same kernels in Triton's
interpreter. The error of a tensor is |ours - exact| / |exact|, Frobenius norms. In fp32 it must be
at rounding level. In fp16 and bf16 it may be half as much again as that of the plain PyTorch
reference in the same type; where each result is rounded only once, no more than that rounding.
"""

import sys

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kernels

pytest.importorskip("triton")
import interp_bf16  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    interp_bf16.install()

# `kernels.attention` the attribute is the function; the file is in sys.modules.
FILES = {name: sys.modules[f"kernels.{name}"]
         for name in ("attention", "rmsnorm", "layernorm", "swiglu", "rope", "cross_entropy")}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True, params=["triton", "torch"])
def backend(request):
    """Every test runs once by each backend."""
    yield kernels.use(request.param)
    kernels.use("auto")


@pytest.fixture
def dtype(request):
    return DTYPES[request.param]


def every(*names: str):
    return pytest.mark.parametrize("dtype", names, indirect=True)


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=g).to(DEVICE, dtype)


def run(op, inputs: tuple[Tensor, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Outputs of op, then the gradient of every floating input for random output gradients.

    Those are of type `dtype` whatever the outputs are, so that all runs get the same ones.
    """
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [x for x in leaves if x.is_floating_point()]
    traced = [y for y in outputs if y.requires_grad]
    dys = [rand(*y.shape, dtype=dtype, seed=100 + i).to(y.dtype) for i, y in enumerate(traced)]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(traced, wanted, dys))


def errors(ours: list[Tensor], exact: list[Tensor], floor: float = 0.0) -> list[float]:
    """Relative errors; `floor` is the least norm to divide by, as a share of the largest."""
    norms = [x.double().norm().item() for x in exact]
    return [(a.double() - b.double()).norm().item() / max(n, floor * max(norms), 1e-30)
            for a, b, n in zip(ours, exact, norms)]


def check(op, reference, inputs: tuple[Tensor, ...], dtype: torch.dtype,
          floor: float = 0.0, once: bool = False, slack: float = 1.5) -> None:
    """op on inputs against reference in float64; `once`: every result is rounded a single time."""
    ours = run(op, inputs, dtype)
    double = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    exact = run(reference, double, dtype)
    for got, want in zip(ours, exact):
        assert got.shape == want.shape
    allowed = [3e-6] * len(exact)
    if once:
        rounded = [want.to(got.dtype) for got, want in zip(ours, exact)]
        allowed = [1.05 * e + 3e-6 for e in errors(rounded, exact)]
    elif dtype != torch.float32:
        allowed = [slack * e + 3e-6 for e in errors(run(reference, inputs, dtype), exact, floor)]
    for i, (error, limit) in enumerate(zip(errors(ours, exact, floor), allowed)):
        assert error <= limit, f"tensor {i}: error {error:.1e}, allowed {limit:.1e}"
    kinds = [x.dtype for x in inputs if x.is_floating_point()]
    assert [x.dtype for x in ours[-len(kinds):]] == kinds, "a gradient has its input's dtype"


# B, T, H, K, D: every length that fills its tiles, and those that do not
ATTENTION = [(2, 1, 2, 1, 64), (1, 17, 2, 2, 64), (1, 64, 1, 1, 128), (1, 100, 4, 2, 64),
             (1, 128, 2, 1, 128), (2, 160, 1, 1, 64)]


def qkv(B: int, T: int, H: int, K: int, D: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(rand(B, T, heads, D, dtype=dtype, seed=i) for i, heads in enumerate((H, K, K)))


@pytest.mark.parametrize("shape", ATTENTION, ids=str)
@every("fp32", "bf16")
def test_attention(shape, dtype):
    # A lone query has one key: dq and dk are exactly 0, so errors are taken relative to dv.
    # Short rows on a CPU: the reference rounds its results only, the kernels probabilities too.
    check(kernels.attention, FILES["attention"].attention_reference, qkv(*shape, dtype), dtype,
          floor=1.0 if shape[1] == 1 else 0.0, slack=2.0)


@pytest.mark.parametrize("shape", ATTENTION[3:5], ids=str)
@every("fp16", "bf16")
def test_attention_by_pointers(shape, dtype, monkeypatch):
    """What GPUs other than Hopper run: other tiles, no TMA."""
    monkeypatch.setattr(FILES["attention"], "_on_hopper", lambda device: False)
    check(kernels.attention, FILES["attention"].attention_reference, qkv(*shape, dtype), dtype,
          slack=2.0)


@every("bf16")
def test_attention_any_scale_and_layout(dtype):
    """Crystal's 1/d, and q, k, v cut out of one fused projection."""
    def ours(x, attention=kernels.attention):
        return attention(*x.unflatten(-1, (3, 2, 64)).unbind(2), scale=1 / 64)

    def reference(x):
        return ours(x, FILES["attention"].attention_reference)

    check(ours, reference, (rand(2, 70, 3 * 2 * 64, dtype=dtype),), dtype, slack=2.0)


@pytest.mark.parametrize("T", [1, 5])
def test_attention_with_a_cache_equals_attention_over_everything(T):
    q, k, v = qkv(2, 24, 4, 2, 64, torch.float32)
    whole = kernels.attention(q, k, v)[:, -T:]
    torch.testing.assert_close(kernels.attention(q[:, -T:], k, v), whole, atol=2e-6, rtol=1e-5)


# 300 rows: more than the backward has programs
ROWS = [(1, 64), (7, 100), (3, 11, 128), (300, 33)]


@pytest.mark.parametrize("shape", ROWS, ids=str)
@every("fp32", "fp16", "bf16")
def test_norms(shape, dtype):
    # In the interpreter 300 rows take long, and the order of their sums is the same in every type.
    shape = (30, 33) if shape[0] == 300 and dtype != torch.float32 else shape
    x, weight, bias = rand(*shape, dtype=dtype) + 0.5, rand(shape[-1]), rand(shape[-1], seed=1)
    check(lambda x, w: kernels.rms_norm(x, w, 1e-5),
          lambda x, w: FILES["rmsnorm"].rms_norm_reference(x, w, 1e-5), (x, weight), dtype,
          once=True)
    check(lambda x, w, b: kernels.layer_norm(x, w, b, 1e-5),
          lambda x, w, b: FILES["layernorm"].layer_norm_reference(x, w, b, 1e-5),
          (x, weight, bias), dtype, once=True)
    # A weight of x's own type: its gradient is rounded to that type, too.
    check(lambda x, w: kernels.rms_norm(x, w, 1e-5),
          lambda x, w: FILES["rmsnorm"].rms_norm_reference(x, w, 1e-5),
          (x, weight.to(dtype)), dtype)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1000), (2, 3, 1365)], ids=str)
@every("fp32", "fp16", "bf16")
def test_swiglu(shape, dtype, backend):
    inputs = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype, seed=1)
    check(kernels.swiglu, FILES["swiglu"].swiglu_reference, inputs, dtype,
          once=backend == "triton")


# H, K, D, R, interleaved
@pytest.mark.parametrize("case", [(4, 2, 64, 64, False), (3, 1, 128, 128, True),
                                  (2, 2, 64, 24, True), (5, 5, 24, 12, False)], ids=str)
@every("fp32", "bf16")
def test_rope(case, dtype):
    H, K, D, R, interleaved = case
    angle = torch.outer(torch.arange(9.0), torch.rand(R // 2)).to(DEVICE)
    tables = angle.cos(), angle.sin()
    check(lambda q, k: kernels.rope(q, k, *tables, interleaved),
          lambda q, k: FILES["rope"].rope_reference(q, k, *tables, interleaved),
          (rand(2, 9, H, D, dtype=dtype), rand(2, 9, K, D, dtype=dtype, seed=1)),
          dtype, once=True)


def test_rope_keeps_lengths_and_depends_on_distance_only():
    angle = torch.outer(torch.arange(12.0), 0.1 ** torch.arange(32)).to(DEVICE)
    x = rand(1, 1, 1, 64).expand(1, 12, 1, 64)
    q, k = kernels.rope(x, x, angle.cos(), angle.sin())
    torch.testing.assert_close(q.norm(dim=-1), x.norm(dim=-1))
    scores = q[0, :, 0] @ k[0, :, 0].T
    torch.testing.assert_close(scores[3:, 3:], scores[:-3, :-3], atol=1e-4, rtol=1e-4)


# N, H, V, chunk_rows; the kernel walks over V in steps of 4096
@pytest.mark.parametrize("case", [(1, 32, 50, None), (37, 48, 4500, 16), (64, 64, 1000, 32)],
                         ids=str)
@every("fp32", "bf16")
def test_linear_cross_entropy(case, dtype):
    N, H, V, chunk = case
    targets = torch.arange(N, device=DEVICE) * 7919 % V
    inputs = rand(N, H, dtype=dtype), (rand(V, H) / 4).to(dtype), targets
    check(lambda x, w, t: kernels.linear_cross_entropy(x, w, t, chunk),
          FILES["cross_entropy"].linear_cross_entropy_reference, inputs, dtype)


def test_linear_cross_entropy_without_gradients():
    x, weight, targets = rand(10, 16), rand(30, 16), torch.arange(10, device=DEVICE)
    loss, rows = kernels.linear_cross_entropy(x.requires_grad_(), weight, targets)
    assert loss.requires_grad and not rows.requires_grad and rows.dtype == torch.float32
    with torch.no_grad():
        again, _ = kernels.linear_cross_entropy(x, weight, targets)
    assert not again.requires_grad and again == loss
    loss.backward()
    assert weight.grad is None


def block(x: Tensor, norm: Tensor, bias: Tensor, proj: Tensor, head: Tensor, targets: Tensor
          ) -> Tensor:
    """All the operations in a row: a tiny one-layer model."""
    B, T, C = x.shape
    angle = torch.outer(torch.arange(T, device=x.device), torch.ones(32, device=x.device))
    y = kernels.rms_norm(x, norm, 1e-5)
    q, k = (y.reshape(B, T, C // 64, 64) for _ in "qk")
    q, k = kernels.rope(q, k, angle.cos(), angle.sin())
    y = kernels.attention(q, k, q + k).reshape(B, T, C)
    x = x + y
    y = kernels.rms_norm(x, norm, 1e-5)
    y = x + kernels.swiglu(y @ proj, y)
    y = kernels.layer_norm(y, norm, bias, 1e-5)
    return kernels.linear_cross_entropy(y.flatten(0, 1), head, targets, chunk_rows=16)[0]


def block_inputs() -> tuple[Tensor, ...]:
    C, V = 64, 40
    return (rand(1, 24, C), rand(C), rand(C, seed=1), rand(C, C) / 8, rand(V, C) / 8,
            torch.arange(24, device=DEVICE) % V)


def test_twice_the_same_bits():
    first, second = run(block, block_inputs()), run(block, block_inputs())
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_activation_checkpointing_changes_no_bit():
    def checkpointed(*inputs):
        return checkpoint(block, *inputs, use_reentrant=False)

    for a, b in zip(run(block, block_inputs()), run(checkpointed, block_inputs())):
        assert torch.equal(a, b)


def test_compiled_whole():
    """torch.compile traces through every operation without a graph break."""
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for a, b in zip(run(block, block_inputs()), run(compiled, block_inputs())):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_custom_operators_are_what_they_declare():
    """PyTorch's own check: schema, no hidden aliasing, fake tensors of the right shape."""
    q, k, v = qkv(1, 20, 2, 1, 64, torch.float32)
    o, lse = torch.ops.kernels.attention(q, k, v, 0.1)
    x, w, rows = rand(6, 40), rand(40), rand(6)
    tables = rand(20, 32), rand(20, 32)
    ops = torch.ops.kernels
    for op, args in [(ops.attention, (q, k, v, 0.1)), (ops.rms_norm, (x, w, 1e-5)),
                     (ops.attention_backward, (o, q, k, v, o, lse, 0.1)),
                     (ops.layer_norm, (x, w, w, 1e-5)), (ops.rms_norm_backward, (x, x, w, rows)),
                     (ops.layer_norm_backward, (x, x, w, rows, rows)), (ops.swiglu, (x, x)),
                     (ops.swiglu_backward, (x, x, x)), (ops.rope, (q, k, *tables, True, 1)),
                     (ops.cross_entropy_, (x, torch.arange(6, device=DEVICE), True))]:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_attention_flops_are_counted(backend):
    B, T, H, D = 2, 64, 2, 64
    q, k, v = (x.requires_grad_() for x in qkv(B, T, H, H, D, torch.bfloat16))
    if backend == "torch":
        pytest.skip("PyTorch counts its own")
    with FlopCounterMode(display=False) as counter:
        kernels.attention(q, k, v).sum().backward()
    assert counter.get_total_flops() == 7 * 2 * B * H * T * T * D


def test_the_choice(backend, monkeypatch):
    assert backend in ("triton", "torch")
    assert kernels.use("auto") == ("triton" if DEVICE == "cuda" else "torch")
    with pytest.raises(ValueError, match="not 'cuda'"):
        kernels.use("cuda")
    monkeypatch.setattr(sys.modules["kernels.lang"], "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs a CUDA GPU"):
        kernels.use("triton")
    monkeypatch.setattr(sys.modules["kernels.lang"], "INSTALLED", False)
    with pytest.raises(RuntimeError, match="pip install triton"):
        kernels.use("triton")


def test_what_triton_does_not_take_is_refused_or_left_to_pytorch(backend):
    odd = qkv(1, 8, 2, 2, 48, torch.float32)
    wide = rand(2, 20000), rand(20000)
    double = rand(2, 8, dtype=torch.float64)
    if backend == "triton":
        with pytest.raises(ValueError, match="head_dim 64 or 128, not 48"):
            kernels.attention(*odd)
        with pytest.raises(ValueError, match="at most 8192, not 20000"):
            kernels.rms_norm(*wide, 1e-5)
        with pytest.raises(ValueError, match="fp64"):
            kernels.swiglu(double, double)
        kernels.use("auto")
    assert kernels.attention(*odd).shape == (1, 8, 2, 48)
    assert kernels.rms_norm(*wide, 1e-5).shape == (2, 20000)
    assert kernels.swiglu(double, double).dtype == torch.float64
