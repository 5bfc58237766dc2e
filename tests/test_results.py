"""The tables of the README files: made from the records, the same each time, and out of date if a record changed."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY, refused

from tools import figures, results

TEXT = """# A project

| project | measured |
|---|---|
| DDP | <!-- results: pytorch-ddp headline --><!-- end results --> |

<!-- results: pytorch-ddp speed -->
old
<!-- end results -->
between
<!-- results: pytorch-ddp memory --><!-- end results -->
<!-- results: pytorch-ddp loss --><!-- end results -->
The end.
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with our records, a main README without blocks and a project's with all of them."""
    shutil.copytree(REPOSITORY / "results", tmp_path / "results")
    (tmp_path / "README.md").write_text("# Main\n")
    (tmp_path / "pytorch-ddp").mkdir()
    (tmp_path / "pytorch-ddp" / "README.md").write_text(TEXT)
    return tmp_path


def change(path: Path, **summary) -> None:
    record = json.loads(path.read_text())
    record["summary"] |= summary
    path.write_text(json.dumps(record))


def cells(text: str, first: str) -> list[str]:
    """The cells of the table row whose first cell is `first`."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return next(row for row in rows if row[0] == first)


def test_blocks_are_rewritten_and_the_rest_is_kept(repository):
    readme = repository / "pytorch-ddp" / "README.md"
    change(repository / "results/pytorch-ddp/speed-1gpu.json", tokens_per_second=100_000, flops_per_token=3e9, mfu=0.3)
    change(repository / "results/pytorch-ddp/speed-2gpu.json", tokens_per_second=150_000, flops_per_token=3e9)
    results.update(repository, check=False)
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith("# A project\n") and "\nbetween\n" in text and text.endswith("\nThe end.\n")
    assert cells(text, "one GPU")[1:6] == ["1", "256/64", "100,000", "100,000", "300"]
    assert cells(text, "one GPU")[6:8] == [f"{300 / 787.7:.1%}", "30.0%"]
    assert cells(text, "two GPUs, NVLink")[3:6] == ["150,000", "75,000", "225"]
    assert cells(text, "two GPUs, NVLink")[-1] == "1.50×"
    assert cells(text, "DDP")[1].removeprefix("<!-- results: pytorch-ddp headline -->").startswith("1.50× on 2 NVIDIA")
    assert (repository / "README.md").read_text() == "# Main\n"


def test_a_run_that_is_not_compiled_has_no_speed_up_over_one_that_is(repository):
    results.update(repository, check=False)
    text = (repository / "pytorch-ddp" / "README.md").read_text()
    assert cells(text, "two GPUs, NVLink, not compiled, micro-batch 32")[-1] == "–"


def test_runs_out_of_memory_stay_in_the_table_and_the_limit_says_nothing_of_speed(repository):
    results.update(repository, check=False)
    text = (repository / "pytorch-ddp" / "README.md").read_text()
    assert cells(text, "micro-batch 4")[1] == "fits"
    assert cells(text, "micro-batch 16")[1:] == ["CUDA out of memory", "–", "–", "–"]
    memory_block = text.partition("<!-- results: pytorch-ddp memory -->")[2].partition("<!-- end results -->")[0]
    assert "14.7 GiB" in memory_block and "tokens/s" not in memory_block


def test_captions_say_where_and_when(repository):
    results.update(repository, check=False)
    text = (repository / "pytorch-ddp" / "README.md").read_text()
    record = json.loads((repository / "results/pytorch-ddp/speed-2gpu.json").read_text())
    for part in ("2 × NVIDIA H200", record["date"], f"torch {record['environment']['versions']['torch']}",
                 record["weights"], record["text"]):  # fmt: skip
        assert part in text


def test_rewriting_twice_changes_nothing(repository):
    results.update(repository, check=False)
    first = (repository / "pytorch-ddp" / "README.md").read_text()
    results.update(repository, check=False)
    assert (repository / "pytorch-ddp" / "README.md").read_text() == first
    results.update(repository, check=True)


def test_check_names_the_stale_file_and_changes_nothing(repository):
    results.update(repository, check=False)
    change(repository / "results/pytorch-ddp/speed-2gpu.json", tokens_per_second=1.0)
    before = (repository / "pytorch-ddp" / "README.md").read_text()
    with refused("pytorch-ddp/README.md", "make format"):
        results.update(repository, check=True)
    assert (repository / "pytorch-ddp" / "README.md").read_text() == before


def test_a_missing_record_is_named(repository):
    (repository / "results/pytorch-ddp/memory-micro-8.json").unlink()
    with refused("results/pytorch-ddp/memory-micro-8.json", "bench/"):
        results.update(repository, check=False)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("<!-- results: pytorch-ddp sped -->\n<!-- end results -->", "pytorch-ddp speed"),
        ("<!-- results: pytorch-ddp speed -->\nnever closed", "end results"),
        (f"<!-- results: pytorch-ddp speed -->\nnever closed\n{TEXT}", "end results"),
    ],
)
def test_a_broken_block_is_refused(repository, text, part):
    (repository / "README.md").write_text(text)
    with refused(part):
        results.update(repository, check=False)
    assert (repository / "README.md").read_text() == text


def test_the_tables_of_this_repository_are_up_to_date():
    results.update(REPOSITORY, check=True)


def test_code_is_copied_from_the_file_and_checked(repository):
    readme = repository / "README.md"
    (repository / "pytorch-ddp/train.py").write_text(
        'def step(x):\n    """What it does."""\n    first = x + 1\n    if first:\n        last = 2\n    return last\n'
    )
    block = "<!-- code: pytorch-ddp/train.py step{} -->{}<!-- end code -->"
    readme.write_text(block.format("", "old") + "\n" + block.format(": if first … last = 2", ""))
    results.update(repository, check=False)
    assert readme.read_text().splitlines() == [
        "<!-- code: pytorch-ddp/train.py step -->", "```python", "def step(x):", "    first = x + 1", "    if first:",
        "        last = 2", "    return last", "```", "<!-- end code -->",
        "<!-- code: pytorch-ddp/train.py step: if first … last = 2 -->", "```python", "if first:", "    last = 2",
        "```", "<!-- end code -->",
    ]  # fmt: skip
    results.update(repository, check=True)
    (repository / "pytorch-ddp/train.py").write_text("def step(x):\n    return x\n")
    with refused("no such lines"):
        results.update(repository, check=True)
    readme.write_text(block.format("", "old"))
    with refused("out of date: README.md"):
        results.update(repository, check=True)
    readme.write_text(block.format("s", ""))
    with refused("no steps in pytorch-ddp/train.py"):
        results.update(repository, check=True)


def test_a_section_of_a_yaml_file_is_copied_with_its_comments(repository):
    readme, file = repository / "README.md", repository / "pytorch-ddp/config.yaml"
    file.write_text(
        "# The whole file.\nmodel: {name: a}\n\n# ── Training ──\ntrain: # what all share\n  # why\n  lr: 1\n\n"
        "  groups:\n  - {decay: 0} # vectors\n\n# ── Evaluation ──\neval:\n  every: 1\n"
    )
    block = "<!-- code: pytorch-ddp/config.yaml {} -->{}<!-- end code -->"
    readme.write_text("\n".join(block.format(what, "old") for what in ("train", "model", "eval", "train: lr … groups")))
    results.update(repository, check=False)
    assert readme.read_text().splitlines() == [
        "<!-- code: pytorch-ddp/config.yaml train -->", "```yaml", "train: # what all share", "  # why", "  lr: 1", "",
        "  groups:", "  - {decay: 0} # vectors", "```", "<!-- end code -->",
        "<!-- code: pytorch-ddp/config.yaml model -->", "```yaml", "model: {name: a}", "```", "<!-- end code -->",
        "<!-- code: pytorch-ddp/config.yaml eval -->", "```yaml", "eval:", "  every: 1", "```", "<!-- end code -->",
        "<!-- code: pytorch-ddp/config.yaml train: lr … groups -->", "```yaml", "lr: 1", "", "groups:", "```",
        "<!-- end code -->",
    ]  # fmt: skip
    results.update(repository, check=True)
    file.write_text(file.read_text().replace("lr: 1", "lr: 2"))
    with refused("out of date: README.md"):
        results.update(repository, check=True)
    readme.write_text(block.format("lr", ""))
    with refused("no lr in pytorch-ddp/config.yaml"):
        results.update(repository, check=True)


def test_plots_are_made_from_the_records_the_same_each_time(repository, monkeypatch):
    figures.update(repository, check=False)
    figures.update(repository, check=True)
    monkeypatch.setattr(figures, "FIGURES", {"pytorch-ddp-speed": figures.ddp_speed})  # one is enough for the rest
    (repository / "docs/figures/pytorch-ddp-speed.svg").rename(repository / "made.svg")
    with refused("docs/figures/pytorch-ddp-speed.svg"):
        figures.update(repository, check=True)
    (repository / "made.svg").rename(repository / "docs/figures/pytorch-ddp-speed.svg")
    assert (repository / "docs/figures/pytorch-ddp-speed.svg").read_text().count("1.96×") == 1
    change(repository / "results/pytorch-ddp/speed-2gpu.json", tokens_per_second=1)
    with refused("out of date"):
        figures.update(repository, check=True)
