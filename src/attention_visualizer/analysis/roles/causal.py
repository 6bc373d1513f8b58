"""Whether predictions depend on a head's role: its attention is replaced by attention that does not have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attention_visualizer.analysis.importance.outcomes import Outcomes
from attention_visualizer.analysis.importance.trials import Passes, Trial
from attention_visualizer.analysis.study.heads import Heads
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.attention.edits import attend_as_partner, permute_keys
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.measures.head_roles import NO_ROLE

OF_POSITION = {"fixed position", "neighbours"}
OTHER_POSITIONS, OTHER_IMAGE = "patches at other positions", "another image's attention"


@dataclass(frozen=True)
class CausalCheck:
    """What happens to the predictions when each head with a role attends otherwise; lists are of these heads."""

    labels: list[str]  # of the heads
    interventions: list[str]
    outcomes: Outcomes
    num_images: int

    @property
    def matters(self) -> list[str]:
        """The labels of the heads whose role the predictions depend on."""
        return [label for label, needed in zip(self.labels, self.outcomes.is_needed, strict=True) if needed]


def check_roles(study: Study, names: Sequence[Sequence[str]]) -> CausalCheck | None:
    """Break the first role of each head that has one. None where no head has, where classes are not known, or where it
    would cost too much. names: the roles of each existing head."""
    heads = Heads.of(study.survey)
    trials = {
        label: trial
        for place, label, roles in zip(heads, heads.labels, names, strict=True)
        if roles[0] != NO_ROLE and (trial := breaking(study, place, roles[0])) is not None
    }
    if not trials or study.survey.correct is None:
        return None
    rows = study.affordable_rows(1 + sum(trial.num_passes for trial in trials.values()), of_all=True)
    if rows is None:
        return None
    passes = Passes(study, rows, study.survey.labels[rows])
    study.progress("heads without their roles")
    before, after = passes.answers(), passes.try_all(list(trials.values()))
    interventions = [OTHER_IMAGE if trial.with_partners else OTHER_POSITIONS for trial in trials.values()]
    return CausalCheck(list(trials), interventions, Outcomes.of(list(trials), before, after, True), len(rows))


def breaking(study: Study, place: tuple[int, int], role: str) -> Trial | None:
    """Return the intervention that takes a role from a head: of a role about positions, what each patch got goes to
    another patch; of one about the image, the head attends as on another image. None for windows, whose patches have no
    other positions."""
    layer, head = place
    name, geometry = study.survey.layer_names[layer], study.survey.geometries[layer]
    title = f"head {layer + 1}.{head + 1} without its role"
    if role not in OF_POSITION:
        return Trial(title, attend_as_partner(name, head), with_partners=True, num_passes=2)
    if geometry.window is not None:
        return None
    return Trial(title, permute_keys(name, head, other_positions(geometry)))


def other_positions(geometry: Geometry) -> Tensor:
    """Return a permutation of the keys that moves every patch half the grid on and leaves other tokens: [key]."""
    grid = np.ndindex(geometry.grid)
    tokens = torch.tensor([geometry.token_of_patch(row, column) for row, column in grid])
    permutation = torch.arange(geometry.num_tokens)
    permutation[tokens] = tokens.roll(len(tokens) // 2 + geometry.grid[1] // 2)
    return permutation
