"""Tests of the schedule and the optimiser: formulas against dense references, sharding over ranks, saved state."""

import dataclasses
import math
import os
import socket
import types

import pytest
import torch
from torch import Tensor, nn

import train_gpt as gpt
import train_hybrid as hybrid

CPU = torch.device("cpu")
BATCH = gpt.PRESETS["sample"].stages[0].batch_tokens


def world(size=1) -> types.SimpleNamespace:
    return types.SimpleNamespace(rank=0, size=size, gpu=False, device=CPU, dtype=torch.float32, sum=lambda x: x,
                                 gather=lambda x: x)


# Schedule


def args(preset="sample", **changes) -> gpt.Hyperparameters:
    return dataclasses.replace(gpt.PRESETS[preset], **changes)


def stages(*parts, batch=1024) -> tuple[gpt.Stage, ...]:
    return tuple(gpt.Stage(part, batch * (i + 1), 512, (8, 16), 1.0 + i, (1.0,)) for i, part in enumerate(parts))


@pytest.mark.parametrize("preset", ["speedrun", "sample"])
def test_stages_follow_each_other_and_their_tokens_add_up(preset):
    schedule, table = gpt.Schedule(args(preset), world()), args(preset).stages
    assert sum(stage.steps for stage in table) == pytest.approx(1)
    total, last = 0, (0, -1.0)
    for step in range(schedule.steps):
        assert schedule.tokens_before[step] == total
        assert last < schedule.stage(step) < (len(table), 0.0) and 0 <= schedule.stage(step)[1] < 1
        last = schedule.stage(step)
        total += table[last[0]].batch_tokens
    assert schedule.tokens == schedule.tokens_before[schedule.steps] == total
    assert abs(total - args(preset).max_tokens) <= 2 * table[-1].batch_tokens
    assert schedule.stage(schedule.steps) == (len(table) - 1, 1.0)  # after the last step
    for index, stage in enumerate(table):
        count = sum(schedule.stage(step)[0] == index for step in range(schedule.steps))
        assert abs(count - stage.steps * schedule.steps) <= 1


def test_progress_goes_evenly_through_a_stage():
    schedule = gpt.Schedule(args(row_tokens=1024, stages=stages(0.5, 0.25, 0.25, 0.0), max_tokens=1024 * 175), world())
    assert schedule.steps == 100
    assert [schedule.stage(step) for step in (0, 25, 49, 50, 75)] == [
        (0, 0.0), (0, 0.5), (0, 0.98), (1, 0.0), (2, 0.0)]
    assert schedule.stage(100) == (2, 1.0)  # the last stage has no steps and never begins


def test_learning_rate_is_the_stage_s_then_falls_linearly_to_the_floor():
    table = stages(0.25, 0.25, 0.25, 0.25)  # with factors 1, 2, 3, 4
    flags = args(row_tokens=1024, stages=table, max_tokens=2560 * 200, cooldown=(0.6, 0.9), lr_floor=0.1)
    schedule = gpt.Schedule(flags, world())
    assert schedule.steps == 200
    assert [schedule.lr(step) for step in (0, 49, 50, 100, 120)] == pytest.approx([1, 1, 2, 3, 3])
    assert schedule.lr(135) == pytest.approx(0.75 * 3 + 0.25 * 0.1)
    assert schedule.lr(150) == pytest.approx(0.5 * 4 + 0.5 * 0.1)
    assert [schedule.lr(step) for step in (180, 190, 199, 200)] == pytest.approx([0.1] * 4)


def test_momentum_rises_holds_and_falls():
    schedule = gpt.Schedule(args(row_tokens=1024, stages=stages(1.0), max_tokens=1024 * 100, muon_momentum=(0.8, 0.9),
                                 muon_ramps=(0.2, 0.1)), world())
    assert schedule.momentum(0) == pytest.approx(0.8 + 0.1 * (1 / 20))
    assert schedule.momentum(9) == pytest.approx(0.85)
    assert [schedule.momentum(step) for step in (19, 50, 89)] == pytest.approx([0.9] * 3)
    assert schedule.momentum(94) == pytest.approx(0.85)
    assert schedule.momentum(99) == pytest.approx(0.8)


