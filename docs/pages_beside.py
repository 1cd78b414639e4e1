"""A hook of mkdocs: what a page links to beside docs/ (README.md of an example, SECURITY.md, a YAML file) comes along.

So the same relative link works in the repository and on the built pages. Knows links alone, nothing of the package.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import relpath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
PLACE = "repository/"


def _target(page: Path, link: str) -> Path | None:
    """The file that a page's link means, a folder being its README; None where it is missing or within docs/."""
    path = (page.parent / link).resolve()
    path = path / "README.md" if path.is_dir() else path
    return path if path.is_file() and path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "docs") else None


def on_files(files: Any, config: Any) -> Any:
    """Adds every file beside docs/ that a page names, and what those name in turn."""
    left = [Path(file.abs_src_path) for file in files if file.src_uri.endswith(".md")]
    while left:
        page = left.pop()
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            path = _target(page, link)
            uri = PLACE + path.relative_to(ROOT).as_posix() if path is not None else None
            if path is None or uri is None or files.get_file_from_path(uri) is not None:
                continue
            files.append(File.generated(config, uri, abs_src_path=str(path)))
            left += [path] if path.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Points a page's links at where those files are on the built pages."""
    here = Path(page.file.abs_src_path)

    def moved(match: re.Match[str]) -> str:
        path = (here.parent / match[1]).resolve()
        path = _target(here, match[1]) or path
        if not path.exists() or not path.is_relative_to(ROOT):
            return match[0]
        inside = path.is_relative_to(ROOT / "docs")
        uri = path.relative_to(ROOT / "docs").as_posix() if inside else PLACE + path.relative_to(ROOT).as_posix()
        return f"]({relpath(uri, Path(page.file.src_uri).parent.as_posix())}"

    return LINK.sub(moved, markdown)
