"""Runs and scores of components in fp64 with plain autograd, one example at a time."""

from copy import deepcopy

import letters
import torch
import words
from oracle import reference_rules
from tiny import build

from sparc3.families import blocks_of, family_of, find
from sparc3.rules import Rule

# fp32 against fp64: sums of some hundred terms that partly cancel, relative to the largest score.
TOLERANCE = 1e-4
STEPS = 5


def model_of(name):
    return build(name, vocab_size=words.VOCABULARY)


def examples_of(model):
    return letters.task(model).ranking


def reference(model, example, rule="gradient", corrupted=False, share=1.0, target="difference"):
    """One example alone in fp64, with plain autograd: (d, {site: (x, gradient) [T, channels]}, {weight: gradient}).

    Of norms behind a site (Gemma's) what leaves them, under the site's name and " norm".
    With a share below 1 the embeddings lie between those of the corrupted (0) and the clean prompt.
    """
    copy = deepcopy(model).double()
    for parameter in copy.parameters():
        parameter.requires_grad_(True)
    family, sites = family_of(copy), {}

    def keep(name, x):
        x.retain_grad()
        sites[name] = x

    for layer, block in enumerate(blocks_of(copy)):
        ends = ((family.attention_output, family.attention_norm), (family.mlp_output, family.mlp_norm))
        for path, behind in ends:
            module, name = find(block, path), f"{family.blocks}.{layer}.{path}"
            if module is not None:
                module.register_forward_pre_hook(lambda m, args, name=name: keep(name, args[0]))
            if (norm := find(block, behind)) is not None:
                norm.register_forward_hook(lambda m, args, y, name=name: keep(f"{name} norm", y))
    clean, other = (
        torch.tensor([[words.BOS, *words.ids(text)]]) for text in (example.prompt, example.corrupted)
    )
    embed = copy.get_input_embeddings()
    table = embed.weight.detach()
    if share < 1:
        mixed = (1 - share) * table[other] + share * table[clean]
        embed.register_forward_hook(lambda m, args, output: mixed.requires_grad_())
    with reference_rules(copy, Rule.parse(rule)):
        logits = copy(other if corrupted else clean, use_cache=False).logits[0, -1]
        (right,), (wrong,) = example.right_ids, example.wrong_ids
        minus = {"difference": logits[wrong], "logit": 0.0, "logprob": logits.logsumexp(0)}
        value = logits[right] - minus[target]
        value.backward()
    seen = {name: (x.detach().flatten(0, -2), x.grad.flatten(0, -2)) for name, x in sites.items()}
    return value.item(), seen, {name: p.grad for name, p in copy.named_parameters() if p.grad is not None}


def expected_scores(
    model,
    found,
    examples,
    rule="gradient",
    ablation="zero",
    shares=(1.0,),
    reduce="signed",
    target="difference",
    through_norms=False,
):
    """With ``through_norms``, of sites with a norm behind them, (N(y) - N(y')) g of one component after the other."""
    rows, means = [], expected_means(model, examples) if ablation == "mean" else {}
    for example in examples:
        _, clean, _ = reference(model, example)
        _, other, _ = reference(model, example, corrupted=True)
        gradients = [reference(model, example, rule, share=share, target=target)[1] for share in shares]
        length = len(next(iter(clean.values()))[0])
        row = torch.zeros(length, len(found.names), dtype=torch.float64)
        for site in found.sites:
            instead = {"zero": 0, "mean": means.get(site.name), "patch": other[site.name][0]}[ablation]
            x = clean[site.name][0] - instead
            if through_norms and site.norm is not None:
                g = sum(one[f"{site.name} norm"][1] for one in gradients) / len(shares)
                linear, norm = deepcopy(site.module).double(), deepcopy(site.norm).double()
                for component in set(site.component.tolist()):
                    without = clean[site.name][0] - x * (site.component == component)
                    with torch.no_grad():
                        change = norm(linear(clean[site.name][0])) - norm(linear(without))
                    row[:, component] += (change * g).sum(-1)
                continue
            g = sum(one[site.name][1] for one in gradients) / len(shares)
            for channel, component in enumerate(site.component.tolist()):
                row[:, component] += x[:, channel] * g[:, channel]
        rows.append(row.abs().sum(0) if reduce == "token-abs" else row.sum(0))
    rows = torch.stack(rows)
    return {"abs": rows.abs(), "square": rows.square()}.get(reduce, rows).mean(0)


def expected_means(model, examples):
    """{site: [channels]} over all tokens of the prompts."""
    runs = [reference(model, example)[1] for example in examples]
    return {name: torch.cat([run[name][0] for run in runs]).mean(0) for name in runs[0]}


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() <= TOLERANCE * theirs.abs().max().item()
