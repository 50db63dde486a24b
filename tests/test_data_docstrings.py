"""The docstring miner: what it takes, what it leaves, and that the split cannot leak or move."""

import os
import subprocess
import sys
import warnings

import pytest

from dqkernels.data.docstrings import (
    DocPair,
    clean,
    default_roots,
    fingerprints,
    first_sentence,
    held_out,
    keys_of,
    lead,
    mine,
    packages_of,
    split_docstring,
    split_of,
)

BODY = " ".join(f"word{i} of the long text" for i in range(8))  # 40 words


def docstring(head, body=BODY):
    return f'"""{head}\n\n    {body}\n    """'


@pytest.fixture
def package(tmp_path):
    """One package with everything that real site-packages hold."""
    root = tmp_path / "site"
    files = {
        "pack/__init__.py": docstring("Tools that fold paper into boats.", "package " + BODY),
        "pack/boats.py": f'''
class Boat:
    {docstring("Hold a boat made of one sheet.", "class " + BODY)}

    def sail(self):
        {docstring("Move the boat over the pond.", "method " + BODY)}

    if True:
        async def sink(self):
            {docstring("Let the water into the boat.", "async " + BODY)}

def short():
    """Say too little about it here.

    Only a few words.
    """

def directive():
    {docstring(".. note:: this is no sentence at all.", "directive " + BODY)}

def signature():
    {docstring("fold(paper, times=2) -> Boat", "signature " + BODY)}

def old():
    {docstring("Deprecated since version two of this.", "old " + BODY)}

def arguments():
    {docstring("Args: the paper and the boat.", "arguments " + BODY)}
''',
        # the same head as in boats.py with other case and marks, and the same opening of a body
        "pack/copies.py": f"def again():\n    {docstring('Move the Boat, over the pond!', 'unlike ' + BODY)}\n"
        f"def body():\n    {docstring('Carry the boat back to shore.', 'method ' + BODY + ' and more')}\n",
        "pack/broken.py": f"def f(:\n    {docstring('Never read this broken file.', 'broken ' + BODY)}\n",
        "pack/escapes.py": "def f():\n    " + docstring("Keep an escape such as this.", f"bad \\d {BODY}") + "\n",
        "pack/tests/helper.py": f"def f():\n    {docstring('Test the boat on land.', 'tests ' + BODY)}\n",
        "pack/test_boats.py": f"def f():\n    {docstring('Test the boat at sea.', 'test ' + BODY)}\n",
        "pack/_vendor/other.py": f"def f():\n    {docstring('Live in a vendored copy.', 'vendor ' + BODY)}\n",
        "pack-1.0.dist-info/junk.py": f"def f():\n    {docstring('Live in no module at all.', 'info ' + BODY)}\n",
        "other.py": f"def f():\n    {docstring('Stand alone beside the package.', 'alone ' + BODY)}\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (root / "pack" / "latin.py").write_bytes(
        "# -*- coding: latin-1 -*-\ndef f():\n    ".encode("latin-1")
        + docstring("Fold a café menu into boats.", "latin " + BODY).encode("latin-1")
    )
    undeclared = docstring("Fold a naïve menu into boats.", "undeclared " + BODY)
    (root / "pack" / "undeclared.py").write_bytes(b"def f():\n    " + undeclared.encode("latin-1"))
    (root / "pack" / "nulls.py").write_bytes(b"x = 1\0\n")
    return root


def test_split_does_not_move():
    """Hard-coded: a model that was trained on this split stays honest only while these hold."""
    names = {"json": "test", "collections": "test", "json.decoder": "train", "argparse": "train", "os": "train"}
    assert {name: split_of(name) for name in names} == names
    counts = {"train": 0, "validation": 0, "test": 0}
    for i in range(10000):
        counts[split_of(f"package{i % 37}.module{i}")] += 1
    assert 700 < counts["test"] < 900 and 330 < counts["validation"] < 470


def test_mine(package):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # SyntaxWarning of the bad escape must stay inside
        pairs = mine([package])
    names = [(pair.module, pair.qualname) for pair in pairs if pair.module != "pack.copies"]
    assert names == [
        ("other", "f"),
        ("pack", ""),
        ("pack.boats", "Boat"),
        ("pack.boats", "Boat.sail"),
        ("pack.boats", "Boat.sink"),
        ("pack.escapes", "f"),
        ("pack.latin", "f"),
    ]
    found = {(p.module, p.qualname): p for p in pairs}
    assert found["pack.boats", "Boat.sail"] == DocPair(
        "pack.boats", "Boat.sail", "method " + BODY, "Move the boat over the pond."
    )
    assert found["pack.latin", "f"].head == "Fold a café menu into boats."


def test_duplicates(tmp_path):
    """Two modules of one split: the first in module order keeps head and body."""
    names = [name for name in (f"m{i:02d}" for i in range(40)) if split_of(name) == "train"][:2]
    first, second = names
    (tmp_path / f"{second}.py").write_text(
        f"def a():\n    {docstring('Move the Boat, over the pond!', 'unlike ' + BODY)}\n"
        f"def b():\n    {docstring('Carry the boat back to shore.', 'method ' + BODY + ' and more')}\n"
        f"def c():\n    {docstring('Paint the boat in blue.', 'third ' + BODY)}\n"
    )
    (tmp_path / f"{first}.py").write_text(
        f"def a():\n    {docstring('Move the boat over the pond.', 'method ' + BODY)}\n"
    )
    assert [(p.module, p.qualname) for p in mine([tmp_path])] == [(first, "a"), (second, "c")]


