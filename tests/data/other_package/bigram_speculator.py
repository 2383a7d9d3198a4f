"""An algorithm of another package: the next token by the last one alone."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from speculators_core.decoding.drafter import join
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.models.feature_draft import speculators_config
from speculators_core.models.parts.losses import score_rows
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.settings import Settings


class BigramConfig(SpeculatorModelConfig):
    speculators_model_type: Literal["bigram"] = "bigram"
    rank: int = 8

    @property
    def aux_layer_ids(self):
        return []


class BigramRecipe(Settings):
    rank: int = 8


class BigramObjective(Settings):
    loss: dict[str, float] = {"kl_div": 1.0}


@dataclass
class BigramState:
    def select_rows(self, rows):
        pass


class BigramModel(SpeculatorModel):
    config_class = BigramConfig
    recipe_class = BigramRecipe
    objective_class = BigramObjective

    def __init__(self, config, verifier=None, verifier_attachment_mode=None):
        super().__init__(config, verifier, verifier_attachment_mode)
        vocab = config.transformer_layer_config.vocab_size
        hidden = config.transformer_layer_config.hidden_size
        self.table = nn.Embedding(vocab, config.rank)
        self.up = nn.Linear(config.rank, hidden, bias=False)
        self.layers = nn.ModuleList()
        self.post_init()

    @classmethod
    def fresh_config(cls, verifier_config, recipe, draft_vocab_size, name_or_path):
        return BigramConfig(
            transformer_layer_config=verifier_config,
            rank=recipe.rank,
            speculators_config=speculators_config("bigram", 2, verifier_config, name_or_path),
        )

    def start_fresh(self, t2d, d2t):
        assert t2d is None and d2t is None

    def forward(self, batch, objective=None):
        objective = objective or BigramObjective()
        rows = batch.loss_mask[0].nonzero().flatten()
        scored = score_rows(
            self.up(self.table(batch.input_ids[0, rows])),
            self.verifier_head.lm_head.weight.detach(),
            self.verifier_logits(batch),
            rows,
            objective.loss,
        )
        return scored.draft_tokens, scored.losses.mean(), {}

    def start_drafting(self):
        return BigramState()

    @torch.no_grad()
    def propose(self, state, confirmed, num_tokens, choose):
        tokens, proposals = confirmed.token_ids[:, -1:], []
        for _ in range(num_tokens):
            states = self.up(self.table(tokens))
            proposals.append(choose(states @ self.verifier_head.lm_head.weight.T))
            tokens = proposals[-1].token_ids
        return join(proposals)
