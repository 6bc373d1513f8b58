"""What `findings.py` judges: models and maps in which nothing is to be found, and those in which something was planted.

Imported where work begins, since it needs PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attention_visualizer.analysis.claims.content import Content
from attention_visualizer.analysis.claims.declared import declared_claims
from attention_visualizer.analysis.claims.evidence import Evidence, gather, resampled_distances
from attention_visualizer.analysis.claims.verdicts import judge
from attention_visualizer.analysis.importance.measure import without_head, without_layers
from attention_visualizer.analysis.importance.outcomes import Outcomes
from attention_visualizer.analysis.importance.trials import Passes
from attention_visualizer.analysis.roles.measure import find_roles
from attention_visualizer.analysis.study.budget import Budget
from attention_visualizer.analysis.study.controls import (
    FIRST_SHUFFLED,
    RANDOM,
    SHARPENED,
    SHARPENED_FOR_EACH,
    SHUFFLED,
    Sharpening,
    random_surveys,
    sharpened_surveys,
)
from attention_visualizer.analysis.study.heads import Heads
from attention_visualizer.analysis.study.output import Output
from attention_visualizer.analysis.study.shuffled_labels import learn_shuffled_labels
from attention_visualizer.analysis.study.study import FIRST_CONTROL, Study
from attention_visualizer.analysis.study.survey import Survey
from attention_visualizer.analysis.study.target import Target
from attention_visualizer.attention.capture import capture, intervene
from attention_visualizer.attention.layers import AttentionLayer
from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.data.image_sets import LabelledImageSet
from attention_visualizer.measures.head_roles import NO_ROLE
from attention_visualizer.measures.intervals import stratified
from attention_visualizer.models.untrained import random_weights
from attention_visualizer.models.vision_transformer import VisionTransformer

Array = NDArray[Any]

NUM_CONTROLS = 3  # of each kind but the sharpened ones, as in a report
LEARNING_RATE, BATCH = 3e-3, 64
# Nats, of sharpened random weights. Uniform attention has 2.8, the default model's heads have 0.8 on average.
ENTROPIES = 0.1, 2.5


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how much: models of a minute or less."""

    data: str
    num_analysed: int  # images
    num_learnt: int  # other images
    num_shuffled: int  # of these, whose labels are shuffled
    epochs: int
    sizes: dict[str, int]


SMALL = {"embed_dim": 32, "num_heads": 4, "num_layers": 3, "mlp_dim": 64}
DIGITS = Recipe("digits", 1000, 797, 500, 15, SMALL)
MNIST = Recipe("mnist", 1000, 10_000, 500, 3, {})
QUICK = Recipe("digits", 200, 200, 60, 3, SMALL)


@dataclass(frozen=True)
class Found:
    """What is said about one model or its maps, whether or not its accuracy is above chance."""

    claims: list[str]  # whose requirements hold
    roles: list[tuple[int, str]]  # heads, counted over all layers, with each of their roles
    passes_gate: bool


