"""Relevance of a real model's answer: conserved part by part.

Nothing is asserted of which token has most of it: that is a finding about a model and a rule, not an identity.
"""

import pytest
import torch

from sparc3.conservation import conservation
from sparc3.page import spell
from sparc3.samples import prompts

TEXT = "When Mary and John went to the store, John gave a drink to"


@pytest.mark.parametrize("rule", ["attnlrp", "cp"])
def test_nothing_is_lost_in_parts_that_conserve(real_model, rule):
    model, tokenizer = real_model.model, real_model.tokenizer
    batch = prompts(tokenizer, [TEXT])
    (answer,) = tokenizer(" Mary", add_special_tokens=False)["input_ids"]
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, -1] = answer
    _, flow = conservation(model, batch | {"labels": labels}, rule)
    assert flow.broken == []
    # The check above is a sharp one.
    assert max(row.rounding for row in flow.rows) < 1e-2 * abs(flow.value)
    words = spell(tokenizer, batch["input_ids"][0].tolist())
    assert "".join(words[1:]).strip() == TEXT
