"""`pmod` on one rank: `torchrun command_worker.py ARGUMENTS`."""

import importlib.util
import sys

from pmod_model.cli import main

if __name__ == "__main__":
    if importlib.util.find_spec("deepspeed") is not None:
        from deepspeed import ops

        # it would compile a reduction over shared memory on first use; gloo is tested here
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sys.exit(main(sys.argv[1:]))