def test_more_tokens_stretch_the_schedule_and_keep_its_shape():
    """Stage, learning rate and momentum at a part of the run, to the width of a step."""
    short, long = (gpt.Schedule(args("speedrun", max_tokens=n * 10**6), world()) for n in (300, 3000))
    assert long.steps == pytest.approx(10 * short.steps, abs=10)
    steps = {"short": short.steps, "long": long.steps}
    for part in (0.0, 0.1, 0.25, 0.45, 0.6, 0.8, 0.95, 0.992):
        a, b = (round(part * n) for n in steps.values())
        assert short.stage(a)[0] == long.stage(b)[0]
        assert short.stage(a)[1] == pytest.approx(long.stage(b)[1], abs=0.2 if part > 0.99 else 0.02)
        assert short.lr(a) == pytest.approx(long.lr(b), abs=0.01)
        assert short.momentum(a) == pytest.approx(long.momentum(b), abs=0.005)


@pytest.mark.parametrize("steps", range(1, 12))
def test_the_shortest_runs_have_a_schedule(steps):
    schedule = gpt.Schedule(args(max_tokens=BATCH * steps), world())
    assert schedule.steps == steps and schedule.tokens == BATCH * steps
    for step in range(steps + 1):
        index, progress = schedule.stage(step)
        assert 0 <= index < 4 and 0 <= progress <= 1
        assert 0 < schedule.lr(step) <= 1 and (step == steps or 0.85 <= schedule.momentum(step) <= 0.95)


@pytest.mark.parametrize("changes", [
    {"cooldown": (1.0, 1.0)}, {"cooldown": (0.5, 0.5)}, {"muon_ramps": (0.0, 0.0)}, {"muon_ramps": (0.0, 0.1)}])
def test_a_cooldown_or_a_ramp_may_have_no_length(changes):
    schedule = gpt.Schedule(args(**changes), world())
    for step in range(schedule.steps):
        assert 0.1 <= schedule.lr(step) <= 1 and 0.85 <= schedule.momentum(step) <= 0.95


@pytest.mark.parametrize("size, changes, message", [
    (3, {}, "3 ranks cannot share"), (16, {}, "16 ranks cannot share"), (1, {"row_tokens": 3000}, "cannot share"),
    (1, {"row_tokens": 0}, "rows of 0"), (1, {"micro_batch_tokens": 0}, "micro-batches of 0"),
    (1, {"max_tokens": BATCH - 1}, "--max-tokens"), (1, {"max_tokens": 0}, "--max-tokens 0"),
    (1, {"stages": stages(0.5, 0.3, 0.1, 0.05)}, "stages.*0.95"), (1, {"stages": stages(1.5, -0.5, 0, 0)}, "stages"),
])
def test_a_schedule_that_cannot_be_is_refused_in_one_line(size, changes, message):
    with pytest.raises(gpt.UserError, match=message) as refusal:
        gpt.Schedule(args(**changes), world(size))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("script", [gpt, hybrid])
@pytest.mark.parametrize("preset", ["sample", "speedrun", "short"])
def test_ranks_that_divide_the_rows_are_accepted(script, preset):
    """1 to 8 GPUs share every batch of a preset, and its longest documents fit into its rows."""
    flags, steps = script.PRESETS[preset], set()
    if preset == "short":  # four at the most, and eight with smaller rows
        with pytest.raises(script.UserError, match="--row-tokens"):
            script.Schedule(flags, world(8))
        flags = dataclasses.replace(flags, row_tokens=8192)
    for size in (1, 2, 4, 8):
        steps.add((schedule := script.Schedule(flags, world(size))).steps)
        loader = types.SimpleNamespace(row_tokens=flags.row_tokens, micro_batch_tokens=flags.micro_batch_tokens,
                                       world=world(size))
        for batch in schedule.batches:
            micro_batch = script.TrainLoader.micro_batch_rows(loader, batch) * flags.row_tokens
            assert batch % (size * micro_batch) == 0 and micro_batch <= flags.micro_batch_tokens
    assert len(steps) == 1 and max(stage.document_tokens for stage in flags.stages) <= flags.row_tokens


# Orthogonalisation


