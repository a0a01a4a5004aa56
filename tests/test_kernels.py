"""Every operation of kernels/, by Triton and by PyTorch, against the same formula in float64.

On a GPU these tests run the compiled kernels; without one, the same kernels in Triton's
interpreter, at the smallest shapes with several tiles, some of them not full. The error of a tensor
is |ours - exact| / |exact|, Frobenius norms. In fp32 it must be at rounding level. In fp16 and bf16
it may be half as much again as that of the plain PyTorch reference in the same type; where each
result is rounded only once, no more than that rounding.
"""

import sys

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
from configs import ModelConfig, UserError
from model import LLaMA

pytest.importorskip("triton")
import interp_bf16  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    interp_bf16.install()

# `kernels.attention` the attribute is the function; the file is in sys.modules.
FILES = {name: sys.modules[f"kernels.{name}"]
         for name in ("attention", "rmsnorm", "layernorm", "swiglu", "rope", "cross_entropy")}
ALL = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True, params=["triton", "torch"])
def backend(request):
    """Every test runs once by each backend."""
    yield kernels.use(request.param)
    kernels.use("auto")


def every(*dtypes: torch.dtype):
    return pytest.mark.parametrize("dtype", dtypes, ids=str)


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=g).to(DEVICE, dtype)


def run(op, inputs: tuple[Tensor, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Outputs of op, then the gradient of every floating input for random output gradients, which
    are of type `dtype` whatever the outputs are, so that all runs get the same ones."""
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [x for x in leaves if x.is_floating_point()]
    traced = [y for y in outputs if y.requires_grad]
    dys = [rand(*y.shape, dtype=dtype, seed=100 + i).to(y.dtype) for i, y in enumerate(traced)]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(traced, wanted, dys))


def errors(ours: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((a.double() - b.double()).norm() / b.double().norm()).item()
            for a, b in zip(ours, exact)]


def check(op, reference, inputs: tuple[Tensor, ...], dtype: torch.dtype, once: bool = False,
          slack: float = 1.5) -> None:
    """op on inputs against reference in float64; `once`: every result is rounded a single time."""
    ours = run(op, inputs, dtype)
    double = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    exact = run(reference, double, dtype)
    assert [x.shape for x in ours] == [x.shape for x in exact]
    allowed = [3e-6] * len(exact)
    if once:
        rounded = [want.to(got.dtype) for got, want in zip(ours, exact)]
        allowed = [1.05 * e + 3e-6 for e in errors(rounded, exact)]
    elif dtype != torch.float32:
        allowed = [slack * e + 3e-6 for e in errors(run(reference, inputs, dtype), exact)]
    for i, (error, limit) in enumerate(zip(errors(ours, exact), allowed)):
        assert error <= limit, f"tensor {i}: error {error:.1e}, allowed {limit:.1e}"
    kinds = [x.dtype for x in inputs if x.is_floating_point()]
    assert [x.dtype for x in ours[-len(kinds):]] == kinds, "a gradient has its input's dtype"


# B, T, H, K, D. The tiles have 128 or 64 rows, in fp32 32 or 16.
ATTENTION = [(1, 67, 2, 1, 64), (1, 130, 1, 1, 64), (1, 129, 1, 1, 128)]


def qkv(B: int, T: int, H: int, K: int, D: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(rand(B, T, heads, D, dtype=dtype, seed=i) for i, heads in enumerate((H, K, K)))


@pytest.mark.parametrize("shape", ATTENTION, ids=str)
@every(torch.float32, torch.bfloat16)
def test_attention(shape, dtype):
    # On a CPU the reference rounds its results only, and the kernels the probabilities too.
    check(kernels.attention, FILES["attention"].attention_reference, qkv(*shape, dtype), dtype,
          slack=2.0)


@pytest.mark.parametrize("shape", [ATTENTION[0], (1, 130, 1, 1, 128)], ids=str)
@every(torch.float16, torch.bfloat16)
def test_attention_by_pointers(shape, dtype, monkeypatch):
    """What GPUs other than Hopper run: other tiles, no TMA."""
    monkeypatch.setattr(FILES["attention"], "_architecture", lambda device: 86)
    test_attention(shape, dtype)


# On a GPU also many tiles, so that the stages of the pipelines come round again and again.
@pytest.mark.parametrize("T", [70, *((2047, 2048) if DEVICE == "cuda" else ())])
def test_attention_any_scale_layout_and_length(T):
    """Crystal's 1/d, and q, k, v cut out of one fused projection."""
    def by(attention):
        return lambda x: attention(*x.unflatten(-1, (3, 2, 128)).unbind(2), scale=1 / 128)

    check(by(kernels.attention), by(FILES["attention"].attention_reference),
          (rand(2, T, 3 * 2 * 128, dtype=torch.bfloat16),), torch.bfloat16, slack=2.0)


@pytest.mark.parametrize("T", [1, 5])
def test_attention_with_a_cache_equals_attention_over_everything(T):
    q, k, v = qkv(2, 24, 4, 2, 64, torch.float32)
    whole = kernels.attention(q, k, v)[:, -T:]
    torch.testing.assert_close(kernels.attention(q[:, -T:], k, v), whole, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 64), (7, 100), (2, 3, 33)], ids=str)
