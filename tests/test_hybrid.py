"""Tests of train_hybrid.py: the model against a naive one, its ingredients one by one, its counts, whole runs."""

import dataclasses
import functools
import inspect
import json
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

import train_gpt as gpt
import train_hybrid as hybrid
from data import tokenize_text

CPU, META = torch.device("cpu"), torch.device("meta")
SCRIPT = Path(hybrid.__file__)
VOCAB = 257
LOCAL, GLOBAL = 3, 5  # attention windows of most tests
LAYERS = "lv r d l dv"

OFF = {  # each ingredient without the others, and the other choices
    "mamba2": {"recurrent": "mamba2"}, "no recurrence": {"recurrent": "none"}, "no convolution": {"short_conv": False},
    "no gate": {"output_gate": False}, "no headwise norm": {"headwise_norm": False},
    "no layernorm scaling": {"layernorm_scaling": False}, "no reuse": {"layers": "lv l d l dv"},
    "differential everywhere": {"diff": "all"}, "no differential": {"diff": "none"}, "no SSMax": {"ssmax": False},
    "rotary everywhere": {"nope": False}, "subtract": {"fusion": "subtract"}, "concat": {"fusion": "concat"},
    "no extras": {"extras": False, "layers": "l r d l d"}, "small init": {"init_std": 0.02},
    "no bigrams": {"bigram_rows": 0}, "late input": {"layers": "lv r= d lh rh dvh"},
    "grouped heads": {"num_heads": 4, "kv_heads": 2, "diff_heads": 2, "expand": 2, "recurrent_heads": 4},
}
ALL = {"everything": {}} | OFF


@pytest.fixture(autouse=True)
def reference_backend():
    hybrid.choose_attention("reference", CPU)


def stage(**changes) -> hybrid.Stage:
    return dataclasses.replace(hybrid.Stage(0.25, 1024, 512, (LOCAL, GLOBAL), 1.0, (1.0,)), **changes)


def tiny(**changes) -> hybrid.Hyperparameters:
    defaults = {"layers": LAYERS, "model_dim": 32, "num_heads": 2, "kv_heads": 2, "diff_heads": 2, "recurrent_heads": 2,
                "stages": (stage(),) * 4, "val_windows": (7, 9), "val_row_tokens": 300, "bigram_rows": 501}
    return dataclasses.replace(hybrid.PRESETS["sample"], **(defaults | changes))


def random_model(seed=0, **changes) -> hybrid.Model:
    """A float64 model in which no parameter is zero or special, so that everything has an effect."""
    model = hybrid.Model(tiny(**changes), VOCAB, CPU, torch.float32).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            std = 1 / math.sqrt(param.size(-1)) if param.ndim > 1 else 0.5
            gain = param.ndim == 0 or name.endswith(("gain", "ssmax", "conv"))
            param.copy_(std * torch.randn(param.shape) + (1 if gain else 0))
        model.embedding.normal_()
    return model


def borders(*lengths) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def random_tokens(count, seed=0) -> Tensor:
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def hidden(model, tokens, *lengths, index=0) -> Tensor:
    with torch.no_grad():
        return model.hidden(tokens, borders(*lengths), model.stage_inputs(index))[0]


def assert_near(x, y, tolerance=1e-10):
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# A second model, written from the docstrings: one document, no packing, loops over heads and tokens


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def turned(x: Tensor, base: float) -> Tensor:
    """Rotary embedding of x (T, d), as complex numbers."""
    half = x.size(1) // 2
    angles = torch.arange(len(x))[:, None] * base ** -(torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], 1)


