"""A summarization set that every machine already has: docstrings of installed packages.

The body of a docstring is the source, its first sentence the summary. Only files are
read; no package is imported and nothing is downloaded. Plain standard library.

    from dqkernels.data.docstrings import mine
    for pair in mine(split="test"):
        print(pair.head, "<-", pair.body[:60])

The split is a hash of the dotted module name, so that a module stays in one split across
versions of its package, and a test module was never trained on. Packages repeat
themselves across modules; `held_out` drops the test pairs whose first sentence, or whose
body's opening, also stands in the training data.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

TEST_PERCENT = 8
VALIDATION_PERCENT = 4
HEAD_WORDS = (4, 40)  # fewest and most words of a first sentence
BODY_WORDS = 30  # fewest words of a body
KEY_WORDS = 32  # a body is known by its first words, about half of what a model reads

# The distributions (with what they require) that reported scores are measured on.
BASE_DISTRIBUTIONS = (
    "torch",
    "transformers",
    "numpy",
    "triton",
    "rouge-score",
    "matplotlib",
    "typer",
    "rich",
    "tqdm",
    "jsonschema",
    "safetensors",
)

_SKIPPED_FOLDERS = {
    "__pycache__", "_vendor", "_vendored", "_distutils", "_bundled", "bin", "dist-packages",
    "extern", "externals", "idle_test", "share", "site-packages", "test", "testing", "tests",
    "dqkernels",
}  # fmt: skip
_SKIPPED_FILE = re.compile(r"^(test_.*|.*_test|tests?|conftest)\.py$")
_LARGEST_FILE = 4_000_000  # bytes; longer ones are generated tables


@dataclass(frozen=True)
class DocPair:
    """One docstring: where it stands, its body (the source) and its head (the summary)."""

    module: str
    qualname: str
    body: str
    head: str


def split_of(module_name: str) -> str:
    """`"train"`, `"validation"` or `"test"`, from the dotted module name alone."""
    bucket = int.from_bytes(hashlib.sha256(module_name.encode("utf-8")).digest()[:8], "big") % 100
    if bucket < TEST_PERCENT:
        return "test"
    if bucket < TEST_PERCENT + VALIDATION_PERCENT:
        return "validation"
    return "train"


def lead(body: str, words: int = 12) -> str:
    """The baseline to beat: the first words of the body."""
    return " ".join(body.split()[:words])


# ---- text -------------------------------------------------------------------------------

_ROLE = re.compile(r":[a-zA-Z][\w:+.-]*:`([^`]*)`")
_ROLE_TARGET = re.compile(r"^(.*?)\s*<[^<>]*>$", re.S)
_RULE = re.compile(r"(?<!\S)([-=~^#*_+.`\"'])\1{2,}(?!\S)")
_DIRECTIVE = re.compile(r"\.\. [\w:-]+::")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s+[A-Z`\"'(\[<*:\d]|$)")
_ABBREVIATION = re.compile(r"(?:^|[\s(\[])(?:e\.g|i\.e|etc|vs|cf|al|fig|eq|resp|approx|no|dr|mr|st|[A-Za-z])\.$", re.I)
_SIGNATURE = re.compile(r"^[\w.\[\], ]+\([^)]*(\)|$)\s*(->|$|[.:=])|->|^\w+\(")
_NOT_A_SENTENCE = re.compile(
    r"^(args?|arguments|parameters?|returns?|raises|yields|attributes|examples?|notes?|warning|todo|fixme|usage|"
    r"copyright|license|see also|references?|type|rtype|param)\s*:|"
    r"^(deprecated|added in|changed in|auto-?generated|this (file|code) is (auto|gener)|copyright|licensed under|"
    r"see :?\w+`?\.?$|alias (for|of)\b)|\bdeprecated\b",
    re.I,
)


def _role(match: re.Match[str]) -> str:
    text = _ROLE_TARGET.sub(r"\1", match.group(1)).lstrip("!")
    return text[1:].rsplit(".", 1)[-1] if text.startswith("~") else text


def clean(text: str) -> str:
    """Text on one line, without reST roles, directives, section rules and backticks."""
    text = _ROLE.sub(_role, text)
    text = _DIRECTIVE.sub(" ", text).replace("`", "")
    return " ".join(_RULE.sub(" ", text).split())


def first_sentence(paragraph: str) -> tuple[str, str]:
    """The first sentence of one line of text, and the rest of it."""
    for match in _SENTENCE_END.finditer(paragraph):
        if not _ABBREVIATION.search(paragraph[: match.end()]) or match.end() == len(paragraph):
            return paragraph[: match.end()], paragraph[match.end() :].strip()
    return paragraph, ""


def _is_sentence(head: str) -> bool:
    words = head.split()
    if not HEAD_WORDS[0] <= len(words) <= HEAD_WORDS[1]:
        return False
    if not head[0].isalpha() or head[-1] in ":,;" or ">>>" in head or "::" in head or "{{" in head:
        return False
    if _SIGNATURE.search(head) or _NOT_A_SENTENCE.search(head):
        return False
    plain = sum(1 for word in words if word.strip(".,;:!?()'\"").isalpha())
    return 3 <= plain >= 0.6 * len(words)


def split_docstring(docstring: str, body_words: int = BODY_WORDS) -> tuple[str, str] | None:
    """`(head, body)` of a docstring, or None where it holds no sentence or too little text."""
    text = inspect.cleandoc(docstring)
    paragraph, _, rest = text.partition("\n\n")
    if _DIRECTIVE.match(paragraph.lstrip()):
        return None
    paragraph = clean(paragraph)
    if not paragraph:
        return None
    head, tail = first_sentence(paragraph)
    if not _is_sentence(head):
        return None
    body = clean(f"{tail} {clean(rest)}")
    if len(body.split()) < body_words:
        return None
    return head, body


def normalise(text: str) -> str:
    """Lower-case letters and digits of the words: what counts as the same text."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def keys_of(pair: DocPair) -> tuple[str, str]:
    """What a pair is known by: its normalised head, and the opening of its normalised body."""
    body = normalise(pair.body).split()[:KEY_WORDS]
    return "head " + normalise(pair.head), "body " + " ".join(body)


