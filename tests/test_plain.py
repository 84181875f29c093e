"""Plain records as people have them: fields of other names, options in other forms, answers that cannot be guessed."""

import json
from pathlib import Path

import pytest

from jmlr_jax.data.readers import read_corpus, read_questions
from jmlr_jax.data.schema import Passage, RecordError

PLAIN = {"id": "x", "question": "q?", "options": {"A": "a", "B": "b"}, "answer": "B"}
MEDQA = {"question": "q?", "answer": "b", "options": {"A": "a", "B": "b"}, "answer_idx": "B"}


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def as_lines(*records: dict) -> list[str]:
    return [json.dumps(record) for record in records]


TEXTS = ["deltaparin", "zetastat", "alphazol", "betamine"]
LETTERED = dict(zip("ABCD", TEXTS, strict=True))


@pytest.mark.parametrize(
    "given",
    [
        {"options": TEXTS, "answer": "alphazol"},
        {"choices": LETTERED, "answer": "C"},
        {"choices": {letter.lower(): text for letter, text in LETTERED.items()}, "answer": "c"},
        {"choices": [{"label": letter, "text": text} for letter, text in LETTERED.items()], "answerKey": "C"},
        {"choices": {"label": list("ABCD"), "text": TEXTS}, "answerKey": "C"},
        {"options": {str(i): text for i, text in enumerate(TEXTS, 1)}, "answer": "3"},
        {"options": LETTERED, "answer": "alphazol", "answer_idx": "C"},
        {"options": LETTERED, "answer": "alphazol", "answer_index": 2},
        {"options": LETTERED, "answer": "alphazol"},
        {"options": LETTERED, "correct_answer": "alphazol"},
        {"options": LETTERED, "correct_option": "C"},
        {**{f"op{letter.lower()}": text for letter, text in LETTERED.items()}, "cop": 3},
        {**{letter.lower(): text for letter, text in LETTERED.items()}, "answer": "C"},
        {**LETTERED, "Answer": "C"},
        {**{f"Choice {letter}": text for letter, text in LETTERED.items()}, "Correct Answer": "C"},
        {**{f"option_{i}": text for i, text in enumerate(TEXTS)}, "answer": "2"},
    ],
)
def test_options_and_answers_under_other_names(tmp_path, given):
    path = write(tmp_path / "set.jsonl", *as_lines({"question_id": "x", "query": "q?", **given}))
    result = read_questions("jsonl", path)
    (question,) = result.questions
    assert (question.id, question.options, question.answer_index) == ("x", tuple(TEXTS), 2)
    assert not result.report.ignored_fields


