"""train.py under FSDP2 on the CPU: torch can do it, accelerate chooses plain data parallelism there."""

import runpy
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


_init = AcceleratorState.__init__


def _init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    # Every later one shares this state, and takes its type from the process group again.
    self.fsdp_plugin = fsdp_plugin or self.fsdp_plugin
    if self.fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP


AcceleratorState.__init__ = _init_with_fsdp
sys.argv[0] = str(Path(__file__).parents[1] / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
