"""Tests of the architecture: what a hidden state depends on, the loss, the stage table, the counts, and the flags."""

import ast
import dataclasses
import functools
import inspect
import math
import re

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

import train_gpt as gpt

CPU = torch.device("cpu")
VOCAB = 257
SHORT, LONG = 3, 5  # attention windows of most tests
LAYERS = "se svpx= lepo -e levhox"
REACH = SHORT - 1 + SHORT // 2 + LONG  # how far back LAYERS see: the last reads the second's


@pytest.fixture(autouse=True)
def reference_backend():
    gpt.choose_attention("reference", CPU)


def stage(**changes) -> gpt.Stage:
    return dataclasses.replace(gpt.Stage(0.25, 1024, 512, (SHORT, LONG), 1.0, (1.0,)), **changes)


def tiny(**changes) -> gpt.Hyperparameters:
    defaults = {"layers": LAYERS, "model_dim": 32, "num_heads": 2, "stages": (stage(),) * 4, "val_windows": (7, 9),
                "val_row_tokens": 300, "bigram_rows": 501}
    return dataclasses.replace(gpt.PRESETS["sample"], **(defaults | changes))


def random_model(seed=0, **changes) -> gpt.Model:
    """A float64 model in which no parameter is zero or special, so that everything has an effect."""
    model = gpt.Model(tiny(**changes), VOCAB, CPU, torch.float32).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            std = 1 / math.sqrt(param.size(-1)) if param.ndim > 1 else 0.5
            param.copy_(std * torch.randn(param.shape) + (1 if param.ndim == 0 else 0))
        model.embedding.normal_()
    return model


def compile_blocks(model):
    """As Run.warm_up does."""
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True)


def borders(*lengths) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def random_tokens(count, seed=0) -> Tensor:
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def hidden(model, tokens, *lengths, index=0) -> Tensor:
    with torch.no_grad():
        return model.hidden(tokens, borders(*lengths), model.stage_inputs(index))[0]


def assert_near(x, y, tolerance=1e-10):
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# A second model, written from the docstrings: one document, no packing, loops over heads


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def turned(x: Tensor, frequencies: Tensor) -> Tensor:
    """Rotary embedding of x (T, d), as complex numbers; its second half stays."""
    quarter = x.size(1) // 4
    angles = torch.arange(len(x))[:, None] * frequencies.double()
    z = torch.complex(x[:, :quarter], x[:, quarter:2 * quarter]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag, x[:, 2 * quarter:]], 1)


