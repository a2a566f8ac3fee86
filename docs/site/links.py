"""Links that leave docs/: which files of the repository the site needs, and where it has them."""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT_PAGES = {
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
}
_LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")
_NAMED = re.compile(r"(?<=\[)[\w-]+\.md(?=\]\(([^)#:\s]+\.md)[)#])")  # links that show the name of a page's file


def uri_of(path: Path | PurePosixPath) -> str:
    """Where the site has a file or folder of the repository, both named from their roots.

    Folders, which get a list of their files, are told by their having no suffix.
    """
    name = path.as_posix()
    if name == "README.md":
        return "index.md"
    if name in ROOT_PAGES:
        return ROOT_PAGES[name]
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    if name.startswith("examples/notebooks/") and name.endswith(".py") and "_" in path.stem:
        return f"notebooks/{path.stem}.md"
    return f"files/{name}" if path.suffix else f"files/{name}/index.md"


def origin_of(uri: str) -> str:
    """The file of the repository that a page was made of, or stands in for."""
    return {uri: name for name, uri in ROOT_PAGES.items()}.get(uri, f"docs/{uri}")


def outside(root: Path) -> list[Path]:
    """What pages link to and docs/ does not hold, but for pages; of folders, also their files."""
    found: set[Path] = set()
    pages = [*(root / "docs").rglob("*.md"), *(root / name for name in ROOT_PAGES)]
    for page in pages:
        for target in _targets(page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve()
            is_ours = path.is_relative_to(root) and not path.is_relative_to(root / "docs")
            if is_ours and (path.is_dir() or (path.exists() and not uri_of(path.relative_to(root)).endswith(".md"))):
                found |= {path, *(_files(path) if path.is_dir() else ())}
    return sorted(found)


def listing(folder: Path, root: Path) -> str:
    """The page that stands in for a folder: links to its files."""
    rows = [f"- [{file.relative_to(folder)}]({file.relative_to(folder)})" for file in _files(folder)]
    return f"# {folder.relative_to(root)}\n\n" + "\n".join(rows) + "\n"


def rewritten(markdown: str, uri: str, root: Path) -> str:
    """A page's text with each link to a file of the repository led to where the site has that file, and links that show
    a page's file name showing its title."""
    origin = origin_of(uri)
    if origin.startswith("docs/files/"):
        return markdown

    def target(match: re.Match[str]) -> PurePosixPath:
        return PurePosixPath(posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[1])))

    def titled(match: re.Match[str]) -> str:
        file = root / target(match)
        title = re.search(r"^# (.+)$", file.read_text(encoding="utf-8"), re.M) if file.is_file() else None
        return title[1] if title else match[0]

    def change(match: re.Match[str]) -> str:
        path = target(match)
        stays = origin.startswith("docs/") and path.parts[0] == "docs"
        if stays or not (root / path).exists():
            return match[1]  # a broken one is reported by mkdocs
        return posixpath.relpath(uri_of(path), posixpath.dirname(uri) or ".")

    return _LINK.sub(change, _NAMED.sub(titled, markdown))


def _targets(markdown: str) -> Iterator[str]:
    return (match[1] for match in _LINK.finditer(markdown))


def _files(folder: Path) -> list[Path]:
    """The files below a folder, but for hidden ones and what lies in hidden folders, wherever the folder itself is."""
    hidden = ("__pycache__", ".")
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(p for p in found if not any(part.startswith(hidden) for part in p.relative_to(folder).parts))
