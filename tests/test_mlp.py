"""Tests of the MLP: what is round quack's products, what chooses them, and on a GPU the kernels themselves."""

import importlib
import json
import shutil
import sys
import types

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

import train_gpt as gpt
import train_hybrid as hybrid

SCRIPTS = pytest.mark.parametrize("script", [gpt, hybrid])


def plain(x, up, down):
    return F.linear(x, up).relu().square() @ down


def inputs(tokens=37, dim=16, width=64, dtype=torch.float64, device="cpu") -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (tokens, dim), (width, dim), (width, dim)
    return [(torch.randn(shape) / dim**0.25).to(device, dtype) for shape in shapes]


def with_gradients(function, tensors) -> list[torch.Tensor]:
    """[output, gradient of each input] for a fixed random gradient of the output."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*tensors)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, dout)]


# Stand-ins with the signatures of quack 0.6.5 show that the wiring is right where the package does not run. What quack
# wants of layouts: one dimension of stride 1, the other's a multiple of 16 bytes


def fits(x: torch.Tensor) -> bool:
    return sorted(x.stride())[0] == 1 and sorted(x.stride())[1] % (16 // x.element_size()) == 0


def gemm_act(A, B, C=None, bias=None, activation=None, alpha=1.0, preact_out=None, postact_out=None, out_dtype=None,
             postact_dtype=None, cu_seqlens_m=None, A_idx=None, store_preact=True, dynamic_scheduler=False, tuned=True):
    assert C is bias is preact_out is postact_out is None and store_preact and not tuned and activation == "relu_sq"
    assert fits(A) and fits(B)
    preact = A @ B
    return preact, preact.relu().square()


def gemm_dact(A, B, PreAct, activation=None, dx_out=None, postact_out=None, out_dtype=None, postact_dtype=None,
              colvec_scale=None, colvec_reduce=False, cu_seqlens_m=None, A_idx=None, dynamic_scheduler=True,
              tuned=True):
    assert dx_out is postact_out is colvec_scale is None and not tuned and activation == "relu_sq"
    assert fits(A) and fits(B) and fits(PreAct)
    return 2 * PreAct.relu() * (A @ B), PreAct.relu().square()


@pytest.fixture
def stand_ins(monkeypatch):
    for script in (gpt, hybrid):
        monkeypatch.setattr(script, "gemm_act", gemm_act)
        monkeypatch.setattr(script, "gemm_dact", gemm_dact, raising=False)


@SCRIPTS
@pytest.mark.parametrize("tokens", [37, 1])
def test_the_fused_form_equals_the_plain_one(script, tokens, stand_ins):
    tensors = inputs(tokens)
    got = with_gradients(script.FusedMLP.apply, tensors)
    for result, want in zip(got, with_gradients(plain, tensors)):
        torch.testing.assert_close(result, want)


@SCRIPTS
def test_a_gradient_of_another_layout_is_taken(script, stand_ins):
    tensors = [x.requires_grad_() for x in inputs(16)]
    dout = torch.randn(16, 16, dtype=torch.float64)[::2].repeat(2, 1).T  # columns first
    for result, want in zip(torch.autograd.grad(script.FusedMLP.apply(*tensors), tensors, dout),
                            torch.autograd.grad(plain(*tensors), tensors, dout)):
        torch.testing.assert_close(result, want)


def test_compiled_it_is_the_same_in_one_graph(stand_ins):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *x: 2 * gpt.FusedMLP.apply(*x), fullgraph=True, dynamic=False, backend=counter)
    for result, want in zip(with_gradients(compiled, inputs()), with_gradients(lambda *x: 2 * plain(*x), inputs())):
        torch.testing.assert_close(result, want)
    assert counter.frame_count == 1


@SCRIPTS
def test_of_what_is_computed_only_what_is_before_the_activation_is_kept(script, stand_ins):
    x, up, down = (x.requires_grad_() for x in inputs())
    kept = script.FusedMLP.apply(x, up, down).grad_fn.saved_tensors
    assert all(a is b for a, b in zip(kept, (x, up, down))) and torch.equal(kept[3], x @ up.T) and len(kept) == 4


# Which form is used


@SCRIPTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_gpu_it_is_the_plain_form(script, dtype, stand_ins, monkeypatch):
    monkeypatch.setattr(script, "gemm_act", None if dtype == torch.float32 else lambda *_, **__: 1 / 0)
    tensors = inputs(dtype=dtype)
    for result, want in zip(with_gradients(script.mlp, tensors), with_gradients(plain, tensors)):
        assert torch.equal(result, want)


@SCRIPTS
@pytest.mark.parametrize("cuda, dtype, quack", [
    (True, torch.bfloat16, True), (True, torch.bfloat16, False), (True, torch.float32, True),
    (False, torch.bfloat16, True)])
def test_quack_does_bf16_on_a_gpu(script, cuda, dtype, quack, monkeypatch):
    monkeypatch.setattr(script, "gemm_act", gemm_act if quack else None)
    monkeypatch.setattr(script, "FusedMLP", types.SimpleNamespace(apply=lambda *_: "fused"))
    monkeypatch.setattr(F, "linear", lambda *_: torch.zeros(1, 1))
    result = script.mlp(types.SimpleNamespace(is_cuda=cuda, dtype=dtype), None, torch.zeros(1, 1))
    assert (result == "fused") == (cuda and dtype == torch.bfloat16 and quack)


class Broken(types.ModuleType):
    """As a package that was built for another CUDA, where all but one product works."""
    gemm_act = staticmethod(gemm_act)

    def __getattr__(self, name):
        raise (OSError if name == "gemm_dact" else AttributeError)(name)


@pytest.fixture
def import_copy(monkeypatch, tmp_path):
    """Imports a copy of train_gpt.py as on a GPU of that capability, with a quack that works or raises."""
    def imported(capability, works=True):
        name = f"copy_{tmp_path.name}"  # another in each test: the custom ops are named by it
        shutil.copy(gpt.SCRIPT, tmp_path / f"{name}.py")
        quack, interface = types.ModuleType("quack"), types.ModuleType("quack.gemm_interface")
        interface.gemm_act, interface.gemm_dact = gemm_act, gemm_dact
        if not works:
            interface = Broken(interface.__name__)
        for module in (quack, interface):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        return importlib.import_module(name)

    if gpt.triton is None:  # what the script needs of it to be imported
        triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
        triton.jit, triton.language, language.constexpr = (lambda function: function), language, int
        for module in (triton, language):
            monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.syspath_prepend(tmp_path)
    return imported


@pytest.mark.parametrize("capability, used", [((9, 0), True), ((10, 0), True), ((8, 9), False), (None, False)])
def test_quack_is_imported_on_a_gpu_that_is_new_enough(import_copy, capability, used):
    script = import_copy(capability)
    assert script.triton and (script.gemm_act is gemm_act) == used and (script.gemm_act is None) == (not used)


def test_a_quack_that_does_not_import_leaves_the_plain_form_and_triton(import_copy):
    script = import_copy((9, 0), works=False)
    assert script.gemm_act is None and script.triton


@pytest.mark.parametrize("used", [False, True])
def test_the_log_says_what_of_quack_is_in_use(monkeypatch, used):
    run = types.SimpleNamespace(world=types.SimpleNamespace(gpu=False, size=1), attention="reference", flags={},
                                model=types.SimpleNamespace(num_params=dict, kernels={"state space": "triton"}),
                                data=types.SimpleNamespace(about={"name": "sample"}, fingerprint="f"))
    monkeypatch.setattr(gpt, "gemm_act", gemm_act if used else None)
    environment = gpt.Run.environment(run)
    assert environment["kernels"] == {"state space": "triton"} | ({"MLP": "quack"} if used else {})
    json.dumps(environment)


# On a GPU


def error(x: torch.Tensor, reference: torch.Tensor) -> float:
    return ((x.double() - reference).norm() / reference.norm()).item()


@pytest.mark.gpu
@SCRIPTS
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tokens, dim", [(1, 16), (77, 192), (1000, 264), (16_384, 768)])
def test_gpu_forms_are_close_to_fp64(script, tokens, dim, compiled):
    if not torch.cuda.is_available() or script.gemm_act is None:
        pytest.skip("needs quack and a GPU of compute capability 9.0 or newer")
    tensors = inputs(tokens, dim, 4 * dim, torch.bfloat16, "cuda")
    want = with_gradients(plain, [x.double() for x in tensors])
    torch._dynamo.reset()
    forms = [torch.compile(form, dynamic=False, fullgraph=True) if compiled else form for form in (script.mlp, plain)]
    mine, theirs = ([error(x, y) for x, y in zip(with_gradients(form, tensors), want)] for form in forms)
    assert max(mine) < 1e-2 and all(x < 2 * y for x, y in zip(mine, theirs)), (mine, theirs)
