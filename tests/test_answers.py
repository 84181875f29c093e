"""Reading answers out of generated text, each form against a table."""

import doctest

import pytest

from jmlr_jax.evaluation import answers
from jmlr_jax.evaluation.answers import exact_match, first_equal, parse_answer, token_f1


def test_doctests():
    result = doctest.testmod(answers)
    assert result.attempted >= 5 and result.failed == 0


OPTIONS = ("Aspirin", "Acute renal failure", "Renal failure", "E. coli infection")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("B", 1),
        ("b", 1),
        ("(b)", 1),
        ("b)", 1),
        ("B.", 1),
        (" B \n", 1),
        ("B:", 1),
        ("[C]", 2),
        ("**C**", 2),
        ('"C"', 2),
        ("B\nbecause of the kidneys", 1),
        ("Answer: B", 1),
        ("Answer: B.", 1),
        ("answer: b", 1),
        ("The answer is B", 1),
        ("The correct answer is (B).", 1),
        ("The answer is A because it thins the blood", 0),
        ("option B", 1),
        ("I would choose option b.", 1),
        ("I choose (D)", 3),
        ("B) Acute renal failure", 1),
        ("B. Acute renal failure", 1),
        ("B acute renal failure", 1),
        ("Acute renal failure", 1),
        ("ACUTE  renal\tfailure.", 1),
        ("'renal failure'", 2),
        ("renal-failure", 2),
        ("The patient has acute renal failure, I think.", 1),
        ("This points to renal failure", 2),
        ("e. coli infection", 3),
        ("E. coli infection", 3),
        ("An E. coli infection is likely", 3),
        ("Ａspirin", 0),  # full-width letter
        # Unparsed: nothing, nothing known, or two things.
        ("", None),
        ("   \n", None),
        ("...", None),
        ("\x00\ufffd", None),
        ("E", None),
        ("Answer: F", None),
        ("I do not know", None),
        ("A patient came in with a cold", None),
        ("The answer is a matter of taste", None),
        ("answer: Vitamin B-12", None),
        ("aspirin or renal failure", None),
        ("A or B", None),
        ("Answer: B or C", None),
        ("(A) and (B)", None),
        ("B) Aspirin", None),
        ("Answer: C. Acute renal failure", None),
        ("aspirins", None),
        ("non-aspirin", None),
        ("A" * 10_000, None),
    ],
)
def test_parse_answer(text, expected):
    assert parse_answer(text, OPTIONS) == expected


@pytest.mark.parametrize(
    "text, options, expected",
    [
        ("yes", ("yes", "no", "maybe"), 0),
        ("There is no doubt: yes", ("yes", "no", "maybe"), None),
        ("5%", ("5%", "15%", "0.5%"), 0),
        ("about 0.5% of cases", ("5%", "15%", "0.5%"), 2),
        ("<5", ("<5", ">5"), 0),
        ("take 1.5 mg", ("1", "1.5"), 1),
        ("C", ("A", "C", "D"), None),  # the option "C", or the third?
        ("A", ("A", "C", "D"), 0),
        ("J", tuple("option " + str(i) for i in range(10)), 9),
        ("anything", (), None),
        ("x", ("", "x"), 1),
        ("a+b (c", ("a+b (c", "[d"), 0),
    ],
)
def test_parse_answer_of_other_options(text, options, expected):
    assert parse_answer(text, options) == expected


def test_free_text_scores():
    assert exact_match(" An aspirin ", "the ASPIRIN.") and not exact_match("aspirins", "aspirin")
    assert token_f1("", "aspirin") == 0 and token_f1("heparin", "aspirin") == 0
    assert token_f1("Aspirin!", "aspirin") == 1
    assert token_f1("aspirin aspirin", "aspirin heparin") == pytest.approx(0.5)


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"answer": "B"}', 1),
        ("{'answer': 'b'}", 1),
        ('{"answer": B}', 1),
        ('```json\n{"reasoning": "Aspirin, so A?", "answer": "C) Renal failure"}\n```', 2),
        ('{"step_by_step_thinking": "not (A)", "answer_choice": "D"}', 3),
        ('{"answer": ["B"]}', 1),
        ('{"answer": "E. coli infection", "note": "A', 3),  # cut off
        ('{"final_answer": {"letter": "B"}}', None),
        ('{"answer": ["A", "B"]}', None),
        ('{"answer": "A"} {"answer": "B"}', None),
        ('{"answer": null}', None),
        ('{"answer": "unclear", "option": "none"}', None),
        ('{"answer": "B", "option": "unclear"}', 1),
        ('{"answer": "acute\\nrenal failure"}', 1),
        (r"So A is out. \boxed{B}", 1),
        (r"$\boxed{\text{(B)}}$", 1),
        (r"\boxed{B} and again \boxed{\textbf{B}}", 1),
        (r"\boxed{A} or \boxed{B}", None),
        (r"\boxed{}", None),
        ("<think>A or C? The answer is A.</think>\nThe answer is B.", 1),
        ("<think>first A</think> no <think>then C</think> **B**", 1),
        ("A lost opening tag: answer is A</think>C", 2),
        ("<think>The answer is A", None),  # it never came to an answer
        ("<thinking>A</thinking>B", 1),
        ("I think it is **B**, since the kidneys fail.", 1),
        ("**Answer:** B", 1),
        ("**Final answer: B**", 1),
        ("The answer is **B. Acute renal failure**", 1),
        ("**B.** Acute renal failure", 1),
        ("### Answer\n\n**(B)**\n", 1),
        ("**A**: no. **B**: yes.", None),
        ("**A** patient came with a cold: **B**", None),
    ],
)
def test_forms_that_generators_answer_in(text, expected):
    assert parse_answer(text, OPTIONS) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("C", 0),
        ("heparin", 1),
        ("Aspirin.", 0),
        ("A or C", 0),
        ("it is aspirin", 0),
        ("A) aspirin", 0),
        ("A or B", None),
    ],
)
def test_of_equal_options_either_is_the_first(text, expected):
    assert parse_answer(text, ("Aspirin", "heparin", "aspirin.")) == expected


def test_equal_options():
    assert first_equal(("x", "y", "X ", "y.", "z")) == [0, 1, 0, 1, 4]
    assert first_equal(()) == []
