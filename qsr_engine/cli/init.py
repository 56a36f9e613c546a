"""`qsr init`: a commented recipe for a model and a folder of shards, to be edited."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from qsr_engine.cli.arguments import add_command, whole_number
from qsr_engine.cli.errors import CommandError
from qsr_engine.config.strict import ConfigError
from qsr_engine.data import read_index
from qsr_engine.data.index import TextData
from qsr_engine.planning.plan import make_plan

_EPOCHS, _H_BASE = 90, 4
_STEPS_OF_AN_EPOCH = 20  # at least, where the batch is chosen here
_LARGEST_BATCH = 1024
_WARM_UP = 0.05  # of the run
_LEAVES = 0.5  # of the run, after which H leaves h_base: there the cosine is half the peak

_TEMPLATE = """\
# {name} on {shards}, with local steps under the Quadratic Synchronization Rule.
#
#   qsr train {out} --dry-run     check it
#   qsr plan {out} --choose       what other alphas and h_bases would cost
#   qsr train {out}               train, on a host with GPUs
#   DS_ACCELERATOR=cpu qsr train {out} --ranks 2
#
# Any key can be overridden: --set qsr.h_base=8
{model_and_data}
batch:
  train_batch_size: {batch}  # samples of one step, over all ranks
{optimizer}
precision:
  dtype: fp32  # bf16 on a GPU that has it
engine: deepspeed  # or fsdp
qsr:
  strategy: qsr  # parallel averages gradients at every step instead: the run to compare with
  h_base: {h_base}  # at least so many local steps between two averagings; more is cheaper, and may cost accuracy
  # H = max(h_base, floor((alpha / lr)^2)). This alpha makes H leave {h_base} about half-way; no rule gives it:
  # it goes with model, optimizer and batch, and half and twice of it are worth a try (docs/choosing-h.md).
  alpha: {alpha:.4g}
  h_max: null  # the longest round, in steps; a worker that is lost takes its steps since the last averaging with it
  worker_size: 1  # ranks that hold one replica together (ZeRO, FSDP)
  lr:
    schedule: cosine
    peak: {peak:.4g}  # {peak_from}: tune it before anything else
    min: 1.0e-6
    warmup_epochs: {warmup:.4g}
epochs: {epochs}
seed: 0
logging:
  dir: runs  # the run's folder is runs/{stem}
  every: {every}  # steps between two records
  eval_every_epochs: {eval_epochs}
  checkpoint_every: {checkpoint}  # steps; null writes none
  keep_checkpoints: 2
"""
_IMAGES = """\
model:
  name: {name}  # timm/NAME, torchvision/NAME, or qsr/simple_vit_b16
  kwargs: {kwargs}  # of its constructor; the number of classes comes from the shards
data:
  shards: {shards}
  train: {train}  # the splits in its index.json: {samples} samples, {classes}
  eval: {eval}
  image_size: {image_size}
  augment: crop_flip  # none, crop, crop_flip; see also randaugment and mixup
  loader_processes: {processes}  # decode pictures beside each rank"""
_TEXT = """\
task: text
model:
  name: {name}  # transformers/TYPE: gpt2, llama, qwen3, ...
  kwargs: {{}}  # of its configuration, such as its size; the vocabulary comes from the shards
data:
  shards: {shards}
  train: {train}  # the splits in its index.json: {samples} blocks of {context} tokens
  eval: {eval}"""
_ADAMW = """\
optimizer:
  type: AdamW  # every worker has its own; SGD, or Muon with engine fsdp
  weight_decay: 0.05
  gradient_clipping: 1.0  # per worker; 0.0 for none"""
