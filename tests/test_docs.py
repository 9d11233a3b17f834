"""Pages of the documentation link to what is there, name files that are there, and show code and commands that work."""

from __future__ import annotations

import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.doc_blocks import blocks_of, command_lines, is_placeholder, run_page

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCE = ROOT / "src" / "lorank"
ROOMS = [path.name for path in SOURCE.iterdir() if path.is_dir()]
FOLDERS = "|".join(["src/lorank", "tests", "benchmarks", "examples", "docs", *sorted(ROOMS)])
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(rf"`((?:{FOLDERS})/[\w./]+)`")
PYTHON = re.compile(r"^    (import |from \w+ import |lorank\.\w+\(|\w+ = lorank\.)", re.MULTILINE)
WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks_of(page))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


@pages
def test_links_lead_somewhere(page: Path) -> None:
    targets = [link.partition("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8"))]
    missing = [t for t in targets if t and not t.startswith("http") and not (page.parent / t).exists()]
    assert not missing


@pages
def test_paths_in_code_style_exist(page: Path) -> None:
    named = PATH.findall(page.read_text(encoding="utf-8"))
    assert not [path for path in named if not any((base / path).exists() for base in (ROOT, SOURCE))]


def test_every_decision_is_in_the_table() -> None:
    folder = ROOT / "docs" / "decisions"
    records = {path.name for path in folder.glob("[0-9]*.md")}
    assert records == set(LINK.findall((folder / "README.md").read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_page(page)


@pages
def test_python_is_in_fences(page: Path) -> None:
    """Indented blocks are for commands and formulas. What is in fences is run."""
    shown = [block for block in blocks_of(page) if block.language == "indented" and PYTHON.search(block.code)]
    assert not [f"line {block.line}: {block.code.strip().splitlines()[0]}" for block in shown]


@cache
def command_line() -> Any:
    """The whole command line, as click's Group."""
    typer = pytest.importorskip("typer")
    from lorank.cli.app import app

    return typer.main.get_command(app)


def check_lorank(words: list[str]) -> str | None:
    """What is wrong with a `lorank` command line, or None."""
    if words == ["--help"] or any(words == [name] for option in command_line().params for name in option.opts):
        return None
    command = command_line().commands.get(words[0])
    if command is None:
        return f"there is no command {words[0]}"
    context = command.context_class(command, info_name=words[0])
    try:
        _, rest, _ = command.make_parser(context).parse_args(list(words[1:]))
    except Exception as error:  # click raises UsageError, a class of typer's own in its newer versions
        return f"{type(error).__name__}: {error}"
    if rest:
        return f"{rest} is too much"
    if words[0] == "train" and not any(map(is_placeholder, words[1:2])):
        return check_train([word for word in words[1:] if not word.startswith("--")])
    return None


def check_train(words: list[str]) -> str | None:
    from lorank.config import load_config
    from lorank.errors import LorankError

    try:
        load_config(words[0], [word for word in words[1:] if not word.endswith("…")])
    except LorankError as error:
        return str(error)
    return None


@pages
def test_commands_exist_with_their_options(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong = []
    for line, words in command_lines(page):
        found = None
        if words[0] == "lorank":
            found = check_lorank(words[1:])
        elif words[0] == "make":
            found = None if set(words[1:]) <= targets else "no such target"
        elif words[:2] == ["python", "-m"]:
            module = ROOT / words[2].replace(".", "/")
            if words[2].split(".")[0] in ("tests", "benchmarks"):
                found = None if module.with_suffix(".py").is_file() or module.is_dir() else "no such module"
        scripts = [word for word in words if word.startswith("examples/")]
        if not all((ROOT / script).is_file() for script in scripts):
            found = "no such script"
        if found is not None:
            wrong.append(f"line {line}: {' '.join(words)}: {found}")
    assert not wrong


def test_the_checks_of_blocks_notice_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n\n    lorank prune a --budgett 5\n\n```python\nx = 1\n1 / 0\n```\n")
    ((_, words),) = command_lines(page)
    assert "budgett" in str(check_lorank(words[1:]))
    assert "no command" in str(check_lorank(["prunes"]))
    assert "no command" in str(check_lorank(["--install-completions"]))
    assert "allocator" in str(check_train(["e2e_alora", "allocator.roundz=2"]))
    with pytest.raises(AssertionError, match=r"page\.md, line 5: ZeroDivisionError"):
        run_page(page)
    page.write_text("<!-- not run: because -->\n```python\nx\n```\n")
    with pytest.raises(AssertionError, match="say why"):
        run_page(page)


def words_of(text: str) -> str:
    """Text without what makes a message differ from its source: quotes, backslashes, breaks in string literals."""
    joined = re.sub(r"[\"']\s*\n\s*[rf]{0,2}[\"']", "", text)
    return re.sub(r"\s+", " ", joined.replace("\\", ""))


def test_each_message_of_the_troubleshooting_page_is_in_the_source() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^> \*\*(.*?)\*\*$", page, re.MULTILINE)
    assert len(messages) >= 25
    source = words_of("\n".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")))
    # names and numbers are {expressions} or %s there
    source = re.sub(r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|%[.\d]*[sdg]", "…", source)
    missing = []
    for message in messages:
        text = words_of(message)
        pieces = [piece.strip(" .()") for piece in re.split(r"…", text)]
        pattern = r".{0,40}?".join(re.escape(piece) for piece in pieces if piece)
        if not re.search(pattern, source):
            missing.append(message)
    assert not missing
