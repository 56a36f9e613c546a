"""README.md and docs/: what scripts write is as written, every command is one, and every example stands for a run."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from docs.scripts import api, keys, pictures
from qsr_engine.cli.main import _parser
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import validate
from qsr_engine.local_steps.steps import LocalSteps

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = {
    "README.md": README,
    **PAGES,
    **{f"{name}/README.md": (ROOT / name / "README.md").read_text(encoding="utf-8") for name in ("configs", "launch")},
}
# Python blocks of docs/, and the test that runs them, or why none does.
EXAMPLES = {
    "deepspeed.md": "tests/ranks/test_examples.py",
    "fsdp.md": "tests/ranks/test_examples.py",
    "accelerate-lightning-trainer.md": "tests/ranks/test_attach*.py, with each library's own objects",
    "data.md": "tests/ranks/test_loaders.py",
    "language-models.md": "tests/ranks/test_train_text.py",
    "faults.md": "ends the process; tests/launch/test_ends.py stops a run by its signal",
}


def blocks(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


# ------------------------------------------------------------------------------------------ what scripts write


def test_the_tables_of_keys_are_those_of_the_models() -> None:
    assert keys.PAGE.read_text(encoding="utf-8") == keys.page(), "write them anew: python -m docs.scripts.keys"


def test_the_refused_keys_are_those_that_are_refused() -> None:
    assert keys.LIMITS.read_text(encoding="utf-8") == keys.limits(), "write them anew: python -m docs.scripts.keys"


def test_a_key_without_a_meaning_is_named() -> None:
    class Block(BaseModel):
        key: int = 1

    with pytest.raises(ValueError, match=r"Block\.key has no meaning"):
        list(keys.rows(Block))


def test_the_api_page_is_that_of_the_docstrings() -> None:
    assert api.PAGE.read_text(encoding="utf-8") == api.page(), "write it anew: python -m docs.scripts.api"


def test_all_that_the_api_page_lists_has_words() -> None:
    for entry in api.page().split("\n### ")[1:]:
        words = re.sub(r"```text.*?```", "", entry.partition("\n")[2], flags=re.DOTALL).partition("\n## ")[0]
        assert words.strip(), entry


@pytest.mark.parametrize("name", ["timelines", "wallclock", "frontier", "rates"])
def test_the_pictures_are_those_of_the_script(name: str) -> None:
    """The bars are the figures of the committed report."""
    drawn = getattr(pictures, name)()
    assert (pictures.PICTURES / f"{name}.svg").read_text(encoding="utf-8") == drawn, "python -m docs.scripts.pictures"


# ------------------------------------------------------------------------------------------ commands


def commands(text: str) -> Iterator[tuple[str, bool]]:
    """What follows `qsr`, and whether it is a line of a block, which stands for itself; the others are in sentences."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [(line.strip(), True) for line in joined.splitlines() if re.match(r" {4}\S", line)]
    spans = [(span, False) for span in re.findall(r"`([^`]+)`", joined.replace("\n", " "))]
    for line, whole in lines + spans:
        found = re.match(r"(?:sudo |env |\w+=\S+ )*(?:qsr|deepspeed .*--module qsr_engine) +(\w.*)", line)
        if found and not re.search(r"\.\.\.|\[", found[1]):
            yield found[1], whole


def test_every_qsr_line_is_one_that_the_command_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """Its arguments are; what it then does, tests/ranks and tests/launch run."""
    count, parser = 0, _parser()
    for name, text in TEXTS.items():
        for command, whole in commands(text):
            try:
                args = parser.parse_args(shlex.split(command, comments=True))
            except SystemExit:
                said = capsys.readouterr().err
                if not whole and re.search(r"are required|expected one argument", said):
                    continue  # a sentence names the command or its option
                pytest.fail(f"{name}: qsr {command}\n{said}")
            recipe = getattr(args, "recipe", "")
            assert not recipe.startswith("configs/") or (ROOT / recipe).exists(), f"{name}: {command}"
            count += 1
    assert count >= 30, "they are found"


# ------------------------------------------------------------------------------------------ examples


def test_every_python_block_is_run_or_says_why_not() -> None:
    with_examples = {name for name, text in PAGES.items() if blocks(text)}
    assert with_examples == set(EXAMPLES)
    for name in with_examples:
        for block in blocks(PAGES[name]):
            compile(block, name, "exec")


def statements(code: str) -> set[str]:
    return {ast.dump(node) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.stmt | ast.expr)}


def test_the_readmes_python_is_that_of_the_pages() -> None:
    run = set[str]().union(*(statements(block) for name in EXAMPLES for block in blocks(PAGES[name])))
    first, second = blocks(README)
    assert statements(first) <= run
    assert statements(second) <= run


def test_the_readmes_diff_is_five_lines_that_give_a_configuration() -> None:
    (diff,) = blocks(README, "diff")
    added = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    assert len(added) <= 5
    run = statements(blocks(PAGES["deepspeed.md"])[0])
    assert statements(added[-2]) <= run
    assert f"\n{added[-1]}" in PAGES["deepspeed.md"]
    (config,) = [line.partition(" = ")[2] for line in added if line.startswith('config["qsr"]')]
    assert validate(QSRConfig, ast.literal_eval(config), where="README.md").total_steps == 400


def test_what_pages_say_of_local_steps_is_there() -> None:
    for name, text in TEXTS.items():
        for attribute in re.findall(r"local_steps\.(\w+)(?!\w*\.py)\b", text):
            known = hasattr(LocalSteps, attribute) or attribute in ("watchdog", "rounds", "boundary")
            assert known or f"local_steps/{attribute}" in text, f"{name}: local_steps.{attribute}"


# ------------------------------------------------------------------------------------------ the front door


def test_the_readme_is_short_and_says_first_what_was_not_tried() -> None:
    assert len(README.splitlines()) <= 150
    assert "Not run on a GPU" in "".join(README.splitlines()[:15])


def test_all_say_the_same_version_of_torch() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tested,) = re.findall(r'"torch>=.*?; (\d\.\d+) is what is tested', project)
    assert f"torch {tested}" in README.partition("## Results")[0]
    said = {found for text in TEXTS.values() for found in re.findall(r"\btorch (\d\.\d+)", text)}
    assert said == {tested}
