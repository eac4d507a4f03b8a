"""Beam search, and diverse beam search (Vijayakumar et al. 2018).

Shapes: B molecules, G groups, K beams a group, N = B * G * K rows, T target length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from biokit.generate.inputs import Hiddens, check_ranges, hiddens_of
from biokit.generate.rules import TokenRules
from biokit.models.molbart import DecodingState, MolBART

if TYPE_CHECKING:
    from biokit.tokenizers import SmilesTokenizer


@dataclass(frozen=True)
class Hypothesis:
    """One answer of a beam search; its score is its log-likelihood (nats) over the tokens that may be emitted."""

    smiles: str
    score: float


@torch.inference_mode()
def beam_search(
    model: MolBART,
    tokenizer: SmilesTokenizer,
    source: torch.Tensor | Hiddens,
    num_beams: int = 10,
    *,
    num_groups: int = 1,
    diversity: float = 0.0,
    banned: Collection[str] = (),
    grammar: bool = False,
    max_length: int = 0,
) -> list[list[Hypothesis]]:
    """The likeliest continuations, in order of their score, of each of the encoder inputs or hiddens.

    Of all continuations of a group's beams the `num_beams / num_groups` likeliest are kept; one that has ended keeps
    its place until better ones take it, and the search ends when all have ended. Groups choose one after the other at
    each step, and a token costs a group `diversity` for each time that earlier groups chose it. Scores never contain
    that. Continuations that are cut off at `max_length` tokens are returned as they stand.

    Args:
        source: encoder inputs (B,S), or hiddens.
        banned: tokens that must not come, beside special, property and unused ones.
        grammar: only what SMILES can go on with (`TokenRules`).
        max_length: tokens a molecule, end included; 0: as many as the model has positions.

    Raises:
        ConfigError: a value outside its range. DataError: an input longer than the model's positions.
    """
    num_positions = model.embed.embedding.num_positions
    max_length = max_length or num_positions
    check_ranges(
        {
            "num_beams": (num_beams, num_beams >= 1),
            "num_groups": (num_groups, num_groups >= 1 and num_beams % num_groups == 0),
            "diversity": (diversity, 0 <= diversity < math.inf),
            "max_length": (max_length, 1 <= max_length <= num_positions),
        },
        f"num_beams >= 1, num_groups that divides it, diversity >= 0, 0 < max_length <= {num_positions}",
    )
    memory = hiddens_of(model, source)
    rules = TokenRules(tokenizer, memory.mask_BS.device, banned, grammar, max_length)
    search = _Search(model, tokenizer, memory, rules, num_beams, num_groups, diversity, max_length)
    for _ in range(max_length):
        if not search.step():
            break
    return search.hypotheses(tokenizer)


class _Search:
    """The beams of all molecules, a token at a time. Molecules whose beams have all ended leave."""

    def __init__(
        self,
        model: MolBART,
        tokenizer: SmilesTokenizer,
        memory: Hiddens,
        rules: TokenRules,
        num_beams: int,
        num_groups: int,
        diversity: float,
        max_length: int,
    ) -> None:
        self.rules, self.num_beams, self.num_groups, self.diversity = rules, num_beams, num_groups, diversity
        self.end_id, self.pad_id = tokenizer.end_id, tokenizer.pad_id
        num_molecules, device = len(memory), memory.mask_BS.device
        self.state = DecodingState(
            model, memory.values_BSD, memory.mask_BS, num_targets=num_beams, max_length=max_length
        )
        rules.begin(num_molecules * num_beams)
        self.molecules = torch.arange(num_molecules, device=device)  # those that go on
        self.next_N1 = torch.full((num_molecules * num_beams, 1), tokenizer.begin_id, device=device)
        first_K = torch.zeros(num_beams // num_groups, device=device)
        first_K[1:] = float("-inf")  # all beams of a group are the same at first: one of them stands for all
        self.scores_BGK = first_K.repeat(num_molecules, num_groups, 1)
        self.ended_BGK = torch.zeros_like(self.scores_BGK, dtype=torch.bool)
        self.tokens_NT = torch.empty(num_molecules * num_beams, 0, dtype=torch.long, device=device)
        self.found: dict[int, tuple[list[list[int]], list[float]]] = {}

    def step(self) -> bool:
        """One token more for every beam; whether any goes on."""
        logits_NV = self.rules.apply(self.state.advance(self.next_N1)[:, -1].float())
        chosen_N, rows_N = self._choose(logits_NV.log_softmax(-1))
        self.tokens_NT = torch.cat((self.tokens_NT[rows_N], chosen_N[:, None]), dim=1)
        going_B = ~self.ended_BGK.flatten(1).all(1)
        if not bool(going_B.all()):
            self._leave(~going_B)
            if not bool(going_B.any()):
                return False
            keep = going_B.nonzero().squeeze(1)
            kept_N = self.state.targets_of(keep)
            rows_N, chosen_N, self.tokens_NT = rows_N[kept_N], chosen_N[kept_N], self.tokens_NT[kept_N]
            self.scores_BGK, self.ended_BGK = self.scores_BGK[keep], self.ended_BGK[keep]
            self.molecules = self.molecules[keep]
            self.state.select_memories(keep)
        self.state.select_targets(rows_N)
        self.rules.advance(chosen_N, rows_N)
        self.next_N1 = chosen_N[:, None]
        return True

    def _choose(self, log_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token of each beam, and the row that it goes on from."""
        num_molecules, (num_groups, beams) = len(self.scores_BGK), self.scores_BGK.shape[1:]
        vocab_size = log_NV.shape[1]
        ended_N = self.ended_BGK.flatten()
        if bool(ended_N.any()):  # an ended beam goes on as itself
            log_NV[ended_N] = float("-inf")
            log_NV[ended_N, self.pad_id] = 0.0
        totals_BGC = (self.scores_BGK[..., None] + log_NV.view(num_molecules, num_groups, beams, -1)).flatten(2)
        chosen_BGK = torch.empty_like(self.scores_BGK, dtype=torch.long)
        rows_BGK = torch.empty_like(chosen_BGK)
        counts_BV = torch.zeros(num_molecules, vocab_size, device=log_NV.device)
        for group in range(num_groups):
            totals_BC = totals_BGC[:, group]
            judged_BC = totals_BC
            if group and self.diversity:
                judged_BC = totals_BC - (self.diversity * counts_BV).repeat(1, beams)
            best_BK = judged_BC.topk(beams, dim=1).indices
            self.scores_BGK[:, group] = totals_BC.gather(1, best_BK)
            chosen_BGK[:, group] = best_BK % vocab_size
            rows_BGK[:, group] = best_BK // vocab_size + group * beams
            if num_groups > 1:
                new_BK = (chosen_BGK[:, group] != self.pad_id).float()
                counts_BV.scatter_add_(1, chosen_BGK[:, group], new_BK)
        dead_BGK = self.scores_BGK == float("-inf")  # there was nothing that may come
        chosen_BGK.masked_fill_(dead_BGK, self.pad_id)
        ended_BN = self.ended_BGK.flatten(1).gather(1, rows_BGK.flatten(1))
        self.ended_BGK = ended_BN.view_as(chosen_BGK) | (chosen_BGK == self.end_id) | dead_BGK
        first_B = torch.arange(num_molecules, device=log_NV.device) * num_groups * beams
        return chosen_BGK.flatten(), (first_B[:, None] + rows_BGK.flatten(1)).flatten()

    def _leave(self, gone_B: torch.Tensor) -> None:
        """Note the beams of molecules that are done."""
        tokens_BLT = self.tokens_NT.view(len(gone_B), self.num_beams, -1)
        for molecule, tokens, scores in zip(
            self.molecules[gone_B].tolist(), tokens_BLT[gone_B].tolist(), self.scores_BGK[gone_B].flatten(1).tolist(),
            strict=True,
        ):  # fmt: skip
            self.found[molecule] = (tokens, scores)

    def hypotheses(self, tokenizer: SmilesTokenizer) -> list[list[Hypothesis]]:
        """Of each molecule, the best first."""
        self._leave(
            torch.tensor([molecule not in self.found for molecule in self.molecules.tolist()], dtype=torch.bool)
        )
        return [_best_first(tokenizer, *self.found[molecule]) for molecule in sorted(self.found)]


def _best_first(tokenizer: SmilesTokenizer, tokens: list[list[int]], scores: list[float]) -> list[Hypothesis]:
    pairs = sorted(zip(scores, range(len(scores)), strict=True), key=lambda pair: (-pair[0], pair[1]))
    return [Hypothesis(tokenizer.decode(tokens[row]), score) for score, row in pairs if score > float("-inf")]
