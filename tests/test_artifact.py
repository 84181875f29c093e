"""Artifacts: made whole or not at all, found by an equal recipe, and every difference named."""

import dataclasses
import json
import subprocess
import sys

import pytest

from jmlr_jax.config import Config
from jmlr_jax.run.artifact import RECORD, ArtifactError, Recipe, artifact, changes, making, refuse
from jmlr_jax.run.phases import PHASES
from jmlr_jax.run.recipes import data_recipe, evaluation_recipe, index_recipe, phase_recipe

PRINTS = dict.fromkeys(
    ("corpus", "questions", "passages", "train", "dev", "test", "retriever_tokenizer", "generator_tokenizer"), "x"
)


@pytest.fixture
def recipe(tmp_path):
    return Recipe(tmp_path / "run" / "made", {"train.steps": 3}, {"corpus": "abc"}, {"corpus": "/data/corpus.jsonl"})


def write(text):
    def make(folder):
        (folder / "text").write_text(text)

    return make


def test_made_once_and_found_again(recipe):
    assert changes(recipe) is None
    assert artifact(recipe, write("one")) and changes(recipe) == []
    assert not artifact(recipe, lambda folder: pytest.fail("made again"))
    assert Recipe.read(recipe.folder) == recipe
    moved = dataclasses.replace(recipe, places={"corpus": "/elsewhere"})
    assert not artifact(moved, lambda folder: pytest.fail("the same content elsewhere is no difference"))


def test_differences_are_named_by_key_and_input(recipe):
    artifact(recipe, write("one"))
    other = dataclasses.replace(recipe, keys={"train.steps": 4, "seed": 1}, inputs={"corpus": "abd", "test": "t"})
    differ = ["train.steps was 3, now 4", "seed was not given, now 1", "corpus (/data/corpus.jsonl) has changed"]
    assert changes(other) == [*differ, "test is new"]
    assert changes(dataclasses.replace(recipe, inputs={})) == ["corpus (/data/corpus.jsonl) is gone"]
    with pytest.raises(ArtifactError) as caught:
        refuse(other, changes(other), "start anew")
    assert str(caught.value).splitlines() == [
        *(f"{recipe.folder}: {line}" for line in [*differ, "test is new"]),
        "start anew",
    ]
    said = []
    assert artifact(other, write("two"), said.append)
    assert said == [f"{recipe.folder}: made again, {line}" for line in [*differ, "test is new"]]
    assert (recipe.folder / "text").read_text() == "two"


def test_what_fails_leaves_what_was_there(recipe):
    def fails(folder):
        (folder / "text").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        artifact(recipe, fails)
    assert not recipe.folder.parent.exists(), "folders made on the way are gone too"
    artifact(recipe, write("one"))
    with pytest.raises(OSError, match="No space"):
        artifact(dataclasses.replace(recipe, keys={}), fails)
    assert changes(recipe) == [] and (recipe.folder / "text").read_text() == "one"
    assert [path.name for path in recipe.folder.parent.iterdir()] == ["made"]


MAKES = """
import sys, time
from pathlib import Path
from jmlr_jax.run.artifact import Recipe, artifact
def make(folder):
    (folder / "text").write_text("half")
    print("making", flush=True)
    time.sleep(600)
artifact(Recipe(Path(sys.argv[1]), {"train.steps": 3}, {"corpus": "abc"}), make)
"""


def test_two_processes_do_not_make_the_same(recipe):
    """The second is refused and leaves the first alone; once that is killed, another makes it."""
    with subprocess.Popen([sys.executable, "-c", MAKES, str(recipe.folder)], stdout=subprocess.PIPE, text=True) as one:
        try:
            assert one.stdout.readline() == "making\n"
            for attempt in (lambda: artifact(recipe, write("two")), lambda: making(recipe.folder).__enter__()):
                with pytest.raises(ArtifactError, match=f"{recipe.folder}: another process is making it; wait"):
                    attempt()
            assert (recipe.folder.with_name(".made.part") / "text").read_text() == "half"
        finally:
            one.kill()
    assert artifact(recipe, write("two")) and (recipe.folder / "text").read_text() == "two"
    assert [path.name for path in recipe.folder.parent.iterdir()] == ["made"]


@pytest.mark.parametrize("moment", ["while it is made", "between the moves"])
def test_a_killed_process_leaves_the_old_one(recipe, moment):
    artifact(recipe, write("one"))
    part, old = (recipe.folder.with_name(f".made.{end}") for end in ("part", "old"))
    part.mkdir()
    (part / "text").write_text("half")
    if moment == "between the moves":
        recipe.folder.rename(old)
    assert changes(recipe) == [] and (recipe.folder / "text").read_text() == "one"
    assert artifact(dataclasses.replace(recipe, keys={}), write("two"))
    assert [path.name for path in recipe.folder.parent.iterdir()] == ["made"]


