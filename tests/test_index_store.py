"""The directory of an index: what is in it, and that damage, kills and full disks never lead to wrong results."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from indexes import DIM, all_scores, build, clustered, digests_of, recall_of

from jmlr_jax.retrieval import store
from jmlr_jax.retrieval.store import IndexUnusable, open_index

MINE = ("model-a", "corpus-a")


@pytest.fixture
def saved(tmp_path):
    vectors, q = clustered(60, 2)
    build(vectors, q, bits=4).save(tmp_path / "index")
    return tmp_path / "index"


def card_of(saved):
    return json.loads((saved / "card.json").read_text())


def folder_with(saved, name):
    card = card_of(saved)
    return saved / next(f["name"] for f in [*card["parts"], card["state"]] if name in f["files"])


@pytest.mark.parametrize("kind, bits", [("exact", 16), ("scann", 16), ("scann", 4)])
def test_saved_index_answers_the_same(kind, bits, tmp_path, monkeypatch):
    """Also after the directory moved and the working directory changed; vectors stay on disk."""
    vectors, q = clustered(120, 6)
    index = build(vectors, q, kind, digests_of(vectors), bits=bits)
    index.save(tmp_path / "here")
    os.rename(tmp_path / "here", tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    again = open_index("there", *MINE)
    held = again.searcher.vectors.vectors_NxPxC if kind == "exact" else again.searcher.parts[0].tokens.arrays
    assert all(isinstance(a, np.memmap) for a in (held.values() if isinstance(held, dict) else [held]))
    for got, want in zip(again.search(q, 9), index.search(q, 9), strict=True):
        np.testing.assert_array_equal(got, want)
    assert again.card == index.card
    np.testing.assert_array_equal(again.digests_Ex16, index.digests_Ex16)


def test_card(tmp_path):
    vectors, q = clustered(200, 20)
    index = build(vectors, q, oracle_queries=15)
    index.save(tmp_path)
    card = card_of(tmp_path)
    want = all_scores(vectors, q[:15])
    got, _ = index.search(q[:15], 10)
    assert card["kind"] == "scann" and card["oracle_queries"] == 15
    assert card["ann_recall"]["10"] == pytest.approx(recall_of(got, np.argsort(-want, axis=1)[:, :10]))
    assert card["ann_recall"]["1"] == pytest.approx(recall_of(got[:, :1], np.argsort(-want, axis=1)[:, :1]))
    assert [card["passages"], card["entries"], card["dim"], card["hits"]] == [200, 200, DIM, 40]
    assert card["total_bytes"] == sum(f.stat().st_size for f in tmp_path.glob("data-*/**/*") if f.is_file())
    curve = json.loads((folder_with(tmp_path, "tradeoff.json") / "tradeoff.json").read_text())
    assert curve["k"] == 10 and curve["chosen"]["hits"] == 40
    assert (folder_with(tmp_path, "tradeoff.png") / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert build(vectors, q, "exact").card.ann_recall == {}


def test_another_model_or_corpus_is_refused(saved):
    with pytest.raises(IndexUnusable, match="another retriever.*build the index again"):
        open_index(saved, "model-b", "corpus-a")
    with pytest.raises(IndexUnusable, match="another corpus"):
        open_index(saved, "model-a", "corpus-b")
    with pytest.raises(IndexUnusable, match="card.json is missing"):
        open_index(saved.parent, *MINE)
    assert len(open_index(saved, "model-a", None)) == 60


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FILES = [
    "residual.npy",
    "centroid.npy",
    "gain.npy",
    "offsets.npy",
    "settings.json",
    "entries.npy",
    "encoding.npz",
    "code.npz",
]


@pytest.mark.parametrize(
    "damage, said", [(truncate, "were written"), (flip, "contents changed"), (os.remove, "missing")]
)
def test_damaged_files_are_refused(saved, damage, said):
    whole = {f: f.read_bytes() for f in saved.glob("data-*/**/*") if f.is_file()}
    assert {f.name for f in whole} >= set(FILES) and any(f.parent.name == "scann" for f in whole)
    for path, content in whole.items():
        if not content:
            continue
        damage(path)
        with pytest.raises(IndexUnusable, match=rf"{path.name}.*{said}"):
            open_index(saved, *MINE)
        path.write_bytes(content)
    open_index(saved, *MINE)


def test_unknown_files_are_refused(saved):
    """ScaNN would unpickle this one."""
    (folder_with(saved, "residual.npy") / "scann" / "scann_docids.pkl").write_bytes(b"")
    with pytest.raises(IndexUnusable, match="scann_docids.pkl: not part"):
        open_index(saved, *MINE)


@pytest.mark.parametrize(
    "change",
    [{"kind": "faiss"}, {"passages": 61}, {"entries": 61}, {"surplus": 1}, {"format": 2}, {"parts": []}, "elsewhere"],
)
def test_broken_cards_are_refused(saved, change):
    card = card_of(saved)
    if change == "elsewhere":
        card["parts"][0]["name"] = "../data-x"
    else:
        card |= change
    (saved / "card.json").write_text(json.dumps(card))
    with pytest.raises(IndexUnusable, match="build the index again"):
        open_index(saved, *MINE)
    (saved / "card.json").write_text("{")
    with pytest.raises(IndexUnusable, match="not a readable index card"):
        open_index(saved, *MINE)


def test_a_flipped_byte_anywhere_in_the_card_is_refused(saved):
    """Also where the card still reads as one: another number of hits would find less and say nothing."""
    path = saved / "card.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1
        path.write_bytes(data)
        with pytest.raises(IndexUnusable, match="(?s)card.json.*build the index again"):
            open_index(saved, *MINE)
    path.write_bytes(whole)
    open_index(saved, *MINE)


def same_index(saved, before, q):
    after = open_index(saved, *MINE)
    for got, want in zip(after.search(q, 5), before, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("limit", [0, 200, 2_000, 8_000])
def test_a_full_disk_leaves_the_previous_index(saved, limit):
    """A real limit on file size, at several places of the save; Python raises OSError instead of being killed."""
    vectors, q = clustered(90, 2, seed=9)
    before = open_index(saved, *MINE).search(q, 5)
    new = build(vectors, q, bits=4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises((OSError, RuntimeError)):
            new.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    same_index(saved, before, q)
    named = {f["name"] for f in [*card_of(saved)["parts"], card_of(saved)["state"]]}
    assert {p.name for p in saved.iterdir()} == {"card.json", *named}
    new.save(saved)
    assert len(open_index(saved, *MINE)) == 90


def test_new_index_replaces_the_old_one(saved):
    vectors, q = clustered(40, 2, seed=9)
    (saved / "data-left-by-a-killed-writer").mkdir()
    build(vectors, q).save(saved)
    assert len(open_index(saved, *MINE)) == 40
    assert len(list(saved.iterdir())) == 3  # the card, the passages, the state


KILLED = """
    import os, signal, sys
    import numpy as np
    sys.path[:0] = {paths!r}
    from indexes import build, clustered, digests_of
    from jmlr_jax.retrieval import store

    vectors, q = clustered(90, 2, seed=9)
    new = build(vectors, q, "exact", digests_of(vectors))  # no thread pool that a fork would lose
    calls = 0
    def stop(original):
        def call(*args, **kwargs):
            global calls
            calls += 1
            if calls == int(os.environ["KILL_AT"]):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        return call
    # Every step of a save: the parts, the state, each checksum, the swap, the removal of what was there.
    for owner, name in ((np, "save"), (np, "savez"), (store.tempfile, "mkdtemp"), (store.hashlib, "file_digest"),
                        (store, "write_text"), (os, "fsync"), (store.shutil, "rmtree")):
        setattr(owner, name, stop(getattr(owner, name)))
    for at in range(1, 100):
        calls, os.environ["KILL_AT"] = 0, str(at)
        pid = os.fork()
        if pid == 0:
            new.save(sys.argv[1])
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        print(at, os.WTERMSIG(status) if os.WIFSIGNALED(status) else "done", flush=True)
        sys.stdin.readline()
        if not os.WIFSIGNALED(status):
            break
