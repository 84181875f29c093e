"""`jmlr serve` over HTTP: a real client, a real server."""

from __future__ import annotations

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from answering import rows_of
from openapi_spec_validator import validate
from serving import Server

from jmlr_jax import cli


@pytest.fixture(scope="module")
def server(askable, tmp_path_factory):
    with Server(askable, tmp_path_factory.mktemp("server"), "--arm", "jmlr", "--arm", "bm25") as found:
        yield found


@pytest.fixture(scope="module")
def row(askable):
    return rows_of(askable, "jmlr")[0]


def question(row, **more):
    return {"question": row["question"], "options": row["option_texts"], **more}


def test_numbers_are_those_of_the_evaluation(server, askable):
    with server.client() as client:
        for row in rows_of(askable, "jmlr")[:3]:
            found = client.post("/v1/answer", json=question(row, answer_anyway=True)).json()
            assert [choice["nll"] for choice in found["choices"]] == pytest.approx(row["option_nll"], abs=1e-4)
            assert [p["id"] for p in found["passages"]] == row["passages"] and found["written"] == row["generated"]
            assert found["said"]["letter"] == "ABCD"[row["prediction"]]
            page = client.get(
                "/ask", params={"q": row["question"], "options": "\n".join(row["option_texts"]), "anyway": 1}
            )
            assert page.status_code == 200
            shown = json.loads(_between(page.text, 'as JSON">', "</textarea>"))
            assert [choice["nll"] for choice in shown["choices"]] == pytest.approx(row["option_nll"], abs=1e-4)


def _between(text, before, after):
    import html

    return html.unescape(text.partition(before)[2].partition(after)[0])


def test_search_and_embeddings(server, row):
    with server.client() as client:
        found = client.post("/v1/search", json={"query": row["question"], "k": 3}).json()
        assert [p["id"] for p in found["passages"]] == row["passages"] and found["passages"][0]["spans"]
        made = client.post("/v1/embeddings", json={"texts": ["kidney", row["question"]]}).json()["embeddings"]
        assert len(made) == 2 and len(made[0][0]) == 8 and sum(x * x for x in made[1][0]) == pytest.approx(1, abs=1e-4)
        refused = client.post("/v1/embeddings", json={"texts": ["x"], "arm": "bm25"})
        assert refused.status_code == 422 and "no retriever" in refused.json()["error"]["message"]


def test_an_answer_streams(server, row):
    events = []
    with (
        server.client() as client,
        client.stream("POST", "/v1/answer", json=question(row, stream=True, answer_anyway=True)) as got,
    ):
        assert got.headers["content-type"].startswith("text/event-stream")
        for line in got.iter_lines():
            if line.startswith("event: "):
                events.append(line.removeprefix("event: "))
            elif line.startswith("data: "):
                last = json.loads(line.removeprefix("data: "))
    assert events[:2] == ["passages", "said"] and events.count("written") > 1 and events[-1] == "answer"
    assert last["said"]["letter"] == "ABCD"[row["prediction"]]


