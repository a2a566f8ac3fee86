"""What mkdocs.yml runs while it builds the site: pages that are made from the code, and links that leave docs/.

The pages of docs/ are written to be read in the repository, too, so that their links lead to its files: CHANGELOG.md,
examples, results. In the site, Markdown at the root becomes a page, and any other linked file lies below files/.
"""

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "src"), str(Path(__file__).parent)]

# ruff: noqa: E402  (they lie beside this file)
import command_pages
import links
import notebook_pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the commands, of the notebooks, and those that lie at the repository's root."""
    for uri, text in {**command_pages.pages(), **notebook_pages.pages(ROOT / "examples/notebooks")}.items():
        files.append(File.generated(config, uri, content=text))
    for name, uri in links.ROOT_PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / name).read_text()))
    for path in links.outside(ROOT):
        uri = links.uri_of(path.relative_to(ROOT))
        if path.is_dir():
            files.append(File.generated(config, uri, content=links.listing(path, ROOT)))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links to where the site has them."""
    return links.rewritten(markdown, page.file.src_uri, ROOT)
