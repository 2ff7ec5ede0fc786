"""Tests of the attention kernels: the reference, the custom op round it, compilation, the wiring of each backend."""

import dataclasses
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import train_gpt as gpt

CPU = torch.device("cpu")
SCALE = 0.375  # of the scores; exact in fp32
PACKED = [  # lengths of packed documents, round the reference's block of 256 and round a window of 100
    (1, 2, 99, 100, 101, 255, 256, 257, 1, 430),
    (256, 0, 1, 255, 0, 0, 600, 99, 2),  # empty documents are borders that repeat
    (0, 513, 0),
]


@pytest.fixture(autouse=True)
def reference_backend():
    """Every test begins with the reference, whatever the one before chose."""
    gpt.choose_attention("reference", CPU)
    yield
    gpt.choose_attention("reference", CPU)


def borders(lengths, device=CPU) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def random_qkv(tokens, heads=2, dim=8, value_dim=8, dtype=torch.float64, device=CPU, seed=0) -> list[Tensor]:
    torch.manual_seed(seed)
    shapes = (tokens, heads, dim), (tokens, heads, dim), (tokens, heads, value_dim)
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]


def naive_attention(q, k, v, lengths, window, scale) -> Tensor:
    """Dense softmax attention in float64 with the mask written out."""
    index = torch.arange(len(q), device=q.device)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    ago = index[:, None] - index
    visible = (ago >= 0) & (ago < window) & (document[:, None] == document)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * scale
    probs = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probs, v.double())


