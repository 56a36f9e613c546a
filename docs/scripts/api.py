"""docs/api.md, from the docstrings of what a script of one's own uses.

    python -m docs.scripts.api      # in the repository's root, after a change of a docstring or an argument

It reads the sources and imports nothing of them.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "qsr_engine"
PAGE = Path(__file__).parents[1] / "api.md"
HEAD = """# API

<!-- `python -m docs.scripts.api` writes this page from the docstrings. -->

What a script uses beside DeepSpeed's or torch's own. `qsr_engine.NAME` is imported when it is first used.
"""
# Of the engine, and of where it stands.
ENGINE = """averaged end_round save_checkpoint load_checkpoint averaged_state_dict local_steps seconds_averaging
    measure_next_step measured while_model_is_read evaluate_the_average"""
LOCAL_STEPS = """step round period mode learning_rate finished on_boundary averagings averagings_percent bytes_sent
    bytes_percent relative_distance stopping request_stop finish wait"""
# Title -> (file, name, or Class.method, and what it is called here).
PARTS = {
    "Functions": [
        ("engines/deepspeed/initialize.py", "initialize", "qsr_engine.initialize"),
        ("engines/fsdp/initialize.py", "initialize_fsdp", "qsr_engine.initialize_fsdp"),
        ("engines/attach.py", "attach", "qsr_engine.attach"),
        ("engines/deepspeed/initialize.py", "zero_init", "qsr_engine.zero_init"),
        ("engines/muon.py", "MuonWithAdamW", "qsr_engine.MuonWithAdamW"),
    ],
    "The engine": [("engines/surface.py", f"Surface.{name}", f"engine.{name}") for name in ENGINE.split()],
    "Where a run is: `engine.local_steps`": [
        ("local_steps/steps.py", f"LocalSteps.{name}", name) for name in LOCAL_STEPS.split()
    ],
    "Errors": [
        ("config/strict.py", "ConfigError", "qsr_engine.ConfigError"),
        ("membership/hosts.py", "HostError", "qsr_engine.HostError"),
        ("membership/facts.py", "AgreementError", "AgreementError"),
        ("local_steps/header.py", "BoundaryError", "BoundaryError"),
        ("averaging/errors.py", "CollectiveError", "CollectiveError"),
        ("membership/watchdog.py", "LostRankError", "LostRankError"),
        ("checkpoint/manifest.py", "CheckpointError", "CheckpointError"),
    ],
}


def page() -> str:
    """The whole page."""
    text = HEAD
    for title, entries in PARTS.items():
        text += f"\n## {title}\n" + "".join(_entry(*entry) for entry in entries)
    return text


def _entry(file: str, path: str, shown: str) -> str:
    node: ast.AST = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    for name in path.split("."):
        node = next(item for item in getattr(node, "body", ()) if getattr(item, "name", None) == name)
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    doc = _markdown(inspect.cleandoc(ast.get_docstring(node) or ""))
    return f"\n### `{shown}`\n\n{_signature(node, shown)}{doc}"


def _signature(node: ast.FunctionDef | ast.ClassDef, shown: str) -> str:
    decorators = [ast.unparse(one) for one in getattr(node, "decorator_list", ())]
    if isinstance(node, ast.ClassDef) or "property" in decorators:
        return ""
    arguments = node.args
    arguments.args = [one for one in arguments.args if one.arg != "self"]
    listed = ast.unparse(arguments)
    if len(listed) > 90:
        listed = "\n    " + re.sub(r", (?=\*{0,2}\w+(:|=|,|$))", ",\n    ", listed) + ",\n"
    given = ast.unparse(node.returns) if node.returns else "None"
    within = re.fullmatch(r"Iterator\[(.*)\]", given)
    given = f"AbstractContextManager[{within[1]}]" if within and "contextmanager" in decorators[0] else given
    return f"```text\n{shown}({listed}) -> {given}\n```\n\n"


def _markdown(doc: str) -> str:
    """A docstring whose sections (Args:, Returns:, Raises:) become lists."""
    before, *sections = re.split(r"^(Args|Returns|Raises):\n", doc, flags=re.MULTILINE)
    text = before.strip() + "\n"
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        lines = re.sub(r"\n {8,}", " ", inspect.cleandoc("\n" + body.rstrip()).replace("\n    ", " ")).splitlines()
        named = [re.sub(r"^([\w., ]+): ", r"`\1`: ", line) if title != "Returns" else line for line in lines]
        text += f"\n**{title}**\n\n" + "".join(f"- {line}\n" for line in named if line)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
