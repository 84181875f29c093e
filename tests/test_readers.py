"""Readers of every question and corpus format: good files, and for each a bad record named by file, line and field."""

import json
from pathlib import Path

import pytest

from jmlr_jax.data.readers import read_corpus, read_questions
from jmlr_jax.data.schema import FieldError, Passage, Question, RecordError
from jmlr_jax.data.split import split_corpus, split_document


@pytest.fixture
def raw(shared_data: Path) -> Path:
    return shared_data / "raw_formats"


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def as_lines(*records: dict) -> list[str]:
    return [json.dumps(record) for record in records]


# ---------------------------------------------------------------- published files


@pytest.mark.parametrize(
    ("form", "path", "count", "first"),
    [
        ("medqa", "medqa/US_4_options_phrases_no_exclude_test_first20.jsonl", 20, "Tell the attending that he cannot"),
        ("medqa", "medqa/reconstructed_US_test_first20.jsonl", 20, "Tell the attending that he cannot"),
        ("medmcqa", "medmcqa/dev_first20.json", 20, "Impulse through myelinated fibers is slower"),
        ("mmlu", "mmlu/test", 120, "paralysis of the facial muscles."),
        ("pubmedqa", "pubmedqa/ori_pqal_first20.json", 20, "yes"),
        ("mirage", "mirage/benchmark_first20.json", 100, "Tell the attending that he cannot"),
    ],
)
def test_published_files(raw, form, path, count, first):
    result = read_questions(form, str(raw / path))
    assert len(result.questions) == count == result.report.read
    assert not result.report.skipped
    assert result.questions[0].answer.startswith(first)
    for question in result.questions:
        assert question.options[question.answer_index] == question.answer


def test_formats_agree_on_the_same_questions(raw):
    """MIRAGE holds the very questions of the other sets, under the same answers."""
    mirage = {q.id: q for q in read_questions("mirage", str(raw / "mirage/benchmark_first20.json")).questions}
    medqa = read_questions("medqa", str(raw / "medqa/reconstructed_US_test_first20.jsonl")).questions
    medmcqa = read_questions("medmcqa", str(raw / "medmcqa/dev_first20.json")).questions
    mmlu = read_questions("mmlu", str(raw / "mmlu/test/anatomy_test.csv")).questions
    pairs = [(mirage.get(f"medqa/{i:04d}"), q) for i, q in enumerate(medqa)]
    pairs += [(mirage.get(f"medmcqa/{q.id}"), q) for q in medmcqa] + [(mirage.get(f"mmlu/{q.id}"), q) for q in mmlu]
    found = [(theirs, ours) for theirs, ours in pairs if theirs]
    assert len(found) >= 50
    for theirs, ours in found:
        assert (theirs.options, theirs.answer_index) == (ours.options, ours.answer_index)


def test_mmlu_quoted_newlines_keep_rows_whole(raw):
    questions = read_questions("mmlu", str(raw / "mmlu/test/college_medicine_test.csv")).questions
    assert len(questions) == 20
    assert any("\n" in question.question for question in questions)


def test_pubmedqa_contexts_are_the_gold_passages(raw):
    result = read_questions("pubmedqa", str(raw / "pubmedqa/ori_pqal_first20.json"))
    ids = {passage.id for passage in result.passages}
    assert all(set(question.gold_doc_ids) <= ids and question.gold_doc_ids for question in result.questions)
    assert result.passages[0].title == "Background"


def test_tiny_sets_in_the_plain_format(shared_data):
    result = read_questions("jsonl", str(shared_data / "tiny/medquad_mcq/dev.jsonl"))
    assert len(result.questions) == 30 and result.questions[0].kind == "clues"
    passages, report = read_corpus(str(shared_data / "tiny/medquad/corpus.jsonl"))
    assert len(passages) == 1300 == report.read
    assert all(set(q.gold_doc_ids) <= {p.id for p in passages} for q in result.questions)


# ---------------------------------------------------------------- bad records: file, line, field, expectation