def test_the_description_is_one_and_is_kept(server, row):
    with server.client() as client:
        described = client.get("/openapi.json").json()
        validate(described)
        import jsonschema

        for path, body in (
            ("/v1/answer", question(row)),
            ("/v1/search", {"query": "x"}),
            ("/v1/embeddings", {"texts": ["x"]}),
        ):
            kind = described["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
            schema = {"$ref": kind, "components": described["components"]}
            jsonschema.validate(client.post(path, json=body).json(), schema)


@pytest.mark.parametrize(
    "body, status, said",
    [
        (b"", 422, "JSON"),
        (b"{", 422, "JSON"),
        (b'{"question": "\xff"}', 422, ""),
        (b'{"question": "\\ud800"}', 422, ""),
        (b"[" * 5000, 422, ""),
        (b'{"question": ""}', 422, "question: is empty"),
        (b'{"question": "x", "optoins": []}', 422, "optoins"),
        (b'{"question": "x", "options": ["a"]}', 422, "2 to 10"),
        (b'{"question": "x", "k": 1e400}', 422, "k"),
        (b'{"question": "x", "arm": "nobody"}', 422, "there are jmlr, bm25"),
        (b'{"question": "x", "sources": ["WHO"]}', 422, "WHO"),
        (b'{"question": "' + b"x" * 9000 + b'"}', 422, "8000"),
        (b'{"question": "' + b"x" * 70000 + b'"}', 413, "65536"),
    ],
)
def test_what_is_no_request_is_told(server, body, status, said):
    with server.client() as client:
        found = client.post("/v1/answer", content=body, headers={"content-type": "application/json"})
    assert found.status_code == status and said in found.json()["error"]["message"]


def test_who_may_ask(server, row):
    with server.client() as client:
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
            assert client.get("/", headers={"host": host}).status_code == 421
        assert client.get("/", headers={"host": "localhost"}).status_code == 200
        for headers in ({"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
            assert client.post("/v1/answer", json=question(row), headers=headers).status_code == 403
        assert client.post("/v1/answer", json=question(row), headers={"origin": server.url}).status_code == 200
        form = client.post("/v1/answer", data={"question": "x"})
        assert form.status_code == 415
        assert client.put("/v1/answer", json={}).status_code == 405 and client.get("/v1/answer").status_code == 405
        page = client.get("/").headers
        assert (
            page["content-security-policy"].startswith("default-src 'self';")
            and page["x-content-type-options"] == "nosniff"
        )
        assert page["referrer-policy"] == "no-referrer" and "server" not in page


def test_nothing_but_its_own_files(server):
    with server.client() as client:
        assert client.get("/static/page.css").status_code == 200
        for path in ("/static/../server.py", "/static/%2e%2e/server.py", "/static/..%2fserver.py", "/nothing", "/v1/x"):
            assert client.get(path).status_code == 404
        text = client.get("/").text
        assert "://" not in text.replace(server.url, "")  # nothing from elsewhere is named


def test_markup_stays_text(server):
    evil = "<script>alert('x')</script> & \"quotes\""
    with server.client() as client:
        page = client.get("/ask", params={"q": evil, "options": f"{evil}\n<b>", "source": evil, "arm": "jmlr"})
        assert page.status_code == 422 and "<script>alert" not in page.text and "&lt;script&gt;" in page.text
        page = client.get("/ask", params={"q": evil, "options": "<i>\n<b>", "anyway": "1"})
        assert page.status_code == 200 and "<script>alert" not in page.text and "<i>" not in page.text
        stream = client.get("/ask/stream", params={"q": evil, "options": "<i>\n<b>", "anyway": "1"}).text
        assert "event: answer" in stream and "<i>" not in stream and "<script>alert" not in stream
        stream = client.get("/ask/stream", params={"q": evil, "options": "<i>"})
        assert stream.status_code == 200 and "1 given; give 2 to 10" in stream.text and "event: close" in stream.text


def test_many_at_once_are_answered_together_or_told_to_wait(server, row, askable):
    rows = rows_of(askable, "jmlr")

    def ask(number):
        with server.client() as client:
            body = question(rows[number % 8], answer_anyway=True, arm=("jmlr", "bm25")[number % 5 == 0])
            return number, client.post("/v1/answer", json=body)

    with ThreadPoolExecutor(48) as pool:
        found = list(pool.map(ask, range(144)))
    assert {answer.status_code for _, answer in found} <= {200, 429}
    assert all(answer.headers["retry-after"] for _, answer in found if answer.status_code == 429)
    good = [(n, answer.json()) for n, answer in found if answer.status_code == 200 and n % 5]
    assert len(good) > 20
    for number, answer in good:
        assert [c["nll"] for c in answer["choices"]] == pytest.approx(rows[number % 8]["option_nll"], abs=1e-4)
    assert server.counted('jmlr_batch_requests_bucket{le="1.0"}') < server.counted("jmlr_batch_requests_count")
    assert server.counted('jmlr_compilations_total{when="serving"}') == 0
    assert server.counted('jmlr_compilations_total{when="opening"}') > 5


def test_a_client_that_leaves_is_forgotten(server, row):
    before = server.counted("jmlr_batch_seconds_count")
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            body = json.dumps(question(row)).encode()
            head = "POST /v1/answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            line.sendall(head.encode() + body)
    with server.client() as client:
        assert client.post("/v1/answer", json=question(row)).status_code == 200
    assert server.counted("jmlr_waiting") == 0 and server.counted("jmlr_batch_seconds_count") > before
    assert "Traceback" not in server.said()


@pytest.mark.exhaustive
def test_slow_clients_hold_nobody(server, row):
    lines = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
    for number, line in enumerate(lines):
        line.sendall(b"POST /v1/answer HTTP/1.1\r\nHost: localhost\r\n"[: 5 + number])
    with server.client() as client:
        assert client.post("/v1/answer", json=question(row)).status_code == 200
    for line in lines:
        line.settimeout(30)
        assert line.recv(100) == b""  # given up
        line.close()


def test_broken_requests_hurt_nobody(server, row):
    """Sizes, encodings, control characters, markup, traversal, broken bodies; `benchmarks/serve_load.py` has 2,000."""
    rng = random.Random(0)
    with server.client() as client:
        for _ in range(60):
            text = "".join(
                rng.choice("a<>&\"'%\x00\x07\n\t{}[]\\/é漢\U0001f600\u202e") for _ in range(rng.randrange(200))
            )
            found = client.get("/ask", params={"q": text, "options": text, "k": text})
            assert found.status_code in (200, 303, 422) and "<script" not in found.text.partition("<body")[2]
            body = rng.randbytes(rng.randrange(300))
            got = client.post("/v1/search", content=body, headers={"content-type": "application/json"})
            assert got.status_code == 422
        assert client.post("/v1/answer", json=question(row)).status_code == 200
    for junk in (b"\x00" * 100, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.settimeout(20)
            line.sendall(junk)
            got = line.recv(100)
            assert got == b"" or got.startswith(b"HTTP/1.1 4")
    head = b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    for first, then in ((head + b"zz\r\n", b""), (head, b"zz\r\n")):  # no body before, and after, an answer
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.settimeout(20)
            line.sendall(first)
            got = line.recv(100)
            line.sendall(then)
            assert got.startswith(b"HTTP/1.1 4") and all(iter(lambda: line.recv(1000), b""))
    assert "Traceback" not in server.said()


def test_questions_are_not_logged(server):
    with server.client() as client:
        client.get("/ask", params={"q": "verysecret words"})
    assert "verysecret" not in server.said() and "GET /ask 200" in server.said()


@pytest.mark.exhaustive
def test_a_token_where_others_can_reach_it(askable, tmp_path, capsys):
    where = ["--run-dir", str(askable), "--host", "0.0.0.0"]
    assert cli.main(["serve", *where]) == 2 and "--token-file" in capsys.readouterr().err
    short = tmp_path / "short"
    short.write_text("abc\n")
    assert cli.main(["serve", *where, "--token-file", str(short)]) == 2 and "16 letters" in capsys.readouterr().err
    (tmp_path / "token").write_text("0123456789abcdef\n")
    words = ("--host", "0.0.0.0", "--token-file", str(tmp_path / "token"), "--arm", "closed_book")
    with Server(askable, tmp_path / "server", *words, wait=False) as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}/healthz").status_code in (200, 503)
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert httpx.get(f"{url}/metrics", headers={"authorization": "Bearer 0123456789abcdeg"}).status_code == 401
        assert httpx.get(f"{url}/metrics", headers={"authorization": "Bearer 0123456789abcdef"}).status_code == 200
        page = httpx.get(url, headers={"accept": "text/html"})
        assert page.status_code == 401 and 'name="token"' in page.text
        with httpx.Client(base_url=url, follow_redirects=True) as browser:
            assert browser.post("/enter", data={"token": "0123456789abcdeg"}).status_code == 401
            assert browser.post("/enter", data={"token": "0123456789abcdef"}).status_code == 200
            assert browser.get("/corpus").status_code == 200
        assert server.stopped() == 0  # while it still loads


@pytest.mark.exhaustive
def test_it_stops_when_told_and_answers_what_is_under_way(askable, tmp_path, row):
    with Server(askable, tmp_path / "server", "--arm", "jmlr") as server, server.client() as client:
        body = question(row, stream=True, answer_anyway=True)
        with client.stream("POST", "/v1/answer", json=body) as got:
            lines = got.iter_lines()
            assert next(lines) == "event: passages"
            assert server.stopped() == 0
            assert "event: answer" in list(lines)
        with pytest.raises(httpx.ConnectError):
            client.get("/healthz")
        assert "Traceback" not in server.said()