"""


def test_kill_9_at_every_step_of_a_save(saved, tmp_path):
    """After each kill the directory opens as the old index or as the new one, whole; the next save goes through."""
    _, q = clustered(90, 2, seed=9)
    old = open_index(saved, *MINE).search(q, 5)
    paths = [str(Path(__file__).parent), str(Path(store.__file__).parents[2])]
    script = textwrap.dedent(KILLED).format(paths=paths)
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(saved)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    sizes, killed = [], 0
    for line in child.stdout:
        index = open_index(saved, *MINE)
        sizes.append(len(index))
        if len(index) == 60:
            same_index(saved, old, q)
        else:
            assert len(index) == 90 and np.all(index.search(q, 5)[0] >= 0)
        killed += line.split()[1] == "9"
        child.stdin.write("\n")
        child.stdin.flush()
    assert child.wait(60) == 0
    assert killed >= 10 and sizes[0] == 60 and sizes[-1] == 90 and sorted(sizes) == sizes
    assert len(list(saved.iterdir())) == 3


KILLED_WHILE_BUILDING = """
    import os, signal, sys
    sys.path[:0] = {paths!r}
    from indexes import CFG, build, clustered
    from jmlr_jax.retrieval import build as build_module, scann, store

    def stop(original):
        return lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)

    # A fork before anything is computed: JAX and ScaNN have no threads yet that it would lose.
    for owner, name in ((scann, "fit_code"), (scann.TokenStore, "of"), (scann, "build_searcher"),
                        (build_module, "tune"), (scann.TokenStore, "save"), (store, "_save_code"), (None, None)):
        pid = os.fork()
        if pid == 0:
            if owner is not None:
                setattr(owner, name, stop(getattr(owner, name)))
            build(*clustered(90, 2, seed=9), bits=4).save(sys.argv[1])
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        print(name, os.WTERMSIG(status) if os.WIFSIGNALED(status) else "done", flush=True)
        sys.stdin.readline()