MEDQA = {"question": "q?", "answer": "b", "options": {"A": "a", "B": "b"}, "answer_idx": "B"}
MEDMCQA = {"id": "x", "question": "q?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 2, "subject_name": "S"}
PLAIN = {"id": "x", "question": "q?", "options": {"A": "a", "B": "b"}, "answer": "B"}


@pytest.mark.parametrize(
    ("form", "record", "field", "expected"),
    [
        ("medqa", MEDQA | {"answer_idx": "C"}, "answer_idx", "A to B"),
        ("medqa", MEDQA | {"answer": "a"}, "answer", "option B"),
        ("medqa", MEDQA | {"options": {"A": "a"}}, "options", "2 to 10"),
        ("medqa", MEDQA | {"options": {"A": "a", "C": "c"}}, "options", "letters A, B"),
        ("medqa", MEDQA | {"options": ["a", "b"]}, "options", "object"),
        ("medqa", MEDQA | {"question": " "}, "question", "non-empty"),
        ("medmcqa", MEDMCQA | {"cop": None}, "cop", "no labels"),
        ("medmcqa", MEDMCQA | {"cop": 5}, "cop", "1 to 4"),
        ("medmcqa", MEDMCQA | {"opd": None}, "opd", "non-empty"),
        ("jsonl", PLAIN | {"answer": "b"}, "answer", "A to B"),
        ("jsonl", PLAIN | {"options": ["a", "a"], "answer": "a"}, "answer", "exactly one"),
        ("jsonl", PLAIN | {"options": ["B", "a"], "answer": "B"}, "answer", "exactly one"),
        ("jsonl", PLAIN | {"options": {chr(65 + i): str(i) for i in range(11)}}, "options", "2 to 10"),
        ("jsonl", PLAIN | {"options": {"A": "a", "B": ""}}, "options.B", "non-empty"),
        ("jsonl", PLAIN | {"gold_doc_ids": "d1"}, "gold_doc_ids", "list"),
        ("jsonl", PLAIN | {"meta": "m"}, "meta", "object"),
        ("jsonl", {"id": "x", "question": "q?"}, "answer", "non-empty"),
    ],
)
def test_bad_json_records(tmp_path, form, record, field, expected):
    good = {"medqa": MEDQA, "medmcqa": MEDMCQA | {"id": "first"}, "jsonl": PLAIN | {"id": "first"}}[form]
    path = write(tmp_path / "set.jsonl", *as_lines(good, record))
    with pytest.raises(RecordError, match=expected) as error:
        read_questions(form, path)
    assert (error.value.file, error.value.line, error.value.field) == (path, 2, field)
    assert str(error.value).startswith(f"{path}:2: field '{field}'")
    result = read_questions(form, path, on_error="skip")
    assert len(result.questions) == 1 and [e.line for e in result.report.skipped] == [2]


def test_medmcqa_counted_from_zero_stops_even_when_skipping(tmp_path):
    path = write(tmp_path / "hf.jsonl", *as_lines(MEDMCQA, MEDMCQA | {"id": "y", "cop": 0}))
    with pytest.raises(RecordError, match="count from 0") as error:
        read_questions("medmcqa", path, on_error="skip")
    assert error.value.line == 2


def test_line_that_is_no_json_object(tmp_path):
    path = write(tmp_path / "set.jsonl", json.dumps(PLAIN), "", '{"id": "y", ', "[1]")
    result = read_questions("jsonl", path, on_error="skip")
    assert [(e.line, e.field) for e in result.report.skipped] == [(3, "(line)"), (4, "(line)")]


def test_repeated_id_names_both_lines(tmp_path):
    path = write(tmp_path / "set.jsonl", *as_lines(PLAIN, PLAIN))
    with pytest.raises(RecordError, match=r"set.jsonl:2: field 'id'.*line 1 has it"):
        read_questions("jsonl", path)


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_bytes(json.dumps(PLAIN).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(RecordError, match="UTF-8") as error:
        read_questions("jsonl", str(path), on_error="skip")
    assert error.value.line == 2


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


# ---------------------------------------------------------------- CSV and TSV


@pytest.mark.parametrize(("suffix", "mark"), [("csv", ","), ("tsv", "\t")])
@pytest.mark.parametrize("names", [("A", "B", "C"), ("option_a", "option_b", "option_c")])
def test_plain_tables(tmp_path, suffix, mark, names):
    rows = [
        ["id", "question", *names, "answer", "gold_doc_ids", "note"],
        ["1", '"two\nlines?"', "x", "y", "z", "C", "d1|d2", "n"],
        ["2", "two options?", "x", "y", "", "A", "", ""],
        ["3", "free?", "", "", "", "some text", "", ""],
    ]
    path = write(tmp_path / f"set.{suffix}", *(mark.join(row) for row in rows))
    result = read_questions(suffix, path)
    one, two, free = result.questions
    assert one.question == "two\nlines?" and one.answer == "z" and one.gold_doc_ids == ("d1", "d2")
    assert two.options == ("x", "y") and free.options == () and free.answer_index == -1
    assert result.report.ignored_fields == {"note": 1}


@pytest.mark.parametrize(
    ("row", "field", "expected"),
    [
        ("1,q?,x,y,Q", "answer", "A to B"),
        ("1,q?,x,y", "(row)", "5 cells"),
        ("1,q?,,y,B", "option B", "one run"),
        ('1,"q?,x,y,A', "(row)", "closed quotes"),
    ],
)
def test_bad_table_rows(tmp_path, row, field, expected):
    path = write(tmp_path / "set.csv", "id,question,A,B,answer", "0,q?,x,y,A", row)
    with pytest.raises(RecordError, match=expected) as error:
        read_questions("csv", path)
    assert (error.value.file, error.value.line, error.value.field) == (path, 3, field)


def test_missing_column(tmp_path):
    path = write(tmp_path / "set.csv", "id,question,A,B", "0,q?,x,y")
    with pytest.raises(RecordError, match=r"set.csv:1: field 'answer': expected a column"):
        read_questions("csv", path, on_error="skip")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv"])
def test_corpora(tmp_path, suffix):
    mark = {"csv": ",", "tsv": "\t"}.get(suffix)
    good, bad = {"id": "a", "title": "T", "text": "x" * 200_000}, {"id": "b", "title": "T", "text": ""}
    lines = as_lines(good, bad) if mark is None else [mark.join(good), *(mark.join(r.values()) for r in (good, bad))]
    path = write(tmp_path / f"corpus.{suffix}", *lines)
    with pytest.raises(RecordError, match="non-empty text") as error:
        read_corpus(path)
    assert (error.value.line, error.value.field) == (len(lines), "text")
    passages, report = read_corpus(path, on_error="skip")
    assert [p.id for p in passages] == ["a"] and len(report.skipped) == 1


def test_corpus_of_another_kind(tmp_path):
    with pytest.raises(ValueError, match=r"\.jsonl, \.csv or \.tsv"):
        read_corpus(write(tmp_path / "corpus.txt", "x"))


def test_question_record_checks_itself():
    with pytest.raises(FieldError, match="answer_index"):
        Question("1", "q?", ("a", "b"), "a", 2)
    with pytest.raises(FieldError, match="answer"):
        Question("1", "q?", ("a", "b"), "a", 1)
    assert Question("1", "q?", ("a", "b"), "b", 1).letter == "B"


# ---------------------------------------------------------------- splitting


def test_short_documents_stay_and_long_ones_split_on_sentence_ends():
    text = 'One two three. "Four five!" Six seven eight nine. Ten.'
    document = Passage("d", "T", text, "S", "U")
    assert split_document(document, 10) == [document]
    pieces = split_document(document, 5)
    assert [p.id for p in pieces] == ["d#0", "d#1"]
    assert [p.text for p in pieces] == ['One two three. "Four five!"', "Six seven eight nine. Ten."]
    assert {(p.title, p.source, p.url) for p in pieces} == {("T", "S", "U")}


def test_a_sentence_beyond_the_limit_is_cut_between_words_and_nothing_is_lost():
    text = "Short one. " + " ".join(f"w{i}" for i in range(25)) + ". Last one."
    pieces = split_document(Passage("d", "", text), 10)
    assert all(len(p.text.split()) <= 10 for p in pieces)
    assert " ".join(p.text for p in pieces).split() == text.split()


def test_split_corpus_maps_documents_to_pieces_and_refuses_a_clash():
    long, short = Passage("d", "", "a b. c d."), Passage("e", "", "a b.")
    passages, pieces_of = split_corpus([long, short], 2)
    assert [p.id for p in passages] == ["d#0", "d#1", "e"] and pieces_of == {"d": ["d#0", "d#1"]}
    with pytest.raises(ValueError, match="'d#1'"):
        split_corpus([long, Passage("d#1", "", "x")], 2)