@pytest.mark.parametrize("shape", [(24, 24), (64, 16), (16, 64), (40, 8)], ids=str)
def test_polar_express_keeps_singular_vectors_and_makes_singular_values_about_one(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    y = gpt.polar_express(x)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    diagonal = u.mT @ y @ vh.mT
    values = diagonal.diagonal(dim1=-2, dim2=-1)
    large = s > 0.01 * s.amax(-1, keepdim=True)
    assert y.shape == x.shape and large.float().mean() > 0.9
    assert values[large].min() > 0.8 and values[large].max() < 1.2
    torch.testing.assert_close(diagonal, torch.diag_embed(values), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(24, 24), (64, 16), (16, 64)], ids=str)
def test_polar_express_treats_each_matrix_of_a_stack_alone_and_whatever_its_size(shape):
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    together = gpt.polar_express(x)
    for i, scale in enumerate((1.0, 100.0, 1e-3, 1.0)):
        torch.testing.assert_close(gpt.polar_express(scale * x[i:i + 1])[0], together[i], rtol=5e-3, atol=5e-4)
    assert not gpt.polar_express(torch.zeros(1, 8, 8)).any()


# The optimiser against a second one, dense, in float64, a parameter at a time, written from the formulas

SHAPES = {"qkv": (3, 8, 8), "out": (8, 8), "up": (32, 8), "a.down": (32, 8), "b.down": (32, 8), "wide": (8, 24),
          "head": (24, 8), "gate": (13,), "scalar": (), "table": (20, 6)}  # banks of 4, 3 and 1 matrices
GROUPS = (
    dict(method="muon", names=("qkv", "out", "up", "wide"), lr=0.02, weight_decay=0.5),
    dict(method="muon", names=("a.down", "b.down"), lr=0.04, weight_decay=0.3),
    dict(method="adam", names=("head", "scalar"), lr=0.03, weight_decay=0.4, betas=(0.5, 0.95)),
    dict(method="adam", names=("gate",), lr=0.05, betas=(0.9, 0.99), every=1),
    dict(method="rows", names=("table",), lr=0.06, weight_decay=0.6, betas=(0.0, 0.9)),
)


def new_params(dtype=torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def new_optimizer(params, world_=None, **changes) -> gpt.Optimizer:
    """The optimiser of GROUPS; `changes` are of every group."""
    groups = []
    for group in GROUPS:
        settings = {key: value for key, value in group.items() if key != "names"} | changes
        groups.append(gpt.ParamGroup(params={name: params[name] for name in group["names"]}, **settings))
    return gpt.Optimizer(groups, world_ or world(), compile=False)


def gradient(name: str, step: int) -> Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(1000 * step + list(SHAPES).index(name)))


def factors(step: int) -> tuple[float, float]:
    """(learning rate, momentum) of a step."""
    return 1.0 - 0.1 * step, 0.85 + 0.01 * step


def lookups(step: int) -> tuple[Tensor, Tensor]:
    """The rows of the table that a step looks up, some of them several times, with their gradients."""
    generator = torch.Generator().manual_seed(step)
    return (20 * torch.rand(16, generator=generator) ** 2).long(), torch.randn(16, 6, generator=generator)


def train(params, optimizer, steps, share=lambda gradient, name, step: gradient, part=(0, 1)):
    """`part`: (rank, ranks), of the tokens whose rows are looked up."""
    for step in steps:
        for name, param in params.items():
            if hasattr(param, "looked_up"):  # in two micro-batches
                param.looked_up += zip(*(x.chunk(part[1])[part[0]].chunk(2) for x in lookups(step)))
            else:
                param.grad += share(gradient(name, step), name, step).to(param.dtype)  # as backward does
        optimizer.step(step, *factors(step))


