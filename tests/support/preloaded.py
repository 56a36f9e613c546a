"""What processes of the pool need. It is imported once, in the process from which all of them are forked."""

from __future__ import annotations

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import timm  # noqa: F401

import qsr_engine.cli.main
import qsr_engine.engines.deepspeed.engine
import qsr_engine.engines.fsdp.engine
import qsr_engine.training.loop  # noqa: F401
