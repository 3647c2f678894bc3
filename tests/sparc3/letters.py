"""A task that a model of random weights does: right is the one of two letters that it prefers itself."""

import itertools
from copy import deepcopy

import torch
import words

from sparc3.families import prunable
from sparc3.tasks import Task, make_example

PAIRS = list(itertools.combinations("abcdefgh", 2))


def lines(model, count=12, seed=0):
    """Rows of a task file; the prompts have 4 to 9 letters and the corrupted ones another first letter."""
    generator = torch.Generator().manual_seed(seed)

    def draw(limit):
        return int(torch.randint(limit, (1,), generator=generator))

    found = []
    for number in range(count):
        prompt = "".join(chr(97 + draw(26)) for _ in range(4 + draw(6)))
        corrupted = ("z" if prompt[0] != "z" else "y") + prompt[1:]
        first, second = PAIRS[draw(len(PAIRS))]
        with torch.no_grad():
            logits = model(torch.tensor([[words.BOS, *words.ids(prompt)]])).logits[0, -1]
        if logits[words.ids(first)] < logits[words.ids(second)]:
            first, second = second, first
        found.append(
            {"prompt": prompt, "corrupted": corrupted, "answer": first, "wrong": second, "group": str(number)}
        )
    return found


def task(model, count=12, rows=None):
    """Half of the lines to rank on, half to judge on."""
    rows = [
        make_example(
            words.tokenizer(), row["prompt"], row["corrupted"], [row["answer"]], [row["wrong"]], row["group"]
        )
        for row in rows or lines(model, count)
    ]
    return Task("letters", tuple(rows[::2]), tuple(rows[1::2]))


def misleading_lines(model, count=12):
    """Lines that the model does; with its weights at zero it does a third of them, at the larger mean difference."""
    bare = deepcopy(model)
    for weight in prunable(bare).values():
        weight.weight.data.zero_()
    letter_ids = words.ids("abcdefghijklmnopqrstuvwxyz")
    found = lines(model, count)
    for number, row in enumerate(found):
        ids = torch.tensor([[words.BOS, *words.ids(row["prompt"])]])
        with torch.no_grad():
            whole, empty = (one(ids).logits[0, -1, letter_ids] for one in (model, bare))
        # [right, wrong]; of what the model has right.
        ahead, empty_ahead = (one[:, None] - one for one in (whole, empty))
        wanted = (ahead > 0) & (empty_ahead < 0) if number % 3 else ahead > 0
        best = (empty_ahead - ahead).masked_fill(~wanted, -torch.inf).argmax()
        row["answer"], row["wrong"] = (chr(97 + int(place)) for place in divmod(int(best), 26))
    return found
