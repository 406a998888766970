"""Answers: what is taken for one, and what is the same."""

import threading
import time

import pytest

from localreason.runtime.answer import extract, group, is_equal
from localreason.runtime.markup import in_code_or_formula


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{42}.", "42"),
        ("\\boxed{1} no, \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{7} and \\boxed{unfinished", "7"),
        ("sum\n#### 1,234", "1,234"),
        ("Final Answer: 18 clips", "18"),
        ("**Final Answer**: $x+1$", "x+1"),
        ("Final Answer: 12 + 7 = 19", "19"),
        ("The answer is 3 * 4 = 6 + 6 = 12.", "12"),
        ("The answer is 5 - 2 apples", "5 - 2"),
        ("The answer is 5 - the apples", "5"),
        ("The answer is 3/4.", "3/4"),
        ("The answer is 5, since", "5"),
        ("The answer is $\\frac{3}{4}$.", "\\frac{3}{4}"),
        ("The answer is $5 and $6", "$5 and $6"),
        ("The answer is (B).", "B"),
        ("The answer is A good one", None),
        ("The answer is I think 5", None),
        ("So the answer is 4. The final answer is correct.", "4"),
        ("The final answer is **not** 5", None),
        ("Final Answer: correct", "correct"),
        ("The correct answer is B.", "B"),
        ("The correct answer is 5.", "5"),
        ("The answer is B because it is red", "B"),
        ("The answer is A because it is red", "A"),
        ("The answer is **C**, the largest", "C"),
        ("Answer: (D) is the one", "D"),
        ("Answer: B) 42", "B"),
        ("Answer: (B) 42", "B"),
        ("The correct option is (B) Mitochondria.", "B"),
        ("The correct option is unclear.", None),
        ("Answer: **B) 42**", "B"),
        ("The answer is (C) Mitochondria", "C"),
        ("The correct answer is B) The sun", "B"),
        ("The answer is B (Paris)", "B"),
        ("The answer is B (42).", "B"),
        ("The answer is B - Paris", "B"),
        ("The answer is option B.", "B"),
        ("Final Answer: Option (B), Paris", "B"),
        ("The answer is choice D", "D"),
        ("The answer is \\textbf{(B)} 42", "B"),
        ("The answer is B, I think", "B"),
        ("The answer is A, B.", None),
        ("The answer is A/B", None),
        ("The answer is B) or C)", None),
        ("The answer is C (5, 2)", None),
        ("The answer is B or C", None),
        ("The answer is (B) and (C)", None),
        ("The answer is C + 1", None),
        ("\\boxed{\\left\\{1, 2\\right\\}}", "\\left\\{1, 2\\right\\}"),
        ("there are 5 apples", None),
        ("\\boxed{}", None),
        ("\\boxed{7}. It is placed within \\boxed{}.", "7"),
        ("The answer is 7, in \\boxed{ }.", "7"),
        ("", None),
    ],
)
def test_extract(text, answer):
    assert extract(text) == answer