def naive_attention(block, word, x, tokens, heads, scale, frequencies) -> Tensor:
    window, width, outputs = LONG if "l" in word else SHORT, x.size(1) // heads, []
    qkv = []
    for head in range(heads):
        q, k, v = (x @ w[head * width:(head + 1) * width].T for w in block.in_scale * block.qkv)
        if "v" in word:
            values = block.value_table[tokens]
            gate = 2 * torch.sigmoid(torch.cat([x[:, :6], values[:, :6]], 1) @ block.value_gate[head])
            v = v + gate[:, None] * values[:, head * width:(head + 1) * width]
        q, k = rms(q), rms(k)
        if "o" in word:  # the second half of a key is the one of the token before, the first token keeps its own
            k = torch.cat([k[:, :width // 2], torch.cat([k[:1, width // 2:], k[:-1, width // 2:]])], 1)
        qkv.append((q, k, v))
    if "p" in word:  # one sequence of two heads, which take turns
        qkv = [[torch.stack(both, 1).flatten(0, 1) for both in zip(qkv[h], qkv[h + heads // 2])]
               for h in range(heads // 2)]
    for q, k, v in qkv:
        ago = torch.arange(len(q))[:, None] - torch.arange(len(q))
        scores = turned(q, frequencies) @ turned(k, frequencies).T * scale
        outputs.append(scores.masked_fill((ago < 0) | (ago >= window), -torch.inf).softmax(1) @ v)
    if "p" in word:
        outputs = [y[half::2] for half in range(2) for y in outputs]
    if "x" in word:  # without a part of its projection on the head's own value
        values = [v[half::2] for half in range(2) for _, _, v in qkv] if "p" in word else [v for _, _, v in qkv]
        outputs = [y - gate.tanh() * (y * v).sum(1, keepdim=True) / v.norm(dim=1, keepdim=True) ** 2 * v
                   for y, v, gate in zip(outputs, values, block.own_gate)]
    return torch.cat(outputs, 1) @ (block.out_scale * block.out).T


def naive_bigram(model, tokens) -> Tensor:
    """A row of the table for each pair of tokens, with signs; the last one for a document's first token."""
    rows, signs, before = len(model.bigram_table) - 1, model.signs, [0, *tokens.tolist()]
    return torch.stack([
        model.bigram_table[((36313 * b) ^ (27191 * a)) % rows if place else rows] * signs[(a ^ b) % len(signs)]
        for place, (a, b) in enumerate(zip(before, before[1:]))])


def naive_hidden(model, tokens) -> Tensor:
    words, heads = model.args.layers.split(), model.args.num_heads
    scale, frequencies = gpt.yarn([LONG], model.args.model_dim // heads)
    x = x0 = rms(model.embedding[tokens])
    bigram, held = naive_bigram(model, tokens), 0.0
    for word, block in zip(words, model.blocks):
        x = block.residual * x + (block.inject * x0 if "e" in word else 0) + block.bigram_gate * bigram
        if "-" not in word:
            x = x + naive_attention(block, word, rms(held if "h" in word else x), tokens, heads, scale, frequencies)
        x = block.mlp_residual * x + (rms(x) @ block.up.T).relu() ** 2 @ block.down
        held = x if "=" in word else held
    return x + block.backout * held if "=" in model.args.layers else x


@torch.no_grad()
@pytest.mark.parametrize("layers", ["s", "l", "sv", "lv", "-", "s s", "s -", "s l s", "-  lv sv", "s= s", "-= lh",
                                    "s l= svh lvh", "sp", "lvp s= lhp", "lo", "svpo", "se", "-e le",
                                    "sevpo= lehp", "sx", "lvpx s", LAYERS])
@pytest.mark.parametrize("heads", [2, 4])
def test_each_kind_of_layer_equals_a_naive_model(layers, heads):
    model, tokens = random_model(layers=layers, num_heads=heads), random_tokens(40)
    assert_near(hidden(model, tokens, 40), naive_hidden(model, tokens), 1e-6)  # the rotary embedding is in fp32


def test_layers_that_add_the_embedding():
    assert [i for i, word in enumerate(gpt.PRESETS["speedrun"].layers.split()) if "e" in word] == [0, 5]
    assert gpt.PRESETS["short"].layers == gpt.PRESETS["speedrun"].layers
    assert all("e" in word for word in gpt.PRESETS["sample"].layers.split())


def test_parameters_are_where_the_words_say():
    model = random_model(layers="s sev - le lvx se")
    assert not any(hasattr(block, "backout") for block in model.blocks)
    assert [hasattr(block, "backout") for block in random_model(layers="s= s s").blocks] == [False, False, True]
    has = {name: [hasattr(block, name) for block in model.blocks]
           for name in ("qkv", "out", "in_scale", "out_scale", "value_table", "inject", "own_gate")}
    assert has["qkv"] == has["out"] == has["in_scale"] == has["out_scale"] == [True, True, False, True, True, True]
    assert has["value_table"] == [False, True, False, False, True, False]
    assert has["inject"] == [False, True, False, True, False, True]
    assert has["own_gate"] == [False, False, False, False, True, False]


# What a hidden state depends on


def test_a_token_changes_no_hidden_state_before_it_and_some_after():
    model, tokens = random_model(stages=(stage(windows=(30, 200)),) * 4), random_tokens(200)
    before = hidden(model, tokens, 200)
    for place in (1, 57, 199):
        other = tokens.clone()
        other[place] = (other[place] + 1) % VOCAB
        after = hidden(model, other, 200)
        assert_near(after[:place], before[:place])
        assert (after[place:] - before[place:]).abs().amax(1).gt(1e-6).all()


@pytest.mark.parametrize("layers, reach", [
    (LAYERS, REACH), ("-", 0), ("s", SHORT - 1), ("l", LONG - 1), ("s -", SHORT - 1), ("l lv -", 2 * (LONG - 1)),
    ("s= l", SHORT + LONG - 2), ("s= l lh", SHORT + LONG - 2), ("s= l l", SHORT - 1 + 2 * (LONG - 1)),
    ("sp", SHORT // 2), ("lp", LONG // 2), ("lp s", LONG // 2 + SHORT - 1),
    ("so", SHORT), ("lpo", LONG // 2 + 1), ("lo s", LONG + SHORT - 1)])
def test_a_hidden_state_depends_on_its_own_document_as_far_back_as_the_windows_reach(layers, reach):
    """By gradients, exactly: causality, document borders, windows, and that nothing in reach is missing."""
    model, lengths = random_model(layers=layers), (30, 1, 20, 25)
    tokens = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))[:76]  # all differ: one row per token
    x, _ = model.hidden(tokens, borders(*lengths), model.stage_inputs(0))
    tables = [param for name, param in model.named_parameters() if name.endswith(("embedding", "value_table"))]
    for place in (0, 29, 30, 31, 32, 50, 51, 75):
        start = max(start for start in (0, 30, 31, 51) if start <= place)
        grads = torch.autograd.grad(x[place].square().sum(), tables, retain_graph=True, materialize_grads=True)
        seen = sum(grad[tokens].abs().sum(1) for grad in grads) > 0
        assert seen.nonzero().flatten().tolist() == list(range(max(start, place - reach), place + 1)), place


def test_documents_do_not_leak_into_each_other():
    model, lengths = random_model(stages=(stage(windows=(50, 500)),) * 4), (5, 1, 40, 17, 0, 60)
    tokens = random_tokens(sum(lengths))
    before = hidden(model, tokens, *lengths)
    for start, end in zip(borders(*lengths).tolist(), borders(*lengths)[1:].tolist()):
        other = tokens.clone()
        other[start:end] = (other[start:end] + 1) % VOCAB
        after = hidden(model, other, *lengths)
        inside = (torch.arange(len(tokens)) >= start) & (torch.arange(len(tokens)) < end)
        assert_near(after[~inside], before[~inside])
        assert (after[inside] - before[inside]).abs().gt(1e-6).any() or start == end
        if start < end:
            assert_near(before[start:end], hidden(model, tokens[start:end], end - start))  # as if it were alone


def test_empty_documents_change_nothing():
    model, tokens = random_model(), random_tokens(60)
    assert_near(hidden(model, tokens, 0, 20, 0, 0, 40, 0, 0), hidden(model, tokens, 20, 40))


def test_validation_sees_its_own_windows():
    model, tokens = random_model(layers="l", val_windows=(7, 9)), torch.arange(60)
    x, _ = model.hidden(tokens, borders(60), model.stage_inputs(0, validation=True))
    (grad,) = torch.autograd.grad(x[-1].sum(), model.embedding)
    assert grad.abs().sum(1).nonzero().flatten().tolist() == list(range(60 - 9, 60))


def test_scores_depend_on_relative_position_only():
    model, seen = random_model(), []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    hidden(model, random_tokens(100), 40, 60)
    cos, sin = seen[6:8]
    assert cos.size(0) == sin.size(0) == 100
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64, generator=generator).expand(2, 100, 1, 16)
    scores = gpt.rotate(q, cos, sin)[:, 0] @ gpt.rotate(k, cos, sin)[:, 0].T
    for ago in (0, 1, 30):
        diagonal = scores[40:, 40:].diagonal(-ago)
        assert_near(diagonal, diagonal[:1].expand_as(diagonal), 1e-5)
    assert scores[99, 40:].diff().abs().min() > 1e-4  # and they do depend on it
    assert torch.equal(gpt.rotate(q, cos, sin)[..., 8:], q[..., 8:])
    assert_near(gpt.rotate(q, cos, sin).norm(dim=-1), q.norm(dim=-1), 1e-6)


# The loss


def naive_loss(model, x, targets, lengths, weights) -> Tensor:
    total = 0.0
    logits = 23 * torch.sigmoid((rms(x.double()) @ model.head.double().T + 5) / 7.5)
    for start, end in zip(borders(*lengths).tolist(), borders(*lengths)[1:].tolist()):
        for ahead, weight in enumerate(weights):
            if end - start > ahead:
                predicted, actual = logits[start:end - ahead], targets[start + ahead:end]
                total += weight * F.cross_entropy(predicted, actual, reduction="sum")
    return total


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.5, 0.25), (0.5, 0.0), (1.0, 0.0, 0.0, 0.7)])
def test_loss_equals_naive_cross_entropy(weights):
    """Each token ahead is predicted where it is of the same document, with its weight; logits are capped at 23."""
    lengths = (1, 2, 3, 0, 50, 44)
    model = random_model(stages=(stage(loss_weights=weights),) * 4)
    tokens, targets = random_tokens(100), random_tokens(100, seed=1)
    with torch.no_grad():
        model.head.mul_(5)  # so that the cap is felt
        loss = model(tokens, targets, borders(*lengths), model.stage_inputs(0))
        want = naive_loss(model, hidden(model, tokens, *lengths), targets, lengths, weights)
    assert loss.ndim == 0 and loss.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("vocab_size, padded", [(257, 384), (384, 384), (50257, 50304)])
def test_initial_loss_is_the_logarithm_of_the_padded_vocabulary(vocab_size, padded):
    model = gpt.Model(tiny(model_dim=16, num_heads=1, layers="s"), vocab_size, CPU, torch.float32)
    model.initialise(0)
    loss = model(random_tokens(64), random_tokens(64, seed=1), borders(64), model.stage_inputs(0))
    assert loss.item() / 64 == pytest.approx(math.log(padded), rel=1e-5)


def test_a_tied_run_begins_with_embedding_and_head_alike_and_learning_alike():
    model = gpt.Model(tiny(tied_until=0.5), VOCAB, CPU, torch.float32)
    model.initialise(0)
    assert torch.equal(model.embedding, model.head) and model.head.std().item() == pytest.approx(0.005, rel=0.05)
    head, embedding = (next(group for group in model.param_groups() if list(group.params) == [name])
                       for name in ("head", "embedding"))
    assert embedding.tied_to == "head" and not head.tied_to
    assert dataclasses.replace(embedding, params=head.params, tied_to="") == head
    untied = gpt.Model(tiny(), VOCAB, CPU, torch.float32)
    untied.initialise(0)
    assert not untied.head.any() and not any(group.tied_to for group in untied.param_groups())
    assert untied.embedding.std().item() == pytest.approx(1, rel=0.05)


def test_first_values_of_what_is_learned_besides_matrices():
    model = gpt.Model(tiny(), VOCAB, CPU, torch.float32)
    model.initialise(0)
    assert model.blocks[-1].backout.item() == -0.5 and not model.bigram_table.any()
    for block in model.blocks:
        assert block.bigram_gate.item() == pytest.approx(0.05) and not block.down.any()
        assert not block.exclusive or not block.own_gate.any()
        if block.attends:
            assert (block.in_scale.item(), block.out_scale.item()) == (0.5, 1.0)
            assert block.out.std().item() == pytest.approx(0.5 / math.sqrt(32), rel=0.05)


def test_signs_of_bigrams_are_the_same_in_every_model_and_even():
    """They are in no checkpoint: the constructor makes them, whatever the seed and the generator's state."""
    one, other = random_model(seed=1), random_model(seed=2)
    assert torch.equal(one.signs, other.signs) and "signs" not in one.state_dict()
    assert set(one.signs.unique().tolist()) == {-1, 1} and abs(one.signs.mean().item()) < 0.01


def test_initialisation_depends_on_the_seed_alone_and_mlps_begin_with_nothing():
    models = [gpt.Model(tiny(), VOCAB, CPU, torch.float32) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2)):
        torch.rand(seed)  # whatever the generator did before
        model.initialise(seed)
    first, again, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.qkv"], other["blocks.0.qkv"])
    for block in models[0].blocks:
        for name in ("qkv", "out", "up") if block.attends else ("up",):
            assert getattr(block, name).std().item() == pytest.approx(0.5 / math.sqrt(32), rel=0.05), name
        assert not block.down.any()
    flat = gpt.Model(tiny(layers="-e - -", bigram_rows=0), VOCAB, CPU, torch.float32)
    flat.initialise(0)
    x, x0 = hidden(flat, random_tokens(50), 50), gpt.norm(flat.embedding[random_tokens(50)])
    assert F.cosine_similarity(x, x0, dim=1).min() > 0.9999


def test_terms_of_the_stream_are_rounded_once_and_their_scalars_learn_from_every_element():
    scalar, (x, dout) = torch.tensor(1.3, requires_grad=True), torch.randn(2, 50, 32).bfloat16()
    product = gpt.scaled(scalar, x)
    assert product.dtype == torch.float32 and torch.equal(product, 1.3 * x.float())
    (grad,) = torch.autograd.grad(product.bfloat16(), scalar, dout)
    assert grad.item() == pytest.approx((x.double() * dout.double()).sum().item(), rel=1e-5)


def test_gradients_reach_every_parameter():
    model = random_model()
    model(random_tokens(60), random_tokens(60, seed=1), borders(60), model.stage_inputs(0)).backward()
    assert not [name for name, param in model.named_parameters() if param.grad is None or not param.grad.any()]


# Compilation


def test_compiled_model_equals_eager_and_one_set_of_graphs_serves_all_stages(monkeypatch):
    """Stages, validation windows and numbers of documents recompile nothing."""
    stages = tuple(stage(windows=(3, long), loss_weights=weights) for long, weights in
                   ((5, (1.0, 0.5)), (9, (1.0, 0.3)), (30, (1.0,)), (80, (1.0,))))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    real, tokens, targets = torch.compile, random_tokens(90), random_tokens(90, seed=1)
    monkeypatch.setattr(torch, "compile", functools.partial(real, backend=counter))
    torch._dynamo.reset()
    eager, compiled = (random_model(stages=stages).float() for _ in range(2))
    compile_blocks(compiled)
    graphs, frames = [], [(0, (90,)), (1, (90,)), (2, (40, 50)), (3, (1, 9, 0, 80)), (1, (30, 60))]
    for index, lengths in frames:
        cu_seqlens = borders(*lengths)
        torch._dynamo.mark_dynamic(cu_seqlens, 0)
        results = []
        for model in (eager, compiled):
            loss = model(tokens, targets, cu_seqlens, model.stage_inputs(index))
            results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        for x, y in zip(*results):
            assert_near(x, y, 1e-3)
        graphs.append(counter.frame_count)
    assert set(graphs) == {5}, graphs  # one for each kind of layer


def test_layers_of_one_kind_share_a_graph_also_where_they_read_the_held_stream(monkeypatch):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    model = random_model(layers="s s= svh svh").float()
    compile_blocks(model)
    model(random_tokens(90), random_tokens(90, seed=1), borders(90), model.stage_inputs(0)).backward()
    assert counter.frame_count == 3  # s, svh, the last svh


# The stage table


def test_yarn_of_one_window_is_plain_rotary():
    for windows in ([500], [500, 500], [500] * 4):
        scale, frequencies = gpt.yarn(windows, 64)
        assert scale == 0.1 and frequencies.dtype == torch.float32
        assert_near(frequencies, torch.logspace(0, -math.log10(1024), 16), 1e-6)


def test_yarn_slows_slow_frequencies_and_keeps_fast_ones():
    _, plain = gpt.yarn([400], 128)
    scale, frequencies = gpt.yarn([400, 1000], 128)
    turns, factor = plain * 400 / (2 * math.pi), frequencies / plain
    assert (turns > 32).any() and (turns < 1).any()
    assert_near(factor[turns > 32], torch.ones_like(factor[turns > 32]), 1e-6)
    assert_near(factor[turns < 1], torch.full_like(factor[turns < 1], 0.4), 1e-6)
    between = factor[(turns > 1) & (turns < 32)]
    assert ((between > 0.4) & (between < 1)).all() and (factor.diff() <= 1e-7).all()
    assert scale == pytest.approx(0.1 * (1 + 0.2 * math.log(2.5)))


def test_yarn_compounds_over_stages():
    """Two doublings slow a slow frequency fourfold, and sharpen twice."""
    scale, frequencies = gpt.yarn([64, 128, 256], 64)
    assert frequencies[-1] * 4 == pytest.approx(1 / 1024) and scale == pytest.approx(0.1 * (1 + 0.2 * math.log(2)) ** 2)


STAGES = (stage(windows=(2, 64), document_tokens=100, loss_weights=(1.0, 0.5, 0.2)),
          stage(windows=(3, 128), document_tokens=200, loss_weights=(0.8, 0.5), batch_tokens=2048),
          stage(windows=(4, 256), document_tokens=300, loss_weights=(0.6,), candidates=128),
          stage(windows=(5, 512), document_tokens=400, loss_weights=(0.4, 0.2), candidates=10**6))


@pytest.mark.parametrize("index", range(4))
def test_stage_inputs_are_the_row_of_the_table(index):
    inputs = random_model(stages=STAGES).stage_inputs(index)
    scale, frequencies = gpt.yarn([64, 128, 256, 512][:index + 1], 16)
    assert [x.item() for x in inputs[:3]] == [100 * (index + 1), index + 2, 64 * 2**index]
    assert inputs.scale.item() == pytest.approx(scale) and torch.equal(inputs.frequencies, frequencies)
    assert inputs.loss_weights.tolist() == pytest.approx(list(STAGES[index].loss_weights))
    assert inputs.candidates == (384, 384, 128, 384)[index] and inputs.batch_tokens == (1024, 2048, 1024, 1024)[index]
    assert all(x.ndim == 0 and x.device == CPU for x in inputs[:4])


@pytest.mark.parametrize("index", range(4))
def test_validation_predicts_the_next_token_alone(index):
    model = random_model(stages=STAGES)
    training, inputs = model.stage_inputs(index), model.stage_inputs(index, validation=True)
    assert [x.item() for x in inputs[:3]] == [300, 7, 9]
    assert inputs.loss_weights.tolist() == [1.0] and inputs.candidates == 384
    assert inputs.scale == training.scale and torch.equal(inputs.frequencies, training.frequencies)


# Counts


@pytest.fixture(scope="module")
def speedrun() -> gpt.Model:
    return gpt.Model(gpt.PRESETS["speedrun"], 50257, torch.device("meta"), torch.bfloat16)


def test_num_params_of_the_speedrun(speedrun):
    table, square, gates = 50304 * 768, 768 * 768, 5 * 6 * 12
    matrices = 11 * 8 * square + 10 * 4 * square  # an MLP in each of 11 layers, attention in all but one
    scalars = 11 * 3 + 2 + 10 * 2 + 1 + 3 * 6  # of stream, x0, attention; backout; exclusive attention's heads
    bigrams = 377_280 * 768
    assert speedrun.num_params() == {  # embedding, head, 5 value tables
        "total": matrices + 7 * table + bigrams + gates + scalars,
        "matmul": matrices + table + gates, "tables": 6 * table + bigrams}


@pytest.mark.parametrize("context", [1, 500, 768, 1000, 5000])
def test_flops_per_token_of_the_speedrun(speedrun, context):
    def mean_keys(window):
        return sum(min(i, window) for i in range(1, context + 1)) / context

    # s s s s and l l; paired heads see as many keys, of twice the length
    paired = sum(min(i, 768) for i in range(1, 2 * context + 1)) / (2 * context)
    keys = 4 * mean_keys(768) + 4 * paired + 2 * mean_keys(1664)
    attention = 3 * 2 * 2 * 768 * keys  # forward and twice that backward; scores and values; 2 per multiply-add
    weights = 6 * (11 * 8 * 768**2 + 10 * 4 * 768**2 + 50304 * 768 + 5 * 6 * 12)
    assert speedrun.flops_per_token(context) == pytest.approx(weights + attention)


@pytest.mark.parametrize("context, keys", [(1, 10), (384, 3840), (768, 6 * 768 + 4 * 384), (9999, 6 * 768 + 2 * 1664)])
def test_cache_bytes_of_the_speedrun(speedrun, context, keys):
    assert speedrun.cache_bytes(context) == keys * 768 * 2 * 2  # a key and a value, 2 bytes each


# Refusals


@pytest.mark.parametrize("layers", ["", " ", "x", "ss", "sl", "v", "-v", "vs", "S", "s>", "s<", "s> s<", "s>=", "s,s",
                                    "s-", "sh", "sh s=", "s= -h", "s= shv", "s= h", "s= s=", "s=h", "sh=", "s= hs",
                                    "s=", "p", "-p", "spv", "sph", "spp", "ps", "o", "-o", "sov", "sop", "e", "es",
                                    "sve", "e-", "-ee"])
def test_wrong_layers_are_refused_in_one_line(layers):
    with pytest.raises(gpt.UserError, match="--layers") as refusal:
        gpt.Model(tiny(layers=layers), VOCAB, CPU, torch.float32)
    assert "\n" not in str(refusal.value) and layers in str(refusal.value)


@pytest.mark.parametrize("dim, heads", [(36, 2), (33, 2), (32, 3), (32, 8), (32, 0), (8, 1)])
def test_wrong_widths_are_refused_in_one_line(dim, heads):
    """Heads of a multiple of 8 channels, at least one head, and the 12 channels that gates read."""
    with pytest.raises(gpt.UserError, match="--model-dim|--num-heads") as refusal:
        gpt.Model(tiny(model_dim=dim, num_heads=heads), VOCAB, CPU, torch.float32)
    assert "\n" not in str(refusal.value)


def test_pairs_of_an_odd_number_of_heads_are_refused():
    with pytest.raises(gpt.UserError, match="--num-heads 3 .even for p"):
        gpt.Model(tiny(layers="s lp", model_dim=48, num_heads=3), VOCAB, CPU, torch.float32)


@pytest.mark.parametrize("rows", [1, -3])
def test_bigram_tables_that_no_pair_fits_are_refused(rows):
    with pytest.raises(gpt.UserError, match=f"--bigram-rows {rows} must"):
        gpt.Model(tiny(bigram_rows=rows), VOCAB, CPU, torch.float32)


# Optimiser groups

METHODS = {  # ending of a name: (method, learning rate, weight decay, betas)
    "qkv": ("muon", 0.023, 0.0276, None), "out": ("muon", 0.023, 0.0276, None), "up": ("muon", 0.023, 0.0276, None),
    "down": ("muon", 0.046, 0.0276, None), "head": ("adam", 0.008, 0.006, (0.5, 0.95)),
    "embedding": ("adam", 0.008, 0.006, (0.5, 0.95)), "value_table": ("adam", 0.6, 0.015, (0.75, 0.95)),
    "bigram_table": ("rows", 0.9, 0.015, (0.0, 0.95)), "bigram_gate": ("adam", 0.008, 0.0, (0.9, 0.99)),
    "value_gate": ("adam", 0.008, 0.0, (0.9, 0.99)), "own_gate": ("adam", 0.008, 0.0, (0.9, 0.99)),
    "residual": ("adam", 0.04, 0.0, (0.9, 0.99)), "mlp_residual": ("adam", 0.04, 0.0, (0.9, 0.99)),
    "inject": ("adam", 0.04, 0.0, (0.9, 0.99)), "backout": ("adam", 0.04, 0.0, (0.9, 0.99)),
    "in_scale": ("adam", 0.04, 0.0, (0.9, 0.99)), "out_scale": ("adam", 0.04, 0.0, (0.9, 0.99)),
}


def test_every_parameter_learns_in_exactly_one_group_by_its_name(speedrun):
    groups = speedrun.param_groups()
    names = [name for group in groups for name in group.params]
    assert sorted(names) == sorted(name for name, _ in speedrun.named_parameters())
    assert {name.split(".")[-1] for name in names} == set(METHODS)
    for group in groups:
        for name, param in group.params.items():
            method, lr, decay, betas = METHODS[name.split(".")[-1]]
            assert (group.method, group.lr, group.weight_decay) == (method, lr, decay), name
            assert betas is None or group.betas == betas and group.every == 2, name
            assert group.cautious and param is speedrun.get_parameter(name)


def test_groups_follow_the_flags_and_are_never_empty():
    groups = random_model(layers="s", muon_lr=1.0, muon_weight_decay=2.0, scalar_lr=3.0, gate_lr=4.0, bigram_lr=5.0,
                          head_lr=7.0).param_groups()
    by_name = {name: group for group in groups for name in group.params}
    assert all(group.params for group in groups) and not any("value" in name for name in by_name)
    assert by_name["blocks.0.up"].lr == 1.0 and by_name["blocks.0.down"].lr == 2.0
    assert by_name["blocks.0.out"].weight_decay == 2.0
    assert by_name["blocks.0.residual"].lr == 3.0
    assert by_name["embedding"].lr == by_name["head"].lr == 7.0
    assert by_name["blocks.0.bigram_gate"].lr == 4.0 and by_name["bigram_table"].lr == 5.0


# Flags


def test_presets():
    assert gpt.parse_args([]) == gpt.parse_args(["--preset", "speedrun"]) == gpt.PRESETS["speedrun"]
    assert gpt.parse_args(["--preset", "sample"]) == gpt.parse_args(["--preset=sample"]) == gpt.PRESETS["sample"]
    assert gpt.parse_args(["--seed", "3", "--preset", "sample"]) == dataclasses.replace(gpt.PRESETS["sample"], seed=3)
    assert all(args.preset == name for name, args in gpt.PRESETS.items())


def test_flags_change_a_preset():
    args = gpt.parse_args([
        "--preset", "sample", "--max-tokens", "1000", "--layers", "s -", "--model-dim=64", "--compile",
        *"--cooldown 0.1 0.2 --stages.0.batch-tokens 4096 --stages.3.windows 5 6 --stages.1.candidates 128".split()])
    first, second, third, last = gpt.PRESETS["sample"].stages
    assert args == dataclasses.replace(
        gpt.PRESETS["sample"], max_tokens=1000, layers="s -", model_dim=64, compile=True, cooldown=(0.1, 0.2), stages=(
            dataclasses.replace(first, batch_tokens=4096), dataclasses.replace(second, candidates=128), third,
            dataclasses.replace(last, windows=(5, 6))))


def test_layers_may_begin_with_a_dash():
    assert gpt.parse_args(["--layers=- s"]).layers == "- s"


@pytest.mark.parametrize("argv", ["--speed 1", "--preset none", "--seed x", "--stages.4.lr 1", "extra"])
def test_wrong_flags_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        gpt.parse_args(argv.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err


def help_texts(cls) -> dict[str, str]:
    """Field name -> its help: the comment behind it, or the string below it."""
    source, texts = inspect.getsource(cls), {}
    lines, body = source.splitlines(), ast.parse(source).body[0].body
    for node, following in zip(body, [*body[1:], None]):
        if isinstance(node, ast.AnnAssign):
            _, _, text = lines[node.end_lineno - 1].partition("  # ")
            if not text and isinstance(following, ast.Expr):
                text = following.value.value
            texts[node.target.id] = text
    return texts


def test_help_exits_with_0_and_explains_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        gpt.parse_args(["--help"])
    assert stop.value.code == 0

    def words(text):
        return re.sub(r"[│|\s]", "", text)

    shown = capsys.readouterr().out
    assert words(gpt.__doc__) in words(shown)
    options = re.split(r"^\W{0,3}(?=--[a-z])", shown, flags=re.M)[1:]
    sections = {re.match(r"--[\w.-]+", option)[0]: words(option) for option in options}
    for cls, prefix in ((gpt.Hyperparameters, "--"), (gpt.Stage, "--stages.2.")):
        texts = help_texts(cls)
        for field in dataclasses.fields(cls):
            if field.name != "stages":
                assert len(texts[field.name].split()) > 0, f"{field.name} has no help text"
                assert words(texts[field.name]) in sections[prefix + field.name.replace("_", "-")], field.name
