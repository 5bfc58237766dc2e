"""Check the relative links and anchors of the documentation: `python -m tools.links`.

Reads the Markdown files of the repository's root, of `docs/` and of the projects. A link must lead to a file or folder
of the repository, and an anchor into Markdown to a heading, under the name that GitHub gives it, or to an `id`.
Addresses outside the repository are not opened, so the check needs no network.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from common import errors
from common.config import REPOSITORY
from common.errors import UserError

PLACES = ("*.md", "*/README.md", "docs/*.md")
FENCE = re.compile(r"^ *(```|~~~).*?^ *\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(`+)(?!`)(?:(?!\n\n).)*?(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"\]\(\s*<?([^)>\s]+)[^)]*\)|^ *\[[^\]]+\]:\s+(\S+)|(?:href|src|srcset)=\"([^\"]+)\"", re.MULTILINE)
HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)
ID = re.compile(r"<[^>]+\b(?:id|name)=\"([^\"]+)\"")


def links(text: str) -> list[str]:
    """The targets of all links and pictures in Markdown and its HTML that stay in the repository; none from code."""
    found = [next(filter(None, match.groups())) for match in LINK.finditer(CODE.sub("", FENCE.sub("", text)))]
    return [target for target in found if not re.match(r"[a-z][a-z\d+.-]*:|//", target, re.IGNORECASE)]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of the headings, where a repeated name gets -1, -2 …, and the `id`s of the HTML."""
    text, seen = FENCE.sub("", text), []
    for heading in HEADING.findall(text):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)|<[^>]+>", r"\1", heading)
        seen.append(re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"))
    numbered = {f"{name}-{seen[:i].count(name)}" for i, name in enumerate(seen) if name in seen[:i]}
    return {*seen, *numbered, *ID.findall(text)}


def check(repository: Path) -> None:
    """Raise `UserError` if a link or an anchor leads nowhere; the message names all that do."""
    dead = []
    for file in sorted({path for place in PLACES for path in repository.glob(place)}):
        for target in links(file.read_text(encoding="utf-8")):
            place, _, anchor = unquote(target).partition("#")
            path = (file.parent / place).resolve() if place else file
            if not (path.exists() and path.is_relative_to(repository.resolve())):
                dead.append(f"{file.relative_to(repository)}: {target}: no such file")
            elif anchor and path.suffix == ".md" and anchor not in anchors(path.read_text(encoding="utf-8")):
                dead.append(f"{file.relative_to(repository)}: {target}: no such heading")
    if dead:
        raise UserError(f"{len(dead)} dead {'link' if len(dead) == 1 else 'links'}: {'; '.join(dead)}")


if __name__ == "__main__":
    errors.run(lambda: check(REPOSITORY))