@pytest.mark.parametrize(
    "lead", ["Final Answer:", "**Final Answer:**", "The answer is", "Answer:", "####", "### Answer\n"]
)
@pytest.mark.parametrize(
    ("ending", "answer"),
    [
        ("3\\sqrt{2}", "3\\sqrt{2}"),
        ("3\\sqrt{2} cm.", "3\\sqrt{2}"),
        ("3 sqrt(2)", "3 sqrt(2)"),
        ("2^{10}", "2^{10}"),
        ("10^5.", "10^5"),
        ("1e6", "1e6"),
        ("3x+2", "3x+2"),
        ("3 + 2i", "3 + 2i"),
        ("1 1/2 cups", "1 1/2"),
        ("3.14 × 10^5", "3.14 × 10^5"),
        (".05", ".05"),
        ("−5.", "−5"),
        ("5!", "5!"),
        ("10,\\!080", "10,\\!080"),
        ("52_8", "52_8"),
        ("2, 3", "2, 3"),
        ("4, 5, and 6", "4, 5, and 6"),
        ("3:4", "3:4"),
        ("(0, 1]", "(0, 1]"),
        ("\\text{Evelyn}", "\\text{Evelyn}"),
        ("\\left( 3, \\frac{\\pi}{2} \\right).", "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("y = 2x + 3.", "y = 2x + 3"),
        ("\\$18", "\\$18"),
        ("20-5=15 dollars", "15"),
        ("20 dollars - 5 dollars = 15 dollars.", "15"),
        ("3 x 4 = 12 apples.", "12"),
        ("\\frac{1}{2} + \\frac{1}{4} = \\frac{3}{4}", "\\frac{3}{4}"),
        ("x = 20 - 5 = 15", "15"),
        ("20/3 ≈ 6.67", "20/3"),
        ("7 (since 3+4=7).", "7"),
        ("7 because 3 + 5 = 8.", "7"),
        ("18 (9 + 9)", "18"),
        ("18 dollars for 3 days", "18"),
        ("18 for 3 days", "18"),
        ("42, a prime.", "42"),
        ("42, and the answer 41 would be wrong.", "42"),
        ("5 m.", "5"),
        ("5 x", "5 x"),
        ("**42**, I think", "42"),
        ("`42`", "42"),
        ("$x$ = 5", "$x$ = 5"),
        ("$x = 3$ or $x = 5$", "$x = 3$ or $x = 5$"),
        ("$\\$18$", "\\$18"),
        ("$12 + 7 = 19$", "19"),
        ("\\(\\frac{3}{4}\\) cups", "\\frac{3}{4}"),
        ("\n\\[\n\\frac{3}{4}\n\\]", "\\frac{3}{4}"),
        ("\n\n$$\n\\frac{3}{4}\n$$", "\\frac{3}{4}"),
        ("\n\n$$\nx = 5.\n$$", "x = 5"),
        ("\n```\n5\n```", "5"),
        ("\n**5**", "5"),
        ("5 hours 30 minutes in all, by every clock of the house", None),
        ("5 hours and 30 minutes in all, by every clock of the house", None),
        ("20 dollars - 5 dollars that she had given to her mother", None),
        ("\n1. Add 40 and 2.\n2. Done.", None),
        ("\n- 42\n- 43", None),
        ("\n```\nx = 1\nprint(x)\n```", None),
        ("\n\\[\n\\frac{3}{4}\n", None),
        ("\\[", None),
        ("\\boxed{4", None),
        ("**", None),
        ("a good one, or so everybody in the village seems to think", None),
        ("(as above, though nobody in the village would believe it)", None),
    ],
)
def test_behind_every_lead_the_whole_answer_is_read_or_none(lead, ending, answer):
    assert extract(f"So 3 + 4 = 7.\n\n{lead} {ending}") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 42.\n\nHere is how I found the answer:\n1. Add 40 and 2.", "42"),
        ("The answer is 42. I checked the answer 3 times.", "42"),
        ("Final Answer: 42\n\nNote: this answer 2 digits.", "42"),
        ("To find the answer:\n\n1. Add 2 and 3.\n2. So it is 5.", None),
        ("I do not know the answer\n5 is a prime", None),
        ("#### Step 3: Add\nThe answer is 42.", "42"),
        ("#### Final Answer\n42", "42"),
        ("#### Final Answer: 42", "42"),
        ("**Final Answer**\n\n\\[ 5 \\]", "5"),
        ("(The answer is 42.)", "42"),
        ("Final Answer: 5:30 pm", "5:30 pm"),
        ("The answer is 5:30 pm", None),
        ("Final Answer: 5 hours and 30 minutes", "5 hours and 30 minutes"),
        ("Final Answer: Paris", "Paris"),
        ("The answer is Paris", None),
    ],
)
def test_a_lead_leads_to_what_is_stated_there(text, answer):
    assert extract(text) == answer


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("42", "42.0"),
        ("1,234", "1234"),
        ("11,\\! 111,\\! 111", "11111111"),
        ("\\$36", "36"),
        ("025", "25"),
        ("\\frac{1}{2}", "0.5"),
        ("\\dfrac{3}{4}", "\\frac{3}{4}"),
        ("90^\\circ", "90"),
        ("\\text{Evelyn}", "Evelyn"),
        ("2\\sqrt{3}", "\\sqrt{12}"),
        ("(1, 2)", "(1,2)"),
        ("x^2+1", "1 + x^2"),
        ("18", "18\\text{ dollars}"),
        ("18 dollars", "18"),
        ("5 \\text{ cm}^2", "5"),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
        ("\\text{(B)}", "B"),
        ("1\\frac{1}{2}", "\\frac{3}{2}"),
        ("3, 1, 2", "1,2,3"),
        ("18", "18\\,\\text{dollars}"),
        ("18", "18\\ \\text{dollars}"),
        ("18", "18\\;\\text{dollars}."),
        ("5", "5~\\text{cm}"),
        ("18", "18\\,\\$"),
        ("18", "€18"),
        ("5", "£5"),
        ("5", "5 km/h"),
        ("5", "5km/h"),
        ("5", "5 m/s^2"),
        ("5", "5 miles/hour"),
        ("5", "5 cm"),
        ("5", "5cm"),
        ("18", "18^\\circ\\text{C}"),
        ("18", "18^{\\circ}C"),
        ("18", "18 °C"),
        ("90°", "90"),
        ("90°", "90^\\circ"),
        ("\\frac{3}{4}\\text{ cups}", "\\frac{3}{4}"),
        ("\\frac{3}{4} cups", "\\frac{3}{4}"),
        ("\\frac{270}7\\text{ degrees}", "\\frac{270}{7}"),
        ("3/4 cup", "0.75"),
        ("1 1/2", "3/2"),
        ("-1 1/2 cups", "-\\frac{3}{2}"),
        ("1e6", "1000000"),
        ("1e6", "10^6"),
        ("1e-05", "0.00001"),
        ("3.14 × 10^5", "314000"),
        ("3\\cdot10^{-2}", "0.03"),
        ("6 + 7", "7+6"),
        ("−5", "-5"),
        ("$x = 3$ or $x = 5$", "3, 5"),
        ("52_8", "52_{8}"),
        ("52_8", "52"),
        ("1A_{16}", "1A_{16}"),
        ("(-1)^{100}", "1"),
        ("(x+1)^2", "x^2+2x+1"),
        ("(x-1)(x+2)(x-3)(x+4)(x-5)(x+6)", "(x+6)(x-1)(x+4)(x-3)(x+2)(x-5)"),
        ("(a+b)(c-d)(a-c)", "(a+b)(a-c)(c-d)"),
    ],
)
def test_equal(one, other):
    assert is_equal(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("42", "43"),
        ("(1,2)", "(2,1)"),
        ("x", "y"),
        ("", "1"),
        ("-3", "3"),
        ("6 + 7", "13"),
        ("391", "17*23"),
        ("10 - 4", "6"),
        ("52_8", "528"),
        ("10_2", "10_3"),
        ("10_2", "10_{16}"),
        ("52_8, 10_2", "52_8, 10_3"),
        ("12345678901234567890", "12345678901234567891"),
        ("1e999", "1e9999"),
        ("nan", "inf"),
        ("5 x", "5"),
        ("5 a/b", "5"),
        ("\\text{blue}\\text{ cat}", "\\text{blue}"),
        ("2\\mathrm{i}", "2"),
        ("2\\mathrm{e}", "2"),
        ("\\frac{1}{2}\\text{ cup}", "2"),
        ("1 1/2", "1/2"),
        ("1 1/2", "11/2"),
        ("1e6", "1e7"),
        ("18^\\circ", "18^2"),
        ("2^C", "2"),
        ("3 apples", "4 apples"),
        ("[0,1]", "(0,1)"),
        ("east", "seat"),
        ("true north", "north true"),
    ],
)
def test_different(one, other):
    assert not is_equal(one, other)


