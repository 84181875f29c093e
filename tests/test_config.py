"""Presets, overrides, error messages and resolved files (``jmlr_jax.config_io``)."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jmlr_jax import config_io
from jmlr_jax.config import Config
from jmlr_jax.config_io import ConfigError, load, save_resolved


def _message(path: str | Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(None if path is None else str(path), overrides)
    return str(caught.value)


def _write(folder: Path, text: str) -> Path:
    file = folder / "preset.yaml"
    file.write_text(text)
    return file


# What comes out


def test_without_anything_the_defaults_come_out() -> None:
    assert load(None) == Config()


def test_later_sources_win(tmp_path: Path) -> None:
    file = _write(tmp_path, "seed: 1\ntrain:\n  steps: 7\n")
    assert load(str(file)).train.steps == 7
    config = load(str(file), ["train.steps=8", "train.steps=9"])
    assert (config.seed, config.train.steps) == (1, 9)


def test_a_partial_section_keeps_its_other_defaults(tmp_path: Path) -> None:
    """train.retriever's default learning rate lives in the instance, not in OptimizerConfig."""
    file = _write(tmp_path, "train:\n  retriever:\n    warmup_steps: 5\n")
    config = load(str(file), ["train.retriever.weight_decay=0.5"])
    assert config.train.retriever == Config().train.retriever.model_copy(
        update={"warmup_steps": 5, "weight_decay": 0.5}
    )


def test_floats_that_yaml_reads_as_text(tmp_path: Path) -> None:
    assert isinstance(yaml.safe_load("1e-5"), str)
    file = _write(tmp_path, "train:\n  retriever:\n    learning_rate: 1e-5\n")
    config = load(str(file), ["train.generator.learning_rate=3e-4"])
    assert config.train.retriever.learning_rate == 1e-5
    assert config.train.generator.learning_rate == 3e-4


def test_optional_sections_go_on_and_off() -> None:
    assert load(None, ["generator.lora.rank=8"]).generator.lora.rank == 8  # type: ignore[union-attr]
    assert load(None, ["generator.lora={}"]).generator.lora.rank == 128  # type: ignore[union-attr]
    assert load(None, ["generator.lora.rank=8", "generator.lora=null"]).generator.lora is None
    assert load(None).retriever.lora is None
    adapters = load(None, ["retriever.lora={}", "retriever.lora.targets=[q, v]"]).retriever.lora
    assert adapters is not None and adapters.targets == ("q", "v") and adapters.whole == ("projection",)
    with pytest.raises(ConfigError, match=r"retriever\.lora\.targets.*'q', 'k', 'v', 'qkv', 'o', 'up' or 'down'"):
        load(None, ["retriever.lora.targets=[q, gate]"])


def test_text_is_taken_as_typed() -> None:
    config = load(
        None,
        [
            "run_dir=2024",
            "generator.passage_template={title}: {text}",
            "generator.option_template=",
            'generator.answer_template="\\n{answer}"',
            "data.train_path=",
        ],
    )
    assert config.run_dir == "2024"
    assert config.generator.passage_template == "{title}: {text}"
    assert config.generator.option_template == ""
    assert config.generator.answer_template == "\n{answer}"
    assert config.data.train_path is None


def test_lists_and_negative_numbers() -> None:
    config = load(None, ["eval.arms=[jmlr, bm25]", "mesh.fsdp=-1"])
    assert config.eval.arms == ("jmlr", "bm25")
    assert config.mesh.fsdp == -1


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load(str(_write(tmp_path, "# nothing\n"))) == Config()


@pytest.mark.parametrize("name", sorted(config_io.presets()))
def test_shipped_preset(name: str) -> None:
    file = config_io.presets()[name]
    config = load(name)
    assert config == load(str(file))
    head = file.read_text().splitlines()
    assert head[0].startswith("# ") and any(line.startswith("# Command: ") for line in head), "header comment missing"
    given = yaml.safe_load(file.read_text())
    default = load(given.pop("extends", None)).model_dump(mode="json")

    def repeated(tree: dict, base: dict | None, prefix: str = "") -> list[str]:
        out = []
        for key, value in tree.items():
            if isinstance(value, dict) and base and isinstance(base[key], dict):
                out += repeated(value, base[key], f"{prefix}{key}.")
            elif base and base[key] == value:
                out.append(f"{prefix}{key}")
        return out

    assert repeated(given, default) == [], "a preset holds differences only"


