"""The README's Python runs, and what it and the docs name exists."""

import re
import shlex
from pathlib import Path

import pytest

from drt.cli.main import parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(code, {})
    assert "torch.Size([1, 50])" in capsys.readouterr().out
    assert (tmp_path / "runs" / "memory" / "state.safetensors").is_file()


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_linked_files_exist(path: str) -> None:
    assert (ROOT / path).exists(), path


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def commands() -> list[str]:
    """The lines of code blocks that call drt, as they stand in the README and the docs."""
    pages = [README, *(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))]
    blocks = [block for page in pages for block in re.findall(r"```\n(.*?)```", page, re.DOTALL)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    # A synopsis is no command.
    return sorted({line for line in lines if line.startswith("drt ") and "..." not in line})


@pytest.mark.parametrize("line", commands())
def test_commands_can_be_given(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    assert parser().parse_args(words).command == words[0]