@pytest.mark.parametrize(
    ("given", "field", "expected"),
    [
        ({"answer": "A"}, "answer", "a letter or number alone is no answer"),
        ({"answer": "(b)"}, "answer", "options or choices"),
        ({"answer": "x", "answer_idx": 2}, "answer_idx", "options beside it"),
        ({"answer": "x", "optoins": TEXTS}, "optoins", "nearest is 'options'"),
        ({"answer": "x", "distractor1": "y"}, "distractor1", "nearest is 'options'"),
        ({"anwser": "x"}, "anwser", "nearest is 'answer'"),
        ({"options": LETTERED, "answer_idx": 2}, "answer_idx", "0 or from 1"),
        ({"options": LETTERED, "answer": 2}, "answer", "A to D"),
        ({"options": LETTERED, "answer": "alphazol", "answer_idx": "A"}, "answer", "the fields differ"),
        ({"options": LETTERED, "answer": "alphazol", "answer_index": 0}, "answer_index", "2 or 3"),
        ({"options": LETTERED, "choices": TEXTS, "answer": "A"}, "choices", "another field"),
        ({"options": LETTERED, "A": "x", "B": "y", "answer": "A"}, "options", "one form"),
        ({"A": "x", "C": "y", "answer": "A"}, "option C", "one run"),
        ({**{f"op{letter}": letter for letter in "abc"}, "cop": 4}, "cop", "1 to 3"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(tmp_path, given, field, expected):
    path = write(tmp_path / "set.jsonl", *as_lines({"question": "q?", **given}))
    with pytest.raises(RecordError, match=expected) as error:
        read_questions("jsonl", path)
    assert error.value.field == field


def test_fields_that_are_nothing_known_are_counted(tmp_path):
    path = write(tmp_path / "set.jsonl", *as_lines(PLAIN | {"year": 1990, "meshes": ["x"], "long_answer": "y"}))
    assert read_questions("jsonl", path).report.ignored_fields == {"year": 1, "meshes": 1, "long_answer": 1}
    path = write(tmp_path / "medqa.jsonl", *as_lines(MEDQA | {"metamap_phrases": []}))
    assert read_questions("medqa", path).report.ignored_fields == {"metamap_phrases": 1}


def test_a_corpus_as_other_libraries_write_it(tmp_path):
    path = write(tmp_path / "corpus.jsonl", *as_lines({"_id": "d1", "title": "", "text": "x", "metadata": {}}))
    assert read_corpus(path)[0] == [Passage("d1", "", "x")]
    path = write(tmp_path / "corpus.jsonl", *as_lines({"docid": "d1", "contents": "x"}))
    assert read_corpus(path)[0] == [Passage("d1", "", "x")]
    path = write(tmp_path / "corpus.jsonl", *as_lines({"id": "d1", "titel": "T", "text": "x"}))
    with pytest.raises(RecordError, match="nearest is 'title'"):
        read_corpus(path)


@pytest.mark.parametrize(
    ("header", "field"), [("question,a,b,anwser", "anwser"), ("question,distractor1,answer", "distractor1")]
)
def test_a_header_with_a_slip_is_refused_in_either_mode(tmp_path, header, field):
    path = write(tmp_path / "set.csv", header, ",".join("x" for _ in header.split(",")))
    with pytest.raises(RecordError, match="nearest") as error:
        read_questions("csv", path, on_error="skip")
    assert (error.value.line, error.value.field) == (1, field)


def test_mmlu_splits_of_one_subject_have_ids_of_their_own(tmp_path):
    for split in ("dev", "val", "test"):
        write(tmp_path / f"anatomy_{split}.csv", "q?,a,b,c,d,A")
    ids = {q.id for q in read_questions("mmlu", str(tmp_path)).questions}
    assert ids == {"anatomy-dev-000", "anatomy-val-000", "anatomy-000"}  # those of the test split are published so


@pytest.mark.parametrize(
    ("row", "field", "expected"),
    [
        ("q?,a,b,c,A", "(row)", "6 cells"),
        ("q?,a,b,c,d,E", "answer", "A to D"),
        ("q?,a,,c,d,A", "option B", "non-empty"),
    ],
)
def test_bad_mmlu_rows(tmp_path, row, field, expected):
    path = write(tmp_path / "anatomy_test.csv", '"first\nquestion",a,b,c,d,A', row)
    with pytest.raises(RecordError, match=expected) as error:
        read_questions("mmlu", path)
    assert (error.value.line, error.value.field) == (3, field)
    result = read_questions("mmlu", path, on_error="skip")
    assert [q.id for q in result.questions] == ["anatomy-000"] and len(result.report.skipped) == 1


def test_mmlu_directory_names_the_file_inside(tmp_path):
    write(tmp_path / "a_test.csv", "q?,a,b,c,d,A")
    write(tmp_path / "b_test.csv", "q?,a,b,c,d,X")
    with pytest.raises(RecordError, match=r"b_test.csv:1: field 'answer'"):
        read_questions("mmlu", str(tmp_path))


PUBMEDQA = {"QUESTION": "q?", "CONTEXTS": ["c"], "LABELS": ["RESULTS"], "final_decision": "no"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"final_decision": "perhaps"}, "final_decision"),
        ({"LABELS": ["A", "B"]}, "LABELS"),
        ({"QUESTION": 3}, "QUESTION"),
    ],
)
def test_bad_pubmedqa_entries(tmp_path, change, field):
    path = write(tmp_path / "ori.json", json.dumps({"1": PUBMEDQA, "2": PUBMEDQA | change}, indent=1))
    line = 1 + Path(path).read_text().split("\n").index(' "2": {')
    with pytest.raises(RecordError) as error:
        read_questions("pubmedqa", path)
    assert (error.value.line, error.value.field) == (line, field)
    result = read_questions("pubmedqa", path, on_error="skip")
    assert [q.id for q in result.questions] == ["1"] and [p.id for p in result.passages] == ["PMID1-0"]


def test_bad_mirage_entries(tmp_path):
    good = {"question": "q?", "options": {"A": "a", "B": "b"}, "answer": "A"}
    path = write(
        tmp_path / "b.json", json.dumps({"medqa": {"0": good}, "mmlu": {"0": good | {"answer": "D"}}}, indent=1)
    )
    with pytest.raises(RecordError) as error:
        read_questions("mirage", path)
    lines = Path(path).read_text().split("\n")
    assert error.value.field == "answer" and lines[error.value.line - 1] == '  "0": {' and error.value.line > 5
    assert [q.id for q in read_questions("mirage", path, on_error="skip").questions] == ["medqa/0"]


def test_json_file_with_a_repeated_key(tmp_path):
    entry = json.dumps(PUBMEDQA)
    path = write(tmp_path / "ori.json", "{", f'"1": {entry},', f'"1": {entry}', "}")
    with pytest.raises(RecordError, match="each key once") as error:
        read_questions("pubmedqa", path, on_error="skip")
    assert error.value.line == 3
