"""The engine against one graph of plain autograd, and against itself with less memory."""

from functools import partial

import pytest
import torch
from oracle import residual_gradients, weight_gradients
from tiny import VOCABULARY, batch, build, singles

from sparc3 import engine, head
from sparc3.boundaries import InMemory, OnDisk
from sparc3.engine import (
    GRADIENT,
    Blocks,
    Resume,
    attribute_batch,
    attribute_batches,
    free_memory,
)
from sparc3.errors import InputError
from sparc3.families import prunable
from sparc3.head import target_gradient
from sparc3.plan import boundaries_held
from sparc3.rules import Rule
from sparc3.scores import Accumulators, accumulate
from sparc3.targets import TARGETS, explained, target_value
from sparc3.wrap import wrap

TOLERANCE = 1e-5  # see test_families.py


def run(model, inputs, target="logprob", positions="all", rule="attnlrp", memory=None):
    """(values, embedded input's gradient, sums of weights)."""
    weights = prunable(model)
    sink = Accumulators(weights, "signed")
    sink.start(inputs)
    with wrap(model, Rule.parse(rule), weights, sink):
        value, embedded, gradient = attribute_batch(Blocks(model), inputs, target, positions, memory)
    assert embedded.shape == gradient.shape
    return value, gradient, sink.sums


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def check(model, inputs, target, positions, scalar):
    """Against autograd on single samples; scalar: (logits [1, T, V], sample) -> [1]."""
    value, gradient, sums = run(model, inputs, target, positions)
    total = dict.fromkeys(sums, 0)
    for row, sample in enumerate(singles(inputs)):
        expected, gradients = weight_gradients(model, sample, Rule(), scalar)
        assert value[row].item() == pytest.approx(expected.item(), rel=TOLERANCE, abs=TOLERANCE)
        ((_, first), *_) = residual_gradients(model, sample, Rule(), scalar)
        real = inputs["attention_mask"][row].bool()
        assert relative_error(gradient[row, real], first[0]) <= TOLERANCE
        assert torch.count_nonzero(gradient[row, ~real]) == 0
        total = {name: total[name] + gradients[name] for name in total}
    for name, weight in prunable(model).items():
        assert relative_error(weight.canonical(sums[name]), total[name]) <= TOLERANCE, name


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_target(target, positions):
    check(
        build("llama"), batch(), target, positions, partial(target_value, target=target, positions=positions)
    )


def test_labels_name_the_token_to_explain():
    inputs = batch()
    labels = torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(5))
    labels[:, ::3] = -100
    labels[inputs["attention_mask"] == 0] = -100
    check(build("opt"), {**inputs, "labels": labels}, "logit", "all", partial(target_value, target="logit"))


def test_a_callable_explains_what_it_likes():
    def difference(logits, inputs):
        """Of two tokens' logits at the last real position, squared: not linear in the logits."""
        mask = inputs["attention_mask"]
        last = (mask * torch.arange(mask.shape[1])).amax(1)
        at = logits[torch.arange(len(logits)), last]
        return (at[:, 3] - at[:, 4]) ** 2

    check(build("gpt2"), batch(), difference, "all", difference)


def test_a_callable_and_the_named_target_agree():
    model, inputs = build("gemma3_text"), batch()
    named = run(model, inputs, "logit")
    called = run(model, inputs, partial(target_value, target="logit"))
    torch.testing.assert_close(named[:2], called[:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt", "gemma3_text"])
def test_residual_streams_from_the_engines_pieces(name):
    model = build(name)
    scalar = partial(target_value, target="logit", positions="last")
    with wrap(model, Rule()):
        blocks = Blocks(model)
        (sample, *_) = singles(batch())
        hidden, calls = blocks.record(sample)
        streams = [hidden.requires_grad_()]
        for index, call in enumerate(calls):
            streams.append(blocks.run(index, streams[-1], call))
        _, gradient = target_gradient(blocks, streams[-1], sample, "logit", "last")
        gradients = torch.autograd.grad(streams[-1], streams, gradient)
    for stream, gradient, (exact, expected) in zip(
        streams, gradients, residual_gradients(model, sample, Rule(), scalar), strict=True
    ):
        assert relative_error(stream, exact) <= TOLERANCE
        assert relative_error(gradient, expected) <= TOLERANCE


def one_block_bytes(model, inputs):
    weights = prunable(model)
    with wrap(model, Rule(), weights, Accumulators(weights, "signed")):
        blocks = Blocks(model)
        hidden, calls = blocks.record(inputs)
        with engine._count_saved(True) as saved:
            blocks.run(0, hidden.requires_grad_(), calls[0])
    return saved.bytes


# Every kind of MLP: gated, gate and up in one, plain, experts; three blocks, so that a part of them can be
# kept.
@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "gpt2", "gemma3_text", "mixtral"])
def test_recomputing_gives_the_same_bits_as_keeping(name):
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2} if name == "gemma3_text" else {}
    model = build(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 4}, **layers)
    inputs = batch()
    runs = []
    for block in Blocks(model).blocks:
        block.register_forward_pre_hook(lambda module, args: runs.append(args[0].requires_grad))
    results, counts = [], []
    one = one_block_bytes(model, inputs)
    assert one > 0
    for memory in (None, 0, 1, 2 * one, 2 * one + 1):
        runs.clear()
        value, gradient, sums = run(model, inputs, memory=memory)
        results.append((value, gradient, *sums.values()))
        counts.append(len(runs))
    # record, logits and forward call each block once; then the ones that were not kept are run again.
    assert [count - 3 * 4 for count in counts] == [0, 4, 3, 3, 2]
    for result in results[1:]:
        for ours, kept in zip(result, results[0], strict=True):
            assert torch.equal(ours, kept)