# ---- fingerprints -----------------------------------------------------------------------


def _fingerprint(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:4], "big")


def fingerprints(pairs: Iterable[DocPair]) -> list[int]:
    """Sorted, unique 32-bit hashes of the heads and bodies of `pairs`."""
    return sorted({_fingerprint(key) for pair in pairs for key in keys_of(pair)})


def held_out(pairs: Iterable[DocPair], seen: Collection[int]) -> list[DocPair]:
    """The pairs of which neither head nor body is in `seen`, a model's `seen.npy`.

    `seen` holds the fingerprints of all that the model was trained and tuned on.
    """
    known = set(map(int, seen))
    return [pair for pair in pairs if not any(_fingerprint(key) in known for key in keys_of(pair))]


# ---- files ------------------------------------------------------------------------------


def default_roots() -> list[Path]:
    """The standard library and the site-packages of this interpreter."""
    paths = sysconfig.get_paths()
    found = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib") if name in paths]
    found += [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    roots: dict[Path, None] = {}
    for entry in found:
        path = Path(entry).resolve()
        if path.is_dir():
            roots.setdefault(path)
    return list(roots)


def packages_of(distributions: Iterable[str] = BASE_DISTRIBUTIONS) -> frozenset[str]:
    """Top-level import names of installed distributions, of what they require, and of the
    standard library. Requirements of extras, and what is not installed, are left out."""
    names: dict[str, set[str]] = {}
    for package, owners in metadata.packages_distributions().items():
        for owner in owners:
            names.setdefault(_canonical(owner), set()).add(package)
    found, todo = set(), [_canonical(name) for name in distributions]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        for requirement in requirements:
            if not re.search(r";.*\bextra\b", requirement):
                match = re.match(r"[A-Za-z0-9][\w.-]*", requirement)
                if match:
                    todo.append(_canonical(match.group()))
    packages = {package for name in found for package in names.get(name, ())}
    return frozenset(packages | set(sys.stdlib_module_names))


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS and name.isidentifier())
        parts = Path(folder).relative_to(root).parts
        for name in sorted(files):
            if not name.endswith(".py") or _SKIPPED_FILE.match(name) or not name[:-3].isidentifier():
                continue
            dotted = parts if name == "__init__.py" else (*parts, name[:-3])
            if dotted:
                yield ".".join(dotted), Path(folder, name)


def read_source(path: Path) -> str | None:
    """The text of a Python file in its declared encoding, or None where that fails."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            return None
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeError, LookupError):
        return None


def docstrings_of(source: str) -> Iterator[tuple[str, str]]:
    """`(qualname, docstring)` of a module's text, outermost first; nothing if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes of other people's files
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    todo: list[tuple[str, ast.AST]] = [("", tree)]
    while todo:
        name, node = todo.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield name, docstring
        inner = []
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                inner.append((f"{name}.{child.name}".lstrip("."), child))
            elif isinstance(child, (ast.If, ast.Try, ast.With)):
                inner.append((name, child))
        todo.extend(reversed(inner))


def mine(
    roots: Iterable[str | os.PathLike[str]] | None = None,
    split: str | None = None,
    progress: bool = False,
    packages: Collection[str] | None = None,
    body_words: int = BODY_WORDS,
) -> list[DocPair]:
    """All pairs under `roots` (default: all that this interpreter can import), by module name.

    `split` is decided by the module's name before a file is opened, so that the test split
    costs a few seconds. `packages` keeps modules of these top-level names only; `body_words`
    is the fewest words of a body. Tests and
    vendored copies are skipped; within a split no head and no body's opening comes twice
    (the first in module order stays). Order and content do not depend on the file system.
    """
    if split not in (None, "train", "validation", "test"):
        raise ValueError(f"split must be 'train', 'validation', 'test' or None, not {split!r}")
    files: dict[str, Path] = {}
    for root in default_roots() if roots is None else roots:
        for module, path in _modules(Path(root)):
            if split is not None and split_of(module) != split:
                continue
            if packages is None or module.partition(".")[0] in packages:
                files.setdefault(module, path)  # an earlier root wins, as on sys.path
    seen: set[tuple[str, str]] = set()
    pairs: list[DocPair] = []
    for number, module in enumerate(sorted(files)):
        if progress and number % 500 == 0:
            print(f"\rmining {number}/{len(files)} modules, {len(pairs)} pairs", end="", file=sys.stderr)
        source = read_source(files[module])
        for qualname, docstring in docstrings_of(source) if source else ():
            found = split_docstring(docstring, body_words)
            if found is None:
                continue
            pair = DocPair(module, qualname, found[1], found[0])
            keys = {(split_of(module), key) for key in keys_of(pair)}
            if seen.isdisjoint(keys):
                seen |= keys
                pairs.append(pair)
    if progress:
        print(f"\rmining {len(files)}/{len(files)} modules, {len(pairs)} pairs", file=sys.stderr)
    return pairs
