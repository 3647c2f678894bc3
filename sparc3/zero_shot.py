"""Zero-shot accuracy by EleutherAI's harness (the ``eval`` extra)."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparc3.errors import InputError


def check_installed() -> None:
    """InputError where the harness is missing; to be called before long work."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError(
            "zero-shot tasks need a package more: pip install 'sparc3[eval]', or leave them out"
        ) from error


def accuracies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str]
) -> dict[str, float]:
    """{task: share of right answers}, not normalised by length, no examples in the prompt.

    Raises:
        InputError: the harness is missing, or one of its tasks has no accuracy.
    """
    check_installed()
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(tasks), num_fewshot=0, bootstrap_iters=0
    )
    results = found["results"]
    lacking = [task for task in tasks if "acc,none" not in results.get(task, {})]
    if lacking:
        raise InputError(f"the harness gives no accuracy for {', '.join(lacking)}")
    return {task: float(results[task]["acc,none"]) for task in tasks}
