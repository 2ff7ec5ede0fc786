"""Tables of which a step looks up few rows: their update, its kernel (by Triton's interpreter where there is no GPU),
and the bank that has both."""

import dataclasses
import os
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import train_gpt as gpt
import train_hybrid as hybrid

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
V, D, N = 40, 12, 24  # rows of the table, its columns, tokens
ROWS = {
    "some repeated": torch.tensor([7, 3, 3, 39, 7, 0, 12, 7, 38, 3, 0, 25] * 2),
    "one row": torch.full((N,), 5), "the last row": torch.full((N,), V - 1),
    "all different": torch.arange(N).flip(0), "in order": torch.arange(N), "one token": torch.tensor([9]),
}


def random_grads(count, seed=0, dtype=torch.float32):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def world(gather=lambda x: x) -> types.SimpleNamespace:
    return types.SimpleNamespace(rank=0, size=1, gpu=False, device=CPU, dtype=torch.float32, gather=gather,
                                 sum=lambda x: x)


def new_bank(world_=None, dtype=torch.float32, **settings) -> tuple[nn.Parameter, gpt.Optimizer]:
    """A random table that learns by rows, and its optimiser."""
    table = nn.Parameter(torch.randn(V, D, generator=torch.Generator().manual_seed(9)).to(dtype))
    group = gpt.ParamGroup(**{"method": "rows", "lr": 0.1, "weight_decay": 0.5, "betas": (0.0, 0.9)} | settings,
                           params={"table": table})
    return table, gpt.Optimizer([group], world_ or world(), compile=False)


# Updates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_gradients_of_a_row_are_added_up_in_fp32_one_token_after_the_other(rows, dtype):
    """To the last bit: the tokens of other rows in between change nothing."""
    grads, sums = random_grads(len(rows), dtype=dtype), torch.zeros(V, D)
    for row, grad in zip(rows.tolist(), grads.float()):
        sums[row] += grad
    weights, second = torch.zeros(2, V, D)
    gpt.row_update(weights, second, rows, grads, 1.0, 0.0, 0.0, 1)
    assert torch.equal(second, sums.square()) and torch.equal(weights.sign(), -sums.sign())  # beta 0: no average
    exact = torch.zeros(V, D, dtype=torch.float64).index_add_(0, rows, grads.double())
    torch.testing.assert_close(second.double().sqrt(), exact.abs(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.4])
