"""Tests of the recurrent kernels: the chunked references, the custom ops round the packages, differential attention."""

import os
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

import train_hybrid as hybrid

CPU = torch.device("cpu")
PACKED = [  # lengths of packed documents, round the chunk of 64
    (1, 2, 63, 64, 65, 130, 1, 30),
    (0, 64, 0, 3, 300, 0, 1, 0, 0),  # empty documents are borders that repeat
    (128,), (5,),
]
HEADS, KEYS, VALUES = 2, 8, 12
INTERPRETED = hybrid.triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def reference_backends():
    """Every test begins with the references, whatever the one before chose."""
    for kind in hybrid.RECURRENCES:
        hybrid.choose_recurrence(kind, "reference", CPU)
    hybrid.choose_attention("reference", CPU)
    yield


def borders(lengths, device=CPU) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def positions(cu_seqlens: Tensor) -> Tensor:
    """Places in the documents, (T,) int32."""
    return torch.cat([torch.arange(length) for length in cu_seqlens.diff().tolist()]).int().to(cu_seqlens.device)


def where(kind, lengths, device=CPU) -> tuple[Tensor, ...]:
    """The last arguments of a recurrence."""
    cu_seqlens = borders(lengths, device)
    chunks = hybrid.chunk_table(cu_seqlens, sum(lengths))
    return (positions(cu_seqlens), cu_seqlens, chunks) if kind == "short convolution" else (cu_seqlens, chunks)


def inputs_of(kind: str, tokens: int, heads=HEADS, keys=KEYS, values=VALUES, dtype=torch.float64, device=CPU):
    """Random inputs with gradients: decays as a model has them, keys of length 1."""
    torch.manual_seed(0)
    q, k = F.normalize(torch.randn(2, tokens, heads, keys), dim=-1)
    v, rates = torch.randn(tokens, heads, values), torch.rand(tokens, heads)
    if kind == "gated delta rule":
        inputs = [q, k, v, -3 * rates.square(), torch.rand(tokens, heads)]
    elif kind == "state space":
        inputs = [v, rates, -torch.arange(1.0, heads + 1), k, q]
    else:
        inputs = [torch.randn(tokens, values), torch.randn(values, 4)]
    precise = torch.promote_types(dtype, torch.float32)
    small = {"gated delta rule": (3, 4), "state space": (1, 2), "short convolution": (1,)}[kind]
    return [x.to(device, precise if i in small else dtype).requires_grad_() for i, x in enumerate(inputs)]


def token_by_token(kind: str, *inputs_and_lengths) -> Tensor:
    """The recurrence as it is defined, in float64."""
    *inputs, lengths = inputs_and_lengths
    inputs, outs = [x.double() for x in inputs], []
    for start, length in zip(borders(lengths).tolist(), lengths):
        state = 0.0
        for t in range(start, start + length):
            if kind == "short convolution":
                x, weight = inputs
                outs.append(F.silu(sum(weight[:, 3 - ago] * x[t - ago] for ago in range(min(4, t - start + 1)))))
                continue
            if kind == "gated delta rule":
                q, k, v, log_decay, beta = (x[t] for x in inputs)
                state = state * log_decay.exp()[:, None, None] + 0 * k[..., None] * v[:, None]
                u = beta[:, None] * (v - torch.einsum("hkv,hk->hv", state, k))
                state, q = state + k[..., None] * u[:, None], q * k.size(-1)**-0.5
            else:
                x, dt, a, b, q = (x if x.ndim == 1 else x[t] for x in inputs)
                state = state * (dt * a).exp()[:, None, None] + b[..., None] * (dt[:, None] * x)[:, None]
            outs.append(torch.einsum("hkv,hk->hv", state, q))
    return torch.stack(outs)


FUNCTIONS = {"gated delta rule": hybrid.gated_delta_rule, "state space": hybrid.state_space,
             "short convolution": hybrid.short_convolution}
KINDS = list(FUNCTIONS)


