"""README.md and docs/: commands parse, Python runs, what is named exists (links, files, functions, flags, messages).

The README's figures are test_readme's; what a page says in prose is not checked by anybody but its reader.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import os
import re
from pathlib import Path

import documents
import pytest
import torch

from dqkernels import cli
from dqkernels.cli import app, common
from dqkernels.environment import ENVIRONMENT

ROOT, PAGES = documents.ROOT, documents.PAGES
DOCS = ROOT / "docs"
ALL = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
#: Written by whoever follows a page, or by its commands.
_MADE = re.compile(r"(a100_out|out|demo|~)/")
_WRITTEN = {"benchmarks/results/gemm.json", "dqkernels/_build_info.json", "setup.py"}
#: Names that are no identifiers of ours: of the contract's formulas, and another program's.
_NO_NAMES = {"t_j", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
#: Flags of other programs that pages call.
_FOREIGN_FLAGS = {
    "-ffp-contract", "-fmad", "--fmad", "--no-deps", "--target", "--num_processes", "--multi_gpu", "--dist",
    "--cpu",
}  # fmt: skip
_TREES = ("dqkernels", "csrc", "python", "benchmarks", "tests")


# ------------------------------------------------------------------------------------------------ the command line


@functools.cache
def command():
    """The tree of verbs."""
    return app.build()


@functools.cache
def train_flags() -> set[str]:
    """Flags of `dqkernels train`, whose parser is transformers'."""
    from dqkernels.train import arguments

    return {"--config", "--json", "--help", "--help_all", *re.findall(r"--\w+", arguments.help_text(all_flags=True))}


def verb(words) -> tuple[object, list[str], list[str]]:
    """The command that words name, their verbs, and the words behind them."""
    found, names, rest = command(), [], [word for word in words if word != "--debug"]
    while rest and rest[0] in getattr(found, "commands", {}):
        found, names, rest = found.commands[rest[0]], [*names, rest[0]], rest[1:]
    return found, names, rest


