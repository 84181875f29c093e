"""Readers of every question and corpus format: good files, and for each a bad record named by file, line and field."""

import json
from pathlib import Path

import pytest

from jmlr_jax.data.readers import read_corpus, read_questions
from jmlr_jax.data.schema import FieldError, Question, RecordError


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
        ("jsonl", PLAIN | {"answer": "C"}, "answer", "A to B"),
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


@pytest.mark.parametrize("bad", [b"a\xffb", b"half a pair \\ud83d", b"nothing \\u0000 after"])
def test_text_that_is_none_is_a_bad_record(tmp_path, bad):
    """Bytes that are not UTF-8, half a surrogate pair, NUL: refused by file, line and field, and counted on skip."""
    path = tmp_path / "set.jsonl"
    good, last = (json.dumps(PLAIN | {"id": name}).encode() for name in "ac")
    path.write_bytes(good + b'\n{"id": "b", "question": "' + bad + b'", "answer": "x"}\n' + last + b"\n")
    with pytest.raises(RecordError, match="UTF-8 text|NUL") as error:
        read_questions("jsonl", str(path))
    assert (error.value.line, error.value.field) == (2, "question") and str(error.value).isprintable()
    result = read_questions("jsonl", str(path), on_error="skip")
    assert [q.id for q in result.questions] == ["a", "c"] and [e.line for e in result.report.skipped] == [2]


@pytest.mark.parametrize("form", ["csv", "tsv", "mmlu", "pubmedqa"])
def test_other_files_with_bytes_that_are_no_text(tmp_path, form):
    mark = b"\t" if form == "tsv" else b","
    rows = [mark.join([b"q?", b"a", b"b", b"c", last, b"A"]) for last in (b"d", b"\xff", b"d")]
    if form in ("csv", "tsv"):
        rows.insert(0, mark.join([b"question", b"A", b"B", b"C", b"D", b"answer"]))
    if form == "pubmedqa":
        entry = b'"%d": {"QUESTION": "q%s?", "CONTEXTS": [], "LABELS": [], "final_decision": "no"}'
        rows = [
            b"{",
            *(entry % (number, byte) + b"," for number, byte in ((1, b""), (2, b"\xff"))),
            entry % (3, b""),
            b"}",
        ]
    path = tmp_path / f"set.{form}"
    path.write_bytes(b"\n".join(rows))
    result = read_questions(form, str(path), on_error="skip")
    assert len(result.questions) == 2 and len(result.report.skipped) == 1
    assert "UTF-8" in str(result.report.skipped[0])


def test_lines_end_at_newlines_alone(tmp_path):
    """A byte-order mark, CRLF, U+2028 and form feeds are no more than what they are."""
    path = tmp_path / "set.jsonl"
    text = "one\u2028two\u0085three"
    path.write_text("\ufeff" + json.dumps(PLAIN | {"question": text}, ensure_ascii=False) + "\r\n", newline="")
    (question,) = read_questions("jsonl", str(path)).questions
    assert question.question == text
    corpus = tmp_path / "corpus.tsv"
    corpus.write_text("\ufeffid\ttext\r\np1\tone\u2028two\x0cthree\r\np2\tx\r\n", newline="")
    passages, _ = read_corpus(str(corpus))
    assert [p.text for p in passages] == ["one\u2028two\x0cthree", "x"]


def test_utf16_is_said_to_be_that(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_bytes(json.dumps(PLAIN).encode("utf-16"))
    with pytest.raises(RecordError, match="UTF-16"):
        read_questions("jsonl", str(path), on_error="skip")


def test_an_object_with_a_key_twice_or_too_deep(tmp_path):
    path = write(tmp_path / "set.jsonl", '{"id": "x", "answer": "A", "answer": "B"}', "[" * 100_000, "9" * 5000)
    first, second, third = read_questions("jsonl", path, on_error="skip").report.skipped
    assert first.field == "answer" and "each key once" in str(first)
    assert {second.field, third.field} == {"(line)"}


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
    result = read_questions(suffix, path, tsv_quotes=True)
    one, two, free = result.questions
    assert one.question == "two\nlines?" and one.answer == "z" and one.gold_doc_ids == ("d1", "d2")
    assert two.options == ("x", "y") and free.options == () and free.answer_index == -1
    assert result.report.ignored_fields == {"note": 1}


def test_quotes_are_text_in_tsv(tmp_path):
    rows = ["id\ttext", 'p1\t"Podagra is gout.', "p2\tScurvy.", 'p3\tLack of "D".']
    path = write(tmp_path / "corpus.tsv", *rows)
    passages, _ = read_corpus(path)
    assert [p.text for p in passages] == ['"Podagra is gout.', "Scurvy.", 'Lack of "D".']


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("rows", [('p1\t"one', 'two"', "p2\tx"), ('"p1', '"\ttwo', "p2\tx")])
def test_a_cell_over_several_lines_of_tsv_is_refused(tmp_path, rows, on_error):
    """Also where bad records are skipped: half of the cell would be read as the whole."""
    path = write(tmp_path / "corpus.tsv", "id\ttext", *rows)
    with pytest.raises(RecordError, match="data.tsv_quotes=true") as error:
        read_corpus(path, on_error)
    assert error.value.line == 2
    assert len(read_corpus(path, tsv_quotes=True)[0]) == 2


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


@pytest.mark.parametrize("form", ["pubmedqa", "mirage"])
def test_a_number_of_thousands_of_digits_is_a_bad_file(tmp_path: Path, form: str) -> None:
    (tmp_path / "a.json").write_text('{"1": {"QUESTION": ' + "9" * 5000 + "}}")
    with pytest.raises(RecordError, match=r"a.json:1: field '\(file\)': expected one JSON object \(.*4300 digits"):
        read_questions(form, str(tmp_path / "a.json"), "skip")
