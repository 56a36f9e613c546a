import sys

from qsr_engine.cli.main import main

code = main()
if code == 0 and "torch.distributed" in sys.modules:  # of a rank: NCCL complains of a group that is left open
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
sys.exit(code)
