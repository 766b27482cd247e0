"""A hook of mkdocs: links to files of the repository outside docs/ become the file's name.

The documents are read in the repository too, where such links work.
"""

import re
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?!guides/|reference/)([^)#\s]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the links that lead out of docs/."""
    depth = page.file.src_uri.count("/") + 1

    def replaced(link: re.Match[str]) -> str:
        if link[0].count("../") < depth:
            return link[0]
        text, path = link[1], link[2]
        return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"

    return LINK.sub(replaced, markdown)
