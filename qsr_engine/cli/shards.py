"""`qsr shards`: make and check WebDataset shards."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from types import FrameType

from qsr_engine.cli.arguments import add_command, whole_number
from qsr_engine.cli.errors import CommandError
from qsr_engine.data import (
    Index,
    index_shards,
    shuffle_shards,
    verify_shards,
    write_cifar10,
    write_digits,
    write_imagefolder,
    write_text,
)
from qsr_engine.data.writing.data_sets import CIFAR10_ROOT, DIGITS_EVAL, QUALITY, SHARD_BYTES
from qsr_engine.data.writing.processes import usable_cores
from qsr_engine.data.writing.text import HELD_OUT, SUFFIXES

MB = 1_000_000


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command's arguments."""
    command = add_command(
        commands,
        "shards",
        "Make and check WebDataset shards.",
        examples=[
            "qsr shards imagefolder /data/imagenet /data/shards --max-side 512",
            "qsr shards verify /data/shards",
            "qsr shards digits data/digits  # a small set to try everything with",
            "qsr shards text books/ notes.txt data/text --context 512",
        ],
    )
    command.set_defaults(run=run)
    kinds = command.add_subparsers(required=True, metavar="KIND")
    _add_imagefolder(
        kinds.add_parser(
            "imagefolder",
            help="from ImageNet's folders, ROOT/train/CLASS/*.jpg and ROOT/val/..., or ROOT/ILSVRC2012_img_*.tar",
            description="Run the same command again after it was stopped: finished shards are kept.",
        )
    )
    command = kinds.add_parser("cifar10", help="torchvision's CIFAR-10; its test images become the split val")
    command.add_argument("out")
    command.add_argument(
        "--root", help=f"folder with cifar-10-batches-py, downloaded to it where missing (default: {CIFAR10_ROOT})"
    )
    command.set_defaults(shards=lambda args: _say(args.out, write_cifar10(args.out, root=args.root)))
    command = kinds.add_parser("digits", help="scikit-learn's 1,797 handwritten digits")
    command.add_argument("out")
    command.add_argument(
        "--eval",
        type=whole_number,
        default=DIGITS_EVAL,
        metavar="N",
        help="of them for evaluation, the others for training (default: %(default)s)",
    )
    command.set_defaults(shards=lambda args: _say(args.out, write_digits(args.out, eval_samples=args.eval)))
    _add_text(kinds.add_parser("text", help="from files of text: blocks of tokens, for language models"))
    _add_index(kinds.add_parser("index", help="write the index of shards made elsewhere: a folder or a URL"))
    command = kinds.add_parser("shuffle", help="write the samples of a folder of shards again, in a random order")
    command.add_argument("folder")
    command.add_argument("out")
    command.add_argument(
        "--shard-mb", type=whole_number, default=SHARD_BYTES // MB, metavar="N", help="at most N million"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the shuffle (default: 0)")
    _add_processes(command)
    command.set_defaults(shards=_shuffle)
    command = kinds.add_parser("verify", help="read every shard, compare it with index.json and check every sample")
    command.add_argument("folder")
    command.add_argument("--decode", action="store_true", help="decode every image too")
    _add_processes(command)
    command.set_defaults(shards=_verify)


def _add_imagefolder(command: argparse.ArgumentParser) -> None:
    command.add_argument("root")
    command.add_argument("out")
    size = command.add_mutually_exclusive_group()
    size.add_argument(
        "--shard-mb",
        type=whole_number,
        default=SHARD_BYTES // MB,
        metavar="N",
        help="at most N million bytes a shard, counted before images are made smaller (default: %(default)s)",
    )
    size.add_argument("--samples-per-shard", type=whole_number, metavar="N", help="N images a shard instead")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the shuffle (default: 0)")
    command.add_argument("--split", help="name of the split where ROOT holds classes and no splits (default: train)")
    side = command.add_mutually_exclusive_group()
    side.add_argument(
        "--max-side", type=whole_number, metavar="N", help="resize images whose long side has more than N pixels"
    )
    side.add_argument(
        "--short-side", type=whole_number, metavar="N", help="resize images whose short side has more than N pixels"
    )
    command.add_argument(
        "--quality", type=whole_number, metavar="N", help=f"of the JPEG of resized images (default: {QUALITY})"
    )
    _add_processes(command)
    command.set_defaults(shards=_write_imagefolder)


def _add_text(command: argparse.ArgumentParser) -> None:
    command.add_argument("sources", nargs="+", metavar="FILE", help="a file of text, a document; or a folder of them")
    command.add_argument("out")
    command.add_argument(
        "--context", type=whole_number, default=256, metavar="N", help="tokens that a block predicts (default: 256)"
    )
    command.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json (default: every byte is a token)")
    command.add_argument("--end", metavar="TOKEN", help="of --tokenizer, which ends a document (default: a known one)")
    command.add_argument(
        "--held-out", type=float, default=HELD_OUT, metavar="SHARE", help="that becomes the split val (default: 0.05)"
    )
    command.add_argument(
        "--suffix",
        action="append",
        metavar=".TXT",
        help=f"of the files that are read of a folder, several times for several (default: {', '.join(SUFFIXES)})",
    )
    command.add_argument(
        "--shard-mb", type=whole_number, default=SHARD_BYTES // MB, metavar="N", help="at most N million bytes a shard"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the orders (default: 0)")
    _add_processes(command)
    command.set_defaults(shards=_write_text)


def _add_index(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", help="of the shards, or its URL (http, s3, gs, hf, ...)")
    command.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME=PATTERN",
        help="the shards of a split, with braces and *; once for each split (default: info.json, folders or names)",
    )
    command.add_argument("--label", metavar="RULE", help="cls (default), txt, or json:FIELD of a sample's .json")
    command.add_argument("--out", help="folder of the index, where it cannot be beside the shards")
    command.add_argument("--again", action="store_true", help="replace the index that is there, with the same splits")
    _add_processes(command)
    command.set_defaults(shards=_index)


def _add_processes(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--processes",
        type=whole_number,
        default=usable_cores(),
        metavar="N",
        help="how many work at once (default: the cores that this process may use, %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Write or check. SIGTERM ends it as Ctrl-C does: other processes are stopped and temporary files deleted.

    Most files that cannot be read or written are a DataError, which says what to do; what is left is said here.
    """

    def stop(signum: int, _: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return int(args.shards(args))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise CommandError(f"{where}{error.strerror or error}") from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_imagefolder(args: argparse.Namespace) -> int:
    options = {
        name: getattr(args, name)
        for name in ("samples_per_shard", "seed", "split", "max_side", "short_side", "quality", "processes")
    }
    return _say(args.out, write_imagefolder(args.root, args.out, shard_bytes=args.shard_mb * MB, say=_warn, **options))


def _write_text(args: argparse.Namespace) -> int:
    options = {name: getattr(args, name) for name in ("context", "tokenizer", "end", "held_out", "seed", "processes")}
    suffixes = args.suffix or SUFFIXES
    return _say(
        args.out, write_text(args.sources, args.out, suffixes=suffixes, shard_bytes=args.shard_mb * MB, **options)
    )


def _index(args: argparse.Namespace) -> int:
    splits = {}
    for text in args.split:
        name, sign, pattern = text.partition("=")
        if not (name and sign and pattern) or name in splits:
            raise CommandError(f"--split is {text!r}; write NAME=PATTERN, each NAME once, as train='train-*.tar'")
        splits[name] = pattern
    options = {name: getattr(args, name) for name in ("label", "out", "again", "processes")}
    return _say(args.out or args.folder, index_shards(args.folder, splits=splits or None, say=_warn, **options))


def _shuffle(args: argparse.Namespace) -> int:
    options = {"shard_bytes": args.shard_mb * MB, "seed": args.seed, "processes": args.processes}
    return _say(args.out, shuffle_shards(args.folder, args.out, **options))


def _warn(text: str) -> None:
    print(f"qsr: {text}".encode(errors="backslashreplace").decode(), file=sys.stderr, flush=True)


def _verify(args: argparse.Namespace) -> int:
    return _say(args.folder, verify_shards(args.folder, decode=args.decode, processes=args.processes, say=_warn))


def _say(folder: str, index: Index) -> int:
    folder = os.fsencode(folder).decode(errors="backslashreplace")  # a name need not be UTF-8
    for name, split in index.splits.items():
        print(f"{folder}: split {name!r}, {split.samples} samples in {len(split.shards)} shards")
    return 0
