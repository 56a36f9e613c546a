import sys

from qsr_engine.cli import main

sys.exit(main())
