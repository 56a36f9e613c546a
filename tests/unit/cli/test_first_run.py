"""What a new user types before anything trains: help, versions, `qsr init`, `qsr train --dry-run`, `qsr doctor`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

from qsr_engine.checkpoint.manifest import Manifest, sha256
from qsr_engine.cli import doctor
from qsr_engine.cli.main import _parser, main
from qsr_engine.config.recipe_file import load_recipe
from qsr_engine.data import index_shards
from qsr_engine.records.run_folder import open_run_folder
from qsr_engine.training.models import create_model
from tests.support.shard_files import write_tar


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def test_every_example_of_the_help_can_be_typed() -> None:
    parser = _parser()
    for name, command in {"qsr": parser, **commands(parser)}.items():
        lines = [line.split("qsr ", 1)[1] for line in (command.epilog or "").splitlines() if line.startswith("  ")]
        assert lines, name
        assert command.description is not None
        assert re.match(r"[A-Z].*\.$", command.description, re.DOTALL), f"{name}: whole sentences"
        for line in lines:
            parser.parse_args(shlex.split(line, comments=True))


MEMBERS = "--elastic --ranks 2 --set batch.on_other_ranks=per_rank --set qsr.membership=torchft"


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert re.fullmatch(r"qsr_engine \S+, sources \w{12} \(python 3\.\d+, torch \S+, .*\)\n", capsys.readouterr().out)


def test_completion_of_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    there = importlib.util.find_spec("shtab") is not None
    with pytest.raises(SystemExit, match="0" if there else "2"):
        main(["--print-completion", "bash"])
    said = capsys.readouterr()
    if there:
        assert "--dry-run" in said.out
        assert "--local_rank" not in said.out
    else:
        assert 'write `pip install "qsr-engine[completion]"`' in said.err


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("timm/vit_tiny_patch16_224", []),
        ("timm/vit_tiny_patch16_224", ["--image-size", "32"]),  # as its constructor must be told too
        ("torchvision/resnet18", []),
    ],
)
def test_a_recipe_is_written_and_can_be_trained(
    model: str,
    more: list[str],
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would need a moment more to train: what `--dry-run` checks is what a run checks."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)
    words = ["init", "--model", model, "--shards", os.path.relpath(digits), "--epochs", "20", *more]
    assert main(words) == 0
    assert "qsr H>=4 alpha=" in capsys.readouterr().out
    recipe = load_recipe("my.yaml")
    assert recipe.optimizer.type == ("SGD" if "resnet" in model else "AdamW")
    text = Path("my.yaml").read_text()
    assert len([line for line in text.splitlines() if "#" in line]) > 25, "commented"
    assert recipe.data.shards == str(digits), "found from other folders too"
    assert main(words) == 1
    assert "my.yaml: this file is there already; write another name with --out" in capsys.readouterr().err
    assert main(["train", "my.yaml", "--dry-run", "--ranks", "2"]) == 0
    said = capsys.readouterr().out
    assert f"data:   {digits}: 1437 training samples in 12 shards, 360 to evaluate\n" in said
    with torch.device("meta"):
        parameters = sum(p.numel() for p in create_model(recipe.model, 10, recipe.data.image_size).parameters())
    assert f"{model}: {parameters / 1e6:.4g} million parameters\n" in said
    assert "2, 2 workers of 1, engine deepspeed, CPU; 32 samples a rank, 1 times a step, 64 in all\n" in said
    assert "440 steps (20 epochs of 22 steps)" in said
    assert said.endswith("Nothing was started.\n")
    assert os.listdir() == ["my.yaml"]


def test_what_init_refuses(tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "train-000000.tar", {"a.jpg": b"A", "a.cls": b"0"})
    index_shards(tmp_path)
    for model, shards, out, words in (
        ("timm/vit_tinny_patch16_224", digits, "a", "did you mean timm/vit_tiny_patch16_224"),
        ("vit", digits, "a", "model.name: found 'vit'"),
        ("timm/resnet18", tmp_path, "a", "index.json names no classes"),
        ("timm/resnet18", tmp_path / "none", "a", "index is missing"),
        ("timm/resnet18", digits, "none/a", "a: cannot be written: No such file or directory"),
    ):
        assert main(["init", "--model", model, "--shards", str(shards), "--out", str(tmp_path / out)]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--set model.name=timm/vit_tiny_patch16_225", 1, "did you mean timm/vit_tiny_patch16_224"),
        ("--ranks 5", 1, "train_batch_size is 96"),
        ("--set batch_norm={}", 1, "has no batch norm"),
        ("--set qsr.averaging.state=[exp_avg,exp_inf]", 1, "names ['exp_inf'], and AdamW as configured keeps"),
        ("--set qsr.averaging.state=[exp_avg,exp_avg_sq]", 0, "not checked, since there is no GPU here"),
        ("--ranks 2 --set engine=fsdp --set qsr.worker_size=3", 1, "worker_size is 3"),
        ("--set data.shards=none", 1, "index is missing"),
        ("--resume --set seed=7", 1, "seed was 0 and is 7"),
        ("--resume --ranks 2", 0, "(begins anew: there is no whole checkpoint)"),
        ("--ranks 4 --set qsr.worker_size=2 --set engine=fsdp", 0, "4, 2 workers of 2, engine fsdp, CPU; 24 samples"),
        ("", 0, "not checked, since there is no GPU here"),
        ("--elastic", 1, "write --ranks N"),
        (
            "--elastic --ranks 2",
            0,
            "2, 2 workers of 1, engine deepspeed, CPU; 48 samples a rank, 1 times a step, 96 in",
        ),
        (f"{MEMBERS} --set stop_at_step=3", 1, "stop_at_step is given, where members would stop inside a round"),
        (f"{MEMBERS} --set qsr.membership.min_workers=3", 1, "min_workers is 3, and 2 workers start here"),
        (f"{MEMBERS} --set batch.train_batch_size=97", 1, "97"),
        (MEMBERS, 0, "2, 2 workers of 1"),
    ],
)
def test_what_a_dry_run_finds(
    words: str,
    code: int,
    said: str,
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    if "--resume" in words:
        open_run_folder(recipe.parent / "runs" / "small", yaml.safe_dump(load_recipe(recipe).model_dump(mode="json")))
    assert main(["train", str(recipe), "--dry-run", *words.split()]) == code
    captured = capsys.readouterr()
    assert said in (captured.err if code else captured.out)


def test_export_takes_the_folder_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it has no whole checkpoint, the error names the folder that was looked at."""
    folder = tmp_path / "runs" / "my"
    open_run_folder(folder, "seed: 1")
    words = ["export", str(folder), str(tmp_path / "out")]
    assert main(words) == 1
    assert f"{folder / 'checkpoints'}: there is no whole checkpoint here" in capsys.readouterr().err
    (folder / "model.safetensors").write_bytes(b"the end's")
    assert main(words) == 1
    assert f"here; {folder / 'model.safetensors'} is the run's model" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "out")]) == 1
    assert "none is not there; name the folder" in capsys.readouterr().err
    saved = folder / "checkpoints" / "step-00000004"
    saved.mkdir(parents=True)
    (saved / "model.safetensors").write_bytes(b"model")
    files = {"model.safetensors": (5, sha256(saved / "model.safetensors"))}
    Manifest(saved.name, 4, 1.0, {"workers": 2}, {}, [0, 1], files).write(saved)
    for path in (folder, saved.parent, saved):
        assert main(["export", str(path), str(tmp_path / "out")]) == 0
        assert (tmp_path / "out").read_bytes() == b"model"
        assert "the averaged model after step 4" in capsys.readouterr().out


