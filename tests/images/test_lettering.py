"""Letters of labels: every script is readable, with the fonts that are there or without them."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from blendswap.images import lettering
from blendswap.images.plot import loss_plot

SCRIPTS = [
    "café",
    "Ångström",
    "красная",
    "ΟΔΟΣ",
    "λ",
    "שלום",
    "سلام",
    "猫",
    "ねこ",
    "고양이",
    "แมว",
    "नमस्ते",
    "🐶",
    "cafe\u0301",
]


@pytest.fixture
def no_system_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The machine of a user who has matplotlib's fonts and no others."""
    from matplotlib.font_manager import fontManager

    own = [entry for entry in fontManager.ttflist if Path(entry.fname).is_relative_to(matplotlib.get_data_path())]
    with monkeypatch.context() as patch:
        patch.setattr(fontManager, "ttflist", own)
        lettering.fonts_for.cache_clear()
        yield
    lettering.fonts_for.cache_clear()


def ink(text: str, size: int = 24) -> np.ndarray:
    picture = Image.new("L", (int(lettering.width(text, size)) + 8, 40), 255)
    lettering.draw(ImageDraw.Draw(picture), (2, 2), text, size)
    return np.asarray(picture)


def box() -> np.ndarray:
    """What stands for a letter that the font does not have."""
    picture = Image.new("L", (60, 40), 255)
    ImageDraw.Draw(picture).text((2, 2), "\U000f1234", font=lettering.sized_font(None, 24))
    return np.asarray(picture)


@pytest.mark.parametrize("text", SCRIPTS)
def test_no_letter_of_any_script_is_drawn_as_a_box(no_system_fonts, text: str) -> None:
    shown = lettering.written(text)
    assert shown.strip() and not lettering.rare_letters(shown)
    drawn = ink(text)
    assert (drawn < 128).sum() > 20
    columns = np.flatnonzero((box() < 128).any(0))
    template = box()[:, columns[0] : columns[-1] + 1]
    wide = template.shape[1]
    for left in range(drawn.shape[1] - wide + 1):
        assert not np.array_equal(drawn[2:, left : left + wide] < 128, template[2:] < 128), text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("café", "café"),
        ("красная λ", "красная λ"),
        ("ねこ", "neko"),
        ("고양이", "goyangi"),
        ("แมว", "aemowo"),
        ("a 🐶", "a [dog face]"),
        ("猫", "[U+732B]"),
    ],
)
def test_what_no_font_has_is_written_in_plain_letters(no_system_fonts, text: str, shown: str) -> None:
    assert lettering.written(text) == shown


def test_numbers_in_the_place_of_letters_are_explained(no_system_fonts) -> None:
    assert lettering.legend(["a 猫", "star"]) == "no font here has these letters of the labels: [U+732B] is 猫"
    assert lettering.legend(["star", "café", "ねこ"]) == ""


def test_a_font_of_the_system_is_used_for_what_the_base_lacks(tmp_path, monkeypatch) -> None:
    """A font with one letter more than the base stands for the system's."""
    fontTools = pytest.importorskip("fontTools.ttLib")
    from matplotlib.font_manager import fontManager, ttfFontProperty
    from matplotlib.ft2font import FT2Font

    path = tmp_path / "own.ttf"
    with fontTools.TTFont(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")) as font:
        for table in font["cmap"].tables:
            if table.isUnicode():
                table.cmap[ord("猫")] = "M"
        for name in font["name"].names:
            if name.nameID in (1, 4, 16):
                font["name"].setName("Own", name.nameID, name.platformID, name.platEncID, name.langID)
        font.save(path)
    monkeypatch.setattr(fontManager, "ttflist", [*fontManager.ttflist, ttfFontProperty(FT2Font(str(path)))])
    lettering.fonts_for.cache_clear()
    try:
        assert lettering.written("猫 cat") == "猫 cat" and lettering.legend(["猫"]) == ""
        assert np.array_equal(ink("猫") < 128, ink("M") < 128)
        assert np.array_equal(ink("a猫b") < 128, ink("aMb") < 128)
        history = [{"clip": torch.tensor([1.0])}]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # matplotlib warns of a glyph that is missing
            assert (loss_plot(history, "猫") < 0.95).any()
    finally:
        lettering.fonts_for.cache_clear()
        shutil.rmtree(tmp_path)


@pytest.mark.parametrize("text", SCRIPTS)
def test_a_plot_titled_in_any_script_lacks_no_letter(no_system_fonts, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_plot([{f"clip: {text}": torch.tensor([1.0])}], text)


@pytest.mark.parametrize(("one", "other"), [("звезда", "ковёры"), ("猫", "狗"), ("ねこ", "いぬ"), ("café", "cafè")])
def test_every_label_tells_words_of_other_letters_apart(one: str, other: str) -> None:
    from blendswap.attention_swap.pictures.draw import heat_picture
    from blendswap.attention_swap.sweep import contact_sheet

    picture = torch.zeros(64, 64, 3)
    for label in (
        lambda word: heat_picture(picture, torch.zeros(64, 64), word),
        lambda word: contact_sheet(picture, [picture], [word], 1),
        lambda word: loss_plot([{"clip": torch.tensor([1.0])}], word),
    ):
        assert not torch.equal(label(one), label(other))
