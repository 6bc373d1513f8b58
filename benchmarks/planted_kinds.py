"""The kinds of planted nulls and truths on which `findings.py` counts verdicts. Each model of a kind has its own seed,
and none has that of a control."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from planted import Found, Setting
from torch import nn

from attention_visualizer.analysis.study.survey import Survey
from attention_visualizer.analysis.trust.measure import TrustResult
from attention_visualizer.analysis.trust.measure import measure as measure_trust
from attention_visualizer.analysis.trust.rankings import curves_along, map_images, method_maps
from attention_visualizer.analysis.trust.verdict import BASELINES, RANDOM, REFERENCES, PairedGains, performance
from attention_visualizer.measures.perturbation import ranking_of
from attention_visualizer.measures.predicted_attention import ink_features, predict_out_of_fold
from attention_visualizer.models.untrained import random_weights

Array = NDArray[Any]

TRUST_IMAGES = 60  # deletion and insertion take hundreds of passes over each
STRENGTHS = (1.0, 40.0)  # of brightness in a softmax: from nearly uniform to nearly the brightest patch alone
PERMUTED, BAD_MAPS = "permuted pixels, true labels", "bad maps of trained models, six each"
CLASSES = "Attention differs clearly between classes"
END_POINTS = "End points get more attention than other ink"
EXTRA_ON_END_POINTS = (0.25, 0.5, 1.0)  # of what the patch would get without one
TRAINED, LEARNT_SHUFFLED, LEARNT_PERMUTED, SHARP, PLANTED = 10_000, 20_000, 30_000, 40_000, 50_000  # first seeds


@dataclass(frozen=True)
class Count:
    """How many of so many models something was found on, and all that was found."""

    found: int
    total: int
    what: tuple[str, ...] = ()

    @classmethod
    def of(cls, found: Sequence[Iterable[str]]) -> Count:
        """found: on each model."""
        names = [sorted(each) for each in found]
        return cls(sum(map(bool, names)), len(names), tuple(name for each in names for name in each))


@dataclass(frozen=True)
class Null:
    """Models of one kind, on which nothing is to be found; None for what is not asked of them."""

    kind: str
    claims: Count | None = None
    roles: Count | None = None
    needed: Count | None = None
    trusted: Count | None = None
    trusted_without_gate: Count | None = None
    gate: Count | None = None  # models whose accuracy counts as above chance


@dataclass(frozen=True)
class Truth:
    planted: str
    size: str
    count: Count


class Kinds:
    """All kinds, of `count` models each; `trust_count` of them have their maps tested, which is slow. first: what is
    added to the seeds, so that a rule need not be judged by the models that it was chosen on."""

    def __init__(self, setting: Setting, count: int, trust_count: int, first: int = 0) -> None:
        self.setting, self.count, self.trust_count, self.first = setting, count, trust_count, first

    def planted_seed(self, number: int) -> int:
        return PLANTED + self.first + number

    def told(self, kind: str, make: Callable[[int], Any], count: int | None = None) -> list[Any]:
        """Make one of each number, saying so."""
        made = []
        for number in range(self.count if count is None else count):
            print(f"{kind}: {number + 1}", file=sys.stderr, flush=True)
            made.append(make(number))
        return made

    @cached_property
    def trained(self) -> list[nn.Module]:
        return self.told("true labels", lambda number: self.setting.trained_model(TRAINED + self.first + number))

    @cached_property
    def trained_surveys(self) -> list[Survey]:
        return [self.setting.survey(model) for model in self.trained]

    @cached_property
    def trust_in_trained(self) -> list[TrustResult]:
        return self.told(
            "maps of true labels", lambda number: trust(self.setting, self.trained[number]), self.trust_count
        )

    # --- nulls: maps ---

    def softmax_of_ink(self, strength: Array | float, places: Array | float = 0.0) -> Array:
        """Attention that brightness and place decide: [image, layer, head, patch]. strength, places: broadcast to
        [layer, head, patch]."""
        scores = strength * self.setting.content.amount[:, None, None] + places
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares = weights / weights.sum(axis=-1, keepdims=True)
        return np.broadcast_to(shares, (len(shares), *self.setting.shape)).astype(np.float32)

    def brightest(self, number: int) -> Array:
        """The brightest patch; in half of the models, with up to half of the attention on preferred places."""
        generator = np.random.default_rng(self.planted_seed(number))
        elsewhere = number % 2 * generator.uniform(0, 0.5, (*self.setting.shape[:2], 1))
        places = self.softmax_of_ink(0.0, generator.normal(size=self.setting.shape))
        return ((1 - elsewhere) * self.softmax_of_ink(1e4) + elsewhere * places).astype(np.float32)

    def one_strength(self, number: int) -> Array:
        return self.softmax_of_ink(np.exp(np.random.default_rng(self.planted_seed(number)).uniform(*np.log(STRENGTHS))))

    def one_strength_and_places(self, number: int) -> Array:
        generator = np.random.default_rng(self.planted_seed(number))
        strength = np.exp(generator.uniform(*np.log(STRENGTHS)))
        return self.softmax_of_ink(strength, generator.normal(size=self.setting.shape))

    def mixed_strengths_and_places(self, number: int) -> Array:
        generator = np.random.default_rng(self.planted_seed(number))
        strengths = generator.normal(scale=12, size=(*self.setting.shape[:2], 1))
        return self.softmax_of_ink(strengths, generator.normal(size=self.setting.shape))

    def predicted_from_ink(self, number: int) -> Array:
        content = self.setting.content
        return predict_out_of_fold(self.trained_surveys[number].shares, ink_features(content.amount, content.inked))

    def maps_null(self, kind: str, maps: Callable[[int], Array]) -> Null:
        """Count claims alone: roles of such maps are what they look like."""
        found = self.told(kind, lambda number: self.judged(maps(number), number))
        return Null(kind, claims=Count.of([each.claims for each in found]))

    def judged(self, maps: Array, number: int) -> Found:
        model = random_weights(self.setting.blank, self.planted_seed(number))
        return self.setting.judge(self.setting.with_maps(model, maps), roles=False)

    # --- nulls: models ---

    def model_null(
        self,
        kind: str,
        setting: Setting,
        make: Callable[[int], nn.Module],
        is_null: Callable[[str], bool] = lambda _: True,
        answers: bool = True,
    ) -> Null:
        """is_null: whether a claim is false of such models; answers: whether to look at what they answer, which has
        nothing to do with the classes, so that no head is needed and no map explains them."""

        tested: list[TrustResult] = []

        def all_of(number: int) -> tuple[Found, list[str]]:
            model = make(number)
            found = setting.judge(setting.survey(model))
            if not answers:
                return found, []
            if number < self.trust_count:
                tested.append(trust(setting, model))
            return found, setting.needed_heads(model)

        found, needed = zip(*self.told(kind, all_of), strict=True)
        return Null(
            kind,
            Count.of([filter(is_null, each.claims) for each in found]),
            Count.of([{name for _, name in each.roles} for each in found]),
            Count.of(needed) if answers else None,
            Count.of([each.trusted for each in tested]),
            Count.of([trusted_without_gate(each) for each in tested]),
            Count(sum(each.passes_gate for each in found), len(found)),
        )

    def permuted_pixels(self) -> Null:
        """Classes can be told apart from permuted pixels, and attention may do so."""
        setting = self.setting.with_permuted_pixels()
        return self.model_null(
            PERMUTED,
            setting,
            lambda number: setting.trained_model(LEARNT_PERMUTED + self.first + number),
            CLASSES.__ne__,
            answers=False,
        )

    def bad_maps(self) -> Null:
        """Maps that know chance, the image, other weights or another image, of models that have learnt."""
        found = [
            trusted
            for model, result in zip(self.trained, self.trust_in_trained, strict=False)
            for trusted in trusted_bad_maps(self.setting, model, result)
        ]
        return Null(BAD_MAPS, trusted=Count.of(found))

    def nulls(self) -> dict[str, Callable[[], Null]]:
        setting = self.setting
        maps = {
            "attention on the brightest patch": self.brightest,
            "brightness-softmax": self.one_strength,
            "brightness-softmax with places": self.one_strength_and_places,
            "brightness-softmax with places, heads mixed": self.mixed_strengths_and_places,
            "trained attention as predicted from ink": self.predicted_from_ink,
        }
        models: dict[str, Callable[[int], nn.Module]] = {
            "shuffled labels": lambda number: setting.shuffled_model(LEARNT_SHUFFLED + self.first + number),
            "sharpened random weights": lambda number: setting.sharpened_model(SHARP + self.first + number),
        }
        return {
            **{kind: partial(self.maps_null, kind, make) for kind, make in maps.items()},
            **{kind: partial(self.model_null, kind, setting, model) for kind, model in models.items()},
            PERMUTED: self.permuted_pixels,
            BAD_MAPS: self.bad_maps,
        }

    # --- truths ---

    def end_points(self, extra: float, layers: slice) -> Count:
        """Brightness and places, with so much more on patches with an end point."""

        def found(number: int) -> bool:
            generator = np.random.default_rng(self.planted_seed(number))
            maps = self.one_strength_and_places(number) * generator.gamma(
                20, 1 / 20, (len(self.setting.rows), *self.setting.shape)
            ).astype(np.float32)
            maps[:, layers] *= 1 + extra * self.setting.content.features["end points"][:, None, None]
            return END_POINTS in self.judged(maps / maps.sum(axis=-1, keepdims=True), number).claims

        return count_true(self.told(f"end points, {extra} more", found))

    def one_head(self, role: str, weights: Callable[[int], Array]) -> Count:
        """One head of a trained model attends as planted. weights: of a number [image, patch]."""
        layers, heads, _ = self.setting.shape

        def found(number: int) -> bool:
            head = int(np.random.default_rng(self.planted_seed(number)).integers(layers * heads))
            maps = np.full((len(self.setting.rows), *self.setting.shape), np.nan, np.float32)
            maps[:, head // heads, head % heads] = weights(number)
            survey = self.setting.with_maps(self.trained[number], maps)
            return (head, role) in self.setting.judge(survey, claims=False).roles

        return count_true(self.told(f"head: {role}", found))

    def one_place(self, number: int) -> Array:
        """Nine tenths on one patch."""
        patches = self.setting.shape[-1]
        place = int(np.random.default_rng(self.planted_seed(number)).integers(patches))
        return np.where(np.arange(patches) == place, 0.9, 0.1 / (patches - 1))

    def needed_head(self, number: int) -> bool:
        """Whether the head is found that alone brings anything to the class token."""
        setting, (layers, heads, _) = self.setting, self.setting.shape
        model = random_weights(setting.blank, self.planted_seed(number))
        head = int(np.random.default_rng(self.planted_seed(number)).integers(heads))
        width = setting.blank.config["embed_dim"] // heads
        with torch.no_grad():
            for layer, block in enumerate(model.blocks):
                kept = torch.zeros(setting.blank.config["embed_dim"])
                kept[head * width : (head + 1) * width] = float(layer == layers - 1)
                block.attn.proj.weight *= kept
            logits = model(setting.images.model_input(setting.images.images))
            model.head.bias -= logits.mean(dim=0)  # so that there are several answers
            labels = (logits - logits.mean(dim=0)).argmax(dim=1)
        return setting.needed_heads(model, replace(setting.images, labels=labels)) == [f"{layers}.{head + 1}"]

    def shapley_values(self) -> Count:
        return count_true([not each.calibration.verdict.failures for each in self.trust_in_trained])

    def truths(self) -> dict[str, Callable[[], Truth]]:
        layers, heads, _ = self.setting.shape
        one = f"1 head of {layers * heads}"
        found: dict[str, Callable[[], Truth]] = {}
        for where, which, extras in (
            ("all layers", slice(None), EXTRA_ON_END_POINTS[:2]),
            ("one layer", slice(layers - 1, layers), EXTRA_ON_END_POINTS),
        ):
            for extra in extras:
                found[f"end points, {where}, {extra:.0%}"] = lambda where=where, which=which, extra=extra: Truth(
                    f"more attention on end points, {where}", f"{extra:.0%} more", self.end_points(extra, which)
                )
        brightest = self.softmax_of_ink(1e4)[:, 0, 0]
        heads = {
            "head on the brightest patch": lambda: self.one_head("brightest patch", lambda _: brightest),
            "head on one place": lambda: self.one_head("fixed position", self.one_place),
            "head that alone is needed": lambda: count_true(self.told("needed head", self.needed_head)),
        }
        for name, count in heads.items():
            found[name] = lambda name=name, count=count: Truth(name, one, count())
        name = "ranking by Shapley values of other permutations"
        found[name] = lambda: Truth(name, "100% of the gain", self.shapley_values())
        return found


def count_true(found: Sequence[bool]) -> Count:
    return Count(sum(found), len(found))


# --- trust ---


def trust(setting: Setting, model: nn.Module) -> TrustResult:
    study = setting.study(model)
    return measure_trust(study, study.stratified_rows(TRUST_IMAGES))


def trusted_without_gate(result: TrustResult) -> list[str]:
    """Return the maps that would be trusted if the accuracy were above chance."""
    return [each.name for each in result.methods if replace(each, is_learnt=True).is_trusted]


def trusted_bad_maps(setting: Setting, model: nn.Module, result: TrustResult) -> list[list[str]]:
    """Return for each bad map its name where it gains what trust needs, else nothing."""
    study = setting.study(model)
    rows = study.stratified_rows(TRUST_IMAGES)
    images = map_images(study, rows)
    inputs, classes = (
        study.target.model_input(study.target.images.read(rows.tolist())),
        torch.from_numpy(images.classes),
    )
    other = method_maps(random_weights(model, PLANTED), inputs, classes)
    noise = np.random.default_rng(PLANTED).random(images.inked.shape)
    maps = {
        "at random": noise,
        "inked at random": images.inked + 0.5 * noise,
        "brightness": images.ink_amount + 1e-6 * noise,
        "edges": images.edge_amount + 1e-6 * noise,
        "relevance of random weights": other["relevance"],
        "relevance of another image": np.roll(images.maps["relevance"], 1, axis=0),
    }
    curves = curves_along(
        study, rows, images.classes, {name: ranking_of(each, 1) for name, each in maps.items()}, "bad"
    )
    known = {name: performance(result.curves, name) for name in (*BASELINES, *REFERENCES)}
    baselines, references = ({name: known[name] for name in names} for names in (BASELINES, REFERENCES))
    everywhere = np.arange(len(rows))
    found = []
    for name in maps:
        own = performance(curves, name)
        gains = PairedGains.of(own, baselines, references, [known[RANDOM]], everywhere).summary()
        found.append([] if gains.failures() else [name])
    return found
