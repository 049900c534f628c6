"""Letters in pictures: which font has them, and what stands for those that no font here has.

matplotlib brings DejaVu Sans (Latin, Greek, Cyrillic, Hebrew, Arabic and more); further scripts are looked for among
the fonts of the system. A letter that none of them has is written out in plain ones: "ね" as "ne", "🐶" as
"[dog face]"; a Chinese one by its number, "[U+732B]", which `legend` explains.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import regex
from PIL import ImageDraw, ImageFont, features

BASE = "DejaVu Sans"
_INVISIBLE = regex.compile(r"[\p{Cf}\p{Cc}\uFE0E\uFE0F]")
_RIGHT_TO_LEFT = regex.compile(r"[\p{bc=R}\p{bc=AL}](?:[\p{bc=R}\p{bc=AL}\p{Mn}\s]*[\p{bc=R}\p{bc=AL}\p{Mn}])?")
_SOUND = re.compile(r".*(?:LETTER|SYLLABLE|VOWEL SIGN|CHARACTER)(?: SMALL| CAPITAL| SARA)* ([A-Z]+)(?: [A-Z]+)?")
_PILLOW_SHAPES = features.check("raqm")
_MATPLOTLIB_SHAPES = tuple(map(int, re.findall(r"\d+", matplotlib.__version__)[:2])) >= (3, 11)


def written(text: str) -> str:
    """`text` as the fonts here can show it."""
    text = unicodedata.normalize("NFC", text)
    strange = _lacking(text)
    return "".join(_spelled(letter) if letter in strange else letter for letter in text) if strange else text


def legend(texts: Iterable[str]) -> str:
    """What stands for letters that pictures cannot show by more than a number; empty where there are none."""
    strange = dict.fromkeys(
        letter
        for text in texts
        for letter in unicodedata.normalize("NFC", text)
        if letter in _lacking(text) and _spelled(letter) == _numbered(letter)
    )
    return (
        "no font here has these letters of the labels: "
        + ", ".join(f"{_numbered(letter)} is {letter}" for letter in strange)
        if strange
        else ""
    )


def for_matplotlib(text: str) -> tuple[str, dict[str, Any]]:
    """What to give matplotlib for `text`, and with which arguments: its fonts, and no mathematics in it."""
    shown = written(text)
    shown = shown if _MATPLOTLIB_SHAPES else _turned(shown)
    fonts = fonts_for(rare_letters(shown))
    others = {fonts[letter] for letter in shown if letter in fonts}
    return shown, {"fontfamily": [BASE, *sorted(name for name, _ in others)], "parse_math": False}


def width(text: str, size: int) -> float:
    """Width of a line in pixels, in letters of `size` pixels."""
    return sum(sized_font(path, size).getlength(run) for run, path in _runs(text))


def draw(pen: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, size: int, fill: str = "black") -> None:
    """A line of text whose upper left corner is `xy`."""
    left, baseline = xy[0], xy[1] + sized_font(None, size).getmetrics()[0]
    for run, path in _runs(text):
        font = sized_font(path, size)
        pen.text((left, baseline), run, fill=fill, font=font, anchor="ls")
        left += font.getlength(run)


def height(size: int) -> int:
    """Pixels from the top of a line to the lowest of its letters."""
    return sum(sized_font(None, size).getmetrics())


@functools.lru_cache(maxsize=64)
def sized_font(path: str | None, size: int) -> ImageFont.FreeTypeFont:
    own = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(path or str(own), size)


@functools.cache
def _base_letters() -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return frozenset(map(chr, FT2Font(str(path)).get_charmap()))


def rare_letters(text: str) -> frozenset[str]:
    """Letters of `text` that need another font than the base."""
    return frozenset(letter for letter in text if not letter.isspace()) - _base_letters()


@functools.lru_cache(maxsize=256)
def fonts_for(letters: frozenset[str]) -> dict[str, tuple[str, str]]:
    """(name, file) of a font for each of `letters`, as far as the system has one."""
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    found: dict[str, tuple[str, str]] = {}
    if not letters:
        return found
    upright = sorted(
        {
            (one.style != "normal", one.weight not in (400, "normal", "regular"), one.name, one.fname)
            for one in fontManager.ttflist
            if "LastResort" not in one.fname
        }
    )
    for *_, name, path in upright:
        missing = letters - found.keys()
        if not missing:
            break
        try:
            face = FT2Font(path)
            has = [letter for letter in missing if face.get_char_index(ord(letter))]
            if has:
                ImageFont.truetype(path, 16)  # refuses fonts of coloured pictures, which have one size
        except (OSError, RuntimeError):
            continue
        found |= dict.fromkeys(has, (name, path))
    return found


def _lacking(text: str) -> set[str]:
    rare = rare_letters(unicodedata.normalize("NFC", text))
    return set(rare - fonts_for(rare).keys())


def _spelled(letter: str) -> str:
    """`letter` in plain ones."""
    if _INVISIBLE.match(letter):
        return ""
    bare = "".join(one for one in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(one))
    if bare and bare != letter and not rare_letters(bare):
        return bare
    name = unicodedata.name(letter, "")
    sound = _SOUND.fullmatch(name)
    if sound:
        return sound[1].lower()
    if unicodedata.combining(letter) or unicodedata.category(letter).startswith("M"):
        return ""
    return _numbered(letter) if not name or "IDEOGRAPH" in name else f"[{name.lower()}]"


def _numbered(letter: str) -> str:
    return f"[U+{ord(letter):04X}]"


def _runs(text: str) -> list[tuple[str, str | None]]:
    """(text, file of its font; None for the base) in the order in which they are drawn."""
    shown = written(text)
    shown = shown if _PILLOW_SHAPES else _turned(shown)
    others, runs = fonts_for(rare_letters(shown)), []
    for letter in shown:
        path = others[letter][1] if letter in others else None
        if runs and (runs[-1][1] == path or letter.isspace()):
            runs[-1] = (runs[-1][0] + letter, runs[-1][1])
        else:
            runs.append((letter, path))
    return runs


def _turned(text: str) -> str:
    """`text` in the order of its letters from left to right, for what draws them so whatever their script."""
    return _RIGHT_TO_LEFT.sub(lambda found: "".join(reversed(regex.findall(r"\X", found[0]))), text)