@every(*ALL)
def test_norms(shape, dtype):
    x, weight, bias = rand(*shape, dtype=dtype) + 0.5, rand(shape[-1]), rand(shape[-1], seed=1)

    # A weight of x's own type: its gradient is rounded to that type, too.
    for w, once in ((weight, True), (weight.to(dtype), False)):
        check(lambda x, w: kernels.rms_norm(x, w, 1e-5),
              lambda x, w: FILES["rmsnorm"].rms_norm_reference(x, w, 1e-5),
              (x, w), dtype, once=once)
    check(lambda x, w, b: kernels.layer_norm(x, w, b, 1e-5),
          lambda x, w, b: FILES["layernorm"].layer_norm_reference(x, w, b, 1e-5),
          (x, weight, bias), dtype, once=True)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1000), (2, 3, 1365)], ids=str)
@every(*ALL)
def test_swiglu(shape, dtype, backend):
    inputs = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype, seed=1)
    check(kernels.swiglu, FILES["swiglu"].swiglu_reference, inputs, dtype,
          once=backend == "triton")


# H, K, D, R, interleaved
@pytest.mark.parametrize("case", [(4, 2, 64, 64, False), (3, 1, 128, 128, True),
                                  (2, 2, 64, 24, True), (5, 5, 24, 12, False)], ids=str)
@every(torch.float32, torch.bfloat16)
def test_rope(case, dtype):
    H, K, D, R, interleaved = case
    angle = torch.outer(torch.arange(3.0), rand(R // 2).cpu()).to(DEVICE)
    tables = angle.cos(), angle.sin()
    check(lambda q, k: kernels.rope(q, k, *tables, interleaved),
          lambda q, k: FILES["rope"].rope_reference(q, k, *tables, interleaved),
          (rand(2, 3, H, D, dtype=dtype), rand(2, 3, K, D, dtype=dtype, seed=1)),
          dtype, once=True)


# N, H, V, chunk_rows; the kernel walks over V in steps of 16384
@pytest.mark.parametrize("case", [(1, 32, 50, None), (11, 48, 16500, 4), (8, 64, 9, 4)], ids=str)
@every(torch.float32, torch.bfloat16)
def test_linear_cross_entropy(case, dtype):
    N, H, V, chunk = case
    targets = torch.arange(N, device=DEVICE) * 7919 % V
    inputs = rand(N, H, dtype=dtype), (rand(V, H) / 4).to(dtype), targets
    check(lambda x, w, t: kernels.linear_cross_entropy(x, w, t, chunk),
          FILES["cross_entropy"].linear_cross_entropy_reference, inputs, dtype)
    loss, _ = kernels.linear_cross_entropy(inputs[0].requires_grad_(), *inputs[1:], chunk)
    with torch.no_grad():
        again, rows = kernels.linear_cross_entropy(*inputs, chunk)
    assert loss.requires_grad and not again.requires_grad and rows.dtype == torch.float32
    torch.testing.assert_close(again, loss.detach())


def test_the_heads_gradient_in_fp16():
    """The sum over the rows, 40 x 2940, is more than fp16 holds, and the mean is not."""
    x, weight = rand(40, 16).half() * 0 + 3000, rand(50, 16).half() / 4000
    check(kernels.linear_cross_entropy, FILES["cross_entropy"].linear_cross_entropy_reference,
          (x, weight, torch.zeros(40, dtype=torch.int64, device=DEVICE)), torch.float16)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_the_same_bits_twice_checkpointed_and_nearly_compiled(norm):
    """All the operations in a row: a tiny model."""
    model = LLaMA(ModelConfig(vocab_size=40, hidden_size=64, intermediate_size=48, norm=norm,
                              num_hidden_layers=1, num_attention_heads=1), torch.float32)
    model.init_weights(0)
    ids = torch.arange(10, device=DEVICE).view(2, 5)

    def gradients(forward) -> list[Tensor]:
        loss = forward(ids, ids)[0]
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    first = gradients(model.to(DEVICE))
    for again in (model, lambda *ids: checkpoint(model, *ids, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(again)))
    # torch.compile traces through every operation without a graph break.
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for a, b in zip(first, gradients(compiled)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_choice(backend, monkeypatch):
    assert backend in ("triton", "torch")
    assert kernels.use("auto") == ("triton" if DEVICE == "cuda" else "torch")
    with pytest.raises(ValueError, match="not 'cuda'"):
        kernels.use("cuda")
    monkeypatch.setattr(sys.modules["kernels.lang"], "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        kernels.use("triton")
    monkeypatch.setattr(sys.modules["kernels.lang"], "INSTALLED", False)
    with pytest.raises(UserError, match="pip install triton"):
        kernels.use("triton")


def test_what_triton_does_not_take_is_refused_or_left_to_pytorch(backend):
    odd, wide = qkv(1, 8, 2, 2, 48, torch.float32), rand(2, 20000)
    double = rand(2, 8, dtype=torch.float64)
    if backend == "triton":
        with pytest.raises(ValueError, match="head_dim 64 or 128, not 48"):
            kernels.attention(*odd)
        with pytest.raises(ValueError, match="scale above 0"):
            kernels.attention(*qkv(1, 8, 1, 1, 64, torch.float32), scale=-1.0)
        with pytest.raises(ValueError, match="at most 8192, not 20000"):
            kernels.rms_norm(wide, wide[0], 1e-5)
        with pytest.raises(ValueError, match="fp64"):
            kernels.swiglu(double, double)
        kernels.use("auto")
    assert kernels.attention(*odd).shape == odd[0].shape
    assert kernels.rms_norm(wide, wide[0], 1e-5).shape == wide.shape
    assert kernels.swiglu(double, double).dtype == torch.float64
