"""Text of a few documents, and a recipe that trains a small GPT on it in a second."""

from __future__ import annotations

import random
from pathlib import Path

CONTEXT = 16
STEPS = 14


def write_documents(folder: Path, count: int = 6, words: int = 150, seed: int = 0) -> list[Path]:
    """Documents of so many words, some of them not in ASCII."""
    generator = random.Random(seed)
    vocabulary = ["the", "round", "ends", "and", "workers", "average", "größer", "λ", "step", "again,", "so."]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        lines = [" ".join(generator.choices(vocabulary, k=10)) for _ in range(words // 10)]
        paths.append(folder / f"document-{number}.txt")
        paths[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def text_recipe(tmp_path: Path, shards: Path) -> Path:
    path = tmp_path / "text.yaml"
    path.write_text(f"""
task: text
model:
  name: transformers/gpt2
  kwargs: {{n_layer: 1, n_embd: 16, n_head: 2, n_positions: {CONTEXT}, resid_pdrop: 0, embd_pdrop: 0, attn_pdrop: 0}}
data: {{shards: "{shards}"}}
batch: {{train_batch_size: 16}}
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