def with_gradients(function, inputs) -> list[Tensor]:
    """[output, gradient of each input] for a fixed random gradient of the output."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    grads = torch.autograd.grad(out, inputs, dout, materialize_grads=True)
    return [out.detach(), *grads]


def error(x: Tensor, reference: Tensor) -> float:
    return ((x.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-9)).item()


# The references


@pytest.mark.parametrize("lengths", PACKED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_reference_equals_the_recurrence_token_by_token(kind, lengths):
    inputs = inputs_of(kind, sum(lengths))
    got = with_gradients(lambda *x: FUNCTIONS[kind](*x, *where(kind, lengths)), inputs)
    want = with_gradients(lambda *x: token_by_token(kind, *x, lengths), inputs)
    for x, reference in zip(got, want):
        torch.testing.assert_close(x, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaks_between_documents_or_back_in_time(kind):
    """By gradients: an output depends on its own document up to itself, and on the first of it."""
    lengths = (70, 1, 90, 3)
    inputs = inputs_of(kind, sum(lengths))
    out = FUNCTIONS[kind](*inputs, *where(kind, lengths))
    back = 4 if kind == "short convolution" else 1000
    for place in (0, 69, 70, 71, 74, 133, 160, 161, 163):
        start = max(start for start in (0, 70, 71, 161) if start <= place)
        grads = torch.autograd.grad(out[place].sum(), inputs, retain_graph=True)
        for x, grad in zip(inputs, grads):
            if len(x) == len(out):
                seen = (grad.flatten(1).abs().sum(1) > 1e-13).nonzero().flatten()  # sums of decays cancel, but round
                assert set(seen.tolist()) <= set(range(start, place + 1))
        values = grads[{"gated delta rule": 2}.get(kind, 0)].flatten(1).abs().sum(1)
        assert values[max(start, place - back + 1):place + 1].gt(0).all()


def test_mamba_2_is_attention_without_softmax_whose_scores_decay():
    x, dt, a, b, c = inputs_of("state space", 150)
    total = (dt * a).cumsum(0).T
    scores = torch.einsum("thn,shn->hts", c, b) * (total[:, :, None] - total[:, None]).exp().tril()
    torch.testing.assert_close(hybrid.state_space(x, dt, a, b, c, *where("state space", [150])),
                               torch.einsum("hts,shp->thp", scores, dt[..., None] * x))


def test_decays_to_nothing_stay_finite():
    """exp(-40) a token: products over a chunk underflow, quotients of them would overflow."""
    q, k, v, log_decay, beta = inputs_of("gated delta rule", 130, dtype=torch.float32)
    inputs = q, k, v, log_decay - 40, beta
    results = with_gradients(lambda *x: hybrid.gated_delta_rule(*x, *where("gated delta rule", [130])), inputs)
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_inputs_compute_in_fp32(kind):
    lengths = (100, 1, 99)
    inputs = inputs_of(kind, 200, dtype=torch.bfloat16)
    got = with_gradients(lambda *x: FUNCTIONS[kind](*x, *where(kind, lengths)), inputs)
    want = with_gradients(lambda *x: token_by_token(kind, *x, lengths), inputs)
    for x, reference, source in zip(got, want, [None, *inputs]):
        assert x.dtype == (torch.bfloat16 if source is None else source.dtype) and error(x, reference) < 1e-2


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("lengths", [*PACKED, (500,), (5,) * 60, (64, 64, 1, 0, 0), (63, 200, 0, 130)],
                         ids=lambda x: str(x)[:30])
def test_state_space_in_chunks_equals_the_recurrence(lengths, dtype, most):
    """Values and gradients, for documents that end inside chunks, with them, or cover many."""
    inputs = inputs_of("state space", sum(lengths), dtype=dtype)
    got = with_gradients(lambda *x: hybrid.state_space_chunked(*x, *where("state space", lengths)), inputs)
    want = with_gradients(lambda *x: token_by_token("state space", *x, [n for n in lengths if n]), inputs)
    for i, (x, reference) in enumerate(zip(got, want)):  # the gradient of a: few sums in which much cancels out
        assert error(x, reference) < most * (10 if i == 3 else 1), i


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 13])
def test_scan_equals_a_loop(count):
    torch.manual_seed(0)
    decay, state = (torch.randn(count, 2, 3, n, dtype=torch.float64) for n in (3, 5))
    s, want = torch.zeros(2, 3, 5, dtype=torch.float64), []
    for n in range(count):
        s = decay[n] @ s + state[n]
        want.append(s)
    torch.testing.assert_close(hybrid.scan(torch.matmul, decay, state), torch.stack(want))


@pytest.mark.parametrize("lengths", [*PACKED, (1,) * 200, (64, 63) * 3, (0, 0, 65)], ids=lambda x: str(x)[:30])
def test_chunk_table_holds_every_chunk_once_and_else_nothing(lengths):
    table = hybrid.chunk_table(borders(lengths), sum(lengths)).tolist()
    chunks = [[i, n] for i, length in enumerate(lengths) for n in range(-(-length // hybrid.CHUNK))]
    assert table[:len(chunks)] == chunks and len(table) == sum(lengths) // hybrid.CHUNK + len(lengths)
    assert all(hybrid.CHUNK * n >= lengths[document] for document, n in table[len(chunks):])


# Stand-ins with the signatures of fla-core 0.6.0 and mamba-ssm 2.3.2 show that the wiring is right on a CPU


def gradients(function, inputs, dout):
    """In a thread: inside a custom op autograd is off."""
    def run():
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, dout, materialize_grads=True)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def check(cu_seqlens, chunk_indices, *tensors):
    assert all(x.size(0) == 1 and x.is_contiguous() for x in tensors)
    assert cu_seqlens.dtype == torch.int32
    if chunk_indices is not None:
        assert torch.equal(chunk_indices, hybrid.chunk_table(cu_seqlens, tensors[0].size(1)))


def gated_delta_rule_module():
    """Out and gradients come from the reference; what kernels hand to each other says who made it."""
    seen = {}

    def expect(*pairs):
        for x, number in pairs:
            assert x.is_contiguous() and x.eq(number).all()

    def grads_of(q, k, v, g, beta, do, cu_seqlens):
        return [x[None].contiguous() for x in gradients(
            lambda *x: hybrid.delta_rule_reference(*x, cu_seqlens, None), [x[0] for x in (q, k, v, g, beta)], do[0])]

    def chunk_local_cumsum(g, chunk_size, reverse=False, scale=None, cu_seqlens=None, output_dtype=torch.float,
                           chunk_indices=None, use_graph=False):
        check(cu_seqlens, chunk_indices, g)
        assert chunk_size == 64 and scale == (None if reverse else 1.5)
        return g.clone()

    def chunk_gated_delta_rule_fwd_intra(k, v, g=None, beta=None, cu_seqlens=None, chunk_size=64, chunk_indices=None):
        check(cu_seqlens, chunk_indices, k, v, g, beta)
        seen.update(v=v, beta=beta)
        return torch.full_like(k, 3.0), torch.full_like(v, 4.0), torch.full((*v.shape[:3], 64), 7.0, dtype=k.dtype)

    def chunk_gated_delta_rule_fwd_h(
            k, w, u, g=None, gk=None, initial_state=None, output_final_state=False, chunk_size=64, save_new_value=True,
            state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, chunk_offsets=None):
        check(cu_seqlens, chunk_indices, k, w, u, g)
        expect((w, 3), (u, 4))
        states = k.new_full((1, len(chunk_indices), *k.shape[2:], u.size(-1)), 5.0)
        return states, torch.full_like(u, 6.0), None

    def chunk_fwd_o(q, k, v, h, g=None, g_gamma=None, scale=None, cu_seqlens=None, chunk_size=64, chunk_indices=None,
                    state_v_first=False):
        check(cu_seqlens, chunk_indices, q, k, v, g)
        expect((v, 6), (h, 5))
        assert scale == q.size(-1)**-0.5
        inputs = q, k, seen["v"], g, seen["beta"]
        return hybrid.delta_rule_reference(*(x[0] for x in inputs), cu_seqlens, None)[None].contiguous()

    def chunk_bwd_dv_local(q, k, do, g=None, g_gamma=None, scale=None, cu_seqlens=None, chunk_size=64,
                           chunk_indices=None):
        check(cu_seqlens, chunk_indices, q, k, do, g)
        return torch.full_like(do, 8.0)

    def chunk_gated_delta_rule_bwd_dhu(
            q, k, w, do, dv, g=None, gk=None, h0=None, dht=None, scale=None, state_v_first=False, cu_seqlens=None,
            chunk_size=64, chunk_indices=None, chunk_offsets=None, use_graph=False):
        check(cu_seqlens, chunk_indices, q, k, w, do, dv, g)
        expect((w, 3), (dv, 8))
        return q.new_full((1, len(chunk_indices), *k.shape[2:], dv.size(-1)), 9.0), None, torch.full_like(dv, 10.0)

    def chunk_bwd_dqkwg(q, k, v, do, h, dh, g=None, g_gamma=None, dv=None, w=None, scale=None, cu_seqlens=None,
                        chunk_size=64, chunk_indices=None, state_v_first=False):
        check(cu_seqlens, chunk_indices, q, k, v, do, g, dv, w)
        expect((v, 6), (h, 5), (dh, 9), (dv, 10), (w, 3))
        assert scale == q.size(-1)**-0.5
        seen.update(q=q, do=do)
        dq, dk, _, dg, _ = grads_of(q, k, seen["v"], g, seen["beta"], do, cu_seqlens)
        return dq, dk / 2, torch.full_like(k, 11.0), dg / 4

    def prepare_wy_repr_bwd(k, v, beta, A, dw, du, g=None, cu_seqlens=None, chunk_indices=None):
        check(cu_seqlens, chunk_indices, k, v, beta, A, dw, du, g)
        expect((A, 7), (dw, 11), (du, 10))
        _, dk, dv, dg, dbeta = grads_of(seen["q"], k, v, g, beta, seen["do"], cu_seqlens)
        return dk / 2, dv, dbeta, 3 * dg / 4

    return types.SimpleNamespace(RCP_LN2=1.5, **locals())


def causal_conv1d_module():
    def causal_conv1d_fwd(
            x, weight, bias, residual, initial_state=None, output_final_state=False, activation=None, cu_seqlens=None,
            cu_seqlens_cpu=None, chunk_indices=None, chunk_size=64, layout_fallback=False):
        check(cu_seqlens, chunk_indices, x)
        assert bias is residual is initial_state is None and activation == "silu"
        return hybrid.short_convolution_reference(x[0], weight, positions(cu_seqlens), None, None)[None], None

    def causal_conv1d_bwd(
            x, dy, dht, weight=None, bias=None, residual=None, initial_state=None, activation=None, cu_seqlens=None,
            cu_seqlens_cpu=None, chunk_indices=None, chunk_size=64, layout_fallback=False):
        check(cu_seqlens, chunk_indices, x, dy)
        assert dht is None and activation == "silu"
        dx, dw = gradients(lambda *x: hybrid.short_convolution_reference(*x, positions(cu_seqlens), None, None),
                           (x[0], weight), dy[0])
        return dx[None], dw, None, None, None

    return types.SimpleNamespace(**locals())


def mamba_module():
    def lengths_of(seq_idx):
        return seq_idx[0].unique_consecutive(return_counts=True)[1]

    def _mamba_chunk_scan_combined_fwd(
            x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
            cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, float("inf"))):
        assert seq_idx.dtype == torch.int32 and seq_idx.shape == x.shape[:2] and D is z is dt_bias is cu_seqlens is None
        inputs = x[0], dt[0], A, B[0], C[0]
        out = hybrid.state_space_reference(*inputs, borders(lengths_of(seq_idx)), None)[None].contiguous()
        return out, None, None, None, None, None

    def _mamba_chunk_scan_combined_bwd(
            dout, x, dt, A, B, C, out, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
            dfinal_states=None, seq_idx=None, dt_softplus=False, dt_limit=(0.0, float("inf")), dx=None, ddt=None,
            dB=None, dC=None, dz=None, recompute_output=False):
        assert out.shape == x.shape and not dt_softplus
        dx, ddt, dA, dB, dC = gradients(
            lambda *x: hybrid.state_space_reference(*x, borders(lengths_of(seq_idx)), None),
            (x[0], dt[0], A, B[0], C[0]), dout[0])
        return dx[None], ddt[None], dA, dB[None], dC[None], None, None, None, None

    return types.SimpleNamespace(**locals())


@pytest.fixture
def packages(monkeypatch):
    modules = {"ops.gated_delta_rule.chunk": gated_delta_rule_module(),
               "modules.causal_conv1d.ops": causal_conv1d_module()}
    mamba = mamba_module()
    monkeypatch.setattr(hybrid, "fla", modules.__getitem__)
    monkeypatch.setattr(hybrid, "mamba_ssm", lambda: mamba)


BACKENDS = [(kind, name) for kind in KINDS for name in hybrid.RECURRENCES[kind] if name != "reference"]
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs below, in Triton's interpreter")
ON_CPU = [pytest.param(*backend, marks=interpreted if backend[1] == "triton" else ()) for backend in BACKENDS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, name", ON_CPU)
def test_a_backend_computes_or_passes_on_what_the_reference_computes(kind, name, dtype, packages):
    """Values, every gradient in its place, and types; sliced inputs are made contiguous."""
    lengths = (30, 1, 0, 69, 0)
    inputs = inputs_of(kind, 100, dtype=dtype)
    want = with_gradients(lambda *x: hybrid.RECURRENCES[kind]["reference"][0](*x, *where(kind, lengths)), inputs)
    got = with_gradients(lambda *x: hybrid.RECURRENCES[kind][name][0](*x, *where(kind, lengths)), inputs)
    for x, reference in zip(got, want):
        assert x.shape == reference.shape and x.dtype == reference.dtype
        assert error(x, reference) < ((1e-5 if name == "chunked" else 1e-6) if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("kind, name", [row for row in ON_CPU if row.values[1] != "chunked"])
def test_custom_ops_are_sound(kind, name, packages):
    """Schema, fake and backward of each op, as torch checks them; the fakes of the backward ops agree with them."""
    inputs = inputs_of(kind, 70, dtype=torch.float32)
    op = {"gated delta rule fla": hybrid.delta_rule_op, "state space mamba-ssm": hybrid.state_space_op}.get(
        f"{kind} {name}", hybrid.RECURRENCES[kind][name][0])
    rest = where(kind, (30, 40))
    if name == "mamba-ssm":
        rest = rest[:1]
    torch.library.opcheck(op, (*inputs, *rest), test_utils=("test_schema", "test_autograd_registration",
                                                            "test_faketensor", "test_aot_dispatch_static"))


@pytest.mark.parametrize("kind, name", [  # slow in the interpreter
    *(backend for backend in BACKENDS if backend[1] != "triton"), *((kind, "reference") for kind in KINDS)])
def test_compiled_equals_eager_and_no_number_of_documents_recompiles(kind, name, packages):
    function = hybrid.RECURRENCES[kind][name][0]

    def layer(*inputs):
        return 2 * function(*inputs).square()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    inputs = inputs_of(kind, 100, dtype=torch.float32)
    for lengths in ((100, 0, 0), (10, 20, 70, 0, 0), (50, 50, 0)):
        rest = where(kind, lengths)
        for x in rest[-2:]:
            torch._dynamo.mark_dynamic(x, 0)
        got = with_gradients(lambda *x: compiled(*x, *rest), inputs)  # noqa: B023 (called at once)
        want = with_gradients(lambda *x: layer(*x, *rest), inputs)  # noqa: B023
        for x, reference in zip(got, want):
            torch.testing.assert_close(x, reference, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


# The short convolution's own kernels, on a GPU or in Triton's interpreter


@pytest.mark.skipif(hybrid.triton is None or INTERPRETED, reason="needs Triton")
def test_triton_kernels_in_the_interpreter():
    """In another process, for it must be known before Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton", "-m", "not gpu", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
