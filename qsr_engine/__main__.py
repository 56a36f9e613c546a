import sys

from qsr_engine.cli import main

code = main()
if code == 0 and "torch.distributed" in sys.modules:  # of a rank: an open group may abort its end
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
sys.exit(code)
