"""Tables of which a step looks up few rows: sums by row, their update, and the bank that has both."""

import dataclasses
import types

import pytest
import torch
from torch import nn

import train_gpt as gpt
import train_hybrid as hybrid

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


# Sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_sums_by_row_are_those_of_a_dense_table(rows, dtype):
    grads = random_grads(len(rows), dtype=dtype)
    found, sums = gpt.sum_by_row(rows, grads, V)
    assert found.shape == rows.shape and found.dtype == rows.dtype  # whatever the number of different rows
    assert sums.shape == grads.shape and sums.dtype == torch.float32
    different = rows.unique()
    assert torch.equal(found[:len(different)], different) and (found[len(different):] == V).all()
    want = torch.zeros(V + 1, D, dtype=torch.float64).index_add_(0, rows, grads.double())
    torch.testing.assert_close(sums.double(), want[found], rtol=1e-6, atol=1e-6)
    assert not sums[len(different):].any()


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_sums_have_the_bits_of_adding_one_token_after_the_other(rows):
    """The tokens of other rows in between change nothing."""
    grads = random_grads(len(rows))
    found, sums = gpt.sum_by_row(rows, grads, V)
    want = torch.zeros(V + 1, D)
    for row, grad in zip(rows.tolist(), grads):
        want[row] += grad
    assert torch.equal(sums, want[found])
    rows, order = rows.sort(stable=True)
    assert all(torch.equal(x, y) for x, y in zip(gpt.sum_by_row(rows, grads[order], V), (found, sums)))


def test_no_shape_depends_on_how_many_rows_differ():
    shapes = {tuple(x.shape for x in gpt.sum_by_row(rows, random_grads(N), V)) for rows in ROWS.values()
              if len(rows) == N}
    assert shapes == {((N,), (N, D))}


# Updates


def numbers(*values):
    return map(torch.tensor, values)


@pytest.mark.parametrize("decay", [0.0, 0.4])
def test_rows_learn_like_a_dense_table_by_adam_without_momentum(decay):
    """Each step by Adam on the rows that it looks up, as a table of their own; all others keep their bits."""
    weights, second = random_grads(V + 1, seed=1), torch.zeros(V + 1, D)
    assert weights[V].all()  # the spare row: not zero here, so that a change would show
    want, moments = weights.clone(), second.clone()
    for count, name in enumerate(("some repeated", "all different", "one row", "the last row", "some repeated"), 1):
        rows, grads = gpt.sum_by_row(ROWS[name], random_grads(N, seed=count), V)
        looked_up = rows[rows < V]
        before = weights.clone(), second.clone()
        gpt.row_update(weights, second, rows, grads, *numbers(0.05, decay, 0.9, float(count)))
        part, moment, first = want[looked_up], moments[looked_up], torch.zeros(len(looked_up), D)
        settings = numbers(0.05, decay, 0.0, 0.9, float(count))
        gpt.adam_update(part, first, moment, grads[:len(looked_up)], *settings, True)
        want[looked_up], moments[looked_up] = part, moment
        torch.testing.assert_close(weights, want, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(second, moments, rtol=1e-6, atol=1e-7)
        others = torch.ones(V + 1, dtype=torch.bool).index_fill(0, looked_up, False)
        assert others[V] and torch.equal(weights[others], before[0][others])
        assert torch.equal(second[others], before[1][others])
        assert (weights != before[0])[looked_up].all() and (second != before[1])[looked_up].all()


def test_the_first_update_of_all_rows_is_adam_s_of_the_table():
    weights, grads = random_grads(V, seed=1), random_grads(V)
    dense, spare = weights.clone(), torch.zeros(1, D)
    weights = torch.cat([weights, spare])
    gpt.row_update(weights, torch.zeros(V + 1, D), torch.arange(V), grads, *numbers(0.05, 0.4, 0.9, 1.0))
    gpt.adam_update(dense, *torch.zeros(2, V, D), grads, *numbers(0.05, 0.4, 0.0, 0.9, 1.0), True)
    torch.testing.assert_close(weights, torch.cat([dense, spare]), rtol=1e-6, atol=1e-7)


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
    assert list(bank.state) == ["second"] and len(bank.weights) == len(bank.state["second"]) == (V + 1) * D
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


def test_the_spare_row_stays_zero_and_learning_rate_and_decay_follow_the_schedule():
    table, optimizer = new_bank()
    bank, before = optimizer.banks["table"], table.detach().clone()
    for step, name in enumerate(ROWS):
        look_up(table, ROWS[name], step)
        optimizer.step(step, 0.5, 0.9)
        if not step:
            rows, sums = gpt.sum_by_row(ROWS[name], random_grads(N), V)
            old, update = before[rows[rows < V]], sums[rows < V].sign()  # of a first step of Adam
            want = old - 0.05 * (update + 0.25 * old * (update * old > 0))
            torch.testing.assert_close(table[rows[rows < V]].detach(), want, rtol=1e-5, atol=1e-6)
    assert not bank.master[-D:].any() and not bank.state["second"][-D:].any()


def test_a_saved_bank_goes_on_where_it_was():
    def steps(table, optimizer, which):
        for step in which:
            look_up(table, list(ROWS.values())[step], step)
            optimizer.step(step, 1.0, 0.9)

    table, optimizer = new_bank()
    steps(table, optimizer, range(3))
    saved = {name: x.clone() for name, x in optimizer.banks["table"].state_dict().items()}
    assert {name: len(x) for name, x in saved.items()} == {"grads": 0, "master": (V + 1) * D, "second": (V + 1) * D}
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("tokens, rows", [(5000, 3000), (65536, 100_000)])
def test_on_a_gpu(tokens, rows):
    """Sums and the compiled update against fp64, and the same bits twice."""
    torch.manual_seed(0)
    looked_up = (rows * torch.rand(tokens, device="cuda") ** 4).long()
    grads = torch.randn(tokens, 768, device="cuda").bfloat16()
    each, sums = gpt.sum_by_row(looked_up, grads, rows)
    dense = torch.zeros(rows + 1, 768, dtype=torch.float64, device="cuda").index_add_(0, looked_up, grads.double())
    assert (dense[each] - sums).norm() < 1e-6 * dense.norm() and not sums[each == rows].any()
    assert torch.equal(sums, gpt.sum_by_row(looked_up, grads, rows)[1])
    weights, second = torch.randn_like(dense).float(), torch.rand_like(dense).float()
    exact, numbers = (weights.double(), second.double()), [torch.tensor(x) for x in (0.5, 0.01, 0.95, 3.0)]
    torch.compile(gpt.row_update, dynamic=True, fullgraph=True)(weights, second, each, sums, *numbers)
    gpt.row_update(*exact, each, sums.double(), *numbers)
    for got, want in zip((weights, second), exact):
        assert (got - want).norm() < 1e-6 * want.norm()