devices = pytest.mark.parametrize("device", [pytest.param("cpu", marks=interpreted),
                                             pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])])


def small_tiles(monkeypatch):
    for name in ("FORWARD_TILE", "BACKWARD_TILE"):
        monkeypatch.setattr(hybrid, name, {"ROWS": 8, "GROUP": 4, "COLUMNS": 64, "num_warps": 1})


@devices
@pytest.mark.parametrize("lengths, channels, width, dtype, small", [
    ((0, 1, 2, 3, 0, 0, 63, 64, 65, 130, 0), 96, 4, torch.float32, False),
    ((0, 1, 2, 3, 0, 0, 61, 64, 5, 0), 200, 4, torch.bfloat16, False),
    ((2, 9, 5, 6, 1, 1, 1, 15), 96, 4, torch.float32, True), ((40,), 8, 2, torch.float32, True),
    ((2,), 8, 4, torch.float32, False), ((128,), 40, 3, torch.bfloat16, False),
], ids=str)
def test_triton_convolution_equals_the_reference(lengths, channels, width, dtype, small, device, monkeypatch):
    if small:  # more borders of tiles
        small_tiles(monkeypatch)
    torch.manual_seed(0)
    x, dout = torch.randn(2, sum(lengths), channels, device=device).to(dtype)
    weight, rest = torch.randn(channels, width, device=device), where("short convolution", lengths, device)
    out = hybrid.short_convolution_triton(x, weight, *rest)
    grads = hybrid.short_convolution_triton_backward(dout, x, weight, *rest)
    leaves = [each.double().requires_grad_() for each in (x, weight)]
    want = hybrid.short_convolution_reference(*leaves, *rest)
    wants = torch.autograd.grad(want, leaves, dout.double())
    for i, (each, reference) in enumerate(zip((out, *grads), (want, *wants))):
        assert each.shape == reference.shape and each.dtype == (torch.float32 if i == 2 else dtype)
        assert error(each, reference) < (5e-3 if each.dtype == torch.bfloat16 else 1e-6)


