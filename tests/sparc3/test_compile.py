"""torch.compile of a wrapped model: one graph, and the relevance of the eager one."""

import pytest
import torch
from tiny import batch, build

from sparc3.families import prunable
from sparc3.rules import Rule
from sparc3.scores import Accumulators
from sparc3.wrap import wrap


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_wrapped_model_is_one_graph(name):
    model, inputs = build(name), batch(padding=False)
    weights = prunable(model)
    sink = Accumulators(weights, "signed")
    sink.start(inputs)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    with wrap(model, Rule(), weights, sink):

        def logits(hidden):
            return model(inputs_embeds=hidden, use_cache=False).logits

        def relevance(function):
            for total in sink.sums.values():
                total.zero_()
            (gradient,) = torch.autograd.grad(function(embedded).square().sum(), embedded)
            return [gradient, *(total.clone() for total in sink.sums.values())]

        eager = relevance(logits)
        compiled = relevance(torch.compile(logits, fullgraph=True, backend="aot_eager"))
    for one, other in zip(eager, compiled, strict=True):
        # the same operations in fp32, some of them in another order
        assert (one - other).norm() <= 1e-5 * one.norm()
