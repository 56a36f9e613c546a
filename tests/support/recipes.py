"""A recipe that trains in a second, and its batches as the reference takes them."""

from __future__ import annotations

from pathlib import Path

import torch

from qsr_engine.data.batches import ImageBatch
from qsr_engine.data.device import Normalise

STEPS = 14
ELASTIC_STEPS = 300
TINY_MODEL = """model:
  name: timm/vit_tiny_patch16_224
  kwargs: {img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}"""


def small_recipe(tmp_path: Path, digits: Path) -> Path:
    """A recipe that trains in a second; one file, as a user writes it."""
    path = tmp_path / "small.yaml"
    path.write_text(f"""{TINY_MODEL}
data: {{shards: "{digits}", image_size: 8, augment: crop}}
batch: {{train_batch_size: 96}}
optimizer: {{type: AdamW, weight_decay: 0.05, gradient_clipping: 1.0}}
qsr:
  strategy: qsr
  h_base: 2
  alpha: 0.006
  total_steps: {STEPS}
  lr: {{schedule: cosine, peak: 3e-3, warmup_steps: 2}}
logging: {{dir: "{tmp_path / "runs"}", every: 3, eval_every: 5}}
""")
    return path


def normalised(batch: ImageBatch) -> tuple[torch.Tensor, torch.Tensor]:
    return Normalise(torch.device("cpu"), torch.float32)(batch.images), batch.labels


def recipe_of_three_workers(tmp_path: Path, digits: Path, seconds: float) -> Path:
    """Three workers, rounds of 4 steps, a checkpoint at each boundary; a rank is lost after so many seconds."""
    path = tmp_path / "small.yaml"
    path.write_text(f"""{TINY_MODEL}
data: {{shards: "{digits}", image_size: 8}}
batch: {{train_batch_size: 24}}
optimizer: {{type: AdamW, gradient_clipping: 1.0}}
qsr:
  strategy: constant
  h_base: 4
  total_steps: 20
  lr: {{schedule: constant, peak: 1e-3}}
  faults: {{timeout_seconds: {seconds}}}
logging: {{dir: "{tmp_path / "runs"}", name: run, every: 1, checkpoint_every: 4, tensorboard: false}}
""")
    return path


def recipe_of_four_steps(tmp_path: Path, digits: Path, engine: str) -> Path:
    path = tmp_path / "alone.yaml"
    path.write_text(f"""{TINY_MODEL}
engine: {engine}
data: {{shards: "{digits}", image_size: 8}}
batch: {{train_batch_size: 6}}
optimizer: {{type: AdamW, gradient_clipping: 1.0}}
qsr: {{strategy: constant, h_base: 2, total_steps: 4, lr: {{schedule: constant, peak: 1e-3}}}}
logging: {{dir: "{tmp_path / "runs"}"}}
""")
    return path


def elastic_recipe(tmp_path: Path, digits: Path) -> Path:
    """Workers that come and go, rounds of 20 steps, and a record every 10."""
    path = tmp_path / "small.yaml"
    path.write_text(f"""{TINY_MODEL}
engine: fsdp
data: {{shards: "{digits}", image_size: 8, augment: crop}}
batch: {{train_batch_size: 24}}
optimizer: {{type: AdamW, gradient_clipping: 1.0}}
qsr:
  strategy: constant
  h_base: 20
  total_steps: {ELASTIC_STEPS}
  lr: {{schedule: cosine, peak: 1e-3}}
  membership: {{way: torchft, timeout_seconds: 3}}
logging:
  {{dir: "{tmp_path / "runs"}", name: run, every: 10, eval_every: 150, checkpoint_every: 100, keep_checkpoints: 2}}
""")
    return path