def naive_attention(block, source, spans, depth, x, h, tokens, args) -> list[Tensor]:
    """What each head says (T, values). source: (block, input) that keys and values come from."""
    maps = 2 if args.diff == "all" or (args.diff == "global" and spans) else 1
    heads = args.diff_heads if maps == 2 else args.num_heads
    shared = args.num_heads // args.kv_heads
    base = (args.global_base if not args.nope else None) if spans else args.local_base
    window = GLOBAL if spans else LOCAL
    width = args.expand * args.model_dim // heads
    ago = torch.arange(len(h))[:, None] - torch.arange(len(h))
    rotate = (lambda x: turned(x, base)) if base else (lambda x: x)
    outs = []
    for head in range(heads):
        owner, given = source
        kv_head, results = head // shared, []
        v = given @ owner.kv[1][kv_head * width:(kv_head + 1) * width].T
        if hasattr(owner, "value_table"):
            values = owner.value_table[tokens]
            gate = 2 * torch.sigmoid(torch.cat([given[:, :6], values[:, :6]], 1) @ owner.value_gate[kv_head])
            v = v + gate[:, None] * values[:, kv_head * width:(kv_head + 1) * width]
        for i in range(maps):
            part = slice(width // maps * i, width // maps * (i + 1))
            q = rotate(rms(h @ block.q[head * width:(head + 1) * width][part].T))
            k = rotate(rms(given @ owner.kv[0][kv_head * width:(kv_head + 1) * width][part].T))
            if spans and args.ssmax:
                seen = torch.arange(1, len(h) + 1).clamp(max=window).log()
                q = q * block.ssmax[head, i] * seen[:, None]
            scores = q @ k.T * (width // maps) ** -0.5
            results.append(scores.masked_fill((ago < 0) | (ago >= window), -torch.inf).softmax(1) @ v)
        if maps == 2:
            a, b, c, d = block.lambdas
            weight = (a @ b).exp() - (c @ d).exp() + 0.8 - 0.6 * math.exp(-0.3 * depth)
            results = [results[0] - weight * results[1]]
        outs += results
    return outs


def naive_recurrence(block, h, args) -> list[Tensor]:
    def conv(x, weight):
        if not args.short_conv:
            return F.silu(x)
        return F.silu(sum(weight[:, 3 - ago] * F.pad(x, (0, 0, ago, 0))[:len(x)] for ago in range(4)))

    width, heads, outs = args.expand * args.model_dim, args.recurrent_heads, []
    qk = conv(h @ block.recurrent_qk.flatten(0, 1).T, getattr(block, "qk_conv", None))
    v = conv(h @ block.recurrent_v.T, getattr(block, "v_conv", None))
    key, value = width // 2 // heads, width // heads
    for head in range(heads):
        q, k = (qk[:, start:start + key] for start in (head * key, width // 2 + head * key))
        u, state, out = v[:, head * value:(head + 1) * value], torch.zeros(key, value, dtype=h.dtype), []
        dt = F.softplus(h @ block.rates[0][head] + block.dt_bias[head])
        decay = (-dt * block.A_log[head].exp()).exp()
        for t in range(len(h)):
            state = state * decay[t]
            if args.recurrent == "gdn":
                k_t, q_t = (x[t] / (x[t].square().sum() + 1e-6).sqrt() for x in (k, q))
                beta = torch.sigmoid(h[t] @ block.rates[1][head])
                state = state + beta * torch.outer(k_t, u[t] - state.T @ k_t)
                out.append(state.T @ q_t * key**-0.5)
            else:
                state = state + dt[t] * torch.outer(k[t], u[t])
                out.append(state.T @ q[t] + block.skip[head] * u[t])
        gate = F.silu(h @ block.recurrent_gate[head * value:(head + 1) * value].T) if args.output_gate else 1.0
        outs.append(torch.stack(out) * gate)
    return outs


def naive_bigram(model, tokens) -> Tensor:
    """A row of the table for each pair of tokens, with signs; the last one for a document's first token."""
    rows, signs, before = len(model.bigram_table) - 1, model.signs, [0, *tokens.tolist()]
    return torch.stack([
        model.bigram_table[((36313 * b) ^ (27191 * a)) % rows if place else rows] * signs[(a ^ b) % len(signs)]
        for place, (a, b) in enumerate(zip(before, before[1:]))])


def naive_hidden(model, tokens) -> Tensor:
    args, source, held = model.args, None, None
    x = x0 = rms(model.embedding[tokens]) if args.extras else model.embedding[tokens]
    for depth, (word, block) in enumerate(zip(re.findall("[lrd]v?h?=?", args.layers), model.blocks), 1):
        scale = depth**-0.5 if args.layernorm_scaling else 1.0
        if args.extras:
            x = block.residual * x + block.inject * x0
        if args.bigram_rows:
            x = x + block.bigram_gate * naive_bigram(model, tokens)
        h = rms(held if "h" in word else x) * scale
        own = source if word[0] == "r" else (block, h)
        source = own if word[0] == "l" else source
        heard = naive_attention(block, own, "d" in word, depth, x, h, tokens, args)
        recalled = naive_recurrence(block, h, args) if args.recurrent != "none" else []
        if args.headwise_norm:
            heard = [rms(y) * gain for y, gain in zip(heard, block.attention_gain)]
            recalled = [rms(y) * gain for y, gain in zip(recalled, getattr(block, "recurrent_gain", []))]
        y = torch.cat(heard, 1)
        if recalled:
            z = torch.cat(recalled, 1)
            y = {"mean": (y + z) / 2, "subtract": (y - z) / 2, "concat": torch.cat([y, z], 1)}[args.fusion]
        x = x + y @ block.out.T
        x = (block.mlp_residual if args.extras else 1.0) * x + (rms(x) * scale @ block.up.T).relu() ** 2 @ block.down
        held = x if "=" in word else held
    return x if held is None else x + model.backout * held


@torch.no_grad()
@pytest.mark.parametrize("changes", ALL.values(), ids=ALL)
def test_each_ingredient_equals_a_naive_model(changes):
    model, tokens = random_model(**changes), random_tokens(70)
    assert_near(hidden(model, tokens, 70), naive_hidden(model, tokens), 1e-5)  # the rotary embedding is in fp32


# What a hidden state depends on


@pytest.mark.parametrize("changes", [{}, {"recurrent": "mamba2"}, {"diff": "all", "nope": False}], ids=str)
def test_documents_do_not_leak_and_nothing_looks_ahead(changes):
    """A document's states are as if it were alone, empty documents change nothing, and a token changes none before."""
    model, lengths = random_model(stages=(stage(windows=(50, 500)),) * 4, **changes), (5, 1, 70, 17, 0, 66, 0, 0)
    tokens = random_tokens(sum(lengths))
    packed = hidden(model, tokens, *lengths)
    for start, end in zip(borders(*lengths).tolist(), borders(*lengths)[1:].tolist()):
        if start < end:
            assert_near(packed[start:end], hidden(model, tokens[start:end], end - start), 1e-6)
    for place in (5, 40, 100):
        other = tokens.clone()
        other[place] = (other[place] + 1) % VOCAB
        after = hidden(model, other, *lengths)
        end = next(border for border in borders(*lengths).tolist() if border > place)
        changed = (after - packed).abs().amax(1) > 1e-6
        assert changed[place:end].all() and changed.sum() == end - place


def test_a_window_bounds_what_attention_alone_sees():
    """By gradients: the window. A reuse sees no further: its keys are the same."""
    for layers, reach in (("l", LOCAL - 1), ("d", GLOBAL - 1), ("l r", LOCAL - 1), ("l l", 2 * (LOCAL - 1))):
        model = random_model(layers=layers, recurrent="none")
        tokens = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))[:40]
        x, _ = model.hidden(tokens, borders(40), model.stage_inputs(0))
        (grad,) = torch.autograd.grad(x[30].square().sum(), model.embedding)
        assert grad[tokens].abs().sum(1).nonzero().flatten().tolist() == list(range(30 - reach, 31))


# Ingredients


def test_a_reuse_has_no_keys_and_values_and_takes_those_of_the_local_layer_before():
    model, tokens = random_model(layers="l r d r", recurrent="none"), random_tokens(20)
    assert [hasattr(block, "kv") for block in model.blocks] == [True, False, True, False]
    taken = []
    for block in model.blocks:
        forward = block.attention
        block.attention = lambda *inputs, forward=forward: (taken.append(inputs[2]), forward(*inputs))[1]
    made = []
    attend = model.blocks[0].attention
    model.blocks[0].attention = lambda *inputs: (made.append(attend(*inputs)), made[0])[1]
    hidden(model, tokens, 20)
    assert taken[0] is None and taken[2] is None and taken[1] is made[0][1] and taken[3] is made[0][1]


def test_scalable_softmax_of_weight_one_is_softmax():
    """Where s log n = 1, as for all tokens that see n keys if s = 1 / log n."""
    outs, seen = [], GLOBAL  # from the fifth token on
    for ssmax in (True, False):
        model = random_model(layers="d", recurrent="none", ssmax=ssmax)
        state = random_model(layers="d", recurrent="none", ssmax=False).state_dict()
        model.load_state_dict(state, strict=False)
        if ssmax:
            model.blocks[0].ssmax.data.fill_(1 / math.log(seen))
        outs.append(hidden(model, random_tokens(30), 30))
    assert_near(outs[0][seen - 1:], outs[1][seen - 1:], 1e-6)
    assert (outs[0][1:seen - 1] - outs[1][1:seen - 1]).abs().max() > 1e-3


def test_global_layers_know_no_positions():
    """A global layer alone, its window wide, does not care about the order of the tokens before."""
    model = random_model(layers="d", recurrent="none", extras=False, bigram_rows=0,
                         stages=(stage(windows=(3, 100)),) * 4)
    tokens = random_tokens(20)
    turned_round = torch.cat([tokens[:-1].flip(0), tokens[-1:]])
    assert_near(hidden(model, tokens, 20)[-1], hidden(model, turned_round, 20)[-1])


@pytest.mark.parametrize("changes", ALL.values(), ids=ALL)
def test_the_model_learns_with_each_ingredient_alone_left_out(changes):
    model = hybrid.Model(tiny(head_lr=0.05, layers=changes.get("layers", "lv r dv"), **{
        key: value for key, value in changes.items() if key != "layers"}), VOCAB, CPU, torch.float32)
    model.initialise(0)
    optimizer = hybrid.Optimizer(model.param_groups(), hybrid.World(), compile=False)
    tokens, losses = random_tokens(12).repeat(8), []
    for step in range(8):
        loss = model(tokens, tokens.roll(-1), borders(60, 36), model.stage_inputs(0)) / len(tokens)
        loss.backward()
        assert step or all(param.grad is not None and param.grad.isfinite().all() or hasattr(param, "looked_up")
                           for param in model.parameters())
        optimizer.step(step, 1.0, 0.9)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5, losses


@pytest.mark.parametrize("depth, positions, layers", [
    (20, "thirds", "lrldlrlrlrdlrlrlrdlr"), (9, "thirds", "ldlrdlrdl"), (12, "thirds", "lrdlrldlrldl"[:12]),
    (9, "ends", "dlrldlrld"), (3, "thirds", "ddd"), (3, "ends", "ddd"),
])
def test_default_layers(depth, positions, layers):
    got = hybrid.default_layers(depth, positions).replace(" ", "")
    assert len(got) == depth and got.count("d") == 3 and "rr" not in got and not got.startswith("r")
    if depth != 12:
        assert got == layers


# Compilation


@pytest.mark.parametrize("extras", [True, False])
def test_compiled_model_equals_eager_and_one_set_of_graphs_serves_all_stages(extras, monkeypatch):
    """Stages, windows and numbers of documents recompile nothing; layers of one kind share a graph. Without extras the
    loss is compiled too."""
    stages = tuple(stage(windows=(3, long), loss_weights=weights if extras else (1.0,)) for long, weights in
                   ((5, (1.0, 0.5)), (9, (1.0, 0.3)), (30, (1.0,)), (80, (1.0,))))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    real, tokens, targets = torch.compile, random_tokens(90), random_tokens(90, seed=1)
    monkeypatch.setattr(torch, "compile", functools.partial(real, backend=counter))
    torch._dynamo.reset()
    layers = "l r= d l r dvh dvh" if extras else "l d l"
    eager, compiled = (random_model(stages=stages, layers=layers, extras=extras, compile=compile).float()
                       for compile in (False, True))
    for block in compiled.blocks:
        block.compile(dynamic=False, fullgraph=True)
    graphs, frames = [], [(0, (90, 0)), (2, (40, 50)), (3, (1, 9, 0, 80))]
    for index, lengths in frames:
        cu_seqlens = borders(*lengths)
        torch._dynamo.mark_dynamic(cu_seqlens, 0)
        results = []
        for model in (eager, compiled):
            loss = model(tokens, targets, cu_seqlens, model.stage_inputs(index))
            results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        for x, y in zip(*results):
            assert_near(x, y, 2e-3)
        graphs.append(counter.frame_count)
    assert set(graphs) == {4 if extras else 3}, graphs  # l, r, d, dvh; or l, d and the loss


# Counts


@pytest.fixture(scope="module")
def speedrun() -> hybrid.Model:
    return hybrid.Model(hybrid.PRESETS["speedrun"], 50257, META, torch.bfloat16)


def test_num_params_of_dragon_as_published():
    """Dragon-L: 631M without, 129M with embedding and head, 759M together."""
    model = hybrid.Model(hybrid.PRESETS["dragon"], 50257, META, torch.bfloat16)
    counts = model.num_params()
    tables = counts["tables"] + model.head.numel()
    assert [round(n / 1e6) for n in (counts["total"] - tables, tables, counts["total"])] == [631, 129, 759]
    assert counts["matmul"] < counts["total"] - counts["tables"] < 1.002 * counts["matmul"]


def test_the_speedrun_is_as_large_as_that_of_train_gpt(speedrun):
    counts = speedrun.num_params()
    theirs = gpt.Model(gpt.PRESETS["speedrun"], 50257, META, torch.bfloat16).num_params()
    bigrams = 377_280 * 768
    assert counts == {"total": 347_854_621 + bigrams, "matmul": 115_983_720, "tables": 231_800_832 + bigrams}
    assert all(counts[kind] == pytest.approx(theirs[kind], rel=0.05) for kind in counts)


@pytest.mark.parametrize("context", [512, 2048, 16384])
def test_flops_and_cache_of_the_speedrun(speedrun, context):
    def seen(window):
        return sum(min(i + 1, window) for i in range(context)) / context

    mixers = 6 * 4 * 768 * seen(1024) + 3 * 6 * 768 * seen(2048) + 9 * 7 * 6 * 64 * 128
    assert speedrun.flops_per_token(context) == pytest.approx(6 * 115_983_720 + 3 * mixers, rel=1e-6)
    kept = 4 * min(1024, context) + 3 * min(2048, context)  # keys and values of l and d; r has none
    states = 9 * (4 * 6 * 64 * 128 + 2 * 3 * 2 * 768)
    assert speedrun.cache_bytes(context) == kept * 2 * 2 * 768 + states


def test_without_recurrence_flops_and_cache_are_those_of_attention():
    model = hybrid.Model(tiny(recurrent="none", diff="none"), VOCAB, META, torch.float32)
    assert model.state_size() == 0 and model.kernels == {}
    assert model.cache_bytes(100) == 2 * 2 * 32 * (2 * LOCAL + 2 * GLOBAL)


# Optimiser groups


def test_matrices_learn_by_muon_and_the_rest_by_adam_in_fp32_without_decay(speedrun):
    groups = speedrun.param_groups()
    by_name = {name: group for group in groups for name in group.params}
    assert len(by_name) == sum(len(group.params) for group in groups) == len(list(speedrun.parameters()))
    for name, param in speedrun.named_parameters():
        group, kind = by_name[name], name.split(".")[-1]
        if kind in hybrid.MATRICES:
            assert group.method == "muon" and group.lr == (0.046 if kind == "down" else 0.023) and param.ndim > 1
        else:
            assert group.method == ("rows" if kind == "bigram_table" else "adam")
        if kind not in (*hybrid.MATRICES, *hybrid.TABLES, "head"):
            assert param.dtype == torch.float32 and group.weight_decay == 0.0, name
    assert by_name["blocks.0.A_log"].lr == by_name["blocks.0.rates"].lr == by_name["blocks.0.bigram_gate"].lr == 0.008
    assert by_name["bigram_table"].lr == 0.9
    head, embedding = by_name["head"], by_name["embedding"]
    assert dataclasses.replace(embedding, params=head.params, tied_to="") == head and embedding.tied_to == "head"
    slow = {name: group for group in hybrid.Model(tiny(rates_lr=0.001), VOCAB, META, torch.float32).param_groups()
            for name in group.params}
    assert slow["blocks.0.rates"].lr == 0.001 and slow["blocks.0.A_log"].lr == slow["blocks.0.qk_conv"].lr == 0.008
    mamba = hybrid.Model(tiny(recurrent="mamba2", fusion="concat", layers="l"), VOCAB, META, torch.float32)
    assert "blocks.0.skip" in {name for group in mamba.param_groups() for name in group.params}


def test_initial_decays_are_those_of_mamba_2():
    model = hybrid.Model(tiny(recurrent_heads=2, layers="l " * 200), VOCAB, CPU, torch.float32)
    model.initialise(0)
    rates = torch.cat([block.A_log.detach().exp() for block in model.blocks])
    steps = torch.cat([F.softplus(block.dt_bias.detach()) for block in model.blocks])
    assert 1 <= rates.min() < 1.5 and 15.5 < rates.max() <= 16
    assert 0.999e-3 <= steps.min() < 1.2e-3 and 0.08 < steps.max() <= 0.1001
    assert steps.log().mean() == pytest.approx(math.log(1e-2), abs=0.2)


def test_initialisation_depends_on_the_seed_alone():
    models = [hybrid.Model(tiny(), VOCAB, CPU, torch.float32) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2)):
        model.initialise(seed)
    one, same, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["blocks.0.q"], other["blocks.0.q"])
    small = hybrid.Model(tiny(init_std=0.006), VOCAB, CPU, torch.float32)
    small.initialise(0)
    for name in ("embedding", "head", "blocks.0.out", "blocks.0.recurrent_qk", "blocks.0.qk_conv"):
        assert small.get_parameter(name).std().item() == pytest.approx(0.006, rel=0.15), name
    assert not one["blocks.0.out"].any() and (one["blocks.2.ssmax"] == 1).all()
    other = hybrid.Model(tiny(zero_mixers=False, ssmax_init=0.2), VOCAB, CPU, torch.float32)
    other.initialise(1)
    assert other.blocks[0].out.std().item() == pytest.approx(0.5 * 32**-0.5, rel=0.1) and not other.blocks[0].down.any()
    assert (other.blocks[2].ssmax == 0.2).all()
    tied = hybrid.Model(tiny(tied_until=0.5), VOCAB, CPU, torch.float32)
    tied.initialise(0)
    assert torch.equal(tied.embedding, tied.head) and tied.head.std().item() == pytest.approx(0.005, rel=0.05)