def test_presets_are_found() -> None:
    assert "smoke" in config_io.presets()


def test_a_preset_over_another(tmp_path: Path) -> None:
    base, top = tmp_path / "base.yaml", tmp_path / "top.yaml"
    base.write_text("seed: 3\ntrain:\n  steps: 7\n  batch_size: 4\n")
    top.write_text(f"extends: {base}  # by name or path\ntrain:\n  steps: 9\n")
    made, train = load(str(top)), Config().train.model_copy(update={"steps": 9, "batch_size": 4})
    assert made == Config(seed=3, train=train)
    top.write_text(f"extends: {base}\ntrain:\n  stepps: 9\n")
    assert f"{top}:3: train.stepps" in _message(top)
    base.write_text(f"extends: {top}\n")
    assert "extends this preset itself" in _message(base)
    top.write_text("extends: smokke\n")
    assert "did you mean smoke" in _message(top)


# What is refused


def test_unknown_key_names_place_and_neighbour(tmp_path: Path) -> None:
    file = _write(tmp_path, "seed: 1\ntrain:\n  # comment\n  candidate: 3\n")
    assert _message(file) == f"{file}:4: train.candidate: unknown key; did you mean train.candidates?"


def test_every_unknown_key_is_listed(tmp_path: Path) -> None:
    file = _write(tmp_path, "sead: 1\ngenerater:\n  x: 1\n")
    assert _message(file).splitlines() == [
        f"{file}:1: sead: unknown key; did you mean seed?",
        f"{file}:2: generater: unknown key; did you mean generator?",
    ]


@pytest.mark.parametrize("name", ["out #3", "2024", "a: b", "[x]", "{y}", "it's", "x & y", " padded ", "~x"])
def test_names_are_taken_as_typed(name: str) -> None:
    assert load(None, [f"run_dir={name}"]).run_dir == name
    assert load(None, [f"generator.passage_template={name}"]).generator.passage_template == name


def test_text_in_quotes_is_yaml_and_null_is_nothing() -> None:
    assert load(None, [r'generator.passage_template="\n{text}"']).generator.passage_template == "\n{text}"
    assert load(None, ["data.train_path=null"]).data.train_path is None


def test_paths_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    config = load(None, ["run_dir=~/out", "data.train_path=$DATA/q.jsonl", "generator.source=~/models/x"])
    assert (config.run_dir, config.data.train_path) == ("/home/me/out", "/data/q.jsonl")
    assert config.generator.source == config.generator.tokenizer_place == "/home/me/models/x"


def test_unknown_override() -> None:
    assert _message(None, "train.stps=3") == "command line: train.stps: unknown key; did you mean train.steps?"
    assert "train.steps" in _message(None, "steps=3")  # the word exists, elsewhere
    assert "unknown key" in _message(None, "train.steps.x=3")
    assert "print-config --fields" in _message(None, "qqqqqq=3")


def test_repeated_key(tmp_path: Path) -> None:
    file = _write(tmp_path, "seed: 1\nseed: 2\n")
    assert _message(file) == f"{file}:2: seed: given twice, first in line 1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  steps: many\n", ":2: train.steps = 'many': expected a whole number"),
        ("train:\n  steps: 2.5\n", ":2: train.steps = 2.5: expected a whole number"),
        ("train:\n  steps: 0\n", ":2: train.steps = 0: expected greater than 0"),
        ("index:\n  rerank: yes\n", ":2: index.rerank = True: expected a number, not a yes or no"),
        ("mesh:\n", ":1: mesh = None: expected a section with keys of its own"),
        ("eval:\n  arms: jmlr\n", ":2: eval.arms = 'jmlr': expected a list, such as [a, b]"),
        ("eval:\n  split: tset\n", ":2: eval.split = 'tset': expected 'dev' or 'test'"),
        ("run_dir: 3\n", ":1: run_dir = 3: expected text (in YAML, put it in quotes)"),
        ("retriever:\n  skip_punctuation: 3\n", ":2: retriever.skip_punctuation = 3: expected true or false"),
        ("train:\n  batch_size: 7\n  accumulate: 2\n", ":1: train: batch_size=7 is not a multiple of accumulate=2"),
    ],
)
def test_wrong_value(tmp_path: Path, text: str, expected: str) -> None:
    file = _write(tmp_path, text)
    assert _message(file) == f"{file}{expected}"


