"""The gradients of tables against a sum in fp64: their kernel by Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_gpt as gpt
import train_hybrid as hybrid

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available()
CASES = [(100, 30, 96), (64, 5, 256), (33, 300, 40), (70, 1, 300)]  # tokens, vocabulary, columns


def random_case(sizes, dtype, device):
    """A table, gradients and rows, of which the first ones are frequent."""
    tokens, vocab, columns = sizes
    torch.manual_seed(0)
    rows = (vocab * torch.rand(tokens) ** 3).long()
    grads = torch.randn(tokens, columns)
    return torch.randn(vocab, columns).to(device, dtype), grads.to(device, dtype), rows.to(device)


def compare(script, sizes, dtype, device, tolerance):
    table, grads, rows = random_case(sizes, dtype, device)
    want = table.double().index_add_(0, rows, grads.double())
    script.add_rows(table, grads.T.contiguous().T, rows, rows.int().argsort())  # gradients may come in any layout
    assert (table.double() - want).norm() < tolerance * want.norm()


@pytest.mark.skipif(not INTERPRETED or not gpt.triton, reason="run by test_in_the_interpreter")
@pytest.mark.parametrize("script", [gpt, hybrid])
@pytest.mark.parametrize("sizes", CASES)
def test_interpreted(script, sizes):
    compare(script, sizes, torch.float32, "cpu", 1e-6)


@pytest.mark.skipif(not gpt.triton, reason="needs triton, which comes with torch for CUDA")
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter's run")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-k", "test_interpreted", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
                          capture_output=True, text=True)
    assert done.returncode == 0 and f"{2 * len(CASES)} passed" in done.stdout, done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not GPU or INTERPRETED, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("sizes", [*CASES, (65536, 50304, 768)])
def test_on_a_gpu(sizes):
    if not gpt.hopper(torch.empty(0, device="cuda")):
        pytest.skip("needs a Hopper GPU")
    compare(gpt, sizes, torch.bfloat16, "cuda", 5e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU or INTERPRETED, reason="needs an NVIDIA GPU")
def test_frequent_tokens_are_added_up_in_fp32():
    """3,000 times the same token: sums of bf16 lose what is small, one by one."""
    if not gpt.hopper(torch.empty(0, device="cuda")):
        pytest.skip("needs a Hopper GPU")
    table, grads, rows = torch.zeros(2, 256), torch.full((3000, 256), 1 / 64), torch.zeros(3000, dtype=torch.long)
    table, grads, rows = (x.cuda() for x in (table.bfloat16(), grads.bfloat16(), rows))
    gpt.add_rows(table, grads, rows, rows.int().argsort())
    assert (table[0] - 3000 / 64).abs().max() < 0.5 and not table[1].any()


def test_a_lookup_adds_to_the_gradient_that_is_there():
    table, grads, rows = random_case((50, 20, 16), torch.float64, "cpu")
    table, order = nn.Parameter(table), rows.argsort()
    place = table.grad = torch.randn(20, 16, dtype=torch.float64)
    want = place.clone()
    for _ in range(2):  # as by two micro-batches
        gpt.Lookup.apply(table, rows, order).backward(grads)
        want.index_add_(0, rows, grads)
    assert table.grad is place and torch.equal(gpt.Lookup.apply(table, rows, order), F.embedding(rows, table))
    torch.testing.assert_close(place, want)


def test_a_table_without_a_gradient_gets_a_new_one():
    table, grads, rows = random_case((50, 20, 16), torch.float64, "cpu")
    table, order = nn.Parameter(table), rows.argsort()
    (want,) = torch.autograd.grad(F.embedding(rows, table), table, grads)
    (got,) = torch.autograd.grad(gpt.Lookup.apply(table, rows, order), table, grads)
    gpt.Lookup.apply(table, rows, order).backward(grads)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(table.grad, want)
