"""Pairs from message catalogues that these tests write themselves: a `.mo` file is two tables of strings."""

from __future__ import annotations

import struct

import pytest

from dqkernels.data import gettext_catalogues as catalogues
from dqkernels.data.gettext_catalogues import clean, language_of, languages_here, messages, split_of

HEADER = "Content-Type: text/plain; charset={charset}\nPlural-Forms: {plural};\n"
ROMANIAN = "nplurals=3; plural=(n==1 ? 0 : (n==0 || (n%100 > 0 && n%100 < 20)) ? 1 : 2)"


def write_mo(path, entries: dict[str, str], charset: str = "utf-8", plural: str = ROMANIAN, order: str = "<"):
    """A compiled catalogue, in either byte order."""
    entries = {"": HEADER.format(charset=charset, plural=plural), **entries}
    pairs = sorted((key.encode(charset), value.encode(charset)) for key, value in entries.items())
    start, data, tables = 28 + 16 * len(pairs), b"", ([], [])
    for column, table in enumerate(tables):
        for pair in pairs:
            table.append(struct.pack(order + "II", len(pair[column]), start + len(data)))
            data += pair[column] + b"\0"
    head = struct.pack(order + "7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + b"".join(tables[0] + tables[1]) + data)
    return path


def place(root, language: str, domain: str):
    return root / "share" / "locale" / language / "LC_MESSAGES" / f"{domain}.mo"


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("cannot open '%s' for reading: %s", "cannot open for reading:"),
        ("%(count)d of %2$-10s files, 100%% done", "of files, 100 done"),
        ("50% of the disk", "50% of the disk"),
        ("%<PRIu64> bytes (%zu blocks) and %'d lines", "bytes (blocks) and lines"),
        ("%pB(%pA): bad section\n\tin %P:", "bad section in:"),
        ("Hello {name}, {0.size!r:x} of ${HOME} left", "Hello, of left"),
        ("<b>Bold</b> &amp; <a href='x'>linked</a> text", "Bold & linked text"),
        ("&Save _As...", "Save As..."),
        ("E&xit now", "Exit now"),
        ("文件(_F)", "文件"),
        ("look for file_name in the list of all the files", "look for file_name in the list of all the files"),
        ("Search && find", "Search & find"),
        ("Voulez-vous continuer ?", "Voulez-vous continuer ?"),
        ("  two\n lines\t here ", "two lines here"),
        ("the --file=%s option", "the --file= option"),
        ("use a.txt and .profile", "use a.txt and .profile"),
    ],
)
def test_clean(message, text):
    assert clean(message) == text


@pytest.mark.parametrize(
    ("code", "language"),
    [("ro", "ro"), ("ro_RO", "ro"), ("ro_XX", "ro"), ("ron_Latn", "ro"), ("__ro__", "ro"), ("eng_Latn", "en"),
     ("pt_BR", "pt"), ("sr@latin", "sr"), ("zh-Hans", "zh")],
)  # fmt: skip
def test_language_of(code, language):
    assert language_of(code) == language


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("charset", ["utf-8", "iso8859-2"])
def test_what_is_taken_and_what_is_not(tmp_path, order, charset):
    write_mo(
        place(tmp_path, "ro", "tool"),
        {
            "The file could not be opened: %s": "Fișierul nu a putut fi deschis: %s".replace("ș", "ş"),
            "menu\x04Open the selected file": "Deschide fișierul selectat".replace("ș", "ş"),
            "Only three words": "Doar trei cuvinte",
            "This one was never translated": "",
            "This one is the same": "This one is the same",
            "%d file was left over\0%d files were left over": "un fișier a rămas\0%d fișiere\0%d de fișiere".replace(
                "ș", "ş"
            ),
            "%s %d %s {name} &quot;%s&quot; one two": "unu doi",
        },
        charset,
        order=order,
    )
    found = {pair.source: pair.target for pair in messages("ro", folders=[tmp_path])}
    assert found == {
        "The file could not be opened:": "Fişierul nu a putut fi deschis:",
        "Open the selected file": "Deschide fişierul selectat",
        "file was left over": "un fişier a rămas",
    }


