"""A page as its reader meets it: its text, and everything that it would load."""

import re
from html.parser import HTMLParser
from pathlib import Path

_EMPTY = ("meta", "img", "br", "line", "circle")


class Page(HTMLParser):
    """Fails on an element that is not closed."""

    def __init__(self, path: Path):
        super().__init__()
        self.words: list[str] = []
        self.loads: list[str] = []
        self.marks: list[dict[str, str]] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self._open

    def handle_starttag(self, tag, attrs):
        if tag not in _EMPTY:
            self._open.append(tag)
        if tag == "line" and ("class", "bar") in attrs:
            self.marks.append({name: value or "" for name, value in attrs})
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        if tag not in _EMPTY:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))
