"""sparc3 prune several times in the same processes of torchrun, since starting those takes longest.

torchrun ... many_runs.py OUT '[["--method", "wanda"], ...]' prune ...

The n-th run has the n-th list of options besides, and writes OUT-n.
"""

import json
import sys

from torch import distributed

from sparc3.cli import app

# One process group for all runs: a second one would find the first one's addresses.
begin = distributed.init_process_group
distributed.init_process_group = lambda *named, **more: distributed.is_initialized() or begin(*named, **more)
distributed.destroy_process_group = lambda: None
out, options, *arguments = sys.argv[1:]
for number, more in enumerate(json.loads(options)):
    app([*arguments, *more, "--out", f"{out}-{number}"], standalone_mode=False)