def polar_of_svd(x: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / (1.02 * s.square().sum().sqrt() + 1e-6)
    for a, b, c in gpt.POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


def agree(update: Tensor, weights: Tensor) -> Tensor:
    return (update * weights > 0).double()


class DenseMuon:
    def __init__(self, lr, weight_decay, betas=None):
        self.lr, self.decay, self.momentum, self.second = lr, weight_decay, 0.0, 0.0

    def update(self, w: Tensor, g: Tensor, lr: float, mu: float) -> Tensor:
        rows, cols = w.shape
        self.momentum = mu * self.momentum + (1 - mu) * g
        o = polar_of_svd((1 - mu) * g + mu * self.momentum)
        along = 1 if rows >= cols else 0  # a mean square for each neuron of the longer side
        self.second = 0.9 * self.second + 0.1 * (o**2).mean(along, keepdim=True)
        scaled = o / self.second.sqrt()
        o = scaled * o.norm() / scaled.norm()
        return w - lr * self.lr * math.sqrt(max(1, rows / cols)) * o - lr * self.lr * math.sqrt(
            max(1, rows / cols)) * lr * self.decay * agree(o, w) * w


class DenseAdam:
    def __init__(self, lr, weight_decay=0.0, betas=(0.9, 0.95)):
        self.lr, self.decay, self.betas, self.count, self.first, self.second = lr, weight_decay, betas, 0, 0.0, 0.0

    def update(self, w: Tensor, g: Tensor, lr: float, mu: float) -> Tensor:
        (beta1, beta2), self.count = self.betas, self.count + 1
        self.first = beta1 * self.first + (1 - beta1) * g
        self.second = beta2 * self.second + (1 - beta2) * g**2
        o = self.first / (1 - beta1**self.count) / (self.second / (1 - beta2**self.count)).sqrt()
        return w - lr * self.lr * o - lr * self.lr * lr * self.decay * agree(o, w) * w


class DenseRows(DenseAdam):
    """Adam of every row as long as it has a gradient: the others keep their weights and moments."""

    def update(self, w: Tensor, g: Tensor, lr: float, mu: float) -> Tensor:
        seen, old = g.any(1, keepdim=True), self.second
        new = super().update(w, g, lr, mu)
        self.second = torch.where(seen, self.second, old)
        return torch.where(seen, new, w)


@torch.no_grad()
def dense_training(steps: int) -> dict[str, Tensor]:
    results = {}
    for group in GROUPS:
        make = {"muon": DenseMuon, "adam": DenseAdam, "rows": DenseRows}[group["method"]]
        every = group.get("every", 2) if make is DenseAdam else 1
        for name in group["names"]:
            whole = new_params()[name].double()
            stack = whole.view(-1, *whole.shape[-2:]) if make is DenseMuon else whole[None]
            learners = [make(group["lr"], group.get("weight_decay", 0.0), group.get("betas")) for _ in stack]
            waiting = torch.zeros_like(stack)
            for step in range(steps):
                new = gradient(name, step).double()
                if make is DenseRows:
                    rows, grads = lookups(step)
                    new = torch.zeros_like(whole).index_add(0, rows, grads.double())
                waiting = waiting + new.view_as(stack)
                if (step + 1) % every == 0:
                    stack = torch.stack([learner.update(w, g, *factors(step))
                                         for learner, w, g in zip(learners, stack, waiting)])
                    waiting = torch.zeros_like(stack)
            results[name] = stack.view_as(whole)
    return results


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_optimizer_equals_the_dense_reference(steps):
    params = new_params()
    train(params, new_optimizer(params), range(steps))
    for name, want in dense_training(steps).items():
        torch.testing.assert_close(params[name].double(), want, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_adam_waits_for_every_second_step_and_muon_does_not():
    params, before = new_params(), new_params()
    optimizer = new_optimizer(params)
    train(params, optimizer, [0])
    changed = {name for name in params if not torch.equal(params[name], before[name])}
    assert changed == {"qkv", "out", "up", "a.down", "b.down", "wide", "gate", "table"}
    assert torch.equal(params["head"].grad, gradient("head", 0)) and not params["qkv"].grad.any()
    train(params, optimizer, [1])
    assert not any(torch.equal(params[name], before[name]) for name in params)
    assert not any(param.grad.any() for name, param in params.items() if name != "table")


def test_adamw_mode_equals_torch():
    params, mine = new_params(), new_params()
    settings = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    optimizer = new_optimizer(mine, method="adam", every=1, cautious=False, **settings)
    theirs = torch.optim.AdamW(params.values(), eps=1e-10, **settings)
    for step in range(10):
        for name in params:
            params[name].grad, mine[name].grad[...] = gradient(name, step), gradient(name, step)
        theirs.step()
        optimizer.step(step, 1.0, 0.9)
    for name in params:
        torch.testing.assert_close(mine[name], params[name], rtol=1e-5, atol=1e-6)


def test_adamw_decay_follows_the_schedule_squared():
    """The learning rate and the decay are both multiplied by the schedule's factor."""
    param = nn.Parameter(torch.tensor([2.0, -3.0]))
    optimizer = gpt.Optimizer([gpt.ParamGroup("adam", {"x": param}, 0.1, 0.5, every=1, cautious=False)], world(), False)
    optimizer.step(0, 0.5, 0.9)  # no gradient: no update but the decay
    torch.testing.assert_close(param.data, torch.tensor([2.0, -3.0]) * (1 - 0.05 * 0.25))


def test_parameters_and_gradients_stay_views_of_their_bank():
    params = new_params()
    optimizer = new_optimizer(params)
    train(params, optimizer, range(3))
    (params["head"].sum() + params["qkv"].sum()).backward()
    assert params["qkv"].grad.eq(1).all()
    buffers = {bank.weights.untyped_storage().data_ptr(): bank for bank in optimizer.banks.values()}
    places = []
    for name, param in params.items():
        bank = buffers[param.untyped_storage().data_ptr()]
        assert param.shape == SHAPES[name]
        if name == "table":  # of which the bank gets rows
            assert param.grad is None
        else:
            assert param.grad.untyped_storage().data_ptr() == bank.grads.untyped_storage().data_ptr()
            assert param.storage_offset() == param.grad.storage_offset()
        places.append((id(bank), param.storage_offset(), param.storage_offset() + param.numel()))
    places.sort()
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in zip(places, places[1:]))  # none overlap


def test_banks_keep_the_values_that_the_parameters_had():
    params, before = new_params(), new_params()
    new_optimizer(params)
    assert all(torch.equal(params[name], before[name]) for name in params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reset_forgets_what_was_learnt(dtype):
    """As after warm-up: fresh weights in, and then the run goes as if nothing had been."""
    fresh, used = new_params(dtype), new_params(dtype)
    train(fresh, new_optimizer(fresh), range(4))
    optimizer = new_optimizer(used)
    train(used, optimizer, range(5))  # the last gradients of Adam's banks still wait
    with torch.no_grad():
        for name, param in new_params(dtype).items():
            used[name].copy_(param)
    for bank in optimizer.banks.values():
        bank.reset()
    train(used, optimizer, range(4))
    assert all(torch.equal(fresh[name], used[name]) for name in fresh)


@pytest.mark.parametrize("method", ["muon", "adam"])
def test_bf16_parameters_keep_fp32_masters(method):
    """Updates too small for bf16 add up, to the very weights of an fp32 run."""
    start = torch.full((16, 16), 1.0)
    grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        param = nn.Parameter(start.to(dtype))
        optimizer = gpt.Optimizer([gpt.ParamGroup(method, {"x": param}, 1e-3 if method == "muon" else 1e-4, every=1)],
                                  world(), False)
        for step in range(300):
            param.grad += grad
            optimizer.step(step, 1.0, 0.9)
        results.append(param.data)
    fp32, bf16 = results
    assert bf16.dtype == torch.bfloat16 and torch.equal(bf16, fp32.bfloat16())
    assert (fp32 - start).abs().max() > 0.02  # 300 times less in each step: below the 0.004 that bf16 can tell near 1


# Tied parameters


def test_tied_parameters_learn_as_one_matrix_used_twice_and_then_apart():
    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(8, 16, generator=generator) for _ in range(13))
    settings = {"method": "adam", "lr": 0.03, "weight_decay": 0.4, "betas": (0.5, 0.95)}
    params = {name: nn.Parameter(start.clone()) for name in ("head", "embedding", "one")}
    optimizer = gpt.Optimizer([gpt.ParamGroup(params={"head": params["head"]}, **settings),
                               gpt.ParamGroup(params={"embedding": params["embedding"]}, **settings, tied_to="head"),
                               gpt.ParamGroup(params={"one": params["one"]}, **settings)], world(), False)
    for step in range(6):
        tied, (a, b) = step < 4, grads[2 * step:2 * step + 2]
        params["head"].grad += a
        params["embedding"].grad += b
        params["one"].grad += a + b
        optimizer.step(step, *factors(step), tied=tied)
        equal = [torch.equal(*(x[name] for name in ("head", "embedding"))) for x in (params, *(
            {name: bank.state[part] for name, bank in optimizer.banks.items()} for part in ("first", "second")))]
        assert equal == [step < 5] * 3, step  # apart from the next turn on, in step 5
        if tied:
            torch.testing.assert_close(params["head"], params["one"])
    assert not torch.equal(params["head"], start) and not any(bank.grads.any() for bank in optimizer.banks.values())


# Ranks: what one rank does, several do, each with a share of the gradient. Of four, some own no part of a bank


def share_of_rank(rank: int, ranks: int):
    def share(gradient, name, step):
        noise = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(step))
        return gradient / ranks + (1, -1, *[0] * ranks)[rank] * noise
    return share


