"""What mkdocs asks while it builds the site: pages from files beside docs/, and pages made from the package itself."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "https://github.com/imagewright/imagewright/blob/main/"
ABOVE = {
    "index.md": "README.md",
    "reporting.md": "SECURITY.md",
    "contributing.md": "CONTRIBUTING.md",
    "changes.md": "CHANGELOG.md",
}
"""Pages of the site that lie above docs/ in the repository."""
LINK = re.compile(r"(?<=\]\()(?!https?://|#|mailto:)([^)\s#]*)([^)\s]*)(?=\))")


def on_config(config: Any) -> Any:
    """A page that the table of contents does not name is put under its families."""
    docs = Path(config.docs_dir)
    left = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} - {*_named(config.nav)}
    (families,) = (each["Families"] for each in config.nav if "Families" in each)
    families += sorted(name for name in left if not name.startswith(("claims/", "site/")))
    return config


def _named(nav: Any) -> Iterator[str]:
    for each in nav.values() if isinstance(nav, dict) else nav:
        if isinstance(each, str):
            yield each
        else:
            yield from _named(each)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not files of docs/."""
    sys.path[:0] = [str(ROOT / "src"), str(Path(__file__).parent)]
    import commands
    import library

    made = {name: (ROOT / source).read_text() for name, source in ABOVE.items()}
    made |= {"commands.md": commands.page(), **library.pages()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as the repository has them, as the site has them: files that are no page lead to the repository."""
    source = ABOVE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return LINK.sub(lambda found: _led(found, source, page.file.src_uri, files), markdown)


def _led(found: re.Match[str], source: str, page: str, files: Files) -> str:
    target, anchor = found[1], found[2]
    folder = (ROOT / source).parent
    there = (folder / target).resolve()
    if not there.exists() or not there.is_relative_to(ROOT):
        return found[0]  # mkdocs says that it leads nowhere
    path = there.relative_to(ROOT).as_posix()
    above = {file: name for name, file in ABOVE.items()}
    name = above.get(path, path.removeprefix("docs/"))
    if not (path in above or path.startswith("docs/")) or files.get_file_from_path(name) is None:
        return f"{SOURCE}{path}{anchor}"
    return "../" * page.count("/") + name + anchor