@pytest.mark.parametrize("damage", ["{", "[]", "edited", "version"])
def test_a_damaged_record_is_refused(recipe, damage):
    artifact(recipe, write("one"))
    record = recipe.folder / RECORD
    found = json.loads(record.read_text())
    found["keys"]["train.steps"] = 5
    texts = {"edited": json.dumps(found), "version": record.read_text().replace('"format": 2', '"format": 1')}
    record.write_text(texts.get(damage, damage))
    with pytest.raises(ArtifactError, match=r"made_from.json: .*remove .* to make it again"):
        changes(recipe)


# Recipes.


def recipes(tmp_path, **update):
    """Digest of every artifact's recipe under the defaults with these overrides."""
    from jmlr_jax.config_io import load

    cfg = load(None, [f"run_dir={tmp_path}", *(f"{key.replace('__', '.')}={value}" for key, value in update.items())])
    made = {"data": data_recipe(cfg, tmp_path / "data")}
    for name in ("warmup", "jmlr", "closed_book", "frozen"):
        made[name] = phase_recipe(cfg, PRINTS, PHASES[name], {})
    made["index"] = index_recipe(cfg, PRINTS, tmp_path, "weights")
    made["evaluation"] = evaluation_recipe(cfg, PRINTS, "test", "jmlr", {"jmlr": "y"})
    return {name: recipe.digest for name, recipe in made.items()}


@pytest.mark.parametrize(
    ("key", "value", "touched"),
    [
        ("mesh__fsdp", 4, set()),
        ("train__log_steps", 3, set()),
        ("train__keep_last", 3, set()),
        ("train__checkpoint_steps", 3, set()),
        ("eval__batch_size", 3, set()),
        ("eval__split", "dev", set()),
        ("eval__arms", "[bm25]", set()),
        ("index__encode_batch", 3, set()),
        ("generator__llama__remat", "full", set()),
        ("eval__max_questions", 3, {"evaluation"}),
        ("eval__hit_at", "[1]", {"evaluation"}),
        ("train__steps", 3, {"jmlr", "closed_book", "frozen"}),
        ("train__help_margin", 0.5, {"jmlr"}),
        ("train__retriever__learning_rate", 0.5, {"jmlr"}),
        ("train__importance__learning_rate", 0.5, {"jmlr"}),
        ("train__read_passages", 2, {"jmlr", "frozen", "evaluation"}),
        ("train__warmup__rename", 0.5, {"warmup"}),
        ("index__ann_recall", 0.5, {"jmlr", "frozen", "index", "evaluation"}),
        ("retriever__dim", 16, {"jmlr", "frozen"}),
        ("retriever__importance", "true", {"jmlr", "frozen"}),
        ("retriever__query_length", 12, {"data", "jmlr", "frozen"}),
        ("generator__passage_template", "{text}", {"data", "warmup", "jmlr", "closed_book", "frozen"}),
        ("eval__checkpoint", "best", {"warmup", "jmlr", "closed_book", "frozen"}),
        ("data__world__values", 100, {"data"}),
    ],
)
def test_a_key_is_in_the_recipes_it_shapes(tmp_path, key, value, touched):
    before, after = recipes(tmp_path), recipes(tmp_path, **{key: value})
    assert {name for name in before if before[name] != after[name]} == touched


def test_a_published_file_is_told_by_its_content(tmp_path):
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "corpus")}
    for file in files.values():
        file.write_text(f"{file.name}\n")
    data = Config().data.model_copy(update={"questions": "jsonl", **{f"{n}_path": str(f) for n, f in files.items()}})
    cfg = Config(data=data)
    made = data_recipe(cfg, tmp_path / "data")
    files["corpus"].rename(tmp_path / "renamed.jsonl")
    moved = Config(data=data.model_copy(update={"corpus_path": str(tmp_path / "renamed.jsonl")}))
    assert data_recipe(moved, tmp_path / "data").digest == made.digest
    (tmp_path / "renamed.jsonl").write_text("other")
    assert "data.corpus_path" in data_recipe(moved, tmp_path / "data").differences(made)[0]
    (tmp_path / "renamed.jsonl").unlink()  # whoever opens the run asks only what is named anew
    assert data_recipe(cfg, tmp_path / "data", made).digest == made.digest
