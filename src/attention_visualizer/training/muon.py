"""Muon (Jordan et al., 2024) for the blocks' matrices and AdamW for all other parameters, as one optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """PyTorch's two optimisers, step by step together; a schedule reaches the groups of both.

    hidden: groups of matrices for Muon, scaled so that AdamW's learning rate and weight decay suit it (Liu et al.,
    2025, arXiv:2502.16982); others: groups for AdamW.
    """

    def __init__(
        self,
        hidden: list[dict[str, Any]],
        others: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        fused: bool,
    ) -> None:
        muon = torch.optim.Muon(hidden, lr=lr, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, lr=lr, betas=betas, fused=fused)
        self.parts: tuple[torch.optim.Optimizer, ...] = (muon, adamw)
        # The parts' own groups, so that what a schedule changes here changes there.
        super().__init__([group for part in self.parts for group in part.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