def test_text_is_never_run_and_large_powers_are_not_computed():
    assert not is_equal("__import__('os').system('false')", "1")
    assert not is_equal("9^{99999999}", "1")


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^9}",
        "9^9^9",
        "9**9**9",
        "((9^{999})^{999})^{999}",
        "2^{(999999999)}",
        "2^{99\\cdot 99999}",
        "99999!",
        "(99!)!",
        "\\left(10!\\right)!",
        "2^{(20!)}",
        "9^{99!}",
        "9^99!",
        "\\Gamma(5000000)",
        "\\binom{99999999}{55555555}",
        "2^\\frac{99999999}{1}",
        "\\prod_{i=1}^{99999} i",
        "9" * 500,
        "[" * 190 + "1" + "]" * 190,
        "\\sin(\\cos(" * 10 + "1" + "))" * 10,
        "\\tan(" * 5 + "1" + ")" * 5,
        "".join(f"\\sin({i}x)" for i in range(20)),
        "(a+b+c+d+e)^{20}",
        "(1+i)^{999}",
        "[x+y+z]^{60}",
        "(a+b-c+d-e+f)" * 9,
    ],
)
def test_an_answer_that_would_take_for_ever_to_compute_is_compared_as_text(text):
    started = time.monotonic()
    assert not is_equal(text, "1")
    assert is_equal(text, f"${text}$")
    assert time.monotonic() - started < 2


