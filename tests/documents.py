"""README.md and docs/ as the tests read them: blocks, commands, names and links; and the folder in which they run.

Nothing in a page is replaced before it runs. A page names models as a reader would (`facebook/bart-large-cnn`,
`bart-cnn`); in the sandbox these are folders with the teacher that ships, so no network is asked.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
#: Folders that pages call a float model by.
MODELS = ("facebook/bart-large-cnn", "bart-cnn", "teacher", "TEACHER", "my-finetuned-bart")
TEXTS = (
    "Parameters are given as keyword arguments and are checked before the file is opened. Returns the number of bytes "
    "written. Raises OSError if the disk is full.",
    "The cache is keyed by the name of the module. It is cleared when the module is reloaded, so that a stale entry is "
    "never returned to the caller.",
)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_ENVIRONMENT = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language (empty where it has none) and the line its text begins at."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


@dataclass(frozen=True)
class Command:
    """Words behind `dqkernels`. whole: as one would type it; otherwise it is a mention, or has `...` for the rest."""

    where: str
    words: tuple[str, ...]
    whole: bool


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [Block(page, text.count("\n", 0, m.start()) + 2, m[1], m[2]) for m in _BLOCK.finditer(text)]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))


def inline(page: Path) -> list[str]:
    """What stands between backticks in the prose, in order."""
    return _INLINE.findall(prose(page))


def links(page: Path) -> list[str]:
    """Targets of links and pictures."""
    return _LINK.findall(prose(page))


def shell_lines(block: Block) -> list[str]:
    """Lines of a block that are typed: those behind `$ ` where there are such, else all; continued ones as one."""
    lines = block.text.replace("\\\n", " ").splitlines()
    typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return typed or [line for line in lines if line.strip()]


def commands(page: Path) -> list[Command]:
    """Every call of dqkernels in the shell blocks of a page, and every mention of one in its prose."""
    found = []
    for block in blocks(page):
        if block.language in ("", "sh", "bash"):
            found += [
                Command(str(block), words, "..." not in words) for line in shell_lines(block) for words in _calls(line)
            ]
    for text in inline(page):
        if text.startswith("dqkernels ") or " -m dqkernels " in text:
            found += [Command(f"{page.name}: `{text}`", words, False) for words in _calls(text)]
    return [call for call in found if "VERB" not in call.words]


def _calls(line: str) -> list[tuple[str, ...]]:
    """`DQKERNELS_X=1 dqkernels a b | jq . && python -m dqkernels c  # why` -> (a, b), (c)."""
    if "dqkernels" not in line:
        return []
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    parts: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&;"):
            parts.append([])
        else:
            parts[-1].append(word)
    found = []
    for words in parts:
        while words and _ENVIRONMENT.fullmatch(words[0]):
            words = words[1:]
        words = words[: next((i for i, word in enumerate(words) if set(word) <= set("<>")), len(words))]
        if words[:1] == ["dqkernels"]:
            found.append(tuple(words[1:]))
        elif "-m" in words and words[words.index("-m") + 1 :][:1] == ["dqkernels"]:
            found.append(tuple(words[words.index("-m") + 2 :]))
    return found


def sandbox(folder: Path) -> Path:
    """Fills a folder with what the pages name: models, and texts to write something for."""
    from dqkernels.bench import demo

    for name in MODELS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(demo.teacher_folder(), target_is_directory=True)
    for name in ("articles.txt", "bodies.txt", "texts.txt"):
        (folder / name).write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    records = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "many.jsonl").write_text(records, encoding="utf-8")
    return folder


def run_python(page: Path) -> dict:
    """Runs the Python blocks of a page, in order, in one namespace and the current folder; gives the namespace."""
    names: dict = {"__name__": "page"}
    for block in blocks(page):
        if block.language == "python":
            # Blank lines in front: a traceback then has the page's own line.
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)  # noqa: S102 - our own pages
    return names
