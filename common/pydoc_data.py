"""The embedded dataset: the standard library's own docstrings as questions and answers.

Every Python carries it, so it needs no network and no licence beyond Python's own. The modules are read, never imported
(some do things when imported), in a fixed order, so one Python version always gives the same rows.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import inspect
import json
import sys
import sysconfig
from pathlib import Path

from common.errors import UserError
from common.files import cache_folder, write_json

MOST_CHARACTERS = 600  # of an answer: a few paragraphs
SKIPPED = {"__phello__", "antigravity", "idlelib", "lib2to3", "test", "this", "turtledemo"}


@functools.cache
def rows() -> list[dict]:
    """One row per documented module, class, function or method: `prompt`, `response`, both as `text` and as `messages`.

    About 4,400 rows. To parse the library takes a second, so they are kept in the cache, below HF_HOME, until a source
    file changes. Raises `UserError` if Python has no readable standard library sources.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [
        (module, path)
        for module in sorted(sys.stdlib_module_names - SKIPPED)
        for path in (library / f"{module}.py", library / module / "__init__.py")
        if path.is_file()
    ]
    files = [Path(__file__), *(path for _, path in sources)]
    state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(json.dumps([sys.version, state]).encode()).hexdigest()[:16]
    cached = cache_folder() / f"pydoc-{digest}.json"
    try:
        found = json.loads(cached.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
        for module, path in sources:
            for prompt, response in _questions(module, path):
                found.setdefault(prompt, response)  # a redefinition (by platform) is dropped
        with contextlib.suppress(OSError):  # nothing is lost if it cannot be kept
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_json(cached, found)
    if len(found) < 1000:
        raise UserError(
            f"data.name=pydoc: only {len(found)} docstrings in {library}: is this Python without its sources?"
        )
    return [
        {
            "prompt": prompt,
            "response": response,
            "text": f"{prompt}\n{response}",
            "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}],
        }
        for prompt, response in found.items()
    ]


def _questions(module: str, path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if answer := _answer(tree):
        yield f"What is the Python module {module} for?", answer
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and (answer := _answer(node)):
            yield f"What does {module}.{node.name}({ast.unparse(node.args)}) do?", answer
        if isinstance(node, ast.ClassDef):
            if answer := _answer(node):
                yield f"What is {module}.{node.name}?", answer
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and (answer := _answer(method)):
                    yield f"What does {module}.{node.name}.{method.name}({ast.unparse(method.args)}) do?", answer


def _answer(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    """The docstring's first paragraphs, up to MOST_CHARACTERS; empty if there is none worth asking for."""
    text = inspect.cleandoc(ast.get_docstring(node) or "")
    while len(text) > MOST_CHARACTERS and "\n\n" in text:
        text = text[: text.rindex("\n\n")]
    return text[:MOST_CHARACTERS].strip() if len(text) >= 20 else ""
