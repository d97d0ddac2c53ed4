"""Muon for weight matrices and AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer


class MuonWithAdamW(Optimizer):
    """torch's Muon on matrices and torch's AdamW on embeddings, norms and vectors.

    Both share the learning rate: Muon's updates are scaled to the size of AdamW's. Gradients of
    matrices are orthogonalized, so that rare directions learn as fast as common ones; on needle
    tasks this halves the steps to the first right answer (docs/log.md).

    Args:
        matrices: two-dimensional parameters, for Muon.
        others: all other parameters, for AdamW.
        lr: learning rate of both.
        weight_decay: decay of matrices and embeddings; vectors are not decayed.
        betas: of AdamW.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        others = list(others)
        self.muon = Muon(
            list(matrices), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        groups = [
            {"params": [p for p in others if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.adamw = AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)
        super().__init__(self._parts_groups(), {"lr": lr})
        self._share_groups()

    def _parts_groups(self) -> list[dict[str, Any]]:
        return [*self.muon.param_groups, *self.adamw.param_groups]

    def _share_groups(self) -> None:
        # The very same dictionaries: a scheduler that writes a rate here writes it there, and
        # checkpoints of shards find the state where every optimizer of PyTorch has it.
        self.param_groups = self._parts_groups()
        self.muon.state = self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both; a closure is not supported."""
        if closure is not None:
            raise ValueError("MuonWithAdamW takes no closure")
        self.muon.step()
        self.adamw.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state_dict)
        count = len(self.muon.param_groups)
        self.muon.param_groups = self.param_groups[:count]
        self.adamw.param_groups = self.param_groups[count:]
        self._share_groups()


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weights of linear layers but the output head, and all other trained parameters."""
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    head = getattr(model, "lm_head", None)
    embeddings |= {id(p) for p in head.parameters()} if head is not None else set()
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    trained = [p for p in model.parameters() if p.requires_grad]
    # Rows of vectors that are learned one by one, as states are, are no linear layer either.
    matrices = [p for p in trained if id(p) in linear - embeddings]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in trained if id(p) not in chosen]