class Setting:
    """Images, an architecture, and its control models, which are made once."""

    def __init__(self, recipe: Recipe, images: LabelledImageSet, learning: LabelledImageSet) -> None:
        self.recipe, self.images, self.learning = recipe, images, learning
        self.blank = VisionTransformer(**recipe.sizes).eval()
        self.rows = np.arange(len(images))
        self.content = Content.of(images.images, self.blank.grid_size)
        #: Of maps: (layers, heads, patches).
        self.shape = len(self.blank.blocks), self.blank.config["num_heads"], self.content.amount.shape[1]

    @classmethod
    def of(cls, recipe: Recipe) -> Setting:
        data = ImageDataModule(name=recipe.data, fallback=None)
        data.load()
        images, labels = (torch.cat(each) for each in zip(*data.splits.values(), strict=True))
        analysed = stratified(labels.numpy(), recipe.num_analysed)
        others = np.setdiff1d(np.arange(len(labels)), analysed)
        learnt = others[stratified(labels.numpy()[others], recipe.num_learnt)]
        return cls(
            recipe, *(LabelledImageSet(data.description, images[rows], labels[rows]) for rows in (analysed, learnt))
        )

    def with_permuted_pixels(self) -> Setting:
        """The same images with their pixels at other places, the same ones in all: no strokes are left."""
        order = torch.randperm(self.images.images[0].numel(), generator=torch.Generator().manual_seed(0))

        def permuted(pictures: LabelledImageSet) -> LabelledImageSet:
            pixels = pictures.images.flatten(1)[:, order].reshape(pictures.images.shape)
            return replace(pictures, images=pixels)

        return Setting(self.recipe, permuted(self.images), permuted(self.learning))

    def target(self, model: nn.Module) -> Target:
        return Target(model, self.images)

    def survey(self, model: nn.Module) -> Survey:
        return self.target(model).survey()

    def study(self, model: nn.Module, images: LabelledImageSet | None = None) -> Study:
        target = Target(model, self.images if images is None else images)
        return Study(target, Output(Path("unused")), "planted", Budget(None, NUM_CONTROLS))

    @cached_property
    def random_models(self) -> list[nn.Module]:
        count = SHARPENED_FOR_EACH * NUM_CONTROLS
        return [random_weights(self.blank, FIRST_CONTROL + number) for number in range(count)]

    @cached_property
    def fixed_surveys(self) -> dict[str, list[Survey]]:
        """Of the controls that are the same for everything that is judged."""
        shuffled = [self.shuffled_model(FIRST_SHUFFLED + number) for number in range(NUM_CONTROLS)]
        target = self.target(self.blank)
        return {
            RANDOM: random_surveys(target, self.random_models[:NUM_CONTROLS], self.rows),
            SHUFFLED: random_surveys(target, shuffled, self.rows),
        }

    @cached_property
    def fixed_evidence(self) -> dict[str, list[Evidence]]:
        return {
            kind: [self.evidence(survey, False) for survey in surveys] for kind, surveys in self.fixed_surveys.items()
        }

    def evidence(self, survey: Survey, resampled: bool = True) -> Evidence:
        """`evidence_of`, with what is in the images found once."""
        depth = np.flatnonzero(survey.patch_queries_count).tolist()
        distances = resampled_distances(survey, resampled)
        return gather(survey.shares, self.content, survey.labels, depth, distances, resampled)

    def judge(self, survey: Survey, claims: bool = True, roles: bool = True) -> Found:
        """Judge one model's claims and roles as a report does, except that it counts as having learnt.

        Controls can only take verdicts away: those that are made for this survey are made where others leave any.
        """
        found = self.verdicts(survey, {}, claims, roles)
        if found.claims or found.roles:
            sharpened = sharpened_surveys(self.target(self.blank), self.random_models, self.rows, survey)
            found = self.verdicts(survey, {SHARPENED: sharpened}, claims, roles)
        return found

    def verdicts(self, survey: Survey, own_controls: dict[str, list[Survey]], claims: bool, roles: bool) -> Found:
        surveys = {**self.fixed_surveys, **own_controls}
        supported, names = [], []
        if claims:
            evidence = self.evidence(survey)
            own = {kind: [self.evidence(each, False) for each in of_kind] for kind, of_kind in own_controls.items()}
            judgements = judge(declared_claims(evidence)[0], evidence, {**self.fixed_evidence, **own})
            supported = [each.claim.name for each in judgements if each.verdict != "not supported"]
        if roles:
            amount = self.content.amount
            controls = {kind: [(each, amount) for each in of_kind] for kind, of_kind in surveys.items()}
            names = find_roles(survey, amount, self.content.inked, controls).names
        study = self.study(self.blank)
        study.__dict__["survey"] = survey
        return Found(
            supported,
            [(head, name) for head, of_head in enumerate(names) for name in of_head if name != NO_ROLE],
            study.has_learnt,
        )

    def needed_heads(self, model: nn.Module, images: LabelledImageSet | None = None) -> list[str]:
        """Return the heads without which errors rise, whether or not the accuracy is above chance."""
        study = self.study(model, images)
        heads, rows = Heads.of(study.survey), self.rows
        passes = Passes(study, rows, study.survey.labels[rows])
        trials = [*(without_head(study, place) for place in heads), *without_layers(study)]
        outcomes = Outcomes.of([each.name for each in trials], passes.answers(), passes.try_all(trials), True)
        return [name for name, needed in zip(heads.labels, outcomes.is_needed, strict=False) if needed]

    # --- models ---

    def trained_model(self, seed: int) -> VisionTransformer:
        """A model that has learnt the true labels of the images that are not analysed."""
        assert self.learning.labels is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = VisionTransformer(**self.recipe.sizes)
        inputs, labels = self.learning.model_input(self.learning.images), self.learning.labels
        generator = torch.Generator().manual_seed(seed)
        steps = self.recipe.epochs * -(-len(labels) // BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        for _ in range(self.recipe.epochs):
            for rows in torch.randperm(len(labels), generator=generator).split(BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
        return model.eval().requires_grad_(False)

    def shuffled_model(self, seed: int) -> nn.Module:
        assert self.learning.labels is not None
        rows = stratified(self.learning.labels.numpy(), self.recipe.num_shuffled)
        inputs = self.learning.model_input(self.learning.images[rows])
        model = learn_shuffled_labels(self.blank, inputs, self.learning.labels[rows], seed)
        assert model is not None, "shuffled labels were not learnt by heart"
        return model

    def sharpened_model(self, seed: int) -> nn.Module:
        """Random weights with longer queries: as sharp as trained models are, and sharper, each head otherwise."""
        model = random_weights(self.blank, seed)
        batch = self.images.model_input(self.images.images[:500])
        with torch.no_grad(), capture(model) as attention:
            model(batch)
        generator = torch.Generator().manual_seed(seed)
        low, high = ENTROPIES
        edit = Sharpening(
            {layer.name: layer.geometry for layer in attention.layers},
            {
                layer.name: low + (high - low) * torch.rand(self.shape[1], generator=generator)
                for layer in attention.layers
            },
        )
        with torch.no_grad():
            with intervene(model, edit):
                model(batch)
            for block, exponents in zip(model.blocks, edit.exponents.values(), strict=True):
                factors = exponents.repeat_interleave(len(block.attn.qkv.weight) // 3 // len(exponents))
                block.attn.qkv.weight[: len(factors)] *= factors[:, None]
                block.attn.qkv.bias[: len(factors)] *= factors
        return model

    def with_maps(self, model: nn.Module, maps: Array) -> Survey:
        """Survey a model with planted maps: [image, layer, head, patch], NaN for heads that keep their own."""
        with intervene(model, PlantedMaps(torch.from_numpy(maps))):
            return self.survey(model)


class PlantedMaps:
    """An edit: all queries attend to the patches as planted, image by image in their order."""

    def __init__(self, maps: Tensor) -> None:
        self.maps = maps  # [image, layer, head, patch]
        self.layers: list[str] = []
        self.seen: dict[str, int] = {}  # images, by layer

    def __call__(self, layer: AttentionLayer, weights: Tensor) -> Tensor:
        if layer.name not in self.seen:
            self.layers.append(layer.name)
        start = self.seen.get(layer.name, 0)
        self.seen[layer.name] = start + len(weights)
        planted = self.maps[start : start + len(weights), self.layers.index(layer.name), :, None]
        prefix = weights.shape[-1] - planted.shape[-1]
        return torch.where(planted.isnan().any(dim=-1, keepdim=True), weights, nn.functional.pad(planted, (prefix, 0)))
