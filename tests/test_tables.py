"""Lookups in tables, whose gradients go straight into the table's, against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_gpt as gpt

GPU = torch.cuda.is_available()


def random_case(tokens, vocab, columns, dtype=torch.float64, device="cpu"):
    """A table, gradients and rows, of which the first ones are frequent."""
    torch.manual_seed(0)
    rows = (vocab * torch.rand(tokens) ** 3).long()
    table, grads = torch.randn(vocab, columns), torch.randn(tokens, columns)
    return nn.Parameter(table.to(device, dtype)), grads.to(device, dtype), rows.to(device)


def test_a_lookup_adds_to_the_gradient_that_is_there():
    table, grads, rows = random_case(50, 20, 16)
    place = table.grad = torch.randn(20, 16, dtype=torch.float64)
    want = place.clone()
    for _ in range(2):  # as by two micro-batches
        gpt.Lookup.apply(table, rows).backward(grads)
        want.index_add_(0, rows, grads)
    assert table.grad is place and torch.equal(gpt.Lookup.apply(table, rows), F.embedding(rows, table))
    torch.testing.assert_close(place, want)


def test_a_table_without_a_gradient_gets_a_new_one():
    table, grads, rows = random_case(50, 20, 16)
    (want,) = torch.autograd.grad(F.embedding(rows, table), table, grads)
    (got,) = torch.autograd.grad(gpt.Lookup.apply(table, rows), table, grads)
    gpt.Lookup.apply(table, rows).backward(grads)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(table.grad, want)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
def test_on_a_gpu(vocab=50304, tolerance=3e-2):  # one by one in bf16: 2e-2
    table, grads, rows = random_case(65536, vocab, 768, torch.bfloat16, "cuda")
    table.grad = torch.zeros_like(table)
    gpt.Lookup.apply(table, rows).backward(grads)
    want = torch.zeros(table.shape, device="cuda").index_add_(0, rows, grads.float())
    assert (table.grad - want).norm() < tolerance * want.norm()