def test_split_is_chosen_before_reading(package, monkeypatch):
    everything = mine([package])
    opened = []
    real = mine.__globals__["read_source"]
    monkeypatch.setitem(mine.__globals__, "read_source", lambda path: opened.append(path) or real(path))
    for split in ("train", "validation", "test"):
        opened.clear()
        pairs = mine([package], split=split)
        assert pairs == [pair for pair in everything if split_of(pair.module) == split]
        modules = {".".join(path.relative_to(package).with_suffix("").parts) for path in opened}
        assert {split_of(name.removesuffix(".__init__")) for name in modules} <= {split}
    with pytest.raises(ValueError, match="'tset'"):
        mine([package], split="tset")


def test_packages_and_body_words(package):
    assert {pair.module for pair in mine([package], packages={"other"})} == {"other"}
    assert "short" in {pair.qualname for pair in mine([package], body_words=4)}
    assert "short" not in {pair.qualname for pair in mine([package])}


def test_order_does_not_depend_on_the_file_system(package, monkeypatch):
    expected = mine([package])
    real = os.walk

    def backwards(top):
        for folder, folders, files in real(top):
            folders.reverse()
            yield folder, folders, files[::-1]

    monkeypatch.setattr("dqkernels.data.docstrings.os.walk", backwards)
    assert mine([package]) == expected


def test_first_root_wins(package, tmp_path):
    later = tmp_path / "later"
    later.mkdir()
    (later / "other.py").write_text(f"def f():\n    {docstring('Shadowed by an earlier root.', 'later ' + BODY)}\n")
    heads = {pair.head for pair in mine([package, later])}
    assert "Stand alone beside the package." in heads and "Shadowed by an earlier root." not in heads


@pytest.mark.parametrize(
    ("text", "head", "rest"),
    [
        ("Read a file. Then close it.", "Read a file.", "Then close it."),
        ("Use e.g. This one, or vs. That. Done.", "Use e.g. This one, or vs. That.", "Done."),
        ("Version 1.2 of numpy.array is read. Yes.", "Version 1.2 of numpy.array is read.", "Yes."),
        ("No mark at the end", "No mark at the end", ""),
        ("What is it? A test.", "What is it?", "A test."),
    ],
)
def test_first_sentence(text, head, rest):
    assert first_sentence(text) == (head, rest)


def test_clean():
    assert clean("See :class:`~torch.nn.Linear` and :func:`the text <a.b>`,\n  or ``x`` .") == (
        "See Linear and the text, or x ."
    )
    assert clean("Parameters\n----------\nx : int") == "Parameters x : int"


@pytest.mark.parametrize(
    "head",
    [
        "Too short.",
        "Example of the usage below:",
        "forward(input, weight, bias) -> Tensor",
        ">>> import the module and run it",
        "This is deprecated and will go away.",
        "1 2 3 4 5 6 7",
        "Returns: the sum of all things.",
        "word " * 41,
    ],
)
def test_heads_that_are_no_sentences(head):
    assert split_docstring(f"{head}\n\n{BODY}") is None
    assert split_docstring(f"Return the sum of all things.\n\n{BODY}") == ("Return the sum of all things.", BODY)


def test_lead():
    assert lead("a b  c\nd", words=3) == "a b c"
    assert lead(BODY).split() == BODY.split()[:12]
    assert lead("two words") == "two words"


def test_held_out():
    train = DocPair("a", "f", "Opening " + BODY, "Fold the paper twice.")
    same_head = DocPair("b", "f", "Another " + BODY, "fold the PAPER twice")
    same_opening = DocPair("c", "f", "opening, " + BODY + " but another end", "Unfold it again.")
    fresh = DocPair("d", "f", "Fresh " + BODY, "Cut the paper once.")
    seen = fingerprints([train])
    assert seen == sorted(set(seen)) and len(seen) == 2 and all(0 <= value < 2**32 for value in seen)
    assert held_out([train, same_head, same_opening, fresh], seen) == [fresh]
    assert held_out([train, fresh], []) == [train, fresh]
    numpy = pytest.importorskip("numpy")
    assert held_out([same_head, fresh], numpy.asarray(seen, dtype=numpy.uint32)) == [fresh]


def test_fingerprints_do_not_move():
    """Hard-coded: they are compared with a file that ships with the model."""
    pair = DocPair("m", "q", "One two, three.", "A head.")
    assert keys_of(pair) == ("head a head", "body one two three")
    assert fingerprints([pair]) == [317084273, 367616182]


def test_this_machine():
    """The standard library alone gives a few hundred pairs, with no pair in two splits."""
    roots = default_roots()
    assert roots == list(dict.fromkeys(roots)) and all(root.is_dir() for root in roots)
    pairs = mine(split="test", packages=packages_of())
    assert len(pairs) >= 300
    assert all(split_of(pair.module) == "test" for pair in pairs)
    assert all(4 <= len(pair.head.split()) <= 40 and len(pair.body.split()) >= 30 for pair in pairs)
    assert not {pair.module.partition(".")[0] for pair in pairs} & {"dqkernels", "pytest"}
    keys = [key for pair in pairs for key in keys_of(pair)]
    assert len(keys) == len(set(keys))
    packages = packages_of()
    assert {"json", "torch", "transformers", "sympy"} <= packages and "pytest" not in packages


def test_import_is_light():
    # the package's own __init__ may load torch; the miner must not, so it is loaded without it
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('miner', {mine.__globals__['__file__']!r})\n"
        "module = sys.modules['miner'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
