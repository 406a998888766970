"""Formulas: what becomes of LaTeX, however it arrives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localreason.tui.formula import FormulaReader, readable, shown


@pytest.mark.parametrize(
    ("formula", "text"),
    [
        (r"\frac{1}{2} + x^2 \le \sqrt{3}", "1/2 + x² ≤ √3"),
        (r"\frac{n+1}{2m}", "(n+1)/(2m)"),
        (r"\sum_{i=1}^{n} i", "∑ᵢ₌₁ⁿ i"),
        (r"18 \times 9 = 162\text{ pages}", "18 × 9 = 162 pages"),
        (r"\left( a \right)^{2} \implies b", "( a )² ⟹ b"),
        (r"90^\circ, x^{a+b}", "90°, x^(a+b)"),
        (r"\begin{aligned} a &= b \\ c &= d \end{aligned}", "a = b\nc = d"),
        (r"\frac{1", r"\frac{1"),
        (r"\nosuchthing", r"\nosuchthing"),
    ],
)
def test_a_formula_becomes_unicode_or_stays_as_it_is(formula, text):
    assert readable(formula) == text


@pytest.mark.parametrize(
    "text",
    [
        "costs $5 and $6",
        "`\\(x^2\\)`",
        "```\n$x^2$\n```",
        "~~~\n\\[x\\]\n~~~\n",
        "~~gone~~",
        "an \\( open one",
        "a ` tick",
    ],
)
def test_money_code_and_open_formulas_are_left_alone(text):
    assert shown(text) == text


PIECES = [
    "\\(",
    "\\)",
    "\\[",
    "\\]",
    "$",
    "$$",
    "`",
    "```",
    "~~~",
    "\n",
    "\n\n",
    "x^2",
    " a ",
    "\\boxed{",
    "}",
    "\\",
    "5",
]


@given(st.lists(st.sampled_from(PIECES)), st.lists(st.integers(1, 7), min_size=1))
def test_however_a_text_is_cut_the_same_is_shown(pieces, sizes):
    text = "".join(pieces)
    reader, out, at, turn = FormulaReader(), "", 0, 0
    while at < len(text):
        size = sizes[turn % len(sizes)]
        out += reader.feed(text[at : at + size])
        at, turn = at + size, turn + 1
    assert out + reader.flush() == shown(text)