_SGD = """\
optimizer:
  type: SGD  # every worker has its own; or AdamW
  momentum: 0.9
  nesterov: true
  weight_decay: 5.0e-5
  gradient_clipping: 0.0  # per worker; 0.0 is none"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command's arguments."""
    command = add_command(
        commands,
        "init",
        "Write a commented recipe for a model and a folder of shards.",
        more="Its numbers are where to begin, from the size of the data; the comments say what to tune.",
        examples=[
            "qsr init --model timm/vit_small_patch16_224 --shards data/shards",
            "qsr init --model torchvision/resnet50 --shards data/shards --epochs 30 --out resnet.yaml",
            "qsr init --model transformers/gpt2 --shards data/text --epochs 1 --out gpt.yaml",
        ],
    )
    command.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="timm/NAME, torchvision/NAME, qsr/NAME; of a text transformers/TYPE",
    )
    command.add_argument("--shards", required=True, metavar="FOLDER", help="with an index.json: see `qsr shards`")
    command.add_argument("--out", default="my.yaml", metavar="FILE", help="the recipe (default: %(default)s)")
    command.add_argument("--epochs", type=whole_number, default=_EPOCHS, metavar="N", help="(default: %(default)s)")
    command.add_argument(
        "--batch", type=whole_number, metavar="N", help="samples of a step over all ranks (default: by the data)"
    )
    command.add_argument(
        "--image-size", type=whole_number, metavar="N", help="in pixels (default: what the model is made for)"
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the recipe, and show its plan. Raises CommandError: the file is there already, or cannot be written."""
    text = _recipe(args)
    try:
        with Path(args.out).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise CommandError(f"{args.out}: this file is there already; write another name with --out") from error
    except OSError as error:
        raise CommandError(f"{args.out}: cannot be written: {error.strerror or error}") from error
    print(f"{make_plan(args.out).text()}\n\nWritten. Look at its comments, then: qsr train {args.out} --dry-run")
    return 0


def _recipe(args: argparse.Namespace) -> str:
    index = read_index(args.shards)
    train, evaluated = (_split(list(index.splits), names) for names in (("train",), ("val", "test", "validation")))
    samples = index.split(train).samples
    batch = args.batch or _batch(samples)
    steps = args.epochs * max(1, samples // batch)
    # Found from everywhere: a recipe's own paths are taken from where a command is run.
    shards = args.shards if "://" in args.shards else os.path.abspath(args.shards)
    about = {"name": args.model, "shards": shards, "train": train, "eval": evaluated, "samples": samples}
    if index.text is not None:
        convolutions = False
        _check_language_model(args.model, index.text)
        model_and_data = _TEXT.format(**about, context=index.text.context)
    else:
        convolutions, image_size, kwargs = _of_model(args.model, index.class_count, args.image_size)
        processes = 0 if image_size < 64 else 4
        classes = f"{index.class_count} classes"
        model_and_data = _IMAGES.format(
            **about, kwargs=kwargs, classes=classes, image_size=image_size, processes=processes
        )
    if convolutions:
        optimizer, peak, source = _SGD, 0.1 * batch / 256, "0.1 for a batch of 256, in proportion"
    else:
        optimizer, peak, source = _ADAMW, 1e-3 * math.sqrt(batch / 1024), "0.001 for a batch of 1024, by the root"
    return _TEMPLATE.format(
        name=args.model,
        shards=shards,
        out=args.out,
        stem=Path(args.out).stem,
        model_and_data=model_and_data,
        batch=batch,
        optimizer=optimizer,
        h_base=_H_BASE,
        alpha=math.sqrt(_H_BASE + 1) * peak * _LEAVES,
        peak=peak,
        peak_from=source,
        warmup=_WARM_UP * args.epochs,
        epochs=args.epochs,
        every=min(50, max(1, steps // 100)),
        eval_epochs=max(1, args.epochs // 30),
        checkpoint=max(1, steps // 20),
    )


def _split(there: list[str], names: tuple[str, ...]) -> str:
    """The split of one of these names, else the only other one, which a user may change."""
    return next((name for name in names if name in there), there[-1])


def _batch(samples: int) -> int:
    """A power of two, so that many numbers of ranks divide it."""
    return int(min(_LARGEST_BATCH, 2 ** max(3, int(math.log2(max(1, samples / _STEPS_OF_AN_EPOCH))))))


def _check_language_model(name: str, text: TextData) -> None:
    """Raises ConfigError: there is no such model, or it does not take the blocks of these shards."""
    import torch

    from qsr_engine.config.recipe import ModelConfig
    from qsr_engine.config.strict import validate
    from qsr_engine.training.language_models import create_language_model

    if not name.startswith("transformers/"):
        raise ConfigError(f"--model {name}: the shards hold text; write transformers/TYPE, such as transformers/gpt2")
    with torch.device("meta"):
        create_language_model(validate(ModelConfig, {"name": name}, where="--model", prefix="model."), text)


def _of_model(name: str, classes: int | None, image_size: int | None) -> tuple[bool, int, str]:
    """Whether it has batch norm, as models trained with SGD have, the pictures that it takes, and its kwargs in YAML.

    Raises:
        ConfigError: there is no such model, or it does not take these pictures.
    """
    import torch

    from qsr_engine.config.recipe import ModelConfig
    from qsr_engine.config.strict import validate
    from qsr_engine.training.batch_norm import has_batch_norm
    from qsr_engine.training.models import create_model, usual_image_size

    config = validate(ModelConfig, {"name": name}, where="--model", prefix="model.")
    if name.startswith("transformers/"):
        raise ConfigError(f"--model {name}: it is of text, and the shards hold pictures; write `qsr shards text`'s")
    if classes is None:
        raise ConfigError("the shards' index.json names no classes; add them there, as `qsr shards index` explains")
    size = image_size or usual_image_size(name)
    with torch.device("meta"):
        try:
            return has_batch_norm(create_model(config, classes, size)), size, "{}"
        except ConfigError as error:  # timm's transformers are made for pictures of one size
            sized = config.model_copy(update={"kwargs": {"img_size": size}})
            try:
                return has_batch_norm(create_model(sized, classes, size)), size, f"{{img_size: {size}}}"
            except ConfigError:
                raise error from None