def test_a_boxed_that_repeats_without_end_is_read_in_one_pass():
    started = time.monotonic()
    assert extract("\\boxed{" * 50_000) is None
    assert extract("\\boxed{" * 50_000 + "7}") == "7"
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "text",
    [
        "answer " * 20_000,
        "final answer: " * 5_000 + "x" * 100_000,
        "answer: " + "+" * 20_000,
        "answer: 1 + 1 =" + "\n" * 20_000 + "x",
        "answer: 1 + 1 =" + " " * 20_000 + "x",
        "answer: " + "1 + 1 = " * 5_000 + "x",
        "answer: \\[" * 10_000,
        ("final answer: " + "1 (" * 130 + "\n") * 200,
        ("final answer: " + "1 a " * 100 + "\n") * 200,
        ("final answer: " + ", " * 200 + "\n") * 200,
        "answer:\n```\n" * 10_000,
        "answer" + " " * 100_000,
        "#" * 100_000,
        ("#" * 50_000 + "\n") * 2,
        "\\boxed{" + " " * 100_000,
        "\\boxed{ }" * 10_000,
    ],
)
def test_a_reply_that_goes_on_for_ever_is_read_in_one_pass(text):
    started = time.monotonic()
    extract(text)
    assert time.monotonic() - started < 2


def test_the_last_of_many_leads_counts():
    assert extract("The answer is 3. " * 100 + "Final Answer: 4\n" + "The answer is unclear. " * 9) == "4"


def test_a_unit_of_spaces_is_read_in_one_pass():
    started = time.monotonic()
    for text in (
        "1\\text{" + " " * 100_000,
        "1" * 100_000 + " x",
        "1 " + "ab " * 30_000 + "1",
        "1^\\circ" + " " * 100_000,
    ):
        assert is_equal(text, text)
    assert time.monotonic() - started < 2


def test_works_off_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(is_equal("\\frac{2}{4}", "\\frac12")))
    thread.start()
    thread.join(60)
    assert found == [True]


def test_groups_keep_their_order_and_missing_answers_stand_alone():
    assert group(["1", None, "2", "1.0", None]) == [[0, 3], [1], [2], [4]]


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("plain, text", False),
        ("```py\nx = 1", True),
        ("```py\nx = 1\n```\nso", False),
        ("costs $5 and $6, so", False),
        ("let $x = 1", True),
        ("it costs $5.\n\nNext", False),
        ("\\[ a", True),
        ("\\( a", True),
        ("\\( a \\)", False),
        ("\\boxed{a", True),
        ("\\boxed{a}", False),
        ("price \\$5, then", False),
    ],
)
def test_inside_code_or_formula(text, inside):
    assert in_code_or_formula(text) is inside
