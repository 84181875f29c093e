"""`jmlr search`: a run's own retriever asked in words."""

import jax
import numpy as np
import pytest
from runs import open_run

from jmlr_jax import cli
from jmlr_jax.answering.retrieval import SHOWN_MATCHES, Searcher, SearchError, matches, run_searcher
from jmlr_jax.commands import pipeline
from jmlr_jax.commands.search import read_questions, shown
from jmlr_jax.data.prompts import Prompts
from jmlr_jax.data.schema import RecordError
from jmlr_jax.retrieval.fusion import reciprocal_rank
from jmlr_jax.retrieval.store import IndexUnusable


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory, patch):
    run = open_run(tiny_data, tmp_path_factory.mktemp("search"))
    with pytest.raises(IndexUnusable, match="jmlr index"):
        run_searcher(run)
    pipeline.index(run)
    return run


@pytest.fixture(scope="module")
def searcher(run):
    with jax.set_mesh(run.mesh):
        yield run_searcher(run)


def test_a_question_finds_what_its_prepared_row_finds(searcher):
    """The same tokens as `jmlr prepare` writes, the same vectors, the same passages."""
    prepared = searcher.corpus.prepared
    asked = [prepared.questions("test")[row].question for row in range(4)]
    q, length = searcher.vectors(asked)
    ids, lengths = prepared.query_tokens("test", np.arange(4))
    np.testing.assert_array_equal(length, lengths)
    from jmlr_jax.nn.functional import encode_queries

    want = encode_queries(searcher.params, searcher.corpus.retriever, ids, lengths)
    np.testing.assert_allclose(q, np.asarray(want, np.float32), atol=1e-5)
    rows, scores = searcher.search(asked, 3)
    for got, wanted in zip((rows, scores), searcher.index.search(q, 3), strict=True):
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(searcher.search(asked[1:2], 3)[0], rows[1:2])


def test_questions_are_asked_as_the_template_says(searcher, monkeypatch):
    cfg = searcher.corpus.cfg
    template = {"query_template": "{last_sentence} {options}"}
    plain, length = searcher.vectors(["what helps? rest tea"])
    monkeypatch.setattr(searcher, "prompts", Prompts(cfg.retriever.model_copy(update=template), cfg.generator))
    found, same = searcher.vectors(["A man is ill. what helps?"], [["rest", "tea"]])
    np.testing.assert_array_equal(length, same)
    np.testing.assert_allclose(found, plain, atol=1e-6)


def test_only_passages_of_the_sources_asked_for(searcher, monkeypatch):
    count = len(searcher.corpus.prepared.passages)
    monkeypatch.setattr(Searcher, "sources", np.array(["CDC", "NIH"])[np.arange(count) % 2])
    for hybrid in (False, True):
        rows, _ = searcher.search(["which medicine helps"], count, ["NIH"], hybrid)
        found = rows[rows >= 0]
        assert (found % 2 == 1).all() and len(found) >= count // 2 - 1
    with pytest.raises(SearchError, match="--source WHO.*there are CDC, NIH"):
        searcher.search(["x"], 3, ["WHO"])


def test_hybrid_is_the_fusion_of_both_rankings(searcher):
    texts = [searcher.corpus.prepared.questions("dev")[row].question for row in range(3)]
    rows, _ = searcher.search(texts, 5, hybrid=True)
    alone, words = searcher.search(texts, 100)[0], searcher.corpus.lexical.search(texts, 100)[0]
    np.testing.assert_array_equal(rows, reciprocal_rank({"maxsim": alone, "bm25": words}, 5)[0])


def test_marked_words_are_those_that_made_the_score(searcher):
    question = searcher.corpus.prepared.questions("test")[0].question
    rows, scores = searcher.search([question], 3)
    found = searcher.found(question, rows[0], scores[0])
    passages = searcher.corpus.prepared.passages
    assert [one.id for one in found] == [passages[row].id for row in rows[0].tolist()]
    for one, row in zip(found, rows[0].tolist(), strict=True):
        assert 0 < len(one.spans) <= SHOWN_MATCHES
        starts = [span.start for span in one.spans]
        assert starts == sorted(starts) and all(one.text[span.start : span.end].strip() for span in one.spans)
        assert one.text == searcher.prompts.retrieved(passages[row])
    text = shown(found)
    assert found[0].id in text.plain and found[0].text in text.plain
    marked = {text.plain[s.start : s.end] for s in text.spans if "reverse" in str(s.style)}
    assert marked == {one.text[span.start : span.end] for one in found for span in one.spans}
    assert searcher.found(question, np.full(3, -1), np.full(3, -np.inf)) == []


def test_matches_add_up_to_maxsim():
    rng = np.random.default_rng(0)
    q, p, keep = rng.normal(size=(5, 8)), rng.normal(size=(9, 8)), np.arange(9) < 6
    weight = matches(q, p, keep)
    assert weight.sum() == pytest.approx((q @ p[:6].T).max(1).sum()) and (weight[6:] == 0).all()
    assert (matches(q, p, np.zeros(9, bool)) == 0).all()


def test_command_line(run, patch, tmp_path, capsys):
    where = ["--run-dir", str(run.directory)]
    question = run.prepared.questions("test")[0].question
    assert cli.main(["search", question, *where, "--k", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1. ") and "\n2. " in out and "\n3. " not in out
    questions = tmp_path / "questions.tsv"
    questions.write_text(f"q1\t{question}\n\nq2\tnephritis of the heart\n")
    assert cli.main(["search", f"@{questions}", *where, "--k", "4", "--hybrid", "--trec", str(tmp_path / "run")]) == 0
    lines = [line.split() for line in (tmp_path / "run").read_text().splitlines()]
    assert len(lines) == 8 and {line[0] for line in lines} == {"q1", "q2"} and lines[0][5] == "hybrid"
    ids = {passage.id for passage in run.prepared.passages}
    assert all(line[2] in ids for line in lines)


@pytest.mark.parametrize(
    "asked, said",
    [
        (["@{}"], "--trec FILE"),
        (["@{}/no", "--trec", "{}.run"], "no such file"),
        (["@{}", "--trec", "{}.run"], "'q 1': a TREC run needs ids"),
        (["  "], "empty question"),
        (["x", "--arm", "jmlr"], ""),
    ],
)
def test_what_cannot_be_asked_is_refused(run, patch, tmp_path, capsys, asked, said):
    (tmp_path / "q.tsv").write_text("q 1\tx\n")
    asked = [word.format(tmp_path / "q.tsv") for word in asked]
    assert cli.main(["search", *asked, "--run-dir", str(run.directory)]) == 2
    assert said in capsys.readouterr().err


def test_files_of_questions(tmp_path):
    file = tmp_path / "q.tsv"
    file.write_text("a\tone two\n b \tthree\n")
    assert read_questions(file) == (["a", "b"], ["one two", "three"])
    file.write_text("a\tone\nno tab here\n")
    with pytest.raises(SearchError, match=r"q.tsv:2: expected an id, a tab"):
        read_questions(file)
    file.write_text("a\tone\n\na\ttwo\n")
    with pytest.raises(SearchError, match=r"q.tsv:3: the id a stands in line 1 already"):
        read_questions(file)
    file.write_bytes("a\tone\u2028two\r\nb\tx\r\n".encode())
    assert read_questions(file) == (["a", "b"], ["one\u2028two", "x"])
    file.write_bytes(b"a\tone\nb\t\xff\n")
    with pytest.raises(RecordError, match=r"q.tsv:2: .*UTF-8"):
        read_questions(file)
    file.write_text("\n")
    with pytest.raises(SearchError, match="no questions"):
        read_questions(file)