@devices
def test_triton_convolution_leaks_nothing(device, monkeypatch):
    """NaN in a document stays there; in a token, it reaches its own output and the next three, and the gradients of
    the tokens that these saw."""
    small_tiles(monkeypatch)
    lengths, channels = (20, 1, 30, 3), 12
    rest = where("short convolution", lengths, device)
    torch.manual_seed(0)
    x, dout = torch.randn(2, sum(lengths), channels, device=device)
    weight = torch.randn(channels, 4, device=device)
    whole = hybrid.short_convolution_triton(x, weight, *rest)
    whole_dx, _ = hybrid.short_convolution_triton_backward(dout, x, weight, *rest)
    for first, last, begin, end in ((20, 21, 20, 21), (21, 51, 21, 51), (30, 31, 27, 34), (19, 20, 16, 20)):
        bad = x.clone()
        bad[first:last] = torch.nan
        out = hybrid.short_convolution_triton(bad, weight, *rest)
        dx, _ = hybrid.short_convolution_triton_backward(dout, bad, weight, *rest)
        for each, intact, expected in ((out, whole, range(first, end)), (dx, whole_dx, range(begin, end))):
            changed = each.isnan().any(1)
            assert changed.nonzero().flatten().tolist() == list(expected)
            assert torch.equal(each[~changed], intact[~changed])


