"""The PyTorch sides of ``step_peers.py``: the released code's way, and a batched one.

    python step_peers_torch.py FOLDER released|batched MICRO

What both compute is METHOD's step, its faults mended (ties, equal scores, dropout while judging, masked tokens): the
losses have to agree with ours. What differs between them is how the work is laid out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from safetensors.torch import load_file
from step_peers import serve
from torch.nn import functional

Batch = dict[str, np.ndarray]
Prompt = tuple[list[int], int]  # tokens, and how many of them are the answer


class Pair:
    """Both models with their optimizers, as ours start."""

    def __init__(self, folder: Path) -> None:
        self.facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "generator", dtype=torch.float32)
        self.reader = peft.PeftModel.from_pretrained(base, folder / "adapters", is_trainable=True)
        self.encoder = transformers.BertModel.from_pretrained(folder / "retriever", add_pooling_layer=False).eval()
        self.projection = torch.nn.Parameter(load_file(folder / "retriever/1_Dense/model.safetensors")["linear.weight"])
        self.skip = torch.tensor(self.facts["skip"])
        trained = {"retriever": [*self.encoder.parameters(), self.projection]}
        trained["generator"] = [p for p in self.reader.parameters() if p.requires_grad]
        self.halves = [(trained[name], self.facts[name]["clip"]) for name in trained]
        groups = [{"params": trained[name], "lr": self.facts[name]["lr"]} for name in trained]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def update(self) -> None:
        """One step of AdamW for each half, clipped by its own norm."""
        for half, clip in self.halves:
            torch.nn.utils.clip_grad_norm_(half, clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def vectors(self, ids_NxT: np.ndarray, length_N: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unit vectors of texts cut to the longest of them, their ids, and which tokens are real."""
        width = int(length_N.max())
        ids = torch.tensor(ids_NxT[:, :width].astype(np.int64))
        real = torch.arange(width) < torch.tensor(length_N)[:, None]
        hidden = self.encoder(input_ids=ids, attention_mask=real.long()).last_hidden_state
        return functional.normalize(hidden @ self.projection.T, dim=-1), ids, real

    def scores(self, batch: Batch, rows: Sequence[int]) -> list[torch.Tensor]:
        """For each question the normalised scores of its candidates: METHOD steps 1 and 2."""
        q, _, q_real = self.vectors(batch["query_ids_BxQ"][rows], batch["query_len_B"][rows])
        valid = batch["valid_BxK"][rows]
        ids_NxP, length_N = batch["passage_ids_BxKxP"][rows][valid], batch["passage_len_BxK"][rows][valid]
        p, ids, real = self.vectors(ids_NxP, length_N)
        keep = real & ~torch.isin(ids, self.skip)
        found, first = [], 0
        for row, count in enumerate(valid.sum(1)):
            mine = slice(first, first := first + int(count))
            similarity = torch.einsum("qc,kpc->kqp", q[row, q_real[row]], p[mine])
            raw = similarity.masked_fill(~keep[mine, None], -1e9).amax(-1).sum(-1)
            low, high = raw.min(), raw.max()
            found.append(2 * (raw - low) / (high - low) - 1 if high > low else raw * 0)
        return found

    def prompt(self, batch: Batch, row: int, passages: Sequence[int]) -> Prompt:
        """BOS, the passages from the last given to the first, question, answer."""
        tokens = [self.facts["bos"]]
        for k in reversed(passages):
            tokens += batch["reader_ids_BxKxL"][row, k, : batch["reader_len_BxK"][row, k]].tolist()
        tokens += batch["question_ids_BxS"][row, : batch["question_len_B"][row]].tolist()
        answer = batch["answer_ids_BxA"][row, : batch["answer_len_B"][row]].tolist()
        return tokens + answer, len(answer)

    def choose(self, batch: Batch, row: int, score: torch.Tensor) -> tuple[list[int], list[int], list[int]]:
        """Places among the scores of the sampled passages, their rows, and rows of those to read, best first."""
        there = np.flatnonzero(batch["valid_BxK"][row])
        noisy = score.detach() + torch.tensor(batch["gumbel_BxK"][row, there])
        sampled = noisy.topk(min(self.facts["sampled"], len(there))).indices.tolist()
        best = score.detach().topk(min(self.facts["passages"], len(there))).indices.tolist()
        return sampled, [int(there[i]) for i in sampled], [int(there[i]) for i in best]