def flags_of(found, names) -> set[str]:
    if names == ["train"]:
        return train_flags()
    known = {flag for parameter in found.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    return {*known, "--help", "-h"}


def parse(words, whole: bool = True) -> None:
    """Parses a call without running it; raises what the command line would complain of. Not whole: verb and flags."""
    found, names, rest = verb(words)
    if not names and rest and rest[0] not in ("--version", "--help", "-h"):
        raise AssertionError(f"no such verb: {rest[0]}")
    if names == ["train"] and whole and rest:
        from dqkernels.train import arguments

        if not {"--help", "--help_all"} & set(rest):
            # On a machine without a GPU transformers refuses bf16 unless the CPU was asked for.
            arguments.parse([*(word for word in rest if word != "--json"), "--use_cpu", "true"])
    elif whole and not {"--help", "-h", "--version"} & set(rest):
        # Its parent knows that dashes are underscores.
        root = command().make_context("dqkernels", ["info"], resilient_parsing=True)
        found.make_context(" ".join(names), list(rest), parent=root)
    for word in rest:
        flag = word.partition("=")[0].replace("-", "_").replace("__", "--", 1)
        if word.startswith("--") and flag not in flags_of(found, names):
            raise AssertionError(f"No such option: {word}")


@ALL
def test_every_command_parses(page, tmp_path, monkeypatch):
    monkeypatch.chdir(documents.sandbox(tmp_path))
    Path("stages.yaml").write_text("stages: []\n")
    wrong = []
    for call in documents.commands(page):
        try:
            parse(call.words, call.whole)
        except (AssertionError, ValueError, common.CLICK_ERRORS) as error:
            said = error.format_message() if isinstance(error, common.CLICK_ERRORS) else error
            wrong.append(f"{call.where}: dqkernels {' '.join(call.words)}: {said}")
    assert not wrong, "\n".join(wrong)


def test_there_are_commands_to_parse():
    """Or a page written in another manner would pass unread."""
    found = [call for page in PAGES for call in documents.commands(page)]
    assert sum(call.whole for call in found) > 40 and len(found) > 90
    text = "$ dqkernels a --b 1 \\\n --c '2 3' | jq -r .output\nwrote dqkernels\n$ X=1 python -m dqkernels d > f # e\n"
    block = documents.Block(PAGES[0], 1, "", text)
    calls = [documents._calls(line) for line in documents.shell_lines(block)]
    assert calls == [[("a", "--b", "1", "--c", "2 3")], [("d",)]]


@pytest.mark.parametrize(
    "words",
    [
        ("quantise", "a", "b"),
        ("quantize", "a"),
        ("quantize", "a", "b", "--bits", "4"),
        ("bench", "linear", "--seconds", "many"),
        ("train", "--weight_bitz", "2"),
    ],
)
def test_a_wrong_command_is_noticed(words):
    with pytest.raises((AssertionError, ValueError, common.CLICK_ERRORS)):
        parse(words)


@ALL
def test_cheap_commands_run(page, tmp_path, monkeypatch, capsys):
    """In the order of the page, in a folder with the models and texts that it names."""
    cheap = {"info", "summarize", "generate", "warmup", "export", "quantize", "bench size", "bench projected"}
    monkeypatch.chdir(documents.sandbox(tmp_path))
    packed = [call for call in documents.commands(page) if call.whole and call.words[:1] == ("quantize",)]
    if not packed:  # a page that begins with a packed folder
        assert cli.main(["quantize", "teacher", "bart-w4a8", "--embedding_bits", "4"]) == 0
        Path("w4").symlink_to("bart-w4a8")
    ran = 0
    for call in documents.commands(page):
        _, names, rest = verb(call.words)
        models = [word for word in rest[:1] if names[:1] != ["bench"] and not word.startswith("-")]
        if not call.whole or " ".join(names) not in cheap or not all(Path(model).is_dir() for model in models):
            continue
        if names == ["bench", "size"] and "tiny" not in rest:
            continue  # minutes
        assert cli.main(list(call.words)) == 0, f"{call}: {capsys.readouterr().err}"
        ran += 1
    assert ran >= {"README.md": 3, "cli.md": 5, "quantize.md": 1, "serve.md": 4}.get(page.name, 0)


def test_every_verb_has_its_place():
    """Each verb in cli.md, and in a guide or the README besides."""
    names = [name for name in command().commands if name != "bench"]
    names += [f"bench {name}" for name in command().commands["bench"].commands]
    mentioned = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
    for name in names:
        assert f"dqkernels {name}" in mentioned["cli.md"] or f"\n## {name}\n" in mentioned["cli.md"], name
        others = [text for page, text in mentioned.items() if page != "cli.md"]
        assert any(re.search(rf"dqkernels {name}\b|`{name}`", text) for text in others), f"{name} is in no guide"


def test_every_variable_has_its_place():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [name for name in ENVIRONMENT if name not in text]
    named = set(re.findall(r"\bDQKERNELS_[A-Z_]+\b", text)) - {"DQKERNELS_"}
    assert named - set(ENVIRONMENT) <= {"DQKERNELS_GRID_LOG"}, "a variable that the package does not honour"


def walk(found=None, names=()):
    found = command() if found is None else found
    yield names, found
    for name, sub in getattr(found, "commands", {}).items():
        yield from walk(sub, (*names, name))


def test_help_fits_a_terminal_of_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    wide, examples = [], 0
    for names, _ in walk():
        assert cli.main([*names, "--help"]) == 0
        text = capsys.readouterr().out
        wide += [f"{' '.join(names)}: {line}" for line in text.splitlines() if len(line) > 80]
        # An example of the help is a command like those of the pages.
        block = documents.Block(Path("help"), 1, "", text)
        for line in documents.shell_lines(block):
            if re.match(r"\s+(\w+ \S+ \| )?(dqkernels|accelerate launch) ", line):
                examples += 1
                for words in documents._calls(re.sub(r"\s{3,}\S.*$", "", line)):
                    parse(words, "..." not in words)
    assert not wide, "\n".join(wide)
    assert examples > 30


# ----------------------------------------------------------------------------------------------------------- Python


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == DOCS], ids=lambda page: page.name)
def test_python_runs(page, tmp_path, monkeypatch):
    """Every block of a page, in order, in one namespace; the README's are test_readme's."""
    monkeypatch.chdir(documents.sandbox(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    documents.run_python(page)


def test_python_that_fails_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\nx = 1\n```\n\nmore\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        documents.run_python(page)
    assert caught.traceback[-1].lineno + 1 == 10, "the line of the page"


def test_the_guides_have_python():
    with_python = {page.name for page in PAGES for block in documents.blocks(page) if block.language == "python"}
    assert {"quantize.md", "serve.md", "training.md", "numerics.md", "add-a-kernel.md", "benchmark.md"} <= with_python


# ------------------------------------------------------------------------------------------------- what is named


@ALL
def test_links_lead_somewhere(page):
    wrong = []
    for target in documents.links(page):
        if re.match(r"https?:", target):
            continue
        file, _, heading = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists():
            wrong.append(target)
        elif heading and heading not in {_anchor(h) for h in re.findall(r"^#+ (.+)$", path.read_text(), re.M)}:
            wrong.append(f"{target} (no such heading)")
    assert not wrong, wrong


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@functools.cache
def tracked() -> tuple[str, ...]:
    """Files of the tree, relative to it."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__")) and name != "build"]
        found += [os.path.relpath(os.path.join(folder, name), ROOT) for name in names]
    return tuple(found)


_FILE = re.compile(
    r"[\w.*/~\[\]-]+\.(?:py|md|toml|json|sh|cpp|cuh|cu|h|inl|png|npy|yaml|so)\b|[\w.*/~-]+/(?=$)|[\w-]+(?:/[\w.*-]+)+"
)
#: Suffixes of files that belong to us wherever they stand; others without a folder are a reader's own.
_OURS = (".py", ".toml", ".cpp", ".cuh", ".cu", ".h", ".sh")


@ALL
def test_named_files_exist(page):
    wrong = []
    for text in documents.inline(page):
        for name in re.findall(r"(?<![\w/.-])" + _FILE.pattern, text):
            rooted = name.startswith(_TREES) and "/" in name
            if _MADE.match(name) or "://" in text or name.startswith(("http", "/", "./")):
                continue
            if not rooted and not name.endswith(_OURS):
                continue
            if name not in _WRITTEN and not _exists(name):
                wrong.append(f"`{text}`: {name}")
    assert not wrong, "\n".join(wrong)


def _exists(name: str) -> bool:
    pattern = re.escape(name.rstrip("/")).replace(r"\*", "[^/]*")
    return any(re.search(rf"(^|/){pattern}(/|$|\.\w+$)", path) for path in tracked())


@functools.cache
def words_of_the_tree() -> frozenset[str]:
    """Every identifier in the sources, ours and those of transformers' that pages speak of."""
    import transformers

    words: set[str] = set()
    files = [
        ROOT / path
        for path in tracked()
        if path.endswith((".py", ".h", ".cpp", ".cu", ".cuh", ".inl", ".toml", ".json"))
    ]
    files += [ROOT / "CMakeLists.txt", ROOT / ".ci" / "run"]
    own = Path(transformers.__file__).parent
    files += [own / "generation" / "utils.py", own / "modeling_utils.py", own / "training_args.py"]
    for file in files:
        is_record = file.suffix == ".json" and "results" in file.parts
        if file.is_file() and not is_record and file.name not in ("test_docs.py", "documents.py"):
            words.update(re.findall(r"[A-Za-z_]\w+", file.read_text(encoding="utf-8", errors="ignore")))
    return frozenset(words)


_NAME = re.compile(r"([A-Za-z_][\w.]*\w)(?:\(.*\))?")


@ALL
def test_named_functions_exist(page):
    wrong = [text for text in documents.inline(page) if (match := _NAME.fullmatch(text)) and not _known(match[1])]
    assert not wrong, f"{page.name} names what is not there: {wrong}"


@pytest.mark.parametrize(
    "name", ["dqkernels.quantise_", "decode.unplugged", "kernels.skinny.forms_of", "quantize_all_now"]
)
def test_a_wrong_name_is_noticed(name):
    assert not _known(name) and not _exists(f"dqkernels/{name}.py")


_ENDINGS = "py md json jsonl toml yaml txt csv npy png sh h cpp cu cuh".split()


def _known(name: str) -> bool:
    """A name with dots that begins with a room of the package must be there; any other is an identifier somewhere."""
    first, *rest = name.split(".")
    rooms = {path.split("/")[1].removesuffix(".py") for path in tracked() if path.startswith("dqkernels/")}
    if rest and rest[-1] in _ENDINGS:
        return True  # a file
    if name in _NO_NAMES or (first == "nn" and hasattr(torch.nn, name.removeprefix("nn."))):
        return True
    if rest and (first == "dqkernels" or first in rooms):
        return _imported(name if first == "dqkernels" else f"dqkernels.{name}")
    return not any("_" in part or part != part.lower() for part in (first, *rest)) or all(
        part in words_of_the_tree() for part in (first, *rest) if "_" in part.strip("_") or part != part.lower()
    )


def _imported(name: str) -> bool:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                fields = getattr(found, "__dataclass_fields__", {}) if inspect.isclass(found) else {}
                return part in fields
            found = getattr(found, part)
        return True
    return False


@functools.cache
def every_flag() -> frozenset[str]:
    """Flags of all verbs, and of the scripts and tests, which spell them in their sources."""
    found = set(train_flags())
    for names, sub in walk():
        found |= flags_of(sub, list(names))
    for path in tracked():
        if path.startswith(("benchmarks/", "tests/mutants/run.py", "setup.py", "tests/long")) and path.endswith(
            (".py", ".sh")
        ):
            found |= set(re.findall(r"--[a-z][\w-]+", (ROOT / path).read_text(encoding="utf-8")))
    return frozenset(flag.replace("-", "_").replace("__", "--", 1) for flag in found)


@ALL
def test_named_flags_exist(page):
    wrong = []
    for text in documents.inline(page):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
            spelled = flag.replace("-", "_").replace("__", "--", 1)
            if spelled not in every_flag() and flag not in _FOREIGN_FLAGS:
                wrong.append(f"`{text}`: {flag}")
    assert not wrong, wrong


# ------------------------------------------------------------------------------------------------- error messages


@functools.cache
def sentences() -> tuple[tuple[str | None, ...], ...]:
    """Every text of some length in the sources, in pieces; None stands for what is filled in."""
    from transformers.quantizers import auto

    found = []
    for file in [
        *(ROOT / path for path in tracked() if path.startswith(("dqkernels/", "setup.py"))),
        Path(auto.__file__),
    ]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if file.suffix == ".py" else ():
            if isinstance(node, ast.JoinedStr):
                found.append([part.value if isinstance(part, ast.Constant) else None for part in node.values])
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub("%[sd]", "\0%\0", node.value).split("\0"))  # what a logger fills in
    for path in tracked():
        if path.startswith(("csrc/", "python/")):
            for text in re.findall(r'(?:"(?:[^"\\\n]|\\.)+"\s*)+', (ROOT / path).read_text(encoding="utf-8")):
                found.append(["".join(re.findall(r'"((?:[^"\\]|\\.)+)"', text))])
    pieces = ([None if part in ("%", None) else part.replace("--", "") for part in parts] for parts in found)
    return tuple(tuple(parts) for parts in pieces if sum(len(part or "") for part in parts) >= 16)


def quoted() -> list[str]:
    """The messages of troubleshooting.md: every line of its blocks of text."""
    blocks = documents.blocks(DOCS / "troubleshooting.md")
    return [line for block in blocks if block.language == "text" for line in block.text.splitlines()]


def is_said(message: str) -> bool:
    """Whether a text of the sources makes this message, with anything filled in; one that ends in `...` is cut."""
    # The command line puts its name in front, and dashes before names; a module's name may stand in front as well.
    message = message.removeprefix("dqkernels: error: ").replace("--", "")
    if refusal := re.fullmatch(r"[^:]+: .+ is (.+), wanted (.+)", message):  # manifest.refuse: its words stand apart
        return any(len(words) >= 16 and is_said(words) for words in refusal.groups())
    cut = message.endswith(" ...")
    text = message.removesuffix(" ...")
    starts = [text, *(text[match.end() :] for match in re.finditer(": ", text))]
    least = len(text) // 3
    return any(made >= least for parts in sentences() for start in starts for made in [_made(parts, start, cut)])


def _made(parts: tuple[str | None, ...], text: str, cut: bool) -> int:
    """How many characters of `text` are those of a sentence in pieces, all of it being made; -1 where it is not."""
    if not parts:
        return 0 if not text else -1
    first, *rest = parts
    if first is not None:
        if text.startswith(first):
            made = _made(tuple(rest), text[len(first) :], cut)
            return -1 if made < 0 else made + len(first)
        return len(text) if cut and first.startswith(text) else -1
    if not rest or (cut and not text):
        return 0 if text or cut else -1
    if rest[0] is None:
        return _made(tuple(rest), text, cut)
    found = [_made(tuple(rest), text[at:], cut) for at in range(len(text) + 1) if _may_begin(rest[0], text[at:], cut)]
    return max(found, default=0 if cut else -1)


def _may_begin(literal: str, text: str, cut: bool) -> bool:
    return text.startswith(literal) or (cut and literal.startswith(text))


def test_every_message_is_one_of_the_sources():
    found = quoted()
    assert len(found) >= 20
    assert not (wrong := [message for message in found if not is_said(message)]), "\n".join(wrong)


@pytest.mark.parametrize(
    "message",
    ["backend should be one of eager, cpu, got 'eagre'", "dqkernels: error: the model is too large for this machine"],
)
def test_a_message_that_nobody_says_is_noticed(message):
    assert not is_said(message)