# The choice of a backend


def pretend_gpu(monkeypatch, capability=(9, 0)) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    return torch.device("cuda")


@pytest.mark.parametrize("kind", KINDS)
def test_auto_on_a_cpu_is_the_reference(kind):
    assert hybrid.choose_recurrence(kind, "auto", CPU) == "reference"


@pytest.mark.parametrize("kind, name", BACKENDS)
def test_forcing_a_gpu_backend_on_a_cpu_is_refused_in_one_line(kind, name):
    with pytest.raises(hybrid.UserError, match=f"{name} for the {kind} needs a GPU") as refusal:
        hybrid.choose_recurrence(kind, name, CPU)
    assert "\n" not in str(refusal.value)


def test_a_backend_of_another_recurrence_is_refused_in_one_line():
    with pytest.raises(hybrid.UserError, match="no kernel of mamba-ssm for the gated delta rule, there are") as refusal:
        hybrid.choose_recurrence("gated delta rule", "mamba-ssm", CPU)
    assert "\n" not in str(refusal.value)


def test_auto_takes_the_first_that_imports_and_runs(monkeypatch, packages):
    device = pretend_gpu(monkeypatch)
    assert hybrid.choose_recurrence("state space", "auto", device) == "chunked"
    assert hybrid.recurrence_in_use["state space"] is hybrid.state_space_chunked
    assert hybrid.choose_recurrence("state space", "mamba-ssm", device) == "mamba-ssm"
    assert hybrid.choose_recurrence("gated delta rule", "auto", device) == "fla"

    def broken(*_):
        raise OSError("undefined symbol:\n  _ZN3c10")

    monkeypatch.setattr(hybrid, "fla", broken)
    assert hybrid.choose_recurrence("gated delta rule", "auto", device) == "reference"
    with pytest.raises(hybrid.UserError, match="does not import .OSError: undefined symbol: _ZN3c10") as refusal:
        hybrid.choose_recurrence("gated delta rule", "fla", device)
    assert "\n" not in str(refusal.value)
    assert hybrid.choose_recurrence("state space", "auto", pretend_gpu(monkeypatch, (7, 5))) == "reference"


