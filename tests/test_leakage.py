"""The leakage filter: what it removes, what it leaves, what it reports."""

import random

import pytest

from jmlr_jax.data.leakage import filter_leaks, words
from jmlr_jax.data.schema import Passage, Question


def question(id_: str, text: str, answer: str, gold: tuple[str, ...] = ()) -> Question:
    return Question(id_, text, (answer, "something else"), answer, 0, gold)


TEST = question("t1", "A man of forty has pain in the left knee at night. What helps?", "Cold compresses", ("p1",))
PASSAGES = [
    Passage("p0", "Knees", "Pain in the right knee at night is common."),
    Passage("p1", "Case", 'He wrote: "a man of FORTY has pain, in the left knee" and no more.'),
    Passage("p2", "Key", "At night? What helps: cold compresses, mostly."),
]


def test_removes_quotes_whatever_their_case_and_punctuation():
    kept, report = filter_leaks(PASSAGES, {"test": [TEST]}, 6)
    assert [p.id for p in kept] == ["p0"]
    first, second = report.removed
    assert (first.passage_id, first.question_id, first.split) == ("p1", "t1", "test")
    assert first.shared == "a man of forty has pain in the left knee"
    assert second.shared == "at night what helps cold compresses"  # runs from the question into its answer


def test_length_of_the_run_decides():
    assert [p.id for p in filter_leaks(PASSAGES, {"test": [TEST]}, 7)[0]] == ["p0", "p2"]
    assert [p.id for p in filter_leaks(PASSAGES, {"test": [TEST]}, 10)[0]] == ["p0", "p2"]
    assert filter_leaks(PASSAGES, {"test": [TEST]}, 11)[0] == PASSAGES
    assert filter_leaks(PASSAGES, {"test": [TEST]}, 0)[0] == PASSAGES


def test_gold_passages_do_not_vanish_silently():
    _, report = filter_leaks(PASSAGES, {"test": [TEST], "train": []}, 6)
    assert report.gold_removed == 1 and [o.gold for o in report.removed] == [True, False]
    assert report.questions_without_gold == ("t1",)


def test_training_questions_are_reported_and_remove_nothing():
    kept, report = filter_leaks(PASSAGES, {"train": [TEST]}, 6)
    assert kept == PASSAGES and not report.removed
    assert [o.passage_id for o in report.train_overlaps] == ["p1", "p2"]


def test_no_run_crosses_from_one_text_to_the_next():
    asked = [question("a", "one two", "three"), question("b", "four five", "six")]
    passages = [Passage("p", "", "one two three four five six")]
    assert filter_leaks(passages, {"dev": asked}, 3)[0] == []
    assert filter_leaks(passages, {"dev": asked}, 4)[0] == passages
    halves = [Passage("p", "", "one two"), Passage("q", "", "three four")]
    assert filter_leaks(halves, {"dev": [question("a", "one two three", "four")]}, 4)[0] == halves


@pytest.mark.parametrize(("n", "alphabet"), [(1, "abcdefghijklmnopqrstuvwxyzäöü"), (2, "abcdefgh"), (5, "ab")])
def test_agrees_with_the_definition_on_random_texts(n, alphabet):
    rng = random.Random(n)

    def text(length: int) -> str:
        return " ".join(rng.choice(alphabet) for _ in range(length))

    passages = [Passage(f"p{i}", "", text(rng.randint(1, 12))) for i in range(60)]
    asked = [question(f"q{i}", text(rng.randint(1, 4)), text(2)) for i in range(3)]

    def runs(string: str) -> set[tuple[str, ...]]:
        w = words(string)
        return {tuple(w[i : i + n]) for i in range(len(w) - n + 1)}

    leaked = set.union(*(runs(f"{q.question} {q.answer}") for q in asked))
    expected = [p for p in passages if not runs(p.text) & leaked]
    kept, report = filter_leaks(passages, {"test": asked}, n)
    assert kept == expected and len(report.removed) == len(passages) - len(kept)
    assert 0 < len(expected) < len(passages)


def test_chinese_is_compared_by_characters():
    asked = question("zh", "该患者首选的根除治疗方案是", "四联疗法")
    copied = Passage("leak", "题解", "答:该患者首选的根除治疗方案是四联疗法。")
    other = Passage("other", "内科学", "该患者首选的治疗是休息。")
    kept, report = filter_leaks([copied, other], {"test": [asked]}, 12)
    assert [p.id for p in kept] == ["other"] and report.removed[0].shared.replace(" ", "").startswith("该患者首选")
    assert words("COVID-19感染ＡＢ") == ["covid", "19", "感", "染", "ab"]
