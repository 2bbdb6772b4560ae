"""Check the style guide of .github/CONTRIBUTING.md, as far as a test can check it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repo.source import ROOT, Docstring, Text, comments, docstrings, files, messages, relative, tracked

BAD_STARTS = {
    *("what", "who", "whom", "whose", "whether", "those", "of", "which", "how", "where", "if"),
    *("it", "its", "they", "their", "that", "these", "such", "nothing", "so", "also", "and", "but"),
}
"""First words that no docstring may have."""

VERBS = frozenset(Path(__file__).with_name("verbs.txt").read_text(encoding="utf-8").split())
"""Verbs that the docstring of a function may begin with. Add one that is missing."""

BANNED = [
    r"told",
    r"sa(y|ys|id|ying)",
    r"spoke|spoken|speaks?|speaking",
    r"settle[sd]?|settling",
    r"meets?(?! (a|the|its|every) bound)|met|meeting",
    r"judge[sd]?|judging",
    r"folds?|folded|folding",
    r"lay|laid|lays|lies|lie|lying",
    r"placed|placing|to place",
    r"the rest",
    r"besides?",
    r"alike",
    r"anew",
    r"save (for|by|under|that|those)",
    r"at hand",
    r"\w+-manieth",
    r"(of|on) (its|their|your|his|one's) own",
    r"as ever|for ever",
    r"(no|some|every)body|whoever|whomever",
    r"whatever (is|are|was|it|they|has|have|comes|goes|belongs|happens to)",
    r"cannot be meant",
    r"left out of account",
    r"what has a norm",
    r"(is|are|was|were) to(?! (the|its|their|a|an)\b)",
    r"hears?|heard",
    r"knows? of|know nothing",
    r"by the way|on the way",
    r"all but",
]
"""Patterns of words that no prose may contain. CONTRIBUTING.md has the words that replace them."""

PATTERN = re.compile(rf"(?<![\w./-])(?:{'|'.join(BANNED)})(?![\w-])", flags=re.IGNORECASE)
QUOTED = re.compile(r"``.+?``|`[^`]+`|^\s*(>>>|\.\.\.) .*$", flags=re.MULTILINE | re.DOTALL)
COMMENT_MARKS = ("#", "//", "/*", "*")
FENCE = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)


def library_docstrings() -> Iterator[Docstring]:
    """Yield the docstrings of the library and of the training job."""
    for path in files("distclip", "launch"):
        yield from docstrings(path)


def starts_with_verb(docstring: Docstring) -> bool:
    """Return whether the first word is a verb, in the imperative or in the third person."""
    word = first_word(docstring)
    return (
        word in VERBS
        or any(word.endswith(end) and word[: -len(end)] in VERBS for end in ("s", "es"))
        or (word.endswith("ies") and f"{word[:-3]}y" in VERBS)
    )


def is_fragment(docstring: Docstring) -> bool:
    """Return whether the first words mark a sentence fragment."""
    return first_word(docstring) in BAD_STARTS or docstring.first_line.lower().startswith("the same ")


def first_word(docstring: Docstring) -> str:
    """Return the first word in lower case, without punctuation."""
    return docstring.first_line.partition(" ")[0].strip(",.:;").lower()


def banned(text: Text) -> str | None:
    """Return the first banned words of a text outside of quoted code."""
    found = PATTERN.search(QUOTED.sub("", text.text))
    return f"{text.path}:{text.line}: {found[0]!r} in {text.text.strip()[:90]!r}" if found else None


def prose(path: Path) -> Iterator[Text]:
    """Yield the prose of any tracked file: of Python docstrings, comments and messages, of others the lines."""
    if path.suffix == ".py":
        for docstring in docstrings(path):
            yield Text(docstring.path, docstring.line, docstring.text)
        yield from comments(path)
        yield from messages(path)
        return
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        # Code blocks are checked as code, not as prose. Blank lines keep the line numbers.
        text = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    in_c = path.suffix in {".c", ".h"}
    for number, line in enumerate(text.splitlines(), 1):
        # The inner lines of a comment in C have no mark, so that every line that is not a statement is checked.
        plain = path.suffix in {".md", ".html"} or (in_c and not line.rstrip().endswith((";", "{", "}")))
        if plain or line.lstrip().startswith(COMMENT_MARKS) or " # " in line:
            yield Text(relative(path), number, line)


def test_docstrings_do_not_begin_with_a_fragment() -> None:
    tests = (docstring for path in files("tests") for docstring in docstrings(path))
    wrong = [str(d) for d in (*library_docstrings(), *tests) if is_fragment(d)]
    assert not wrong, "\n".join(wrong)


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    wrong = [str(d) for d in library_docstrings() if d.kind == "function" and not starts_with_verb(d)]
    assert not wrong, "\n".join(wrong)


def test_first_lines_are_short_sentences() -> None:
    """A first line ends with a full stop, has at most 100 characters (modules and constants: 120), and no semicolon."""
    wrong = [str(d) for d in library_docstrings() if not d.first_line.endswith((".", "::"))]
    limits = {"module": 120, "constant": 120}
    wrong += [f"{d} (too long)" for d in library_docstrings() if len(d.first_line) > limits.get(d.kind, 100)]
    wrong += [f"{d} (a semicolon)" for d in library_docstrings() if ";" in QUOTED.sub("", d.first_line)]
    assert not wrong, "\n".join(wrong)


SUFFIXES = {".py", ".md", ".yaml", ".yml", ".html", ".css", ".c", ".h", ".sh", ".sbatch", ".toml", ".Dockerfile"}
PROSE_FILES = [path for path in tracked() if path.suffix in SUFFIXES and path != Path(__file__)]


@pytest.mark.parametrize("folder", sorted({relative(path).rpartition("/")[0] for path in PROSE_FILES}))
def test_no_banned_words(folder: str) -> None:
    chosen = [path for path in PROSE_FILES if relative(path).rpartition("/")[0] == folder]
    wrong = [message for path in chosen for text in prose(path) if (message := banned(text))]
    assert not wrong, "\n".join(wrong)


def test_the_checks_find_what_they_look_for() -> None:
    """Every rule rejects a sentence of the old kind, and accepts a plain one."""
    for text in ("Nobody said so.", "It lies beside the others.", "what is to be done", "the how-manieth call"):
        assert banned(Text("x.py", 1, text)), text
    for text in ("The layout belongs to the mesh.", "Call `say()`.", "in place", "the underlying storage"):
        assert not banned(Text("x.py", 1, text)), text
    for text, kind in {"Return the norm.": True, "Applies a decision.": True, "The norm of all.": False}.items():
        assert starts_with_verb(Docstring("x.py", 1, "function", "f", text)) is kind
    assert ROOT.joinpath("README.md") in PROSE_FILES
