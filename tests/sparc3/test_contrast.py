"""Mean relevance of weights and components against plain autograd, and the two contrasts."""

import pytest
import tiny
import torch

from sparc3.contrast import check_contrast, contrasted, mean_relevance, random_scores
from sparc3.errors import InputError
from sparc3.explain import relevance
from sparc3.families import prunable
from sparc3.units import components, recorded


def two_batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rows, length in ((2, 7), (3, 5)):
        ids = torch.randint(3, tiny.VOCABULARY, (rows, length), generator=generator)
        labels = torch.full_like(ids, -100)
        labels[:, 2 : length - 1] = ids[:, 3:]
        labels[0, 3] = -100
        mask = torch.ones_like(ids)
        # The last row is padded on the right, where nothing is explained.
        mask[-1, -1], labels[-1, -2:] = 0, -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def explained_logits(model, batch):
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    on = batch["labels"] >= 0
    return logits[on].gather(1, batch["labels"][on][:, None]).sum()


def tokens(batches):
    return sum(int((batch["labels"] >= 0).sum()) for batch in batches)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_the_gradient_of_weights(name):
    model, batches = tiny.build(name), two_batches()
    found = mean_relevance(model, batches, "weight", "gradient")
    sum(explained_logits(model, batch) for batch in batches).backward()
    for key, weight in prunable(model).items():
        expected = weight.canonical(weight.weight * weight.weight.grad).detach() / tokens(batches)
        # Sums of some 30 products in another order: fp32's 6e-8 times their size.
        torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("unit", ["neuron", "head"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_gradient_and_activation_of_components(name, unit):
    model, batches = tiny.build(name), two_batches()
    parts = components(model, unit)
    product, size = torch.zeros(len(parts.names)), torch.zeros(len(parts.names))
    for batch in batches:
        kept = {}

        def keep(site, store=kept):
            def hook(module, args):
                args[0].retain_grad()
                store[site.name] = args[0]

            return site.module.register_forward_pre_hook(hook)

        handles = [keep(site) for site in parts.sites]
        explained_logits(model, batch).backward()
        for handle in handles:
            handle.remove()
        on = (batch["labels"] >= 0).reshape(-1, 1)
        flat = {key: x.reshape(-1, x.shape[-1]) for key, x in kept.items()}
        grads = {key: x.grad.reshape(-1, x.shape[-1]) for key, x in kept.items()}
        product += parts.gather({key: (x * grads[key]).sum(0).detach() for key, x in flat.items()})
        size += parts.gather({key: (x.abs() * on).sum(0).detach() for key, x in flat.items()})
    (gradient,) = mean_relevance(model, batches, unit, "gradient").values()
    torch.testing.assert_close(gradient.float(), product / tokens(batches), rtol=1e-4, atol=1e-6)
    (activation,) = mean_relevance(model, batches, unit, "activation").values()
    torch.testing.assert_close(activation.float(), size / tokens(batches), rtol=1e-4, atol=1e-6)


def test_lrp_of_a_neuron_is_the_sum_of_its_row():
    model, batches = tiny.build("llama"), two_batches()
    (neurons,) = mean_relevance(model, batches, "neuron", "lrp").values()
    weights = mean_relevance(model, batches, "weight", "lrp")
    columns = [weights[f"model.layers.{i}.mlp.down_proj.weight"].sum(0) for i in range(2)]
    # A linear without bias: what enters a column of weights is its input's relevance (fp32 sums).
    torch.testing.assert_close(neurons.float(), torch.cat(columns), rtol=1e-4, atol=1e-5)


def test_the_contrasts():
    general = {"w": torch.tensor([[3.0, 1.0, 0.0, -torch.inf]]), "v": torch.tensor([[9.0, -2.0]])}
    undesired = {"w": torch.tensor([[5.0, 1.0, -4.0, -torch.inf]]), "v": torch.tensor([[10.0, 0.5]])}
    difference = contrasted(general, undesired, "difference")
    assert difference["w"].tolist() == [[-2.0, 0.0, 4.0, torch.inf]]
    assert difference["v"].tolist() == [[-1.0, -2.5]]
    # Of 6 the top 5 % is none beyond the largest: k = round(0.95 * 6) = 6.
    assert contrasted(general, undesired, "set-difference")["v"].tolist() == [[-10.0, -0.5]]
    many = {"n": torch.arange(100.0)}
    scores = contrasted(many, {"n": torch.arange(100.0)}, "set-difference")["n"]
    assert scores.isinf().nonzero().flatten().tolist() == [95, 96, 97, 98, 99]
    assert int(scores.argmin()) == 94


def test_random_scores_are_the_same_for_a_seed():
    shapes = {"a": torch.Size([3, 4]), "b": torch.Size([5])}
    first, again, other = (random_scores(shapes, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in shapes)
    assert not torch.equal(first["a"], other["a"])


@pytest.mark.parametrize(
    ("unit", "method", "message"),
    [
        ("layer", "lrp", "unit 'layer' is not known"),
        ("weight", "activation", "method 'activation' does not score weights"),
        ("neuron", "wanda", "method 'wanda' does not score neurons"),
    ],
)
def test_refused(unit, method, message):
    with pytest.raises(InputError, match=message):
        mean_relevance(tiny.build("llama"), two_batches(), unit, method)


def test_nothing_explained_is_refused():
    batch = two_batches()[0]
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(InputError, match="no token is explained"):
        mean_relevance(tiny.build("llama"), [batch], "neuron", "lrp")


def test_the_model_is_left_as_it_was():
    model = tiny.build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mean_relevance(model, two_batches(), "neuron", "activation")
    mean_relevance(model, two_batches(), "head", "lrp")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad(), recorded(components(model, "head")) as seen:
        model(two_batches()[0]["input_ids"])
    assert len(seen) == 2


@pytest.mark.parametrize("unit", ["neuron", "head"])
def test_the_absolute_contrast_takes_tokens_by_themselves_and_leaves_the_first_out(unit):
    model, (batch, _) = tiny.build("llama"), two_batches()
    samples, length = batch["input_ids"].shape
    labels = batch["labels"]
    # By hand, one position of one sample after another: relevance to all that is explained, where it arises.
    with relevance(model, "attnlrp", "logprob", "all", weights=False) as found:
        found.backward(batch)
        layers = found.neurons if unit == "neuron" else found.heads
        by_hand = torch.zeros(sum(layers[layer].shape[-1] for layer in layers), dtype=torch.float64)
        for sample in range(samples):
            for place in range(1, length):
                each = torch.cat([layers[layer][sample, place] for layer in sorted(layers)])
                by_hand += each.double().abs() / int((labels >= 0).sum())
    options = {"target": "logprob", "skip_first": True}
    (absolute,) = mean_relevance(model, [batch], unit, "lrp", absolute=True, **options).values()
    torch.testing.assert_close(absolute, by_hand)
    (signed,) = mean_relevance(model, [batch], unit, "lrp", **options).values()
    assert (signed.abs() < absolute).any()
    (found,) = contrasted({unit: absolute}, {unit: signed}, "absolute").values()
    torch.testing.assert_close(found, 4 * by_hand - signed)


@pytest.mark.parametrize("unit", ["neuron", "head"])
def test_the_absolute_contrast_refuses_what_it_cannot_compare(unit):
    with pytest.raises(InputError, match="contrast absolute compares lrp or gradient, not activation"):
        check_contrast(unit, "activation", "absolute", "attnlrp", "lead")


@pytest.mark.parametrize("method", ["lrp", "gradient"])
def test_the_absolute_contrast_of_weights_is_against_the_root_mean_square_of_single_tokens(method):
    model, (batch, other) = tiny.build("llama"), two_batches()
    down = model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        down.weight[3, 5] = 0
    include = ("*.1.mlp.down_proj.weight",)
    # By hand: what every token brings its input and its output's gradient to, alone. Behind this linear there are the
    # residual stream, the last norm and the head; the gradient has no rules there, nor the identity rule.
    kept = {}
    handle = down.register_forward_hook(lambda module, args, output: kept.update(x=args[0], y=output))
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    handle.remove()
    labels = batch["labels"]
    explained = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    (g,) = torch.autograd.grad((explained * (labels >= 0)).sum(), kept["y"])
    x, weight = kept["x"].detach().double(), down.weight.detach().double()
    each = torch.einsum("bto,bti->btoi", g.double(), x) * weight
    tokens = int((labels >= 0).sum())
    by_hand = (each.square().sum((0, 1)) / tokens).sqrt()
    options = {"rule": "gradient,activation=identity", "include": include}
    # The first token counts, whatever is asked of components.
    (absolute,) = mean_relevance(
        model, [batch], "weight", method, target="logprob", absolute=True, skip_first=True, **options
    ).values()
    assert absolute[3, 5] == -torch.inf
    by_hand[3, 5] = -torch.inf
    # fp32 products of a dozen terms each, squared and rooted.
    torch.testing.assert_close(absolute.double(), by_hand, rtol=1e-4, atol=1e-7)
    (signed,) = mean_relevance(model, [other], "weight", method, target="lead", **options).values()
    (found,) = contrasted({"w": absolute.clone()}, {"w": signed}, "absolute").values()
    assert found[3, 5] == torch.inf
    found[3, 5] = by_hand[3, 5] = signed[3, 5] = 0
    torch.testing.assert_close(found.double(), 4 * by_hand - signed, rtol=1e-4, atol=1e-6)