def test_rows_learn_like_a_dense_table_by_adam_without_momentum(decay):
    """Each step by Adam on the rows that it looks up, as a table of their own; all others keep their bits."""
    weights, second = random_grads(V, seed=1), torch.zeros(V, D)
    want, moments = weights.clone(), second.clone()
    for count, name in enumerate(("some repeated", "all different", "one row", "the last row", "some repeated"), 1):
        rows, grads = ROWS[name], random_grads(N, seed=count)
        looked_up, before = rows.unique(), (weights.clone(), second.clone())
        gpt.row_update(weights, second, rows, grads, 0.05, decay, 0.9, count)
        part, moment, sums = want[looked_up], moments[looked_up], torch.zeros(V, D).index_add_(0, rows, grads)
        gpt.adam_update(part, torch.zeros_like(part), moment, sums[looked_up], 0.05, decay, 0.0, 0.9, count, True)
        want[looked_up], moments[looked_up] = part, moment
        torch.testing.assert_close(weights, want, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(second, moments, rtol=1e-6, atol=1e-7)
        others = torch.ones(V, dtype=torch.bool).index_fill(0, looked_up, False)
        assert torch.equal(weights[others], before[0][others]) and torch.equal(second[others], before[1][others])
        assert (weights != before[0])[looked_up].all() and (second != before[1])[looked_up].all()


def test_the_first_update_of_all_rows_is_adam_s_of_the_table():
    weights, grads = random_grads(V, seed=1), random_grads(V)
    dense = weights.clone()
    gpt.row_update(weights, torch.zeros(V, D), torch.arange(V), grads, 0.05, 0.4, 0.9, 1)
    gpt.adam_update(dense, *torch.zeros(2, V, D), grads, 0.05, 0.4, 0.0, 0.9, 1, True)
    torch.testing.assert_close(weights, dense, rtol=1e-6, atol=1e-7)


# The kernel: it adds up sixteen tokens at a time, in blocks of 256 columns

OFTEN = torch.tensor([0] * 17 + [3] * 35 + [7] * 15 + [21] + [V - 1] * 16)
KERNEL_ROWS = {
    "often": OFTEN[torch.randperm(len(OFTEN), generator=torch.Generator().manual_seed(0))],
    "one row": torch.full((32,), 5), "the last row": torch.full((33,), V - 1), "one token": torch.tensor([0]),
}
KERNEL_COLUMNS = 12, 300
needs_triton = pytest.mark.skipif(not gpt.triton or INTERPRETED, reason="needs triton, which comes with torch for CUDA")


class OnGPU(torch.Tensor):
    """One of which row_update believes that it is on a GPU."""
    is_cuda = True


class Fenced:
    """row_kernel, its sorted rows between more of the first and of the last, which it must not take for its own."""
    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid):
        def launch(weights, second, rows, order, *rest, **options):
            self.grids.append(grid)
            rows = torch.cat([rows[:1], rows, rows[-1:].expand(32)])[1:-32]
            order = torch.cat([order, order[-1:].expand(32)])[:-32]
            self.kernel[grid](weights, second, rows, order, *rest, **options)
        return launch


def error(got, want):
    return (got.double() - want).norm() / want.norm()


@pytest.mark.skipif(not INTERPRETED or not gpt.triton, reason="run by test_in_the_interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", KERNEL_COLUMNS)
@pytest.mark.parametrize("rows", KERNEL_ROWS.values(), ids=KERNEL_ROWS)
@pytest.mark.parametrize("script", [gpt, hybrid])
def test_interpreted(script, rows, columns, dtype, monkeypatch):
    """Against the plain form; rows that were not looked up keep their bits."""
    torch.manual_seed(0)
    grads, weights, second = torch.randn(len(rows), columns).to(dtype), torch.randn(V, columns), torch.rand(V, columns)
    results, kernel = [], Fenced(script.row_kernel)
    monkeypatch.setattr(script, "row_kernel", kernel)
    for kind in (OnGPU, torch.Tensor):
        results.append((weights.clone(), second.clone()))
        tables = (x.as_subclass(kind) for x in results[-1])
        script.row_update(*tables, rows, grads, 0.5, 0.3, 0.95, 3)
    assert kernel.grids == [(len(rows), 1 if columns <= 256 else 2)]
    looked_up = rows.unique()
    others = torch.ones(V, dtype=torch.bool).index_fill(0, looked_up, False)
    for got, want, before in zip(*results, (weights, second)):
        assert error(got[looked_up], want[looked_up].double()) < 1e-6
        assert torch.equal(got[others], before[others])


@needs_triton
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-k", "test_interpreted", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
                          capture_output=True, text=True)
    count = 2 * 2 * len(KERNEL_COLUMNS) * len(KERNEL_ROWS)
    assert done.returncode == 0 and f"{count} passed" in done.stdout, done.stdout


@needs_triton
@pytest.mark.parametrize("script", [gpt, hybrid])
def test_the_kernel_compiles_for_a_gpu_that_need_not_be_there(script):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    tensors = {"weights": "*fp32", "second": "*fp32", "rows": "*i64", "order": "*i64", "grads": "*bf16"}
    numbers = dict.fromkeys(("tokens", "COLS"), "i32") | dict.fromkeys(("lr", "decay", "beta", "correction"), "fp32")
    source = ASTSource(script.row_kernel, tensors | numbers | {"BLOCK": "constexpr"}, {"BLOCK": 256})
    assert gpt.triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("tokens, rows", [(5000, 3000), (65536, 100_000)])