# Flags


def test_presets_and_their_stages():
    for name, preset in hybrid.PRESETS.items():
        args = hybrid.parse_args(["--preset", name])
        assert args == preset and args.preset == name
        hybrid.Schedule(args, types.SimpleNamespace(size=1))
    dragon = hybrid.PRESETS["dragon"]
    assert dragon.layers.replace(" ", "") == "lrldlrlrlrdlrlrlrdlr" and dragon.optimizer == "adamw"
    assert not (dragon.extras or dragon.bigram_rows or dragon.tied_until)
    assert hybrid.Schedule(dragon, types.SimpleNamespace(size=1)).steps == 32_990


def test_every_flag_is_explained():
    lines = inspect.getsource(hybrid.Hyperparameters).splitlines()
    for field in dataclasses.fields(hybrid.Hyperparameters):
        (i,) = [i for i, line in enumerate(lines) if line.startswith(f"    {field.name}: ")]
        assert "  # " in lines[i] or lines[i + 1].startswith('    """') or field.name == "stages", field.name


@pytest.mark.parametrize("layers", ["", " ", "x", "r", "r l", "d r", "v", "l vv", "rv", "lr-", "L", "l lh",
                                    "lh=", "lh l=", "l= l=", "lhv"])
def test_wrong_layers_are_refused_in_one_line(layers):
    with pytest.raises(hybrid.UserError, match="--layers") as refusal:
        hybrid.Model(tiny(layers=layers), VOCAB, CPU, torch.float32)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("changes, flag", [
    ({"model_dim": 8}, "model-dim"), ({"model_dim": 36}, "model-dim"), ({"num_heads": 0}, "num-heads"),
    ({"num_heads": 8, "kv_heads": 8}, "num-heads"), ({"diff_heads": 4}, "diff-heads"),
    ({"recurrent_heads": 4}, "recurrent-heads"), ({"kv_heads": 0}, "kv-heads"), ({"kv_heads": 3}, "kv-heads"),
    ({"num_heads": 4, "kv_heads": 1}, "kv-heads"), ({"recurrent_kernel": "fla"}, "fla"),
    ({"recurrent_kernel": "mamba-ssm"}, "mamba-ssm"), ({"bigram_rows": 1}, "bigram-rows"),
])
def test_wrong_sizes_and_kernels_are_refused_in_one_line(changes, flag):
    with pytest.raises(hybrid.UserError, match=flag) as refusal:
        hybrid.Model(tiny(**changes), VOCAB, CPU, torch.float32)
    assert "\n" not in str(refusal.value)