def test_the_same_input_gives_the_same_bits():
    model = build("mixtral")
    first, second = (run(model, batch()) for _ in range(2))
    for one, two in zip((*first[:2], *first[2].values()), (*second[:2], *second[2].values()), strict=True):
        assert torch.equal(one, two)


def test_chunks_of_positions_do_not_matter(monkeypatch):
    model, inputs = build("gemma2", "eager"), batch()
    value, gradient, sums = run(model, inputs, "max-logit")
    monkeypatch.setattr(head, "LOGITS_IN_FLIGHT", 3 * 5 * VOCABULARY)  # 5 of 11 positions at a time
    seen = []
    monkeypatch.setattr(
        head, "explained", lambda logits, *rest: seen.append(logits.shape[1]) or explained(logits, *rest)
    )
    chunked = run(model, inputs, "max-logit")
    assert seen == [5, 5, 1]
    torch.testing.assert_close(chunked[0], value, rtol=1e-6, atol=1e-5)
    assert relative_error(chunked[1], gradient) <= TOLERANCE
    for name in sums:
        assert relative_error(chunked[2][name], sums[name]) <= TOLERANCE


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_to_explain_is_zero(target):
    inputs = batch(length=1, padding=False)
    value, gradient, sums = run(build("llama"), inputs, target)
    assert value.tolist() == [0, 0, 0]
    assert torch.count_nonzero(gradient) == 0
    assert not any(total.any() for total in sums.values())


def test_a_sample_without_a_next_token_gives_nothing():
    inputs = batch()
    inputs["attention_mask"][0] = 0
    inputs["attention_mask"][0, 3] = 1
    value, gradient, sums = run(build("llama"), inputs)
    assert value[0] == 0
    assert value[1] != 0
    assert torch.count_nonzero(gradient[0]) == 0
    others = run(build("llama"), {name: tensor[1:] for name, tensor in inputs.items()})[2]
    for name in sums:
        assert relative_error(sums[name], others[name]) <= TOLERANCE


def test_batches_add_up():
    model = build("qwen3_moe")
    weights = prunable(model)
    inputs = batch()
    parts = [{name: tensor[rows] for name, tensor in inputs.items()} for rows in ([0], [1, 2])]
    whole, split = (Accumulators(weights, "abs") for _ in range(2))
    accumulate(model, [inputs], Rule(), "logprob", "all", weights, whole)
    accumulate(model, parts, Rule(), "logprob", "all", weights, split)
    for name in weights:
        assert relative_error(split.sums[name], whole.sums[name]) <= TOLERANCE


def test_a_scalar_that_is_not_finite_is_an_error_with_its_row():
    model = build("llama")
    weights = prunable(model)

    def target(logits, inputs):
        value = logits.sum((1, 2))
        return torch.where(torch.arange(3) == 1, value / 0, value)

    with pytest.raises(InputError, match=r"scalar of sample 1 of a batch is -?inf"):
        accumulate(model, [batch()], Rule(), target, "all", weights, Accumulators(weights, "abs"))


def test_free_memory_is_in_bytes():
    assert 1 << 20 < free_memory(torch.device("cpu")) < 1 << 50


class Recorder:
    """A visitor that tells the sink of batches, and keeps the order of what it was told."""

    def __init__(self, sink, inputs):
        self.sink, self.inputs, self.told, self.values = sink, inputs, [], []

    def batch(self, number):
        self.sink.start(self.inputs[number])
        self.told.append(number)

    def explained(self, number, value):
        self.values.append(value)

    def enter(self, index):
        self.told.append(f"enter {index}")

    def done(self, index):
        self.told.append(f"done {index}")


