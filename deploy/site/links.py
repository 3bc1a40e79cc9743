"""Links of the documentation to files outside its folder: the site has none of these, and shows what they are called.
A link to what is not there is an error of the build."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    where = (ROOT / "docs" / page.file.src_uri).parent

    def shown(link: re.Match) -> str:
        words, target = link.groups()
        path = (where / target).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return link[0]
        if not path.exists():
            raise FileNotFoundError(f"docs/{page.file.src_uri} links to {target}, which is not there")
        return words if words.startswith("`") else f"{words} (`{path.relative_to(ROOT)}`)"

    return OUTSIDE.sub(shown, markdown)