def test_on_a_gpu(tokens, rows):
    """Against Adam in fp64, and the same bits twice; rows that were not looked up keep theirs."""
    torch.manual_seed(0)
    looked_up = (rows * torch.rand(tokens, device="cuda") ** 4).long()
    grads = torch.randn(tokens, 768, device="cuda").bfloat16()
    before = torch.randn(rows, 768, device="cuda"), torch.rand(rows, 768, device="cuda")
    first, second = ([x.clone() for x in before] for _ in range(2))
    for tables in (first, second):
        gpt.row_update(*tables, looked_up, grads, 0.5, 0.01, 0.95, 3)
    assert all(torch.equal(x, y) for x, y in zip(first, second))
    weights, square = (x.double() for x in before)
    grad = torch.zeros_like(weights).index_add_(0, looked_up, grads.double())
    square = 0.95 * square + 0.05 * grad**2
    update = grad / (square / (1 - 0.95**3)).sqrt()
    weights = weights - 0.5 * (update + 0.01 * weights * (update * weights > 0))
    others = torch.ones(rows, dtype=torch.bool, device="cuda").index_fill(0, looked_up, False)
    for got, want, old in zip(first, (weights, square), before):
        assert error(got[~others], want[~others]) < 1e-6 and torch.equal(got[others], old[others])


# The bank


def look_up(table, rows, seed, module=gpt):
    module.Lookup.apply(table, rows).backward(random_grads(len(rows), seed))


def test_lookups_hand_their_rows_to_the_bank_and_none_to_a_gradient():
    table, optimizer = new_bank()
    look_up(table, ROWS["some repeated"], 0)
    look_up(table, ROWS["one token"], 1)  # micro-batches may be of two sizes
    assert table.grad is None and [len(rows) for rows, _ in table.looked_up] == [N, 1]
    (bank,) = optimizer.banks.values()
    before = table.detach().clone()
    optimizer.step(0, 1.0, 0.9)
    assert isinstance(bank, gpt.RowBank) and table.grad is None and table.looked_up == []
    changed = (table != before).any(1).nonzero().flatten().tolist()
    assert changed == sorted({*ROWS["some repeated"].tolist(), 9})


def test_a_bank_holds_nothing_as_large_as_the_table_but_weights_and_a_moment():
    table, optimizer = new_bank()
    (bank,) = optimizer.banks.values()
    assert bank.master.data_ptr() == bank.weights.data_ptr() == table.data_ptr()
    assert list(bank.state) == ["second"] and len(bank.weights) == len(bank.state["second"]) == V * D
    assert bank.grads.untyped_storage().nbytes() == bank.grad.untyped_storage().nbytes() == 0


def test_micro_batches_and_ranks_give_the_bits_of_one_batch():
    """One rank with one, or four, micro-batches; and the first of two, which gets two and hears of the other's."""
    rows, grads = ROWS["some repeated"], random_grads(N)
    (first, second), results = zip(rows.chunk(2), grads.chunk(2)), []
    others = {x.dtype: x for x in second}  # what a gather appends, rows or gradients
    for parts, gather in (([(rows, grads)], lambda x: x), (list(zip(rows.chunk(4), grads.chunk(4))), lambda x: x),
                          (list(zip(*(x.chunk(2) for x in first))), lambda x: torch.cat([x, others[x.dtype]]))):
        table, optimizer = new_bank(world(gather))
        for step in range(3):
            table.looked_up += parts
            optimizer.step(step, 1.0, 0.9)
        results.append(optimizer.banks["table"].state_dict() | {"table": table.detach()})
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


