"""Heads matched by what they attend to: against SciPy's divergence, planted copies, and unrelated heads."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon  # type: ignore[import-untyped]

from attention_visualizer.attention.capture import capture
from attention_visualizer.measures import head_matching
from attention_visualizer.measures.head_matching import Matching, complete_rows, match_heads, mean_divergences
from attention_visualizer.models.vision_transformer import VisionTransformer

IMAGES, LAYERS, HEADS, KEYS = 23, 3, 5, 11


def rows(seed: int, sharpness: float = 2.0) -> np.ndarray:
    """[image, layer, head, key]: each head has places of its own, and each image moves them a little."""
    generator = np.random.default_rng(seed)
    places = generator.normal(size=(1, LAYERS, HEADS, KEYS)) * sharpness
    scores = places + generator.normal(size=(IMAGES, LAYERS, HEADS, KEYS)) * 0.5
    weights = np.exp(scores)
    return weights / weights.sum(axis=-1, keepdims=True)


def permuted(values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Heads in another order, a different one in each layer: rows and [layer, head], where each head now stands."""
    generator = np.random.default_rng(seed)
    orders = np.stack([generator.permutation(HEADS) for _ in range(LAYERS)])
    return np.take_along_axis(values, orders[None, :, :, None], axis=2), orders.argsort(axis=1)


def test_divergences_are_scipys() -> None:
    first, second = rows(0)[:, 0], rows(1)[:, 0, :4]
    found = mean_divergences(first, second)
    expected = np.array(
        [
            [
                np.mean([jensenshannon(first[i, h], second[i, o], base=np.e) ** 2 for i in range(IMAGES)])
                for o in range(4)
            ]
            for h in range(HEADS)
        ]
    )
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_divergences_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mean_divergences(rows(0)[:, 0], rows(1)[:, 0])
    monkeypatch.setattr(head_matching, "CHUNK", HEADS * HEADS * KEYS * 4)  # four images at once, and three at the end
    np.testing.assert_allclose(mean_divergences(rows(0)[:, 0], rows(1)[:, 0]), whole, rtol=1e-12)


def test_rows_of_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="same images"):
        mean_divergences(rows(0)[:, 0], rows(1)[:-1, 0])


def test_a_permuted_copy_is_matched_back_exactly() -> None:
    own = rows(0)
    copy, where = permuted(own, seed=3)
    found = match_heads(own, copy)
    np.testing.assert_array_equal(found.partners, where)
    np.testing.assert_allclose(found.matched, 0, atol=1e-12)
    np.testing.assert_allclose(found.gains, 1, atol=1e-9)
    assert found.p_value() == 1 / 1000


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_a_noisy_copy_is_matched_back(noise: float) -> None:
    own = rows(0)
    copy, where = permuted(own, seed=4)
    mixed = (1 - noise) * copy + noise * rows(9)
    found = match_heads(own, mixed)
    np.testing.assert_array_equal(found.partners, where)
    assert 0.5 < found.gains.min() <= found.gains.max() < 1
    assert (found.matched < found.random_pairing).all()


def test_the_heads_of_a_model_are_found_in_a_copy_whose_heads_were_moved() -> None:
    """The weights themselves are permuted, so that the output stays and only the heads' numbers change."""
    config = {"embed_dim": 20, "num_heads": 5, "num_layers": 3, "mlp_dim": 13}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, copy = VisionTransformer(**config).eval(), VisionTransformer(**config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.4)
        images = torch.randn(7, 1, 28, 28)
    copy.load_state_dict(model.state_dict())
    order = torch.tensor([3, 0, 4, 2, 1])
    with torch.no_grad():
        for block in copy.blocks:
            for name, parameter in block.named_parameters():
                if name.endswith("qkv.weight") or name.endswith("qkv.bias"):
                    parts = parameter.view(3, 5, 4, *parameter.shape[1:])
                    parameter.copy_(parts[:, order].reshape(parameter.shape))
                if name.endswith("attn.proj.weight"):
                    parameter.copy_(parameter.view(20, 5, 4)[:, order].reshape(20, 20))
        with capture(model) as ours:
            outputs = model(images)
        with capture(copy) as theirs:
            same = copy(images)
    torch.testing.assert_close(outputs, same, rtol=1e-4, atol=1e-4)
    first, second = (
        complete_rows(np.stack([layer.weights[:, :, 0, 1:].numpy() for layer in seen], axis=1))
        for seen in (ours, theirs)
    )
    found = match_heads(first, second)
    np.testing.assert_array_equal(found.partners, np.tile(order.argsort().numpy(), (3, 1)))
    np.testing.assert_allclose(found.matched, 0, atol=1e-5)


def test_rows_are_completed() -> None:
    maps = rows(2)[..., :-1]  # as a survey has them: without the class token's share
    np.testing.assert_allclose(complete_rows(maps), rows(2), atol=1e-12)


def test_partners_are_the_best_of_all_pairings() -> None:
    found = match_heads(rows(0), rows(1))
    for layer in range(LAYERS):
        totals = [
            sum(found.divergences[layer, head, other] for head, other in enumerate(order))
            for order in permutations(range(HEADS))
        ]
        assert found.matched[layer].sum() == pytest.approx(min(totals))
        assert found.random_pairing[layer].sum() == pytest.approx(np.mean(totals))  # partners by lot
        assert found.gains[layer] == pytest.approx(1 - min(totals) / np.mean(totals))


def test_unrelated_heads_are_rarely_called_matched() -> None:
    """At most about 5% of pairs of models that have nothing to do with each other reach 0.05."""
    generator = np.random.default_rng(0)
    p_values = np.array(
        [
            Matching(divergences, head_matching.best_partners(divergences)).p_value(199)
            for divergences in generator.random((200, LAYERS, HEADS, HEADS))
        ]
    )
    assert 0.0 < (p_values <= 0.05).mean() < 0.09
    assert 0.4 < p_values.mean() < 0.6
    unrelated = [match_heads(rows(seed), rows(seed + 100)).p_value(199) for seed in range(20)]
    assert sum(p <= 0.05 for p in unrelated) <= 3


def test_unrelated_heads_gain_something_all_the_same() -> None:
    """Why a match must be held against a control: the best of many pairings is better than the mean of them."""
    gains = [match_heads(rows(seed), rows(seed + 50)).gains.mean() for seed in range(5)]
    assert 0.02 < min(gains) and max(gains) < 0.5


def test_one_head_has_no_choice() -> None:
    found = match_heads(rows(0)[:, :, :1], rows(1)[:, :, :1])
    assert not found.partners.any() and not found.gains.any() and found.p_value(19) == 1