def test_a_launcher_is_not_needed_for_a_dry_run(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert main(["train", str(recipe), "--dry-run"]) == 2
    assert "a launcher has started this one" in capsys.readouterr().err


def test_the_doctor_finds_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First this host as it is; then limits, an extension and a variable are stand-ins for those of a bad one."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "QSR_START_SECONDS"):
        monkeypatch.delenv(name, raising=False)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"  ok       torch {torch.__version__}\n" in said
    for part in ("versions", "gpus", "extensions", "memory", "limits", "network"):
        assert f"{part}:\n  " in said
    monkeypatch.setattr(doctor, "SHARED_MEMORY", 10**18)
    monkeypatch.setattr(doctor, "OPEN_FILES", 10**18)
    monkeypatch.setattr(doctor, "_CC", str(tmp_path / "cc"))
    monkeypatch.setitem(sys.modules, "qsr_engine.data._jpeg", None)
    monkeypatch.setattr(doctor, "addresses", lambda *_: ["127.0.0.1"])
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "warning  gloo is reached at 127.0.0.1: enough for ranks of this host; other hosts cannot reach that" in said
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth99")
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert (
        "warning  _jpeg is not built, so pictures are decoded and augmented by Pillow, which takes longer: there is"
        in said
    )
    assert "start a container with --shm-size=8g" in said
    assert re.search(r"warning  \d+ open files .*write `ulimit -n ", said)
    assert "error    GLOO_SOCKET_IFNAME is 'eth99', and there is no interface 'eth99'" in said
    assert main(["doctor", "--hostfile", str(tmp_path / "none")]) == 1
    assert "give a file with a line a host" in capsys.readouterr().err