def test_the_bank_counts_its_steps_and_learning_rate_and_decay_follow_the_schedule():
    table, optimizer = new_bank()
    want, second = table.detach().clone(), torch.zeros(V, D)
    for step, (rows, factor) in enumerate(zip(ROWS.values(), (0.5, 1.0, 0.25, 0.75, 0.1, 0.0))):
        look_up(table, rows, step)
        optimizer.step(step, factor, 0.9)
        gpt.row_update(want, second, rows, random_grads(len(rows), step), 0.1 * factor, 0.5 * factor, 0.9,
                       step + 1)
        assert torch.equal(table, want) and torch.equal(optimizer.banks["table"].state["second"], second.flatten())


def test_a_saved_bank_goes_on_where_it_was():
    def steps(table, optimizer, which):
        for step in which:
            look_up(table, list(ROWS.values())[step], step)
            optimizer.step(step, 1.0, 0.9)

    table, optimizer = new_bank()
    steps(table, optimizer, range(3))
    saved = {name: x.clone() for name, x in optimizer.banks["table"].state_dict().items()}
    assert {name: len(x) for name, x in saved.items()} == {"grads": 0, "master": V * D, "second": V * D}
    steps(table, optimizer, range(3, 6))
    again, other = new_bank()
    with torch.no_grad():
        again.fill_(9.0)
    other.banks["table"].load_state_dict(saved)
    steps(again, other, range(3, 6))
    assert torch.equal(table, again)


def test_reset_makes_a_fresh_bank():
    table, optimizer = new_bank()
    look_up(table, ROWS["some repeated"], 0)
    optimizer.step(0, 1.0, 0.9)
    with torch.no_grad():
        table.zero_()
    bank = optimizer.banks["table"]
    assert bank.state["second"].any()
    bank.reset()
    assert not (bank.state["second"].any() or bank.master.any() or bank.weights.any() or table.any())


def test_a_table_that_learns_by_adam_learns_densely():
    """As with --optimizer adamw: a lookup adds to its gradient, and momentum moves rows that were looked up before."""
    for method in ("adam", "rows"):
        table, optimizer = new_bank(method=method, weight_decay=0.0, betas=(0.9, 0.95), every=1)
        look_up(table, torch.tensor([0, 1]), 0)
        if method == "adam":
            assert not hasattr(table, "looked_up") and torch.equal(table.grad[:2], random_grads(2))
        optimizer.step(0, 1.0, 0.9)
        before = table.detach().clone()
        look_up(table, torch.tensor([1, 2]), 1)
        optimizer.step(1, 1.0, 0.9)
        moved = (table != before).any(1).nonzero().flatten().tolist()
        assert moved == ([0, 1, 2] if method == "adam" else [1, 2])


@pytest.mark.parametrize("script, layers", [(gpt, "s lv"), (hybrid, "l d")])
def test_a_model_s_table_of_bigrams_learns_where_its_pairs_are(script, layers):
    """fp32, whatever the dtype of the model, and by rows."""
    script.choose_attention("reference", CPU)
    args = dataclasses.replace(script.PRESETS["sample"], layers=layers, model_dim=48, bigram_rows=301, tied_until=0.5)
    assert script.Model(args, 257, torch.device("meta"), torch.bfloat16).bigram_table.dtype == torch.float32
    model = script.Model(args, 257, CPU, torch.float32)
    model.initialise(0)
    torch.nn.init.normal_(model.head)
    optimizer = script.Optimizer(model.param_groups(), world(), compile=False)
    tokens, cu_seqlens = torch.arange(65) % 9, torch.tensor([0, 30, 64], dtype=torch.int32)
    model(tokens[:-1], tokens[1:], cu_seqlens, model.stage_inputs(0)).backward()
    ((rows, grads),) = model.bigram_table.looked_up
    pairs = {(36313 * b ^ 27191 * a) % 300 for i in range(9) for a, b in [(i, (i + 1) % 9)]}
    assert set(rows.tolist()) == pairs | {300} and grads.any(1).all()
    optimizer.step(0, 1.0, 0.9)
    assert set(model.bigram_table.any(1).nonzero().flatten().tolist()) == pairs | {300}
    assert "bigram_table" in optimizer.banks