def test_keys_too_narrow_for_fla_go_to_the_next_backend(monkeypatch, packages):
    """Its backward kernels are wrong for them."""
    device, kind = pretend_gpu(monkeypatch), "gated delta rule"
    assert hybrid.choose_recurrence(kind, "auto", device, 64) == "fla"
    assert hybrid.choose_recurrence(kind, "auto", device, 32) == "reference"
    assert hybrid.recurrence_in_use[kind] is hybrid.RECURRENCES[kind]["reference"][0]
    assert hybrid.choose_recurrence("state space", "auto", device, 32) == "chunked"
    with pytest.raises(hybrid.UserError, match=f"fla for the {kind} needs keys of 64 channels or more, not 32 .*"
                                               "--recurrent-heads") as refusal:
        hybrid.choose_recurrence(kind, "fla", device, 32)
    assert "\n" not in str(refusal.value)


def test_a_model_says_how_wide_its_keys_are(monkeypatch):
    chosen = []
    monkeypatch.setattr(hybrid, "choose_recurrence", lambda *args: chosen.append(args) or "reference")
    hybrid.Model(hybrid.PRESETS["sample"], 384, CPU, torch.float32)
    assert chosen == [("gated delta rule", "auto", CPU, 32), ("short convolution", "auto", CPU)]


