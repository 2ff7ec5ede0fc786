"""The fused loss against plain PyTorch, in fp64: by Triton's interpreter where there is no GPU."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import train_gpt as gpt
import train_hybrid as hybrid

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available()
CASES = [(7, 384, 32, 3), (5, 2176, 16, 1), (9, 4224, 32, 2)]  # tokens, vocabulary, model_dim, targets of a token


def run(loss, x, head, targets, weights, counts):
    x, head = x.detach().clone().requires_grad_(), head.detach().clone().requires_grad_()
    value = loss(x, head, targets, weights, counts)
    (0.5 * value).backward()
    return value.detach(), x.grad, head.grad


def plain_loss(x, head, targets, weights, counts):
    often = torch.where(torch.arange(len(head), device=x.device) < counts[0], 1.0, counts[1]).double()
    logits = 23 * torch.sigmoid((F.linear(x, head) + 5) / 7.5) + often.log()
    return (weights * (logits.logsumexp(1, keepdim=True) - logits.gather(1, targets))).sum()


def compare(script, sizes, dtype, device, tolerance):
    tokens, vocab, dim, ahead = sizes
    torch.manual_seed(0)
    x, head = torch.randn(tokens, dim).to(device, dtype), torch.randn(vocab, dim).to(device, dtype)
    targets, weights = torch.randint(vocab, (tokens, ahead)).to(device), torch.rand(tokens, ahead).to(device)
    targets[0], weights[1], targets[2] = 5, 0.0, vocab - 1  # one token several times; no weight; the last column
    for known, others in ((vocab, 1.0), (vocab // 3, 2.5)):  # a whole softmax, and a sampled one
        targets, counts = targets.clamp(max=known - 1), torch.tensor([known, others], device=device)
        got = run(lambda *inputs: script.SoftcapLoss.apply(*inputs), x, head, targets, weights, counts)
        for result, want in zip(got, run(plain_loss, x.double(), head.double(), targets, weights, counts)):
            assert (result.double() - want).norm() < tolerance * want.norm()


@pytest.mark.skipif(not INTERPRETED or not gpt.triton, reason="run by test_in_the_interpreter")
@pytest.mark.parametrize("script", [gpt, hybrid])
@pytest.mark.parametrize("sizes", CASES)
def test_interpreted(script, sizes):
    compare(script, sizes, torch.float32, "cpu", 2e-6)


@pytest.mark.skipif(not gpt.triton, reason="needs triton, which comes with torch for CUDA")
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter's run")
@pytest.mark.parametrize("script", [gpt, hybrid])
@pytest.mark.parametrize("ahead", [1, 3])
def test_the_kernel_compiles_for_a_gpu_that_need_not_be_there(script, ahead):
    """The interpreter takes Python that the compiler refuses, such as a name that is a number and then a block."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    types = {"logits": "*bf16", "targets": "*i64", "weights": "*fp32", "counts": "*fp32", "losses": "*fp32"}
    sizes = {"VOCAB": 16384, "AHEAD": ahead, "BLOCK": 2048}
    source = ASTSource(script.softcap_loss_kernel, types | dict.fromkeys(sizes, "constexpr"), sizes)
    assert gpt.triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


