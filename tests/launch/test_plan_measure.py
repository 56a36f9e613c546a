"""`qsr plan --measure` by a real launch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.launch import bin_folder, launch

pytestmark = pytest.mark.launch

RECIPE = """
model: {name: timm/vit_tiny_patch16_224, kwargs: {img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}}
data: {shards: nowhere, image_size: 8, train_samples: 1437}
batch: {train_batch_size: 32}
optimizer: {type: AdamW, gradient_clipping: 1.0}
engine: fsdp
qsr:
  strategy: qsr
  h_base: 2
  alpha: 0.006
  lr: {schedule: cosine, peak: 3e-3, warmup_epochs: 1}
  averaging: {overlap: next_forward}
epochs: 3
logging: {dir: nowhere}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Without shards: random pictures are measured with."""
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.slow
def test_a_real_launch(recipe: Path, tmp_path: Path) -> None:
    command = [str(bin_folder() / "qsr"), "plan", str(recipe), "--measure", "--ranks", "2", "--json"]
    done = launch(*command, "--averaging-seconds", "0.25", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    costs = found["costs"]
    assert costs["averaging_seconds"] == 0.25, "the command line goes before what was measured"
    assert costs["step_seconds"] > 0
    assert found["workers"] == 2
    (own,) = [row for row in found["strategies"] if row["own"]]
    assert own["hours_compute"] == pytest.approx(found["total_steps"] * costs["step_seconds"] / 3600)
    assert own["hours_communication"] == pytest.approx(found["rounds"] * 0.25 / 3600)


def test_batches_that_do_not_divide(recipe: Path, tmp_path: Path) -> None:
    done = launch(str(bin_folder() / "qsr"), "plan", str(recipe), "--measure", "--ranks", "5", cwd=tmp_path)
    assert done.returncode == 1
    assert "train_batch_size is 32" in done.stderr