@pytest.mark.parametrize("missing, name", [(False, "triton"), (True, "fla")])
def test_auto_convolves_with_its_own_kernels_where_triton_imports(missing, name, monkeypatch, packages):
    monkeypatch.setitem(sys.modules, "triton", None if missing else types.ModuleType("triton"))
    device = pretend_gpu(monkeypatch)
    assert hybrid.choose_recurrence("short convolution", "auto", device) == name
    assert hybrid.recurrence_in_use["short convolution"] is hybrid.RECURRENCES["short convolution"][name][0]


def test_mamba_ssm_is_imported_without_its_init(tmp_path, monkeypatch):
    """Its __init__ wants an extension that is not compiled."""
    folder = tmp_path / "mamba_ssm" / "ops" / "triton"
    folder.mkdir(parents=True)
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("import selective_scan_cuda")
    (folder / "ssd_combined.py").write_text("answer = 42")
    monkeypatch.syspath_prepend(tmp_path)
    hybrid.mamba_ssm.cache_clear()
    try:
        assert hybrid.mamba_ssm().answer == 42
    finally:
        hybrid.mamba_ssm.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
            del sys.modules[name]


def test_few_configurations_are_left_to_tune(monkeypatch):
    class Wrapper:  # as triton.heuristics and triton.autotune wrap a kernel
        def __init__(self, fn, configs=None):
            self.fn = fn
            if configs:
                self.configs = configs

    def config(warps, stages, **kwargs):
        return types.SimpleNamespace(num_warps=warps, num_stages=stages, kwargs=kwargs)

    configs = [config(warps, stages, BV=size) for warps in (2, 4, 8) for stages in (2, 3, 4) for size in (32, 64)]
    modules = [types.ModuleType("fake_package"), types.ModuleType("fake_package.kernels")]
    modules[1].kernel = Wrapper(Wrapper(lambda: 0, configs))
    modules[1].single, modules[1].other = Wrapper(Wrapper(lambda: 0, [config(8, 1)])), 3
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert hybrid.few_configurations(modules[0]) is modules[0]
    left = [(config.num_warps, config.num_stages, config.kwargs["BV"]) for config in modules[1].kernel.fn.configs]
    assert left == [(4, 3, 64), (4, 3, 32)]
    assert len(modules[1].single.fn.configs) == 1


# Differential attention


def differential_inputs(tokens=60, heads=3, dim=4):
    torch.manual_seed(0)
    shapes = (tokens, heads, 2, dim), (tokens, heads, 2, dim), (tokens, heads, 2 * dim)
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("wide", [True, False])
def test_differential_attention_is_the_difference_of_two_maps(wide):
    q, k, v = differential_inputs()
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    numbers = [torch.tensor(x) for x in (40, 17, 0.5)]

    def plain(q, k, v, weight):
        maps = [hybrid.varlen_attention(q[:, :, i], k[:, :, i], v, borders([20, 40]), *numbers) for i in range(2)]
        return maps[0] - weight * maps[1]

    got = with_gradients(lambda *x: hybrid.differential_attention(*x, borders([20, 40]), *numbers, wide),
                         (q, k, v, weight))
    for x, reference in zip(got, with_gradients(plain, (q, k, v, weight))):
        torch.testing.assert_close(x, reference)


