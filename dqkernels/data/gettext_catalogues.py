"""Translation pairs that a machine may already have: compiled message catalogues (`*.mo`) of installed programs.

The English message is the source, its translation the target. Catalogues are read where they lie and are never
copied along: their licences are those of the programs they belong to. Plain standard library.

    from dqkernels.data.gettext_catalogues import languages_here, messages
    print(languages_here())                      # {"de": 57210, "ro": 20118, ...}
    pairs = messages("ro", split="train")

The split is a hash of a message's opening words, so that one message, and its near copies, stand in one split in
whatever catalogue they are found, on every machine.
"""

from __future__ import annotations

import gettext
import hashlib
import html
import os
import re
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqkernels.data.docstrings import default_roots

TEST_PERCENT = 8
VALIDATION_PERCENT = 4
MIN_WORDS = 4  # fewest words of a message
MAX_WORDS = 100  # longer ones are option tables and licences
OPENING_WORDS = 4  # messages with the same first words share a split

_SKIPPED_FOLDERS = {"__pycache__", "node_modules", ".git"}
#: Languages of which regions or scripts are written differently: `pt` does not answer for `pt_BR`.
_REGIONS_MATTER = {"en", "pt", "sr", "zh"}
#: ISO 639-2 and 639-3 codes, as NLLB spells languages, of languages that programs are often translated into.
_THREE_LETTERS = {
    "ara": "ar", "bul": "bg", "cat": "ca", "ces": "cs", "dan": "da", "deu": "de", "ell": "el", "eng": "en",
    "est": "et", "eus": "eu", "fin": "fi", "fra": "fr", "gle": "ga", "glg": "gl", "heb": "he", "hin": "hi",
    "hrv": "hr", "hun": "hu", "ind": "id", "isl": "is", "ita": "it", "jpn": "ja", "kor": "ko", "lit": "lt",
    "lvs": "lv", "nld": "nl", "nno": "nn", "nob": "nb", "pol": "pl", "por": "pt", "ron": "ro", "rus": "ru",
    "slk": "sk", "slv": "sl", "spa": "es", "srp": "sr", "swe": "sv", "tur": "tr", "ukr": "uk", "vie": "vi",
}  # fmt: skip


@dataclass(frozen=True)
class MessagePair:
    """One message: the catalogue it stands in, the English text and its translation, both cleaned."""

    domain: str
    source: str
    target: str


# ---- languages --------------------------------------------------------------------------


def language_of(code: str) -> str:
    """The two-letter language of a code, however it is spelled: `ro` of ro_RO, ro_XX, ron_Latn, __ro__."""
    base = re.split(r"[_@.-]", code.strip("_<>"))[0].lower()
    return _THREE_LETTERS.get(base, base)


def _answers(folder: str, wanted: str) -> bool:
    """Whether catalogues in a folder of this name are in the language `wanted`."""
    name, asked = folder.replace("-", "_").lower(), wanted.strip("_<>").replace("-", "_").lower()
    if name == asked:
        return True
    base = language_of(wanted)
    if "@" in name + asked or "." in name or language_of(folder) != base:
        return False  # ca@valencia, ja.sjis: another script, or the same texts once more
    has_region = "_" in asked and not re.search(r"_(xx|[a-z]{4})$", asked)  # ro_XX and ron_Latn name no region
    if base in _REGIONS_MATTER and has_region:
        return False
    return name in (base, f"{base}_{base}")


# ---- cleaning ---------------------------------------------------------------------------