def test_the_plural_form_of_one_is_asked_of_the_catalogue(tmp_path):
    """Arabic has form 0 for none and form 1 for one."""
    rule = "nplurals=2; plural=(n==0 ? 0 : 1)"
    entries = {"%d file was left over\0%d files were left over": "nimic\0un singur fișier"}
    write_mo(place(tmp_path, "ar", "tool"), entries, plural=rule)
    assert [pair.target for pair in messages("ar", folders=[tmp_path])] == ["un singur fișier"]


def test_one_message_comes_once_and_in_one_split(tmp_path):
    shared = {f"This message number {n} stands in both": f"al doilea {n}" for n in range(300)}
    write_mo(place(tmp_path, "ro", "b"), shared)
    write_mo(place(tmp_path, "ro", "a"), {key.upper() + "!": value for key, value in list(shared.items())[:150]})
    every = messages("ro", folders=[tmp_path])
    assert len(every) == 300, "case and marks do not make another message"
    assert [pair.domain for pair in every] == ["a"] * 150 + ["b"] * 150, "the first catalogue by name wins"
    splits = {name: messages("ro", name, folders=[tmp_path]) for name in ("train", "validation", "test")}
    assert sorted(map(len, splits.values()))[0] > 0 and sum(map(len, splits.values())) == 300
    openings = [{" ".join(pair.source.lower().split()[:4]) for pair in split} for split in splits.values()]
    assert not openings[0] & openings[1] and not openings[0] & openings[2] and not openings[1] & openings[2]
    assert len(splits["test"]) == pytest.approx(300 * 0.08, abs=15)


def test_near_copies_share_a_split():
    assert len({split_of(f"could not open the file {n} of {n}") for n in range(50)}) == 1
    assert len({split_of(f"could not open {n} the file") for n in range(200)}) == 3


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("ro", {"ro", "ro_RO"}),
        ("ro_RO", {"ro", "ro_RO"}),
        ("ron_Latn", {"ro", "ro_RO"}),
        ("pt", {"pt"}),
        ("pt_BR", {"pt_BR"}),
        ("pt_XX", {"pt"}),
        ("sr@latin", {"sr@latin"}),
        ("sr", {"sr"}),
        ("zh_CN", {"zh_CN"}),
    ],
)
def test_which_folders_answer(tmp_path, asked, found):
    for number, language in enumerate(("ro", "ro_RO", "ro.ISO8859-2", "pt", "pt_BR", "sr", "sr@latin", "zh_CN")):
        text = {f"This message is {number} of {language}": f"tradus {language} de mine, de tine și de el"}
        write_mo(place(tmp_path, language, "tool"), text)
    assert {pair.target.split()[1] for pair in messages(asked, folders=[tmp_path])} == found


def test_languages_here_counts_and_passes_over_broken_files(tmp_path):
    write_mo(place(tmp_path, "ro", "tool"), {"one two three four": "unu", "five six seven eight": "cinci"})
    good = write_mo(place(tmp_path, "de", "tool"), {"one two three four": "eins zwei drei vier"})
    place(tmp_path, "de", "cut").write_bytes(good.read_bytes()[:60])
    place(tmp_path, "de", "empty").write_bytes(b"")
    place(tmp_path, "de", "text").write_bytes(b"no catalogue at all")
    place(tmp_path, "de", "link").symlink_to(good)
    write_mo(place(tmp_path, "fr", "tool"), {})
    assert languages_here([tmp_path])["ro"] == 2 and "fr" not in languages_here([tmp_path])
    assert [pair.domain for pair in messages("de", folders=[tmp_path])] == ["link"], "one file, once"


def test_none_found_says_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"no message catalogues on this machine: looked for .*LC_MESSAGES.*pip"):
        messages("ro", folders=[tmp_path])
    write_mo(place(tmp_path, "de", "tool"), {"one two three four": "eins zwei drei vier"})
    with pytest.raises(ValueError, match=r"target_lang must be .*, got 'ro'; there are de \(1\)$"):
        messages("ro", folders=[tmp_path])
    with pytest.raises(ValueError, match="split must be"):
        messages("de", "dev", folders=[tmp_path])
    with pytest.raises(ValueError, match="min_words must be at least 1, got 0"):
        messages("de", min_words=0, folders=[tmp_path])


def test_this_machine_is_read_without_an_error():
    """Whatever lies here; a machine without catalogues has an empty answer."""
    here = languages_here()
    assert all(count > 0 for count in here.values())
    assert all(folder.is_dir() for folder in catalogues.default_folders())
