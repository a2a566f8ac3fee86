"""accelerate takes FSDP2 from processes with accelerators only; from others, DDP in silence: pretend there are some.

As a script: the command `flashbone`, under that pretence.
"""

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType


def processes_have_accelerators() -> None:
    """From now on two CPU processes count as two GPUs; tensors stay on the CPU and travel by gloo."""
    start = PartialState.__init__

    def start_and_pretend(self: PartialState, *args, **kwargs) -> None:
        start(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start_and_pretend


if __name__ == "__main__":
    from flashbone.cli import main

    processes_have_accelerators()
    sys.exit(main(sys.argv[1:]))
