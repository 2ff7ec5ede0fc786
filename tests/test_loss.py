"""The fused loss against plain PyTorch, in fp64: by Triton's interpreter where there is no GPU."""

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


def run(loss, x, head, targets, weights):
    x, head = x.detach().clone().requires_grad_(), head.detach().clone().requires_grad_()
    value = loss(x, head, targets, weights)
    (0.5 * value).backward()
    return value.detach(), x.grad, head.grad


def plain_loss(x, head, targets, weights):
    logits = 23 * torch.sigmoid((F.linear(x, head) + 5) / 7.5)
    return (weights * (logits.logsumexp(1, keepdim=True) - logits.gather(1, targets))).sum()


def compare(script, sizes, dtype, device, tolerance):
    tokens, vocab, dim, ahead = sizes
    torch.manual_seed(0)
    x, head = torch.randn(tokens, dim).to(device, dtype), torch.randn(vocab, dim).to(device, dtype)
    targets, weights = torch.randint(vocab, (tokens, ahead)).to(device), torch.rand(tokens, ahead).to(device)
    targets[0], weights[1], targets[2] = 5, 0.0, vocab - 1  # one token several times; no weight; the last column
    got = run(lambda *inputs: script.softcap_loss_op(*inputs)[0], x, head, targets, weights)
    for result, want in zip(got, run(plain_loss, x.double(), head.double(), targets, weights)):
        assert (result.double() - want).norm() < tolerance * want.norm()


@pytest.mark.skipif(not INTERPRETED or not gpt.triton, reason="run by test_in_the_interpreter")
@pytest.mark.parametrize("script", [gpt, hybrid])
@pytest.mark.parametrize("sizes", CASES)
def test_interpreted(script, sizes):
    compare(script, sizes, torch.float32, "cpu", 2e-6)


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