@pytest.mark.skipif(not gpt.triton, reason="needs triton, which comes with torch for CUDA")
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter's run")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-k", "test_interpreted", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
                          capture_output=True, text=True)
    assert done.returncode == 0 and f"{2 * len(CASES)} passed" in done.stdout, done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not GPU or INTERPRETED, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("sizes", [*CASES, (2048, 50304, 768, 3)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_on_a_gpu(sizes, dtype, tolerance):
    compare(gpt, sizes, dtype, "cuda", tolerance)


def model_and_batch(script, **changes):
    """A tiny model with random weights, and a micro-batch of two documents: (model, (tokens, targets, cu_seqlens))."""
    script.choose_attention("reference", torch.device("cpu"))
    args = dataclasses.replace(script.PRESETS["sample"], **changes)
    model = script.Model(args, 1000, torch.device("cpu"), torch.float32)
    model.initialise(0)
    torch.nn.init.normal_(model.head, std=0.2)
    tokens = (300 * torch.rand(129) ** 2).long()  # few distinct ones
    return model, (tokens[:-1], tokens[1:], torch.tensor([0, 50, 128], dtype=torch.int32))


@pytest.mark.parametrize("script", [gpt, hybrid])
def test_candidates(script):
    """Targets come first, every other row has its turn, and places and counts say what is where."""
    model, (_, targets, _) = model_and_batch(script)
    known, seen = targets.unique(), set()
    for turn in range(0, model.vocab_size, 100):
        rows, place, counts = model.candidates(targets, torch.tensor(turn), 256)
        assert len(rows.unique()) == 256 and torch.equal(rows[:len(known)].sort()[0], known)
        assert torch.equal(rows[place[rows]], rows) and (place >= 0).sum() == 256 and (place[targets] < counts[0]).all()
        stands_for = (model.vocab_size - len(known)) / (256 - len(known))
        torch.testing.assert_close(counts, torch.tensor([len(known), stands_for**0.5]))
        seen |= set(rows.tolist())
    assert len(seen) == model.vocab_size


@pytest.mark.parametrize("script", [gpt, hybrid])
def test_a_sampled_softmax_of_all_rows_is_the_softmax(script):
    model, (tokens, targets, cu_seqlens) = model_and_batch(script)
    stage = model.stage_inputs(0, validation=True)
    assert stage.candidates == model.vocab_size
    loss = model(tokens, targets, cu_seqlens, stage)
    x = model.hidden(tokens, cu_seqlens, stage)[0]
    want = F.cross_entropy(model.logits(x), targets, reduction="sum")
    torch.testing.assert_close(loss, want)
    grads = [torch.autograd.grad(y, model.head, retain_graph=True)[0] for y in (loss, want)]
    torch.testing.assert_close(*grads)


def test_a_sampled_softmax_comes_closer_with_more_rows_and_knows_only_them():
    model, (tokens, targets, cu_seqlens) = model_and_batch(gpt)
    whole = model.stage_inputs(0, validation=True)
    exact, errors = model(tokens, targets, cu_seqlens, whole), []
    for count in (128, 256, 512):
        loss = model(tokens, targets, cu_seqlens, whole._replace(candidates=count))
        errors.append(abs(loss - exact).item())
        (grad,) = torch.autograd.grad(loss, model.head)
        rows, _, _ = model.candidates(torch.stack([targets], 1), tokens.sum(), count)
        others = torch.ones(model.vocab_size, dtype=torch.bool).index_fill(0, rows, False)
        assert not grad[others].any() and grad[rows].any(1).all()
    assert errors[0] > errors[1] > errors[2] > 0


def test_targets_without_a_place_have_no_weight():
    model, (tokens, targets, cu_seqlens) = model_and_batch(gpt)
    stage = model.stage_inputs(0, validation=True)._replace(candidates=8)
    loss = model(tokens, targets, cu_seqlens, stage)
    _, place, _ = model.candidates(targets[:, None], tokens.sum(), 8)
    assert 0 < (place[targets] >= 0).sum() < len(targets) and 0 < loss < 23 * (place[targets] >= 0).sum()


@pytest.mark.parametrize("script", [gpt, hybrid])
@pytest.mark.parametrize("candidates", [-5, 0, 1000, 100_000])
def test_more_candidates_than_rows_are_the_whole_softmax(script, candidates):
    """As with a byte vocabulary under the default stages: then no row counts for others."""
    stages = tuple(dataclasses.replace(stage, candidates=candidates) for stage in script.PRESETS["sample"].stages)
    model, (tokens, targets, cu_seqlens) = model_and_batch(script, stages=stages)
    stage = model.stage_inputs(0)
    assert stage.candidates == (1000 if candidates == 1000 else model.vocab_size)
    _, _, (known, others) = model.candidates(targets, tokens.sum(), stage.candidates)
    assert known == len(targets.unique()) and (others == 1) == (candidates != 1000)