def rank_loss(score: torch.Tensor, nll: torch.Tensor) -> torch.Tensor:
    """METHOD step 5 for one question."""
    first, second = torch.triu_indices(len(score), len(score), 1)
    counts = nll[first] != nll[second]
    first, second = first[counts], second[counts]
    if not len(first):
        return score.sum() * 0
    label = (nll[first] < nll[second]).float()
    return functional.binary_cross_entropy_with_logits(score[first] - score[second], label)


def released(pair: Pair, batch: Batch) -> dict[str, float]:
    """One question after the other, gradients added up; each prompt through the model alone."""
    questions = len(batch["valid_BxK"])
    losses = {"loss/answer": 0.0, "loss/rank": 0.0}

    def nll(prompt: Prompt) -> torch.Tensor:
        tokens, answer = prompt
        labels = [-100] * (len(tokens) - answer) + tokens[-answer:]
        return pair.reader(input_ids=torch.tensor([tokens]), labels=torch.tensor([labels]), use_cache=False).loss

    for row in range(questions):
        (score,) = pair.scores(batch, [row])
        places, sampled, best = pair.choose(batch, row, score)
        with torch.no_grad():
            judged = torch.stack([nll(pair.prompt(batch, row, [k])) for k in sampled])
        rank = rank_loss(score[places], judged)
        answer = nll(pair.prompt(batch, row, best))
        ((answer + rank) / questions).backward()
        losses["loss/answer"] += answer.item() / questions
        losses["loss/rank"] += rank.item() / questions
    pair.update()
    return losses


def nll_of(pair: Pair, prompts: Sequence[Prompt]) -> torch.Tensor:
    """Answer loss of each prompt, all in one pass: right-padded, which causal attention never sees from before it."""
    decoder, width = pair.reader.base_model.model, max(len(tokens) for tokens, _ in prompts)
    ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in prompts])
    hidden = decoder.model(input_ids=ids, use_cache=False).last_hidden_state
    rows = [row for row, (_, answer) in enumerate(prompts) for _ in range(answer)]
    places = [len(tokens) - answer + i - 1 for tokens, answer in prompts for i in range(answer)]
    wanted = torch.tensor([token for tokens, answer in prompts for token in tokens[-answer:]])
    each = functional.cross_entropy(decoder.lm_head(hidden[rows, places]), wanted, reduction="none")
    lengths = torch.tensor([answer for _, answer in prompts])
    return torch.zeros(len(prompts)).index_add(0, torch.tensor(rows), each) / lengths


def batched(pair: Pair, batch: Batch, micro: int) -> dict[str, float]:
    """Some questions at a time, gradients added up."""
    questions = len(batch["valid_BxK"])
    losses = {"loss/answer": 0.0, "loss/rank": 0.0}
    for first in range(0, questions, micro):
        rows = list(range(first, min(first + micro, questions)))
        scores = pair.scores(batch, rows)
        chosen = [pair.choose(batch, row, score) for row, score in zip(rows, scores, strict=True)]
        alone = [pair.prompt(batch, row, [k]) for row, (_, ks, _) in zip(rows, chosen, strict=True) for k in ks]
        with torch.inference_mode():
            judged = nll_of(pair, alone)
        judged_by = judged.clone().split([len(places) for places, _, _ in chosen])
        rank = sum(
            rank_loss(score[places], nll) for score, (places, _, _), nll in zip(scores, chosen, judged_by, strict=True)
        )
        answer = nll_of(pair, [pair.prompt(batch, r, best) for r, (_, _, best) in zip(rows, chosen, strict=True)]).sum()
        ((answer + rank) / questions).backward()
        losses["loss/answer"] += answer.item() / questions
        losses["loss/rank"] += rank.item() / questions
    pair.update()
    return losses


def open_torch(folder: Path, way: str, micro: int) -> Callable[[int], dict[str, float]]:
    """The models, and the step of one way."""
    pair = Pair(folder)

    def step(number: int) -> dict[str, float]:
        with np.load(folder / f"batch-{number}.npz") as held:
            batch = dict(held)
        start = time.perf_counter()
        losses = released(pair, batch) if way == "released" else batched(pair, batch, micro)
        return {"seconds": time.perf_counter() - start} | losses

    return step


if __name__ == "__main__":
    serve(lambda: open_torch(Path(sys.argv[1]).absolute(), sys.argv[2], int(sys.argv[3])))