def test_without_its_second_map_differential_attention_is_plain():
    q, k, v = differential_inputs()
    numbers = [torch.tensor(x) for x in (60, 60, 0.5)]
    got = hybrid.differential_attention(q, k, v, torch.zeros(()), borders([60]), *numbers, True)
    torch.testing.assert_close(got, hybrid.varlen_attention(q[:, :, 0], k[:, :, 0], v, borders([60]), *numbers))


def test_wide_values_where_the_kernel_takes_them(monkeypatch):
    """flash-attn-4's backward tile for keys of 64 channels is changed for wide values only."""
    assert hybrid.values_twice_as_wide(64)
    interface = types.ModuleType("flash_attn.cute.interface")
    interface._tile_size_bwd_sm90 = lambda head_dim, head_dim_v, causal, local: (head_dim, head_dim_v, causal, local)
    for name, module in (("flash_attn", types.ModuleType("flash_attn")),
                         ("flash_attn.cute", types.ModuleType("flash_attn.cute")),
                         ("flash_attn.cute.interface", interface)):
        monkeypatch.setitem(sys.modules, name, module)
    assert hybrid.choose_attention("flash-attn-4", pretend_gpu(monkeypatch)) == "flash-attn-4"
    assert not hybrid.values_twice_as_wide(128)
    assert hybrid.values_twice_as_wide(64) and hybrid.values_twice_as_wide(64)
    tile = interface._tile_size_bwd_sm90
    assert tile(64, 128, True, local=False) == (128, 128, True, False)
    assert tile(64, 64, True, local=False)[0] == 64 and tile(96, 128, True, local=False)[0] == 96
    hybrid.choose_attention("torch", torch.device("cuda"))
    assert not hybrid.values_twice_as_wide(64)


# On a GPU: every backend that imports, against the recurrence in float64


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("heads, keys, values", [(6, 64, 128), (12, 32, 64), (4, 128, 128)])
@pytest.mark.parametrize("kind, name", BACKENDS)
def test_a_kernel_equals_the_recurrence(kind, name, heads, keys, values):
    lengths, device = (1, 2, 63, 64, 65, 700, 128, 1, 0, 0, 0), torch.device("cuda")
    try:
        hybrid.choose_recurrence(kind, name, device, keys)
    except hybrid.UserError as refusal:
        pytest.skip(str(refusal))
    inputs = inputs_of(kind, sum(lengths), heads, keys, values * heads if kind == "short convolution" else values,
                       torch.bfloat16, device)
    got = with_gradients(lambda *x: FUNCTIONS[kind](*x, *where(kind, lengths, device)), inputs)
    reference = hybrid.RECURRENCES[kind]["reference"][0]
    want = with_gradients(lambda *x: reference(*x, *where(kind, lengths, device)), [x.double() for x in inputs])
    for i, (x, reference) in enumerate(zip(got, want)):
        assert error(x, reference) < 1e-2, f"{'output' if not i else f'gradient {i - 1}'}: {error(x, reference)}"


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_differential_attention_on_a_gpu_equals_the_reference(dim):
    device, lengths = torch.device("cuda"), (1, 700, 64, 1000, 0, 0)
    inputs = [x.detach().to(device, torch.bfloat16) for x in differential_inputs(sum(lengths), 3, dim)]
    weight = torch.tensor(0.4, device=device)
    results = []
    for name in ("auto", "reference"):
        hybrid.choose_attention(name, device)
        wide = hybrid.values_twice_as_wide(dim)
        numbers = [torch.tensor(x) for x in (1000, 300, dim**-0.5)]
        results.append(with_gradients(
            lambda *x: hybrid.differential_attention(*x, borders(lengths, device), *numbers, wide),  # noqa: B023
            [*inputs, weight]))
        outs = [hybrid.differential_attention(*inputs, factor * weight, borders(lengths, device), *numbers, wide)
                for factor in (0, 1)]
    *pairs, (dweight, reference) = zip(*results)
    assert all(error(*pair) < 1e-2 for pair in pairs)
    # a sum of products with random numbers, as large as the second map on average; here it is 0.1 or 2 times that
    assert (dweight - reference).abs() < 1e-2 * ((outs[0] - outs[1]).norm() / weight)
