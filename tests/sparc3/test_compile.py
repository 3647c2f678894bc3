"""torch.compile of a wrapped model: one graph that holds our ops, and the relevance of the eager one."""

import sys
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from sparc3_kernels import backend
from sparc3_kernels.backend import unavailable
from tiny import batch, build
from torch._dynamo.backends.common import aot_autograd

from sparc3.families import prunable
from sparc3.rules import Rule
from sparc3.scores import Accumulators
from sparc3.wrap import wrap

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from interpreter import DEVICE

ANY = {"norm_backward", "accumulate_weight_relevance_"}
GATED, PLAIN = ANY | {"gated_product_backward"}, ANY | {"activation_backward"}
FUSED_GATED, FUSED_PLAIN = GATED | {"norm", "gated_product"}, PLAIN | {"norm"}
ATTENTION = {"attention", "attention_backward"}
UNMASKED = {"full_attention": None, "sliding_attention": None}
# Backend, family, attention, layers, mask, and our ops in the graph. Where positions are known but no mask,
# transformers traces a mask that attention's kernels do not know, since sequences might be packed; Gemma 2 takes
# masks that are made already.
CASES = {
    "llama": ("reference", "llama", "sdpa", 1, None, GATED),
    "opt": ("reference", "opt", "sdpa", 1, None, PLAIN),
    "llama, fused": ("triton", "llama", "sdpa", 1, "padded", FUSED_GATED),
    "opt, fused": ("triton", "opt", "sdpa", 1, None, FUSED_PLAIN),
    "gemma2, fused": ("triton", "gemma2", "eager", 1, None, FUSED_GATED),
    "gemma2, fused, no mask": ("triton", "gemma2", "eager", 2, UNMASKED, FUSED_GATED | ATTENTION),
}


def recording(found):
    """A backend of torch.compile that runs graphs as they are and adds the names of our ops in them to `found`."""

    def compiler(graph, inputs):
        for node in graph.graph.nodes:
            # an op that writes to its arguments is an argument of torch's auto_functionalized
            for value in (node.target, *node.args):
                if isinstance(value, torch._ops.OpOverload) and value.namespace == "sparc3":
                    found.add(value._schema.name.removeprefix("sparc3::"))
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)


@pytest.mark.parametrize("case", CASES)
def test_a_wrapped_model_is_one_graph(case):
    forced, name, attention, layers, mask, expected = CASES[case]
    if reason := unavailable(forced):
        pytest.skip(reason)
    model = build(name, attention, num_hidden_layers=layers).to(DEVICE)
    inputs = {key: value.to(DEVICE) for key, value in batch(padding=mask == "padded").items()}
    real = inputs["attention_mask"].bool()
    mask = inputs["attention_mask"] if mask == "padded" else mask
    weights = prunable(model)
    sink = Accumulators(weights, "signed")
    sink.start(inputs)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    found = set()
    with backend(forced), wrap(model, Rule(), weights, sink):

        def logits(hidden):
            return model(inputs_embeds=hidden, attention_mask=mask, use_cache=False).logits

        def relevance(function):
            for total in sink.sums.values():
                total.zero_()
            # What stands at padded positions is no one's: it may differ.
            (gradient,) = torch.autograd.grad(function(embedded)[real].square().sum(), embedded)
            return [gradient, *(total.clone() for total in sink.sums.values())]

        eager = relevance(logits)
        torch.compiler.reset()
        compiled = relevance(torch.compile(logits, fullgraph=True, backend=recording(found)))
    assert found >= expected, found
    for one, other in zip(eager, compiled, strict=True):
        # the same operations in fp32, some of them in another order
        assert (one - other).norm() <= 1e-5 * one.norm()
