"""The words of ``docs/glossary.md`` with their meanings, for tooltips and pages."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
PLACES = (PACKAGE / "_glossary.md", PACKAGE.parent / "docs" / "glossary.md")
"""In a wheel; in a checkout."""


@lru_cache(maxsize=1)
def glossary() -> dict[str, str]:
    """Meaning by word, without marks of emphasis; a row of several words has each of them."""
    text = next((place.read_text(encoding="utf-8") for place in PLACES if place.is_file()), "")
    found = {}
    for words, meaning in re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE):
        if set(words) <= {"-", "|", " "} or words == "word":
            continue
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", meaning).replace("`", "")
        for word in words.replace("`", "").split(", "):
            found[word.strip()] = plain
    return found
