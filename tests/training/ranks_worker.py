"""One rank of a training: `torchrun ranks_worker.py ENGINE FOLDER`."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from pathlib import Path

from training.ranks import Progress

if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    progress = Progress(Path(sys.argv[-1]), int(os.environ["RANK"]))
    # after the first note: these imports take seconds
    from training.ranks_tasks import run

    run(sys.argv[1], Path(sys.argv[-1]), progress)
    progress.note("done")