# Whole runs


SMALL = ["--preset", "sample", "--row-tokens", "256", "--micro-batch-tokens", "512", "--val-tokens", "2048",
         "--val-row-tokens", "1024", "--model-dim", "32", "--num-heads", "2", "--kv-heads", "2", "--diff-heads", "2",
         "--recurrent-heads", "2", "--layers", "lv r d", "--max-tokens", "7168", "--head-lr", "0.05",
         "--bigram-rows", "301", "--tied-until", "0.667"]
for i in range(4):
    SMALL += [f"--stages.{i}.batch-tokens", "1024"]


@pytest.fixture(scope="module")
def sample() -> list[str]:
    tokenize_text.build_sample()
    return ["--data", str(SCRIPT.parent / "data" / "sample" / "shards")]


def test_a_run_on_the_sample_learns_and_its_log_names_the_kernels(sample, tmp_path):
    hybrid.Run(hybrid.parse_args([*SMALL, *sample, "--val-every", "3", "--target", "9", "--out", str(tmp_path)]),
               hybrid.World()).train()
    (log,) = tmp_path.glob("*_train_hybrid_*.txt")
    result = json.loads(log.read_text().splitlines()[-1])
    losses = [float(x) for x in re.findall(r"^step:\d+/\d+ val_loss:(\S+)", log.read_text(), re.M)]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True) and losses[-1] < 5 < math.log(384)
    assert result["reached"] and log.read_text().startswith(SCRIPT.read_text())
    assert result["kernels"] == {"gated delta rule": "reference", "short convolution": "reference"}