_C_MACRO = re.compile(r"%<PRI\w+>")
_PERCENT = re.compile(
    r"%(?:\(\w+\))?(?:\d+\$)?[-+#0']*(?:\*|\d+)?(?:\.(?:\*|\d+))?(?:hh|h|ll|l|L|q|j|z|t)?"
    r"(?:p[A-Z]\b|[diouxeEfFgGacrspnm%]|[A-Z](?![a-z]))"  # capitals: strftime's, and the linker's own %P, %B
)
_BRACES = re.compile(r"\$?\{[\w.!:\[\]]*\}")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_ACCELERATOR_BEHIND = re.compile(r"\s*\([&_]\w\)")  # as languages without letters of their own write it: 文件(_F)
_ACCELERATOR_IN_FRONT = re.compile(r"(?<![\w&])[&_](?=[^\W_])")
_ACCELERATOR_INSIDE = re.compile(r"(?<=[^\W_])[&_](?=[^\W\d_A-Z])")
_EMPTY_QUOTES = re.compile(r"'\x00'|\"\x00\"|`\x00['`]|[“„]\s*\x00\s*[”“]|«\s*\x00\s*»|‘\x00’|\(\x00\)|\[\x00\]|<\x00>")
_GONE = "\x00"  # stands where something was taken out
_GONE_AT_MARK = re.compile(r"[\s\x00]*\x00[\s\x00]*(?=[,.;:!?)\]](?:\s|$))|(?<=[(\[])\x00\s*")
_LEFT_AT_THE_START = re.compile(r"^[\s\x00:;,.]*\x00[\s\x00:;,.]*")
_LABEL_WORDS = 6  # an accelerator within a word stands in a short label; elsewhere file_name is a name


def _plain(text: str) -> str:
    """A message without formats, names in braces, markup and entities, on one line."""
    text = text.replace(_GONE, " ")
    for pattern in (_C_MACRO, _PERCENT, _BRACES):
        text = pattern.sub(_GONE, text)
    text = _TAG.sub("", html.unescape(text))
    text = _EMPTY_QUOTES.sub(_GONE, text)
    # Punctuation that a language sets apart (French) keeps its space; only gaps are closed.
    text = _GONE_AT_MARK.sub("", _LEFT_AT_THE_START.sub("", text))
    return " ".join(text.replace(_GONE, " ").split())


def _without_accelerator(text: str) -> str:
    text = _ACCELERATOR_BEHIND.sub("", text)
    text = _ACCELERATOR_IN_FRONT.sub("", text)
    inside = _ACCELERATOR_INSIDE.findall(text)
    if len(inside) == 1 and len(text.split()) <= _LABEL_WORDS:
        text = _ACCELERATOR_INSIDE.sub("", text)
    return text.replace("&&", "&")


def clean(message: str) -> str:
    """A message as a sentence: no printf or brace formats, no markup, no keyboard accelerators, single spaces."""
    return _without_accelerator(_plain(message))


def _words(text: str) -> int:
    return sum(1 for word in text.split() if any(letter.isalpha() for letter in word))


def key_of(source: str) -> str:
    """What a message is known by: its lower-case letters and digits."""
    return " ".join(re.findall(r"\w+", source.lower()))


def split_of(source: str) -> str:
    """`"train"`, `"validation"` or `"test"` of a cleaned message, from its opening words alone."""
    opening = " ".join(key_of(source).split()[:OPENING_WORDS])
    bucket = int.from_bytes(hashlib.sha256(opening.encode("utf-8")).digest()[:8], "big") % 100
    if bucket < TEST_PERCENT:
        return "test"
    return "validation" if bucket < TEST_PERCENT + VALIDATION_PERCENT else "train"


# ---- files ------------------------------------------------------------------------------


def default_folders() -> list[Path]:
    """Where catalogues are looked for: gettext's own folder, the system's, and the installed packages."""
    system = [gettext.bindtextdomain("dqkernels"), Path(sys.base_prefix, "share", "locale")]
    system += ["/usr/share/locale", "/usr/local/share/locale", "/usr/share/locale-langpack"]
    packages = [root for root in default_roots() if root.name in ("site-packages", "dist-packages")]
    found = (Path(folder).resolve() for folder in [*system, *packages] if folder)
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]


def _catalogues(folders: Iterable[str | os.PathLike[str]] | None) -> Iterator[tuple[str, Path]]:
    """`(language folder, file)` of every `<language>/LC_MESSAGES/*.mo`, each file once, in the order of its path."""
    seen: set[Path] = set()
    for root in default_folders() if folders is None else folders:
        for folder, inner, files in os.walk(root):
            inner[:] = sorted(name for name in inner if name not in _SKIPPED_FOLDERS)
            if os.path.basename(folder) != "LC_MESSAGES":
                continue
            for name in sorted(files):
                path = Path(folder, name)
                if path.suffix == ".mo" and (real := path.resolve()) not in seen:
                    seen.add(real)
                    yield path.parent.parent.name, path


