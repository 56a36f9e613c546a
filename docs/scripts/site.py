"""A hook of mkdocs: the site has the whole repository's pages, so that a link of a page works there as it does here."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHOWN = {".md", ".png", ".svg"}
PLAIN = {".json", ".ipynb", ".yaml", ".py", ".sh", ".toml", ""}  # as they are, where a page links to them


def on_files(files: Any, config: Any) -> Any:
    """Instead of the files of docs/: all that git has or would add, under their paths in the repository."""
    from mkdocs.structure.files import File, Files

    theme = [file for file in files if not file.src_uri.endswith(".md") and file.src_dir != config.docs_dir]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    found = [path for path in listed if Path(path).suffix in SHOWN | PLAIN and (ROOT / path).is_file()]
    return Files([*theme, *(File.generated(config, path, abs_src_path=str(ROOT / path)) for path in found)])
