"""Attribute a language model with Layer-wise Relevance Propagation, and prune it with the result.

    loaded = sparc3.load("tiny-llama")
    samples = sparc3.windows(loaded.tokenizer, sparc3.read_documents(["bundled"]), length=127, count=32)
    mask = sparc3.attribute(loaded.model, samples).select(0.5, "row")
    sparc3.save_pretrained(loaded.model, mask, "pruned", loaded.tokenizer)

Every name is imported when it is first used: torch and transformers take seconds to load.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparc3.registration import register as _register

if TYPE_CHECKING:
    from sparc3.compress import compare as compare
    from sparc3.compress import prune as prune
    from sparc3.correct import Correction as Correction
    from sparc3.errors import InputError as InputError
    from sparc3.evaluate import paired_interval as paired_interval
    from sparc3.evaluate import perplexity as perplexity
    from sparc3.explain import relevance as relevance
    from sparc3.export import save_pretrained as save_pretrained
    from sparc3.mask import Mask as Mask
    from sparc3.models import load as load
    from sparc3.rules import Rule as Rule
    from sparc3.samples import read_documents as read_documents
    from sparc3.samples import windows as windows
    from sparc3.scores import Scores as Scores
    from sparc3.scores import attribute as attribute

_HOME = {
    "Correction": "correct",
    "InputError": "errors",
    "Mask": "mask",
    "Rule": "rules",
    "Scores": "scores",
    "attribute": "scores",
    "compare": "compress",
    "load": "models",
    "paired_interval": "evaluate",
    "perplexity": "evaluate",
    "prune": "compress",
    "read_documents": "samples",
    "relevance": "explain",
    "save_pretrained": "export",
    "windows": "samples",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("sparc3")
    if name not in _HOME:
        raise AttributeError(f"module 'sparc3' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"sparc3.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


_register()