def with_gradients(function, inputs) -> list[Tensor]:
    """[output, gradient of each input] for a fixed random gradient of the output."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def error(x: Tensor, reference: Tensor) -> float:
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


# The reference


@pytest.mark.parametrize("window", [1, 2, 100, 10_000])
@pytest.mark.parametrize("lengths", PACKED, ids=str)
def test_reference_equals_naive_attention(lengths, window):
    qkv = random_qkv(sum(lengths))
    got = with_gradients(lambda *x: gpt.varlen_attention(*x, borders(lengths), max(lengths), window, SCALE), qkv)
    want = with_gradients(lambda *x: naive_attention(*x, lengths, window, SCALE), qkv)
    for x, reference in zip(got, want):
        torch.testing.assert_close(x, reference, rtol=1e-9, atol=1e-9)


def test_values_may_be_wider_or_narrower_than_keys():
    for value_dim in (4, 24):
        qkv = random_qkv(300, dim=8, value_dim=value_dim)
        got = with_gradients(lambda *x: gpt.varlen_attention(*x, borders([40, 260]), 260, 50, SCALE), qkv)
        want = with_gradients(lambda *x: naive_attention(*x, [40, 260], 50, SCALE), qkv)
        assert got[0].shape == (300, 2, value_dim)
        for x, reference in zip(got, want):
            torch.testing.assert_close(x, reference, rtol=1e-9, atol=1e-9)


def test_queries_keys_and_values_may_be_views_of_one_tensor():
    """As the model has them: qkv (T, 3, H, D) in one product, split without a copy."""
    qkv = torch.stack([x.detach() for x in random_qkv(70)], 1).requires_grad_()
    (got,) = torch.autograd.grad(
        gpt.varlen_attention(*qkv.unbind(1), borders([30, 40]), 40, 9, SCALE).square().sum(), qkv)
    (want,) = torch.autograd.grad(naive_attention(*qkv.unbind(1), [30, 40], 9, SCALE).square().sum(), qkv)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_gradcheck():
    qkv = random_qkv(9, dim=4, value_dim=3)
    assert torch.autograd.gradcheck(lambda *x: gpt.varlen_attention(*x, borders([1, 6, 2]), 6, 3, 0.7), qkv)


def test_custom_ops_are_sound():
    """Schema, fake and backward of the op, as torch checks them; the fake of the backward op agrees with it."""
    numbers = (torch.tensor(5), torch.tensor(3), torch.tensor(SCALE))
    qkv = random_qkv(9, dim=4, value_dim=3, dtype=torch.float32)
    torch.library.opcheck(gpt.attention_op, (*qkv, borders([5, 4]), *numbers))
    qkv = [x.detach() for x in qkv]
    out, lse = gpt.attention_op(*qkv, borders([5, 4]), *numbers)
    assert lse.shape == (2, 9) and lse.dtype == torch.float32
    torch.library.opcheck(gpt.attention_backward_op, (torch.ones_like(out), *qkv, out, lse, borders([5, 4]), *numbers))


def test_lse_is_the_logarithm_of_the_softmax_sum():
    q, k, v = random_qkv(12)
    _, lse = gpt.attention_op(q, k, v, borders([12]), torch.tensor(12), torch.tensor(12), torch.tensor(SCALE))
    last = torch.einsum("hd,khd->hk", q[-1], k) * SCALE
    torch.testing.assert_close(lse[:, -1].double(), last.logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_bf16_inputs_accumulate_in_fp32():
    lengths = (700, 1, 323)
    qkv = random_qkv(sum(lengths), dtype=torch.bfloat16)

    def attend(*x):
        return gpt.varlen_attention(*x, borders(lengths), 700, 500, SCALE)

    out = attend(*qkv)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attend(*(x.float() for x in qkv)).bfloat16())
    got, want = with_gradients(attend, qkv), with_gradients(lambda *x: naive_attention(*x, lengths, 500, SCALE), qkv)
    for x, reference in zip(got, want):
        assert x.dtype == torch.bfloat16 and error(x, reference) < 4e-3


def test_numbers_and_tensors_mean_the_same():
    qkv = random_qkv(50)
    numbers = 50, 7, 0.3
    assert torch.equal(gpt.varlen_attention(*qkv, borders([50]), *numbers),
                       gpt.varlen_attention(*qkv, borders([50]), *(torch.tensor(x) for x in numbers)))


# Compilation


def test_compiled_equals_eager_and_no_change_recompiles():
    """One graph serves every window, scale, bound and number of documents."""
    def function(q, k, v, cu_seqlens, max_seqlen, window, scale):
        return gpt.varlen_attention(gpt.norm(q), gpt.norm(k), 2 * v, cu_seqlens, max_seqlen, window, scale).square()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    qkv = random_qkv(120, dtype=torch.float32)
    results = []
    for lengths, window, scale in (((120,), 5, 0.1), ((120,), 64, 0.1), ((120,), 300, 0.2), ((9, 1, 0, 110), 300, 0.2)):
        rest = borders(lengths), torch.tensor(max(lengths)), torch.tensor(window), torch.tensor(scale)
        torch._dynamo.mark_dynamic(rest[0], 0)
        got = with_gradients(lambda *x: compiled(*x, *rest), qkv)  # noqa: B023 (called at once)
        want = with_gradients(lambda *x: function(*x, *rest), qkv)  # noqa: B023
        for x, reference in zip(got, want):
            torch.testing.assert_close(x, reference)
        results.append(got[0])
    assert counter.frame_count == 1
    assert all(not torch.allclose(a, b) for a, b in zip(results, results[1:]))


# The choice of a backend


def pretend_gpu(monkeypatch, capability=(9, 0)) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    return torch.device("cuda")


def hide(monkeypatch, *modules):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)  # import raises ModuleNotFoundError


def test_auto_on_a_cpu_is_the_reference():
    assert gpt.choose_attention("auto", CPU) == "reference"
    assert gpt.choose_attention("reference", CPU) == "reference"


def test_backends_are_named_by_the_flag():
    (annotation,) = (field.type for field in dataclasses.fields(gpt.Hyperparameters) if field.name == "attention")
    assert set(annotation.__args__) == {"auto", *gpt.ATTENTION_BACKENDS}


@pytest.mark.parametrize("name", ["flash-attn-4", "torch"])
def test_forcing_a_gpu_backend_on_a_cpu_is_refused_in_one_line(name):
    with pytest.raises(gpt.UserError, match=f"--attention {name} needs a GPU") as refusal:
        gpt.choose_attention(name, CPU)
    assert "\n" not in str(refusal.value)


def test_auto_takes_the_fastest_that_imports_and_runs(monkeypatch):
    device = pretend_gpu(monkeypatch)
    hide(monkeypatch, "flash_attn.cute.interface")
    assert gpt.choose_attention("auto", device) == "torch"
    for module in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    assert gpt.choose_attention("auto", device) == "flash-attn-4"
    pretend_gpu(monkeypatch, (8, 0))
    assert gpt.choose_attention("auto", device) == "torch"  # flash-attn-4 is for Hopper and newer
    pretend_gpu(monkeypatch, (7, 5))
    assert gpt.choose_attention("auto", device) == "reference"


def test_a_backend_that_does_not_import_is_refused_in_one_line(monkeypatch):
    hide(monkeypatch, "flash_attn")
    with pytest.raises(gpt.UserError, match="--attention flash-attn-4 does not import") as refusal:
        gpt.choose_attention("flash-attn-4", pretend_gpu(monkeypatch))
    assert "\n" not in str(refusal.value)


def test_a_backend_whose_import_raises_many_lines_is_refused_in_one(monkeypatch, tmp_path):
    """As a package does that was built for another CUDA: an ImportError or OSError of several lines."""
    (tmp_path / "flash_attn.py").write_text(r"raise OSError('undefined symbol:\n  _ZN3c10\n  in libfoo.so')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    with pytest.raises(gpt.UserError, match="does not import") as refusal:
        gpt.choose_attention("flash-attn-4", pretend_gpu(monkeypatch))
    assert "\n" not in str(refusal.value)


# A stand-in with the signature of flash-attn 4 shows that the wiring is right where the package does not run


def stand_in_forward(q, k, v, cu_q, cu_k, longest_q, longest_k, scale, causal, left, right):
    lengths = cu_q.diff().tolist()
    assert torch.equal(cu_q, cu_k) and cu_q.dtype == torch.int32
    assert type(longest_q) is type(longest_k) is int and longest_q == longest_k >= max(lengths)
    assert causal is True and right == 0 and type(left) is int and type(scale) is float
    out = naive_attention(q, k, v, lengths, left + 1, scale).to(q.dtype)
    return out, torch.full((q.size(1), len(q)), 7.0)


def stand_in_backward(dout, q, k, v, out, lse, grads, *mask):
    assert out.shape == dout.shape == v.shape and torch.equal(lse, torch.full((q.size(1), len(q)), 7.0))

    def gradients():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(stand_in_forward(*inputs, *mask)[0], inputs, dout)

    with ThreadPoolExecutor(1) as thread:  # in this thread, inside a custom op, autograd is off
        for grad, x in zip(grads, thread.submit(gradients).result()):
            grad.copy_(x)


def flash_attn_4():
    def _flash_attn_fwd(
            q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
            max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
            window_size_left=None, window_size_right=None, learnable_sink=None, return_lse=False):
        assert return_lse and not any((qv, seqused_q, seqused_k, min_seqlen_k, page_table, softcap, learnable_sink))
        return stand_in_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
                                window_size_left, window_size_right)

    def _flash_attn_bwd(
            q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
            window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
            max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None):
        dq, dk, dv = (torch.empty_like(x) if dx is None else dx for dx, x in ((dq, q), (dk, k), (dv, v)))
        stand_in_backward(dout, q, k, v, out, lse, (dq, dk, dv), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                          softmax_scale, causal, window_size_left, window_size_right)
        return dq, dk, dv

    return "flash_attn.cute.interface", _flash_attn_fwd, _flash_attn_bwd


def test_flash_attn_is_called_as_its_signature_says(monkeypatch):
    path, *functions = flash_attn_4()
    module = types.ModuleType(path)
    for function in functions:
        setattr(module, function.__name__, function)
    for parent in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, path, module)
    assert gpt.choose_attention("flash-attn-4", pretend_gpu(monkeypatch)) == "flash-attn-4"
    lengths, window = (1, 2, 70, 0, 57), 20
    qkv = random_qkv(sum(lengths), dtype=torch.float32)
    got = with_gradients(lambda *x: gpt.varlen_attention(*x, borders(lengths), 70, window, SCALE), qkv)
    want = with_gradients(lambda *x: naive_attention(*x, lengths, window, SCALE).to(x[0].dtype), qkv)
    for x, reference in zip(got, want):
        torch.testing.assert_close(x, reference)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("window", [128, 1000])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["flash-attn-4", "torch"])
def test_gpu_backend_is_close_to_naive_attention(name, head_dim, window):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    device, lengths = torch.device("cuda"), (1, 2, 127, 128, 129, 571, 0, 2090, 0, 0)
    try:
        gpt.choose_attention(name, device)
    except gpt.UserError as refusal:
        pytest.skip(str(refusal))
    qkv = random_qkv(sum(lengths), heads=2, dim=head_dim, value_dim=head_dim, dtype=torch.bfloat16, device=device)
    got = with_gradients(lambda *x: gpt.varlen_attention(*x, borders(lengths, device), 2090, window, 0.1), qkv)
    want = with_gradients(lambda *x: naive_attention(*x, lengths, window, 0.1), qkv)
    errors = {n: error(x, reference) for n, x, reference in zip(("out", "dq", "dk", "dv"), got, want)}
    assert max(errors.values()) < 1e-2, errors


@pytest.mark.gpu
def test_gpu_compiled_bf16_step_is_close_to_the_fp32_step_on_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    stage = dataclasses.replace(gpt.PRESETS["sample"].stages[0], windows=(64, 128), document_tokens=600)
    args = dataclasses.replace(gpt.PRESETS["sample"], model_dim=128, num_heads=2, stages=(stage,) * 4)
    lengths = (300, 1, 130, 593)
    tokens = torch.randint(257, (2, sum(lengths)), generator=torch.Generator().manual_seed(0))
    cpu_world = types.SimpleNamespace(rank=0, size=1, gpu=False, device=CPU, dtype=torch.float32, sum=lambda x: x)
    results, weights = [], {}
    for world in (cpu_world, gpt.World()):
        gpt.choose_attention("auto", world.device)
        model = gpt.Model(args, 257, world.device, world.dtype)
        model.initialise(0)
        with torch.no_grad():  # the same non-zero weights for both: the GPU would draw others from the same seed
            generator = torch.Generator().manual_seed(1)
            for name, param in model.named_parameters():
                start = param if param.any() else 0.1 * torch.randn(param.shape, generator=generator)
                param.copy_(weights.setdefault(name, start.bfloat16()))
        optimizer = gpt.Optimizer(model.param_groups(), world, compile=world.gpu)
        if world.gpu:
            for block in model.blocks:
                block.compile(dynamic=False, fullgraph=True)
        batch = *(x.to(world.device) for x in tokens), borders((*lengths, *[0] * 59), world.device)
        if world.gpu:
            torch._dynamo.mark_dynamic(batch[2], 0)
        loss = model(*batch, model.stage_inputs(0)) / sum(lengths)
        loss.backward()
        grads = {name: param.grad.cpu().clone() for name, param in model.named_parameters()}
        for step in (0, 1):  # Adam takes its turn at the second
            optimizer.step(step, 1.0, 0.9)
        with torch.no_grad():
            after = model(*batch, model.stage_inputs(0)) / sum(lengths)
        results.append((loss.item(), after.item(), grads))
    (cpu_loss, cpu_after, cpu_grads), (loss, after, grads) = results
    assert loss == pytest.approx(cpu_loss, rel=2e-3) and after == pytest.approx(cpu_after, rel=2e-2)
    assert cpu_after < cpu_loss
    for name, grad in grads.items():
        if grad.ndim:
            assert error(grad, cpu_grads[name]) < 3e-2, name  # measured with bf16 on a CPU: 0.015 at the most
        else:  # one sum of many terms that cancel
            assert (grad - cpu_grads[name]).abs() < 5e-3, name
