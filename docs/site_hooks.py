"""
What the site needs beyond the pages as they are on disk: files of other folders as pages, and links that lead there.

Pages link to each other and to files of the repository as a reader of the repository follows them. In the site a link to a page becomes
one to that page, and a link to any other file one into the repository where its address is known, else plain text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parents[1]
# Files of other folders, by the page that they are
PAGES = {
    "about.md": "README.md",
    "benchmarks.md": "benchmarks/README.md",
    "catalogue.md": "trl_ext/losses/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "examples.md": "examples/README.md",
    "recipes.md": "examples/rounds/README.md",
}
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    source = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    pages = {path: name for name, path in PAGES.items()}

    def lead(match: re.Match) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).exists():
            return match[0]  # the build says so
        if path in pages:
            return f"[{text}]({pages[path]}{anchor})"
        if path.startswith("docs/"):
            return f"[{text}]({path.removeprefix('docs/')}{anchor})"
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        return text

    # Code is left as it is
    parts = re.split(r"(```.*?```)", markdown, flags=re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(lead, part) for part in parts)