def test_the_script_refuses_in_one_line(sample, tmp_path):
    command = [sys.executable, SCRIPT, *SMALL, *sample, "--layers", "r l", "--out", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and re.fullmatch(r"train_hybrid\.py: --layers .+\n", done.stderr), done.stderr


def test_a_resumed_run_ends_with_the_same_bits(sample, tmp_path, monkeypatch):
    def train(folder: str, *flags):
        run = hybrid.Run(hybrid.parse_args([*SMALL, *sample, "--out", str(tmp_path / folder), "--checkpoint",
                                            str(tmp_path / folder), *flags]), hybrid.World())
        run.train()
        return torch.load(tmp_path / folder / "train_hybrid_final.pt", weights_only=True)

    class PowerCut(BaseException):
        pass

    def step(self, step=hybrid.Run.train_step):
        step(self)
        if self.step == 4:
            raise PowerCut

    whole = train("whole")
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(hybrid.Run, "train_step", step)
        train("cut", "--save-every", "3")
    resumed = train("cut", "--save-every", "3", "--resume", str(tmp_path / "cut" / "train_hybrid_step000003.pt"))
    assert whole["step"] == resumed["step"] == 7
    for kind in ("model", "optimizer"):
        for name, value in whole[kind].items():
            pairs = [(value, resumed[kind][name])] if kind == "model" else [
                (tensor, resumed[kind][name][part]) for part, tensor in value.items()]
            assert all(torch.equal(a, b) for a, b in pairs), name
