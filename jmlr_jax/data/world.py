"""A small closed medical world, generated from a seed: the embedded default of ``jmlr prepare``.

Every condition is named by two parts, an organ and a process, and each part has two words: a formal one,
invented from the seed, which passages use (``velaric tamosis``), and a lay one, which questions use
(``kidney hardening``). Which lay word means which formal word is nowhere written down, so matching words
does not find the passage: a retriever has to learn it from which passages help the reader. Each condition has one
passage per relation (drug, gene, finding, ...), each stating one value of a closed list. Two things keep the
world from being trivial the other way:

* *hints*: some passages name the organ in lay words too ("it affects the kidney"). Lexical retrieval then finds the
  right organ and relation but not the right process, often enough for a reader to learn to read;
* *traps*: passages in the very words of a question that do not answer it.

Questions are split by condition: a test condition is an unseen combination of parts that training conditions have, so
nothing can be memorised but the meaning of the parts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from jmlr_jax.config import WorldConfig
from jmlr_jax.data.schema import InputError, Passage, Question

LAY_ORGANS = (
    "kidney liver heart lung stomach skin eye ear bone muscle nerve spleen tongue joint throat bladder "
    "knee jaw neck scalp hip wrist nose spine"
).split()
LAY_PROCESSES = (
    "hardening scarring swelling wasting narrowing bleeding clouding thinning itching softening cramping clotting "
    "drying spotting stiffening leaking shrinking burning paling twisting numbness cracking trembling sagging"
).split()
DEV_SHARE_OF_TEST = 0.25

ONSETS = "b br c cl d dr f fl g gr k l m n p pl pr qu r s st t tr v z".split()
VOWELS = "a e i o u".split()
CODAS = ["", "l", "m", "n", "r", "s", "x"]


@dataclass(frozen=True)
class Relation:
    """One kind of fact: how its values are made and the sentences that ask for it and state it."""

    name: str
    endings: tuple[str, ...]
    questions: tuple[str, ...]
    statements: tuple[str, ...]


RELATIONS = (
    Relation(
        "drug",
        ("ibine", "olast", "umab"),
        ("which drug treats {lay} ?", "what medicine helps {lay} ?", "{lay} : which drug should be given ?"),
        (
            "the drug {value} treats {formal} .",
            "{formal} responds to the medicine {value} .",
            "therapy of {formal} : {value} is given .",
        ),
    ),
    Relation(
        "gene",
        ("kin", "ras", "tor"),
        ("which gene causes {lay} ?", "{lay} runs in a family : which mutation ?", "what gene is changed in {lay} ?"),
        (
            "mutation of the gene {value} causes {formal} .",
            "{formal} is inherited with {value} .",
            "in {formal} the gene {value} is changed .",
        ),
    ),
    Relation(
        "sign",
        ("rash", "murmur", "cyst"),
        (
            "which sign points to {lay} ?",
            "what is seen on the body in {lay} ?",
            "{lay} : which sign should be sought ?",
        ),
        (
            "the sign {value} points to {formal} .",
            "{value} is seen in {formal} .",
            "patients with {formal} show {value} on the body .",
        ),
    ),
    Relation(
        "marker",
        ("ogen", "ase", "atin"),
        (
            "which blood test confirms {lay} ?",
            "what rises in the blood in {lay} ?",
            "{lay} : which marker is measured ?",
        ),
        (
            "the blood marker {value} confirms {formal} .",
            "{value} rises in {formal} .",
            "test for {formal} : {value} is measured .",
        ),
    ),
    Relation(
        "food",
        ("nut", "root", "leaf"),
        (
            "which food worsens {lay} ?",
            "what should not be eaten with {lay} ?",
            "{lay} : which food should be avoided ?",
        ),
        (
            "the food {value} worsens {formal} .",
            "{formal} flares when {value} is eaten .",
            "diet in {formal} : {value} is avoided .",
        ),
    ),
    Relation(
        "device",
        ("ometer", "scope", "brace"),
        ("which device relieves {lay} ?", "what is worn against {lay} ?", "{lay} : which device should be fitted ?"),
        (
            "the device {value} relieves {formal} .",
            "{value} is worn in {formal} .",
            "in {formal} a {value} is fitted .",
        ),
    ),
    Relation(
        "animal",
        ("finch", "mole", "newt"),
        ("which animal carries {lay} ?", "whose bite leads to {lay} ?", "{lay} : which animal spreads it ?"),
        (
            "the animal {value} carries {formal} .",
            "the bite of the {value} leads to {formal} .",
            "{formal} : the {value} spreads it .",
        ),
    ),
    Relation(
        "place",
        ("ville", "burg", "ford"),
        (
            "in which place is {lay} common ?",
            "where was {lay} first described ?",
            "{lay} : which town has most cases ?",
        ),
        (
            "the place {value} is where {formal} is common .",
            "{formal} was first described in {value} .",
            "most cases of {formal} live in the town {value} .",
        ),
    ),
)

FILLERS = ("seen worldwide .", "the course is slow .", "studies are small .", "known for decades .")
TRAPS = (
    "many with {lay} ask which {relation} matters .",
    "{lay} and its {relation} : more research is needed .",
)


@dataclass(frozen=True)
class World:
    """Questions by split, passages, and the counts that ``jmlr prepare`` prints."""

    questions: dict[str, list[Question]]
    passages: list[Passage]
    stats: dict[str, int | float]


def words(rng: random.Random, n: int, syllables: int, endings: tuple[str, ...], taken: set[str]) -> list[str]:
    """``n`` invented words, none of which (up to its ending) was made before."""
    words: list[str] = []
    while len(words) < n:
        stem = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(syllables)) + rng.choice(CODAS)
        if stem not in taken:
            taken.add(stem)
            words.append(stem + endings[len(words) % len(endings)])
    return words


def make_world(cfg: WorldConfig, seed: int) -> World:
    """Generate the world.

    Args:
      cfg: sizes; ``conditions`` at most 576 (24 organs x 24 processes).
      seed: everything, names included, follows from it.

    Raises:
      InputError: more conditions than combinations, or so few that a part would be unseen in training.
    """
    rng = random.Random(seed)
    taken: set[str] = set()
    n_o, n_p = len(LAY_ORGANS), len(LAY_PROCESSES)
    if not 32 <= cfg.conditions <= n_o * n_p:
        raise InputError(f"data.world.conditions={cfg.conditions}: expected 32 to {n_o * n_p}")
    organs = list(zip(words(rng, n_o, 2, ("ic", "al"), taken), LAY_ORGANS, strict=True))
    processes = list(zip(words(rng, n_p, 2, ("osis", "oma", "itis"), taken), LAY_PROCESSES, strict=True))
    values = {r.name: words(rng, cfg.values, 2, r.endings, taken) for r in RELATIONS}

    pairs = [(i, j) for i in range(n_o) for j in range(n_p)]
    rng.shuffle(pairs)
    pairs = pairs[: cfg.conditions]
    split_of = _split(pairs, cfg.test_fraction)
    fact = {(pair, r.name): rng.choice(values[r.name]) for pair in pairs for r in RELATIONS}

    passages: list[Passage] = []
    questions: dict[str, list[Question]] = {"train": [], "dev": [], "test": []}
    for c, pair in enumerate(pairs):
        (organ, lay_organ), (process, lay_process) = organs[pair[0]], processes[pair[1]]
        formal, lay = f"{organ} {process}", f"{lay_organ} {lay_process}"
        for r in RELATIONS:
            value = fact[pair, r.name]
            sentences = [rng.choice(r.statements).format(formal=formal, value=value)]
            for hint in (f"it affects the {lay_organ} .", f"there is {lay_process} ."):
                sentences.append(hint if rng.random() < cfg.hint_probability else rng.choice(FILLERS))
            passage = Passage(f"c{c}-{r.name}", formal, " ".join(sentences), "world")
            passages.append(passage)
            if rng.random() < cfg.trap_probability:
                text = " ".join([rng.choice(TRAPS).format(relation=r.name, lay=lay), *rng.sample(FILLERS, 2)])
                passages.append(Passage(f"c{c}-{r.name}-trap", lay, text, "world"))
            options = _options(rng, value, values[r.name])
            split = split_of[pair]
            # Every wording in training, one in the held-out splits: more questions there would not be more evidence.
            for q, wording in enumerate(r.questions if split == "train" else [rng.choice(r.questions)]):
                questions[split].append(
                    Question(
                        id=f"c{c}-{r.name}-{q}",
                        question=wording.format(lay=lay),
                        options=options,
                        answer=value,
                        answer_index=options.index(value),
                        gold_doc_ids=(passage.id,),
                        kind=r.name,
                        meta={"group": f"c{c}"},
                    )
                )
    stats: dict[str, int | float] = {
        "conditions": len(pairs),
        "test_conditions": sum(s == "test" for s in split_of.values()),
        "relations": len(RELATIONS),
        "values_per_relation": cfg.values,
        "passages": len(passages),
    }
    return World(questions, passages, stats)


def _options(rng: random.Random, value: str, pool: list[str]) -> tuple[str, ...]:
    """The value and three others of its list, in random order."""
    options = [value, *rng.sample([v for v in pool if v != value], 3)]
    rng.shuffle(options)
    return tuple(options)


def _split(pairs: list[tuple[int, int]], test_fraction: float) -> dict[tuple[int, int], str]:
    """Train / dev / test by condition; a condition goes to test only while both its parts stay in training."""
    organ_count: dict[int, int] = {}
    process_count: dict[int, int] = {}
    for o, p in pairs:
        organ_count[o] = organ_count.get(o, 0) + 1
        process_count[p] = process_count.get(p, 0) + 1
    held: list[tuple[int, int]] = []
    for o, p in pairs:
        if len(held) < test_fraction * len(pairs) and organ_count[o] > 3 and process_count[p] > 3:
            held.append((o, p))
            organ_count[o] -= 1
            process_count[p] -= 1
    n_dev = round(DEV_SHARE_OF_TEST * len(held))
    split = dict.fromkeys(pairs, "train")
    split.update({pair: "dev" if i < n_dev else "test" for i, pair in enumerate(held)})
    return split