def by_block(model, inputs, boundaries, spacing=None, resume=None):
    weights = prunable(model)
    sink = Accumulators(weights, "abs")
    visitor = Recorder(sink, inputs)
    with wrap(model, Rule(), weights, sink):
        attribute_batches(
            Blocks(model),
            inputs,
            "logprob",
            boundaries=boundaries,
            spacing=spacing,
            memory=0,
            visitor=visitor,
            resume=resume,
        )
    return sink.sums, visitor


@pytest.mark.parametrize("spacing", [None, 1, 2, 3, 5])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_layer_by_layer_gives_the_bits_of_batch_by_batch(place, spacing, tmp_path):
    model = build("llama", num_hidden_layers=5)
    inputs = [batch(), batch(2, 7, padding=False, seed=2)]
    weights = prunable(model)
    expected = Accumulators(weights, "abs")
    accumulate(model, inputs, Rule(), "logprob", "all", weights, expected)
    boundaries = InMemory() if place == "memory" else OnDisk(tmp_path)
    sums, visitor = by_block(model, inputs, boundaries, spacing)
    for name in weights:
        assert torch.equal(sums[name], expected.sums[name]), name
    with wrap(model, Rule()):
        for number, sample in enumerate(inputs):
            value, embedded, gradient = attribute_batch(Blocks(model), sample, "logprob")
            assert torch.equal(visitor.values[number], value)
            assert torch.equal(boundaries.get((0, number)), embedded)
            assert torch.equal(boundaries.get((GRADIENT, number)), gradient)
    steps = [step for index in (5, 4, 3, 2, 1, 0) for step in (f"enter {index}", 0, 1, f"done {index}")]
    assert visitor.told == steps
    # Nothing but the embedded inputs and their gradients is left.
    assert set(boundaries._kept) == {(key, number) for key in (0, GRADIENT) for number in (0, 1)}
    if place == "disk":
        assert len(list(tmp_path.iterdir())) == 4


class Watched(InMemory):
    """Boundaries that know how many they held at most."""

    most = 0

    def put(self, key, tensor):
        super().put(key, tensor)
        self.most = max(self.most, len(self._kept))


@pytest.mark.parametrize("blocks", [1, 2, 9, 10])
@pytest.mark.parametrize("spacing", [None, 1, 3, 4, 20])
def test_spacing_bounds_what_is_held(spacing, blocks):
    boundaries = Watched()
    by_block(build("llama", num_hidden_layers=blocks), [batch()], boundaries, spacing)
    assert boundaries.most == boundaries_held(blocks, spacing)
    # 3 checkpoints, 2 within a stretch and the gradients; all 9 and the gradients.
    assert (boundaries_held(9, 3), boundaries_held(9, None)) == (6, 10)


@pytest.mark.parametrize("spacing", [None, 2])
def test_an_attribution_goes_on_where_it_was_left(spacing):
    model = build("llama", num_hidden_layers=5)
    inputs = [batch(), batch(2, 7, padding=False, seed=2)]
    whole, half = {}, InMemory()
    sums, _ = by_block(model, inputs, InMemory())

    def keep(index):
        if index == 2:
            whole.update({number: boundaries.get((GRADIENT, number)) for number in range(2)})

    boundaries = InMemory()
    visitor = Recorder(Accumulators(prunable(model), "abs"), inputs)
    visitor.done = keep
    with wrap(model, Rule(), prunable(model), visitor.sink):
        attribute_batches(Blocks(model), inputs, "logprob", boundaries=boundaries, memory=0, visitor=visitor)
    for number, gradient in whole.items():
        half.put((GRADIENT, number), gradient)
    rest, visitor = by_block(model, inputs, half, spacing, Resume(2))
    assert visitor.told == [step for index in (1, 0) for step in (f"enter {index}", 0, 1, f"done {index}")]
    for name, total in rest.items():
        if ".layers.0." in name or ".layers.1." in name:
            assert torch.equal(total, sums[name])
        else:
            assert not total.any()


def test_equal_masks_and_tables_are_held_once():
    model = build("gemma3_text")
    blocks = Blocks(model)
    calls = [blocks.record(sample)[1] for sample in (batch(), batch(seed=2), batch(2, 7, padding=False))]
    shared = engine._shared(calls[1], calls[0])
    for (_, kwargs), (_, first), (_, second) in zip(shared, calls[0], calls[1], strict=True):
        assert kwargs.keys() == second.keys()
        assert kwargs["attention_mask"] is first["attention_mask"]
        for one, two in zip(kwargs["position_embeddings"], first["position_embeddings"], strict=True):
            assert one is two
    for (_, kwargs), (_, third) in zip(engine._shared(calls[2], calls[0]), calls[2], strict=True):
        assert kwargs["attention_mask"] is third["attention_mask"]