def _entries(path: Path) -> tuple[Mapping[Any, str], int]:
    """Messages of one catalogue and the number of its plural form for 1; nothing from a file that is no catalogue."""
    try:
        with open(path, "rb") as file:
            catalogue = gettext.GNUTranslations(file)
        return catalogue._catalog, catalogue.plural(1)
    except (OSError, ValueError, LookupError, struct.error, ArithmeticError):
        return {}, 0  # truncated, of an unknown encoding, or with a plural rule that nobody can read


def _pairs(path: Path, min_words: int) -> Iterator[MessagePair]:
    entries, one = _entries(path)
    for key, translation in entries.items():
        if isinstance(key, tuple):
            if key[1] != one:
                continue  # other numbers than the English singular
            key = key[0]
        message = key.rpartition("\x04")[2]  # behind the context
        if not message or not translation:
            continue  # the header, or not translated
        source, target = clean(message), clean(translation)
        if not min_words <= _words(source) <= MAX_WORDS or not 1 <= _words(target) <= MAX_WORDS:
            continue
        if key_of(source) != key_of(target):
            yield MessagePair(path.stem, source, target)


def messages(
    target_lang: str,
    split: str | None = None,
    *,
    min_words: int = MIN_WORDS,
    folders: Iterable[str | os.PathLike[str]] | None = None,
) -> list[MessagePair]:
    """English messages and their translations, of all catalogues on this machine, by catalogue name.

    A message that several catalogues hold comes once (the first in the order of names). Not translated, empty and
    very short messages are left out, and files that are no catalogues are passed over. Fuzzy translations never
    reach a `.mo` file unless it was compiled with them, and look like any other then.

    Args:
        target_lang: `ro`, `pt_BR`, or as a tokenizer spells it (`ro_RO`, `ron_Latn`).
        split: `train`, `validation`, `test`, or None for all.
        min_words: fewest words of the English message.
        folders: where to look; default `default_folders()`.

    Raises:
        ValueError: if no catalogue of the language is found, with the languages that are.
    """
    if split not in (None, "train", "validation", "test"):
        raise ValueError(f"split must be 'train', 'validation', 'test' or None, not {split!r}")
    if min_words < 1:
        raise ValueError(f"min_words must be at least 1, got {min_words}")
    folders = None if folders is None else [*folders]
    paths = [path for language, path in _catalogues(folders) if _answers(language, target_lang)]
    found: dict[str, MessagePair] = {}
    # By name, then by path: what one file holds does not depend on where others lie.
    for path in sorted(paths, key=lambda path: (path.stem, str(path))):
        for pair in _pairs(path, min_words):
            found.setdefault(key_of(pair.source), pair)
    if not found:
        raise ValueError(_nothing(target_lang, folders))
    return [pair for pair in found.values() if split is None or split_of(pair.source) == split]


def languages_here(folders: Iterable[str | os.PathLike[str]] | None = None) -> dict[str, int]:
    """Messages per language folder (`de`, `pt_BR`, ...), most first; before cleaning, so an upper bound."""
    counts: dict[str, int] = {}
    for language, path in _catalogues(folders):
        count = _count(path)
        if count:
            counts[language] = counts.get(language, 0) + count
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _count(path: Path) -> int:
    """Messages that a catalogue's header promises, without the header entry; 0 for what is no catalogue."""
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return 0
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(head[:4])
    return max(0, struct.unpack(order + "I", head[8:])[0] - 1) if order and len(head) == 12 else 0


def _nothing(target_lang: str, folders: list | None) -> str:
    here = languages_here(folders)
    looked = ", ".join(map(str, default_folders() if folders is None else folders))
    if not here:
        return (
            f"no message catalogues on this machine: looked for */LC_MESSAGES/*.mo in {looked}; a distribution's "
            "language packs, or `pip install django babel`, bring some"
        )
    names = ", ".join(f"{name} ({count})" for name, count in list(here.items())[:12])
    return f"target_lang must be a language with message catalogues here, got {target_lang!r}; there are {names}" + (
        f" and {len(here) - 12} more" if len(here) > 12 else ""
    )
