"""The check of the documentation's links: what leads nowhere is found, and nothing else."""

import pytest
from conftest import refused

from tools import links

README = """# Main

## What `train.py` does: DDP's 2×T4, measured
## Twice
## Twice
<a id="by-hand"></a>

[file](docs/page.md) [folder](docs) ![plot](docs/a%20plot.svg "its title")
[![badge](docs/a%20plot.svg)](docs/page.md#a-page)
[here](#what-trainpy-does-ddps-2t4-measured) [second](#twice-1) [id](#by-hand) <img src="docs/a%20plot.svg" width="640">
[elsewhere](https://example.org/gone) [line](docs/code.py#L3) [mail](mailto:a@example.org)

`[code](gone.md)`

```text
# Not a heading
[code](gone.md)
```

[defined]: docs/page.md
"""


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs/page.md").write_text("# A page\n\n[back](../README.md#main)\n")
    (tmp_path / "docs/code.py").touch()
    (tmp_path / "docs/a plot.svg").touch()
    links.check(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a](docs/gone.md)", "README.md: docs/gone.md: no such file"),
        ("![a](docs/gone.svg)", "README.md: docs/gone.svg: no such file"),
        ('<img src="docs/gone.svg">', "README.md: docs/gone.svg: no such file"),
        ("[a]: gone.md", "README.md: gone.md: no such file"),
        ("[a](../outside.md)", "README.md: ../outside.md: no such file"),
        ("[a](#gone)", "README.md: #gone: no such heading"),
        ("[a](#not-a-heading)", "README.md: #not-a-heading: no such heading"),
        ("[a](#twice-2)", "README.md: #twice-2: no such heading"),
        ("[a](docs/page.md#gone)", "README.md: docs/page.md#gone: no such heading"),
    ],
)
def test_a_dead_link_or_anchor_is_named(repository, text, said):
    (repository.parent / "outside.md").touch()
    (repository / "README.md").write_text(f"{README}\n{text}\n")
    with refused("1 dead link", said):
        links.check(repository)


def test_pages_in_docs_and_of_projects_are_read(repository):
    (repository / "project").mkdir()
    (repository / "project/README.md").write_text("[a](../docs/gone.md)")
    (repository / "docs/page.md").write_text("[a](gone.svg)")
    with refused("3 dead links", "docs/page.md: gone.svg", "project/README.md: ../docs/gone.md", "docs/page.md#a-page"):
        links.check(repository)
