"""What README.md tells people to type works."""

import re
import shlex
from pathlib import Path

import pytest

from expertflow import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_example_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [example] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(example, {})
    out = capsys.readouterr().out
    assert out.startswith("ROMEO:")
    assert re.search(r"hit rate \d+%, stall \d+ us/token", out)


COMMANDS = re.findall(r"^ {4}expertflow (.*)$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(shlex.split(command)) == 0


def test_there_are_commands() -> None:
    assert {command.split()[0] for command in COMMANDS} >= {"generate", "info"}