def snapshot(params, optimizer) -> dict:
    return {"params": {name: param.detach().clone() for name, param in params.items()},
            "state": {name: bank.state_dict() for name, bank in optimizer.banks.items()}}


def load(optimizer, state: dict):
    for name, bank in optimizer.banks.items():
        bank.load_state_dict(state[name])


def run_rank(rank: int, port: int, folder: str, size: int):
    """Trains 3 steps, saves, trains 3 more; then loads what one rank saved after 3 steps, and goes on from there."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False
    ranks, share = gpt.World(), share_of_rank(rank, size)
    assert (ranks.rank, ranks.size, ranks.device.type) == (rank, size, "cpu")
    params = new_params()
    optimizer, results = new_optimizer(params, ranks), {}
    train(params, optimizer, range(3), share, (rank, size))
    results["half"] = snapshot(params, optimizer)
    train(params, optimizer, range(3, 6), share, (rank, size))
    results["end"] = snapshot(params, optimizer)
    params = {name: nn.Parameter(torch.full_like(param, 9.0)) for name, param in new_params().items()}
    optimizer = new_optimizer(params, ranks)
    load(optimizer, torch.load(f"{folder}/one.pt")["state"])
    results["loaded"] = snapshot(params, optimizer)
    train(params, optimizer, range(3, 6), share, (rank, size))
    results["resumed"] = snapshot(params, optimizer)
    torch.save(results, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def one_and_several(tmp_path_factory, request) -> tuple[dict, list[dict]]:
    """(results of one rank, results of each of several)"""
    folder, params, one = tmp_path_factory.mktemp("ranks"), new_params(), {}
    optimizer = new_optimizer(params)
    train(params, optimizer, range(3))
    one["half"] = snapshot(params, optimizer)
    torch.save(one["half"], folder / "one.pt")
    train(params, optimizer, range(3, 6))
    one["end"] = snapshot(params, optimizer)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, (port, str(folder), request.param), nprocs=request.param)
    return one, [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]


def assert_same(a: dict, b: dict):
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], dict):
            assert_same(a[key], b[key])
        else:
            assert a[key].isfinite().all() and a[key].shape == b[key].shape
            torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("when", ["half", "end"])
def test_ranks_equal_one(one_and_several, when):
    one, several = one_and_several
    for results in several:
        assert_same(results[when], one[when])
        for name, param in results[when]["params"].items():
            assert torch.equal(param, several[0][when]["params"][name])  # and each other, exactly
        assert torch.equal(results[when]["params"]["table"], one[when]["params"]["table"])  # as if there were one rank
        table, its = results[when]["state"]["table"], one[when]["state"]["table"]
        assert table.keys() == its.keys() and all(torch.equal(table[name], its[name]) for name in its)


def test_ranks_go_on_from_what_one_saved(one_and_several):
    one, several = one_and_several
    for results in several:
        assert_same(results["loaded"], one["half"])
        assert_same(results["resumed"], one["end"])


def test_one_rank_goes_on_from_what_several_saved(one_and_several):
    one, (first, *_) = one_and_several
    params = {name: nn.Parameter(torch.full_like(param, 9.0)) for name, param in new_params().items()}
    optimizer = new_optimizer(params)
    load(optimizer, first["half"]["state"])
    assert_same(snapshot(params, optimizer), one["half"])
    train(params, optimizer, range(3, 6))
    assert_same(snapshot(params, optimizer), one["end"])


def test_saved_gradients_are_those_that_wait_for_adam(one_and_several):
    one, (first, *_) = one_and_several
    for state in (one["half"]["state"], first["half"]["state"]):
        waiting = [bank["grads"] for bank in state.values() if bank["grads"].any()]
        assert len(waiting) == 1 and waiting[0].norm().item() == pytest.approx(
            torch.cat([gradient(name, 2).flatten() for name in ("head", "scalar")]).norm().item(), rel=1e-5)
