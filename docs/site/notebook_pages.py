"""Pages of the notebooks: scripts in percent format, whose text cells are Markdown and whose other cells are Python."""

import re
from pathlib import Path

_IMAGES = "../../docs/images/"  # from where the scripts lie
_CELL = re.compile(r"^# %%(.*)$", re.M)


def pages(folder: Path) -> dict[str, str]:
    """The page of each notebook in a folder, by its place in the site."""
    scripts = sorted(path for path in folder.glob("*.py") if _CELL.search(path.read_text()))
    return {f"notebooks/{script.stem}.md": page(script.read_text(), script.name) for script in scripts}


def page(script: str, name: str) -> str:
    """A notebook as Markdown; where it comes from is said below its title."""
    _, *parts = _CELL.split(script)
    cells = [_cell(head, body) for head, body in zip(parts[::2], parts[1::2], strict=True)]
    title, _, rest = "\n\n".join(filter(None, cells)).partition("\n")
    source = (
        f"*A notebook, `examples/notebooks/{name}`: run it with "
        f"`.venv/bin/python -m examples.notebooks.{Path(name).stem}`, or cell by cell in an editor that knows `# %%`.*"
    )
    return f"{title}\n\n{source}\n{rest}\n"


def _cell(head: str, body: str) -> str:
    if "[markdown]" in head:
        return "\n".join(re.sub(r"^# ?", "", line) for line in body.strip().splitlines()).replace(_IMAGES, "../images/")
    return f"```python\n{body.strip()}\n```" if body.strip() else ""
