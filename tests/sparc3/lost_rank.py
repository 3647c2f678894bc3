"""sparc3, but for one process of torchrun that is killed when it is done with a block.

torchrun ... lost_rank.py RANK BLOCK prune ...
"""

import os
import signal
import sys

from sparc3 import streamed_passes
from sparc3.cli import app

rank, block, *arguments = sys.argv[1:]
done = streamed_passes._Backward.done


def lost(visitor, index):
    if (visitor.ranks.rank, index) == (int(rank), int(block)):
        os.kill(os.getpid(), signal.SIGKILL)
    done(visitor, index)


streamed_passes._Backward.done = lost
app(arguments)
