"""Which passes over the model a way of pruning takes, in their order.

backward    all blocks forward, then in reverse: relevance or gradients of the dense model
forward     all blocks of the dense model, watching what the weights receive
sweep       the same, but each block is pruned before the next one receives its outputs
visit       every weight by itself, without samples
"""

from __future__ import annotations

# Select inside the forward sweep; the second two have no scores to give without it.
SEQUENTIAL = ("wanda", "ria", "gblm", "sparsegpt")
SWEEP_ONLY = SEQUENTIAL[2:]
SAMPLE_FREE = ("magnitude", "random")

BACKWARD, FORWARD, SWEEP, VISIT = "backward", "forward", "sweep", "visit"


def in_sweep(method: str, pattern: str) -> bool:
    """Whether a method selects inside the sweep; a threshold over the whole model needs every score first."""
    return method in SEQUENTIAL and pattern != "global"


def passes(method: str, pattern: str, allocate: str = "uniform", repair: bool = False) -> tuple[str, ...]:
    """See the module; the arguments are those of sparc3.prune."""
    found = {"uniform": [], "owl": [FORWARD], "relevance": [BACKWARD]}[allocate]
    if method in ("lrp", "gradient", "gblm"):
        found.append(BACKWARD)
    if in_sweep(method, pattern):
        found.append(SWEEP)
    elif method in SEQUENTIAL:
        found.append(FORWARD)
    elif method in SAMPLE_FREE:
        found.append(VISIT)
    if repair and SWEEP not in found:
        found.append(SWEEP)
    return tuple(found)


def reads_samples(method: str, allocate: str = "uniform", repair: bool = False) -> bool:
    """Whether reference samples change the outcome."""
    return any(kind != VISIT for kind in passes(method, "row", allocate, repair))
