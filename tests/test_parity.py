"""MolBART under every strategy and layout equals MolBART on one process."""

import numpy as np

from biokit.config import ModelConfig
from biokit.models.molbart import MOLBART
from tests.parity import PP2, TP2_PP2, StrategyParity


class TestMolBART(StrategyParity):
    spec, vocab_size = MOLBART, 61  # prime: no tp divides it
    model = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64)

    @classmethod
    def make_batch(cls, step: int, num_rows: int) -> dict[str, np.ndarray]:
        """Random ids; every row and every batch has lengths of its own."""
        rng = np.random.default_rng(step)
        longest = rng.integers(8, 20, 2)  # (source, target)
        source, target = (rng.integers(3, most + 1, (num_rows, 1)) for most in longest)
        batch = {}
        for key, lengths in zip(cls.spec.batch_keys, (source, target, target), strict=True):
            ids = rng.integers(1, cls.vocab_size, (num_rows, lengths.max()))
            batch[key] = np.where(np.arange(lengths.max()) < lengths, ids, cls.pad_id)
        return batch


class TestTiedMolBART(TestMolBART):
    model = ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, tie_word_embeddings=True
    )
    layouts, journeys = (PP2, TP2_PP2), ((TP2_PP2, PP2),)
