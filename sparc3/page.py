"""What people look at: tokens coloured by their relevance, in a terminal and in one HTML file without a network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich.text import Text
from transformers import PreTrainedTokenizerBase

# For and against, where the colour is full; black text stays readable on both.
_FOR, _AGAINST = (226, 106, 120), (98, 152, 208)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 60em; }
body { margin: 2em auto; padding: 0 1em; }
.tokens { font-size: 18px; line-height: 2; }
.token { white-space: pre-wrap; border-radius: 3px; padding: 2px 0; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: 2px 8px; text-align: right; font-variant-numeric: tabular-nums; }
th { border-bottom: 1px solid #999; font-weight: 600; }
td:first-child, th:first-child { text-align: left; white-space: pre; }
img { max-width: 100%; display: block; margin: 1em 0; }
.wide { overflow-x: auto; }
.note { color: #555; }
th.text { text-align: left; }
td.text { text-align: left; white-space: pre-wrap; vertical-align: top; border-bottom: 1px solid #ddd; }
svg { max-width: 100%; height: auto; }
"""


def spell(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Each token as it stands in the text, with its leading space; what cannot be printed is made visible.

    A part of a character (byte-level tokenizers) is spelled as in the vocabulary.
    """
    words = []
    for token, entry in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        word = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
        # Decoding drops the space of a word that begins a text, as SentencePiece has it.
        if entry and entry.startswith("\u2581") and not word.startswith(" "):
            word = " " + word
        words.append("".join(map(_visible, entry if entry and "\ufffd" in word else word)))
    return words


def _visible(character: str) -> str:
    """Itself where it can be printed; else its picture, as U+240A for a newline, or its number."""
    if character.isprintable():
        return character
    number = ord(character)
    return chr(0x2400 + number) if number < 32 else f"\\u{number:04x}"


def full_scale(values: Sequence[float], special: Sequence[bool]) -> float:
    """The relevance at which the colour is full: the largest but that of special tokens.

    Much relevance gathers on a BOS token, beside which the text would be white.
    """
    of_text = [abs(value) for value, skip in zip(values, special, strict=True) if not skip]
    return max(of_text, default=0.0) or max(map(abs, values), default=0.0) or 1.0


def colour(value: float, scale: float) -> tuple[int, int, int]:
    """(red, green, blue), 0 to 255: white at 0, red where relevance speaks for the answer, blue where against."""
    strength = min(abs(value) / scale, 1.0)
    red, green, blue = (round(255 + strength * (c - 255)) for c in (_FOR if value > 0 else _AGAINST))
    return red, green, blue


def coloured_text(words: Sequence[str], values: Sequence[float], scale: float) -> Text:
    """For a terminal."""
    text = Text()
    for word, value in zip(words, values, strict=True):
        red, green, blue = colour(value, scale)
        text.append(word, style=f"black on rgb({red},{green},{blue})")
    return text


def coloured_html(words: Sequence[str], values: Sequence[float], scale: float) -> str:
    """A paragraph with one span a token: its text, position and relevance (data-index, data-value, tooltip)."""
    spans = []
    for index, (word, value) in enumerate(zip(words, values, strict=True)):
        spans.append(
            f'<span class="token" data-index="{index}" data-value="{value!r}" '
            f'title="{escape(word)} at {index}: {value:+.4g}" style="{_background(value, scale)}">'
            f"{escape(word)}</span>"
        )
        if "\u240a" in word:
            spans.append("<br/>")
    return f'<p class="tokens">{"".join(spans)}</p>'


def heat_map(rows: Sequence[Sequence[float]], across: str, down: str) -> str:
    """A table of coloured numbers, the last row on top: blocks run upwards. Of many columns it scrolls by itself."""
    scale = max((abs(value) for row in rows for value in row), default=0.0) or 1.0
    cells = [
        f"<tr><th>{index}</th>"
        + "".join(f'<td style="{_background(value, scale)}">{value:+.3g}</td>' for value in row)
        + "</tr>"
        for index, row in reversed(list(enumerate(rows)))
    ]
    columns = "".join(f"<th>{column}</th>" for column in range(len(rows[0])))
    header = f"<tr><th>{escape(down)} / {escape(across)}</th>{columns}</tr>"
    return f'<div class="wide"><table>{header}{"".join(cells)}</table></div>'


def _background(value: float, scale: float) -> str:
    return "background: rgb({},{},{})".format(*colour(value, scale))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text."""
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    header = "".join(f"<th>{escape(column)}</th>" for column in columns)
    return f"<table><tr>{header}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def columns(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Longer texts side by side; what cannot be printed is made visible, line ends stay."""
    header = "".join(f'<th class="text">{escape(name)}</th>' for name in names)
    lines = []
    for row in rows:
        texts = ("".join(c if c == "\n" else _visible(c) for c in text) for text in row)
        lines.append("<tr>" + "".join(f'<td class="text">{escape(text)}</td>' for text in texts) + "</tr>")
    return f"<table><tr>{header}</tr>{''.join(lines)}</table>"


def drawing(svg: str) -> str:
    """A drawing as part of the page, from a whole SVG document."""
    return svg[svg.index("<svg") :]


def image(path: str | Path, alt: str) -> str:
    """A PNG file as an element that carries all of its bytes."""
    data = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}"/>'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of text, of a class of the style sheet."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def page(title: str, sections: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A whole page from (heading, elements); it is XML too, and its policy forbids a browser to load anything."""
    body = "".join(f"<h2>{escape(heading)}</h2>\n" + "\n".join(parts) + "\n" for heading, parts in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\"/>\n"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}</body></html>\n"
    )
