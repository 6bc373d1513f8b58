"""Probabilities are told from logits, whatever a model ends in: no second softmax, no wrong percentage."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_visualizer.attention.outputs import ClassScores, class_scores, predict

IMAGES = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0))


class Ending(nn.Module):
    """A linear classifier that ends in some function."""

    def __init__(self, num_classes: int, ending: Callable[[Tensor], Any], scale: float = 3.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(8, num_classes)
        self.ending = ending
        with torch.no_grad():
            self.linear.weight.mul_(scale)

    def logits(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))

    def forward(self, images: Tensor) -> Any:
        return self.ending(self.logits(images))


def scores_of(model: nn.Module, images: Tensor = IMAGES) -> ClassScores | None:
    with torch.no_grad():
        return class_scores(model, images, model(images))


ONE_OF_SEVERAL: dict[str, Callable[[Tensor], Any]] = {
    "logits": lambda scores: scores,
    "softmax": lambda scores: scores.softmax(dim=1),
    "log_softmax": lambda scores: scores.log_softmax(dim=1),
    "half precision": lambda scores: scores.softmax(dim=1).bfloat16(),
    "in a dictionary": lambda scores: {"logits": scores.softmax(dim=1)},
    "mean over crops": lambda scores: torch.stack([scores.softmax(dim=1)] * 4).mean(dim=0),
    "by hand": lambda scores: scores.exp() / scores.exp().sum(dim=1, keepdim=True),
    "a temperature": lambda scores: (scores / 2 * 2).softmax(-1),
    "shifted logits": lambda scores: scores + 100,
}


@pytest.mark.parametrize("ending", ONE_OF_SEVERAL)
def test_one_softmax_is_applied_in_all(ending: str) -> None:
    model = Ending(5, ONE_OF_SEVERAL[ending])
    logits, found = model.logits(IMAGES).detach(), scores_of(model)
    assert found is not None and found.probabilities is not None
    torch.testing.assert_close(found.probabilities, logits.softmax(dim=1), atol=5e-3, rtol=0)
    relative = [each - each.mean(dim=1, keepdim=True) for each in (found.logits, logits)]
    torch.testing.assert_close(*relative, atol=2e-2, rtol=1e-4)
    assert torch.equal(found.predicted, logits.argmax(dim=1))


INDEPENDENT: dict[str, Callable[[Tensor], Any]] = {
    "sigmoid": torch.sigmoid,
    "method, first of a tuple": lambda scores: (scores.sigmoid(), scores),
    "mean over crops": lambda scores: torch.stack([scores.sigmoid(), scores.sigmoid()]).mean(dim=0),
    "kept from 0 and 1": lambda scores: scores.sigmoid().clamp(1e-4, 1 - 1e-4),
}


@pytest.mark.parametrize("ending", INDEPENDENT)
def test_sigmoids_are_probabilities_each_by_itself(ending: str) -> None:
    model = Ending(5, INDEPENDENT[ending])
    logits, found = model.logits(IMAGES).detach(), scores_of(model)
    assert found is not None and found.probabilities is not None
    torch.testing.assert_close(found.probabilities, logits.sigmoid(), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.logits, logits, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("num_classes", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_logits_that_happen_to_lie_between_0_and_1_are_logits(num_classes: int, seed: int) -> None:
    model = Ending(num_classes, lambda scores: scores, scale=0.0)
    with torch.no_grad():
        model.linear.bias.copy_(torch.rand(num_classes, generator=torch.Generator().manual_seed(seed)))
    logits, found = model.logits(IMAGES).detach(), scores_of(model)
    both = torch.cat([torch.zeros_like(logits), logits], dim=1) if num_classes == 1 else logits
    assert found is not None and found.probabilities is not None
    torch.testing.assert_close(found.probabilities, both.softmax(dim=1))


ONE_SCORE: dict[str, Callable[[Tensor], Any]] = {
    "a column": lambda score: score,
    "a vector": lambda score: score[:, 0],
    "sigmoid": lambda score: score.sigmoid(),
    "sigmoid of a vector": lambda score: score[:, 0].sigmoid(),
}


@pytest.mark.parametrize("ending", ONE_SCORE)
def test_one_score_is_class_1_against_class_0(ending: str) -> None:
    model = Ending(1, ONE_SCORE[ending])
    share, found = model.logits(IMAGES).sigmoid()[:, 0].detach(), scores_of(model)
    assert found is not None and found.probabilities is not None
    torch.testing.assert_close(found.probabilities, torch.stack([1 - share, share], dim=1), atol=1e-5, rtol=0)
    assert torch.equal(found.predicted, (share > 0.5).long()) and 0 < found.predicted.sum() < len(IMAGES)


def test_gradients_of_probabilities_are_those_of_their_logarithm() -> None:
    model = Ending(5, lambda scores: scores.softmax(dim=1))
    images = IMAGES.clone().requires_grad_()
    found = class_scores(model, images, model(images))
    assert found is not None
    (gradient,) = torch.autograd.grad(found.logits[:, 2].sum(), images)
    (expected,) = torch.autograd.grad(model.logits(images).log_softmax(dim=1)[:, 2].sum(), images)
    torch.testing.assert_close(gradient, expected)


UNKNOWN: dict[str, Callable[[Tensor], Any]] = {
    "no graph": lambda scores: scores.detach().sigmoid(),
    "shares of the largest": lambda scores: scores.sigmoid() / scores.sigmoid().max(),
    "what is not the class": lambda scores: 1 - scores.sigmoid(),
    "squares": lambda scores: scores.sin().square(),
}


@pytest.mark.parametrize("ending", UNKNOWN)
def test_where_it_is_not_known_what_numbers_are_there_is_a_class_and_no_percentage(ending: str) -> None:
    model = Ending(5, UNKNOWN[ending])
    with torch.no_grad():
        output = model(IMAGES)
    predicted, probability = predict(scores_of(model), len(IMAGES))
    assert (predicted == output.argmax(dim=1).numpy()).all() and (probability != probability).all()
    assert scores_of(Ending(1, UNKNOWN[ending])) is None  # which class it speaks for is not known either


@pytest.mark.parametrize(
    ("config", "outputs", "probability"),
    [
        ({"problem_type": "multi_label_classification"}, 5, torch.sigmoid),
        ({"problem_type": "single_label_classification"}, 5, lambda scores: scores.softmax(dim=1)),
        ({"problem_type": None, "num_labels": 5}, 5, lambda scores: scores.softmax(dim=1)),
        ({"problem_type": "regression"}, 1, None),
        ({"problem_type": None, "num_labels": 1}, 1, None),
    ],
)
def test_what_the_models_configuration_says_of_its_outputs(config: Any, outputs: int, probability: Any) -> None:
    inner = Ending(outputs, lambda scores: scores)
    inner.config = SimpleNamespace(**config)  # type: ignore[assignment]
    for model in (inner, nn.Sequential(inner)):
        found = scores_of(model)
        assert (found is None) == (probability is None)
        if found is not None:
            torch.testing.assert_close(found.probabilities, probability(inner.logits(IMAGES)).detach())


@pytest.mark.parametrize(
    "output", [torch.rand(3, 4, 4), torch.rand(2, 5), torch.rand(()), torch.ones(3, 5).long(), {"tokens": 1}, None]
)
def test_other_outputs_are_no_scores(output: Any) -> None:
    assert class_scores(nn.Identity(), IMAGES, output) is None
