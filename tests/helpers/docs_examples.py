"""Examples of the documentation, made smaller."""

from __future__ import annotations


def replaced(text: str, changes: dict[str, str]) -> str:
    """Return a text with other words, each of which it has to have once."""
    for shown, used in changes.items():
        assert text.count(shown) == 1, shown
        text = text.replace(shown, used)
    return text