"""


@pytest.mark.exhaustive
def test_kill_9_while_an_index_is_built(saved):
    """Whatever it was doing, the index that was there answers as before, and the next build goes through."""
    _, q = clustered(90, 2, seed=9)
    before = open_index(saved, *MINE).search(q, 5)
    paths = [str(Path(__file__).parent), str(Path(store.__file__).parents[2])]
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED_WHILE_BUILDING).format(paths=paths), str(saved)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    for line in child.stdout:
        name, how = line.split()
        assert how == ("done" if name == "None" else "9"), line
        if how == "9":
            same_index(saved, before, q)
        child.stdin.write("\n")
        child.stdin.flush()
    assert child.wait(60) == 0
    assert len(open_index(saved, *MINE)) == 90 and len(list(saved.iterdir())) == 3


def test_an_index_goes_back_to_where_another_took_its_place(saved):
    """Its folders are gone, so it writes them again."""
    vectors, q = clustered(40, 2, seed=9)
    first = build(vectors, q, "exact")
    first.save(saved)
    second = build(*clustered(60, 2), bits=4)
    second.save(saved)
    first.save(saved)
    assert len(open_index(saved, *MINE)) == 40 and len(list(saved.iterdir())) == 3


def swap_for_ever(directory, vectors, q):
    index = build(vectors, q, "exact")
    while True:
        index.save(directory)


def test_a_reader_beside_a_writer_never_sees_half_an_index(tmp_path):
    vectors, q = clustered(40, 2)
    build(vectors, q, "exact").save(tmp_path)
    want = open_index(tmp_path, *MINE).search(q, 5)[0]
    writer = multiprocessing.get_context("spawn").Process(
        target=swap_for_ever, args=(tmp_path, vectors, q), daemon=True
    )
    first = card_of(tmp_path)["state"]["name"]
    writer.start()
    deadline = time.monotonic() + 120
    while card_of(tmp_path)["state"]["name"] == first and time.monotonic() < deadline:
        time.sleep(0.05)
    names = set()
    while len(names) < 4 and time.monotonic() < deadline:
        index = open_index(tmp_path, *MINE)
        names.add(index.card.state.name)
        np.testing.assert_array_equal(index.search(q, 5)[0], want)
    writer.kill()
    writer.join()
    assert len(names) > 1
    np.testing.assert_array_equal(open_index(tmp_path, *MINE).search(q, 5)[0], want)
