"""A hook of MkDocs: links from a page to files outside docs/ lead to the repository, where those files can be read.

On GitHub such a link works as it stands (`../apprentice/request/router.py`); the site has docs/ only. Without
`repo_url` in mkdocs.yml the link's text stays and the link goes.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The page with its links rewritten. MkDocs calls it for every page before it is rendered."""
    return rewritten(markdown, page.file.src_uri, config["repo_url"] or "")


def rewritten(markdown: str, page: str, repository: str) -> str:
    """``page`` is the page's path below docs/; ``repository`` the repository's address, "" if it is not known."""

    def lead(link: re.Match[str]) -> str:
        words, target = link.groups()
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
        if path.startswith("docs/"):
            return link.group()
        return f"[{words}]({repository.rstrip('/')}/blob/HEAD/{path})" if repository else words

    return _LINK.sub(lead, markdown)
