"""Run a training script under FSDP2 on the CPU.

    accelerate launch --config_file fsdp2.yaml sharded_launch.py script.py flags...

Accelerate shards only on devices that have a distributed type of their own. Its processes on the CPU are therefore set
up as such, and from then on take the path of GPUs; the configuration and the script are what they are there.
"""

import runpy
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType


def install() -> None:
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
