"""The README's Python runs, and what it and the docs name exists."""

import re
import shlex
from pathlib import Path

import pytest

from drt.cli.main import parser

ROOT = Path(__file__).parents[1]
PAGES = {
    page.name: page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES["README.md"]
LINKS = [
    (name, path)
    for name, page in PAGES.items()
    for path in re.findall(r"\]\((?!http)([^)#]+)", page)
]


def test_the_ten_lines_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(code, {})
    assert "torch.Size([1, 50])" in capsys.readouterr().out
    assert (tmp_path / "runs" / "memory" / "state.safetensors").is_file()


@pytest.mark.parametrize(("page", "path"), LINKS)
def test_linked_files_exist(page: str, path: str) -> None:
    folder = ROOT if page == "README.md" else ROOT / "docs"
    assert (folder / path).exists(), path


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def commands(page: str) -> list[str]:
    """The lines of code blocks that call drt, as they stand on a page."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    # A synopsis is no command.
    return [line for line in lines if line.startswith("drt ") and "..." not in line]


def test_commands_are_found() -> None:
    counts = {name: len(commands(page)) for name, page in PAGES.items()}
    named = {name: len(re.findall("^drt ", page, re.MULTILINE)) for name, page in PAGES.items()}
    synopses = {"evaluation.md": 1}
    assert counts == {name: count - synopses.get(name, 0) for name, count in named.items()}
    assert counts["README.md"] > 10


@pytest.mark.parametrize(
    "line", sorted({line for page in PAGES.values() for line in commands(page)})
)
def test_commands_can_be_given(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    assert parser().parse_args(words).command == words[0]