def test_wrong_value_on_the_command_line() -> None:
    assert _message(None, "train.steps=x") == "command line: train.steps = 'x': expected a whole number"
    assert _message(None, "train.steps") == (
        "command line: 'train.steps': expected key=value, for example train.steps=3"
    )
    assert "set its keys one by one (train.steps=...)" in _message(None, "train={steps: 3}")


@pytest.mark.parametrize(
    ("shape", "half"), [("generator.llama", "generator"), ("retriever.bert", "retriever")], ids=["decoder", "encoder"]
)
def test_weights_that_train_whole_are_stored_in_float32(shape: str, half: str) -> None:
    """A bfloat16 weight of 1 does not see an update of 0.003; adapters are float32 whatever their base is."""
    for stored in ("bfloat16", "float16"):
        message = _message(None, f"{shape}.param_dtype={stored}")
        assert f"{shape}.param_dtype={stored} with {half}.lora=null" in message
        assert f"{shape}.param_dtype=float32" in message and f"{half}.lora={{}}" in message
        adapted = load(None, [f"{shape}.param_dtype={stored}", f"{half}.lora={{}}"])
        assert getattr(adapted, half).lora is not None
    assert load(None, [f"{shape}.dtype=bfloat16"])  # to compute in it is another thing


def test_a_check_across_sections_names_both_numbers() -> None:
    message = _message(None, "generator.max_length=600")
    assert "generator.max_length=600" in message and "max_positions=512" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: [1\n", "not valid YAML"),
        ("train:\n\tsteps: 3\n", ":2: not valid YAML"),
        ("- a\n", "expected `key: value` lines"),
        ("seed: !!python/object/apply:os.getcwd []\n", ":1: not valid YAML"),
    ],
)
def test_not_a_preset(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in _message(_write(tmp_path, text))


def test_not_text(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    assert "not a YAML text file" in _message(file)


def test_missing_file_lists_presets(tmp_path: Path) -> None:
    assert "did you mean smoke?" in _message("smok")
    assert "is a directory" in _message(tmp_path)


# Resolved files


def test_resolved_file_gives_the_same_configuration(tmp_path: Path) -> None:
    for name in [None, *config_io.presets()]:
        config = load(
            name, ["run_dir=runs/ü", "train.retriever.learning_rate=1e-5", "retriever.bert.layer_norm_eps=1e-7"]
        )
        file = tmp_path / "run" / config_io.RESOLVED_NAME
        save_resolved(config, file)
        assert load(str(file)) == config
        assert [f.name for f in file.parent.iterdir()] == [file.name], "the partial file was left behind"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / config_io.RESOLVED_NAME
    save_resolved(Config(seed=1), file)

    def broken(config: Config) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(config_io, "to_yaml", broken)
    with pytest.raises(OSError, match="disk full"):
        save_resolved(Config(seed=2), file)
    assert load(str(file)).seed == 1


def test_field_rows_cover_the_resolved_file() -> None:
    rows = {row.key: row for row in config_io.field_rows()}

    def leaves(tree: dict, prefix: str = "") -> list[str]:
        out = []
        for key, value in tree.items():
            out += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
        return out

    resolved = load(None, ["generator.lora={}"]).model_dump(mode="json")
    assert set(leaves(resolved)) <= set(rows)
    assert float(rows["train.retriever.learning_rate"].default) == Config().train.retriever.learning_rate
    assert rows["generator.lora"].default == "null" and rows["generator.lora.rank"].default == "128"
