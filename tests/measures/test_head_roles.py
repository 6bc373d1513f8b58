"""Roles of heads: closed forms, planted roles, and nothing where the measurements support none."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats

from attention_visualizer.measures import head_roles, intervals
from attention_visualizer.measures.head_roles import (
    NO_ROLE,
    clustered,
    divergences,
    ink_correlation,
    name_roles,
    on_brightest,
    selectivity,
)
from attention_visualizer.measures.intervals import Interval

BOUNDS = {"ink": 0.3, "brightest patch": 0.5, "fixed position": 0.8, "content-dependent": 0.8, "neighbours": 0.5}


def rows_of(generator: np.random.Generator, sharpness: float, shape: tuple[int, ...]) -> np.ndarray:
    scores = sharpness * generator.standard_normal(shape)
    weights = np.exp(scores)
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)


def test_selectivity_in_closed_form() -> None:
    keys = 5
    uniform = np.full((4, keys), 1 / keys)
    fixed = np.tile(np.eye(keys)[2], (4, 1))
    moving = np.eye(keys)[[0, 1, 2, 3]]
    rows = np.stack([uniform, fixed, moving], axis=1)[:, None].astype(np.float32)  # one layer, three heads
    found = selectivity(rows, np.array([keys]))
    np.testing.assert_allclose(found.place.value, [[0, np.log(5), np.log(5) - np.log(4)]], atol=1e-6)
    np.testing.assert_allclose(found.content.value, [[0, 0, np.log(4)]], atol=1e-6)


def test_place_and_content_add_up_and_their_intervals_are_those_of_a_full_bootstrap() -> None:
    generator = np.random.default_rng(0)
    rows = rows_of(generator, 1.5, (400, 1, 2, 6)) * np.array([3, 1, 1, 1, 1, 1])
    rows = (rows / rows.sum(axis=-1, keepdims=True)).astype(np.float32)
    found = selectivity(rows, np.array([6]))
    mean_entropy = scipy.stats.entropy(rows, axis=-1).mean(axis=0)
    np.testing.assert_allclose(found.place.value + found.content.value, np.log(6) - mean_entropy, rtol=1e-5)
    replicates = []
    for _ in range(600):
        drawn = rows[generator.integers(0, 400, 400)]
        of_mean = scipy.stats.entropy(drawn.mean(axis=0), axis=-1)
        replicates.append([np.log(6) - of_mean, of_mean - scipy.stats.entropy(drawn, axis=-1).mean(axis=0)])
    low, high = np.quantile(np.array(replicates), [0.025, 0.975], axis=0)
    for number, interval in enumerate((found.place, found.content)):
        np.testing.assert_allclose(interval.high - interval.low, high[number] - low[number], rtol=0.15)
    low, high = np.quantile(np.array(replicates)[:, 1].mean(axis=-1), [0.025, 0.975], axis=0)
    whole = found.content_of_layers
    np.testing.assert_allclose(whole.value, found.content.value.mean(axis=1))
    np.testing.assert_allclose(whole.high - whole.low, high - low, rtol=0.15)


def test_the_intervals_of_place_and_content_cover() -> None:
    """Heads whose scores are known, so that both parts are known too, from very many pictures."""
    keys, pictures, trials = 6, 150, 120
    middle = np.array([2.0, 1.0, 0.5, 0.0, 0.0, -1.0])

    def drawn(generator: np.random.Generator, n: int) -> np.ndarray:
        scores = np.exp(middle + 1.2 * generator.standard_normal((n, 1, 1, keys)))
        return scores / scores.sum(axis=-1, keepdims=True)

    many = drawn(np.random.default_rng(20), 400_000)[:, 0, 0]
    of_mean = scipy.stats.entropy(many.mean(axis=0))
    truth = {"place": np.log(keys) - of_mean, "content": of_mean - scipy.stats.entropy(many, axis=-1).mean()}
    generator = np.random.default_rng(21)
    covered = {"place": 0, "content": 0}
    for _ in range(trials):
        found = selectivity(drawn(generator, pictures), np.array([keys]))
        for part in covered:
            interval = getattr(found, part)
            covered[part] += interval.low.item() <= truth[part] <= interval.high.item()
    assert all(0.88 <= count / trials <= 0.995 for count in covered.values()), covered


def test_a_head_that_is_not_there_has_no_selectivity() -> None:
    """Layers of other models have different numbers of heads: NaN must not look like a head of entropy 0."""
    rows = rows_of(np.random.default_rng(4), 1.0, (11, 2, 3, 5))
    rows[:, 1, 2] = np.nan
    found = selectivity(rows, np.array([5, 5]))
    for interval in (found.place, found.content):
        for end in (interval.value, interval.low, interval.high):
            assert np.argwhere(np.isnan(end)).tolist() == [[1, 2]]


def test_entropy_is_scipys_and_of_nothing_nothing() -> None:
    rows = rows_of(np.random.default_rng(5), 2.0, (7, 2, 5))
    np.testing.assert_allclose(head_roles.entropy(rows), scipy.stats.entropy(rows, axis=-1), rtol=1e-5)
    assert head_roles.entropy(np.array([0.0, 1.0, 0.0])) == 0
    assert head_roles.entropy(np.full(8, 1 / 8)) == pytest.approx(np.log(8))
    assert np.isnan(head_roles.entropy(np.array([0.5, np.nan, 0.5])))


def test_ink_is_followed_only_beyond_places() -> None:
    generator = np.random.default_rng(1)
    amount = generator.random((2000, 4)) * [0.9, 0.5, 0.5, 0.1]
    place = np.tile([0.7, 0.1, 0.1, 0.1], (2000, 1))  # always where most ink usually is
    follower = amount / amount.sum(axis=1, keepdims=True)
    avoider = (1 - amount) / (1 - amount).sum(axis=1, keepdims=True)
    found, moves = ink_correlation(np.stack([place, follower, avoider], axis=1), amount)
    assert found[0] == 0 and found[1] > 0.5 and found[2] < -0.5 and not moves[:, 0].any()


def test_the_brightest_patch_may_be_one_of_several() -> None:
    amount = np.array([[0.1, 0.9, 0.9], [0.5, 0.2, 0.1]])
    shares = np.array([[[0.2, 0.3, 0.5], [0.6, 0.2, 0.2]], [[0.2, 0.3, 0.5], [np.nan] * 3]])
    assert on_brightest(shares, amount) == pytest.approx(np.array([[1, 0], [0, np.nan]]), nan_ok=True)


def interval(value: float, width: float = 0.02) -> Interval:
    return Interval(np.array(value), np.array(value - width), np.array(value + width), 100)


def named(**changes: object) -> list[str]:
    plain: dict[str, object] = {
        "follows": interval(0.0),
        "p_value": 0.001,
        "brightest": interval(0.1),
        "place": interval(0.4),
        "content": interval(0.4),
        "closeness": interval(0.0),
        "bounds": BOUNDS,
    }
    return name_roles(**{**plain, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [NO_ROLE]),
        ({"follows": interval(0.6)}, ["ink"]),
        ({"follows": interval(-0.6)}, ["background"]),
        ({"follows": interval(0.4, 0.001)}, [NO_ROLE]),  # significant, but less than the minimum effect
        ({"follows": interval(0.51, 0.03)}, [NO_ROLE]),  # the interval reaches below it
        ({"follows": interval(0.6), "p_value": 0.02}, [NO_ROLE]),
        ({"follows": interval(0.6), "bounds": BOUNDS | {"ink": 0.65}}, [NO_ROLE]),  # controls reach as much
        ({"follows": interval(0.6), "place": interval(0.2), "content": interval(0.2)}, [NO_ROLE]),  # hardly selects
        ({"brightest": interval(0.6)}, ["brightest patch"]),
        ({"brightest": interval(0.51)}, [NO_ROLE]),
        ({"brightest": interval(0.6), "bounds": BOUNDS | {"brightest patch": 0.7}}, [NO_ROLE]),
        ({"brightest": interval(1.0, 0.0), "bounds": BOUNDS | {"brightest patch": 1.0}}, [NO_ROLE]),
        ({"place": interval(2.0)}, ["fixed position"]),
        ({"place": interval(2.0), "content": interval(1.0)}, [NO_ROLE]),  # neither is most of it
        ({"place": interval(2.0), "bounds": BOUNDS | {"fixed position": 0.9}}, [NO_ROLE]),
        ({"place": interval(0.4), "content": interval(0.05)}, [NO_ROLE]),  # hardly selects
        ({"content": interval(2.0)}, ["content-dependent"]),
        ({"closeness": interval(float("nan"))}, [NO_ROLE]),
        ({"closeness": interval(0.6)}, ["neighbours"]),
        ({"closeness": interval(0.51)}, [NO_ROLE]),
        ({"closeness": interval(0.6), "bounds": BOUNDS | {"neighbours": 0.7}}, [NO_ROLE]),
        ({"follows": interval(0.6), "place": interval(2.0)}, ["ink", "fixed position"]),
    ],
)
def test_a_role_is_named_where_the_numbers_carry_it(changes: dict[str, object], expected: list[str]) -> None:
    assert named(**changes) == expected


def test_divergences_are_scipys() -> None:
    rows = rows_of(np.random.default_rng(2), 2.0, (7, 4, 6))
    found, of_images = divergences(rows)
    apart = ~np.eye(4, dtype=bool)
    assert of_images.shape == (7,) and of_images.mean() == pytest.approx(found[apart].mean())
    alone, of_last = divergences(rows[6:])
    assert of_images[6] == pytest.approx(alone[apart].mean()) and of_last == pytest.approx(of_images[6:])
    assert np.isnan(divergences(rows[:, :1])[1]).all()
    for first in range(4):
        for second in range(4):
            each = [scipy.spatial.distance.jensenshannon(row[first], row[second]) ** 2 for row in rows.astype(float)]
            assert found[first, second] == pytest.approx(np.mean(each), abs=1e-6)


def test_like_heads_are_clustered() -> None:
    generator = np.random.default_rng(3)
    kinds = rows_of(generator, 3.0, (30, 3, 8))
    order = np.array([0, 1, 2, 0, 1, 0])
    noise = rows_of(generator, 0.2, (30, 6, 8))
    rows = (0.97 * kinds[:, order] + 0.03 * noise).astype(np.float32)
    leaves, cluster = clustered(divergences(rows)[0])
    assert sorted(leaves.tolist()) == list(range(6))
    for first in range(6):
        for second in range(6):
            assert (cluster[first] == cluster[second]) == (order[first] == order[second])


@pytest.mark.parametrize("heads", [0, 1])
def test_without_two_heads_there_is_no_tree(heads: int) -> None:
    leaves, cluster = clustered(np.zeros((heads, heads)))
    assert leaves.tolist() == list(range(heads)) and cluster.tolist() == [1] * heads


def test_heads_are_alike_below_the_bound_only() -> None:
    just_below, just_above = 0.98 * head_roles.MAX_DIVERGENCE, 1.02 * head_roles.MAX_DIVERGENCE
    divergence = np.array([[0, just_below, 0.6], [just_below, 0, 0.6], [0.6, 0.6, 0]])
    cluster = clustered(divergence)[1]
    assert cluster[0] == cluster[1] != cluster[2]
    divergence[0, 1] = divergence[1, 0] = just_above
    assert len(set(clustered(divergence)[1].tolist())) == 3


def test_the_roles_are_named_in_one_place() -> None:
    assert {"ink", "background", "fixed position"} <= set(head_roles.ROLES) and intervals.LEVEL == 0.05
