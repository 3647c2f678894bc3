"""Small packed models on disk."""

import json
from contextlib import contextmanager

import torch
from safetensors.torch import load_file, save_file
from tiny import attentions, build

from sparc3.export import save_pretrained
from sparc3.scores import attribute

FORMATS = ("bitmap", "nm", "csr")


def magnitude(model, format, **options):
    return attribute(model, [], "magnitude", **options).select(0.5, "2:4" if format == "nm" else "row")


def packed(folder, name="llama", format="bitmap", dtype=torch.float32, **changes):
    """Write a packed model; returns the dense one, pruned."""
    model = build(name, attentions(name)[0], **changes)
    # Not model.to(dtype), which would round the rotary tables too.
    for tensor in (*model.parameters(),):
        tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
    mask = magnitude(model, format)
    save_pretrained(model, mask, folder, format=format)
    mask.apply(model)
    return model


@contextmanager
def changed(folder):
    """Yields (tensors, config) of a folder, and writes them back."""
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors, settings = load_file(file), json.loads(config.read_text())
    yield tensors, settings
    save_file(tensors, file, metadata={"format": "pt"})
    config.write_text(json.dumps(settings))
