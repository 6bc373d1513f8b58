"""Intervals cover, tests reject at their level and find what is planted."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from attention_visualizer.measures import intervals
from attention_visualizer.measures.intervals import (
    BootstrapMeans,
    bootstrap_mean,
    largest_of_all_p_value,
    permuted_products,
)


def permutation_p_value(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Each statistic tested alone."""
    alone = [largest_of_all_p_value(observed[[index]], null[:, [index]]) for index in range(len(observed))]
    return np.concatenate(alone)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    samples = generator.exponential(2.0, (60, 400))  # 400 quantities of 60 images each, skewed
    interval = bootstrap_mean(samples, replicates=400)
    covered = ((interval.low <= 2.0) & (interval.high >= 2.0)).mean()
    assert 0.90 <= covered <= 0.97


def test_intervals_are_those_of_scipy() -> None:
    values = np.random.default_rng(1).gamma(3.0, 1.0, 300)
    ours = bootstrap_mean(values, replicates=5000)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=5000, random_state=np.random.default_rng(2)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert float(ours.low) == pytest.approx(theirs.low, abs=0.06 * width)
    assert float(ours.high) == pytest.approx(theirs.high, abs=0.06 * width)
    assert float(ours.value) == pytest.approx(values.mean()) and ours.n == 300


def test_the_cut_into_batches_changes_nothing() -> None:
    values = np.random.default_rng(3).standard_normal((37, 2, 3))
    groups = np.random.default_rng(4).integers(-1, 2, 37)
    whole, parts = BootstrapMeans(2), BootstrapMeans(2)
    whole.update(values, groups)
    for rows in (slice(0, 5), slice(5, 20), slice(20, 37)):
        parts.update(values[rows], groups[rows])
    for group in range(2):
        for end in ("value", "low", "high"):
            np.testing.assert_allclose(getattr(parts.of_group(group), end), getattr(whole.of_group(group), end))
        np.testing.assert_allclose(whole.of_group(group).value, values[groups == group].mean(axis=0))
        assert whole.of_group(group).n == (groups == group).sum()


def test_group_differences_cover_their_truth() -> None:
    """200 experiments of two groups of 40 and 55 images, far apart in spread; the third group is nobody's."""
    generator = np.random.default_rng(6)
    members = np.repeat([0, 1, -1], [40, 55, 20])
    values = generator.standard_normal((115, 200)) * np.repeat([1.0, 4.0, 9.0], [40, 55, 20])[:, None]
    values[members == 1] += 3.0
    means = BootstrapMeans(2, 600)
    means.update(values, members)
    difference = means.difference(1, 0)
    assert difference.n == 95
    assert 0.9 <= ((difference.low <= 3) & (difference.high >= 3)).mean() <= 0.985


def test_differences_and_functions_of_means() -> None:
    generator = np.random.default_rng(5)
    values, groups = generator.standard_normal((4000, 2)) + [1.0, 0.0], np.arange(4000) % 2
    values[groups == 1] += [0.5, 0.0]
    means = BootstrapMeans(2)
    means.update(values, groups)
    difference = means.difference(1, 0)
    assert difference.low[0] > 0.4 and difference.high[0] < 0.6 and difference.low[1] < 0 < difference.high[1]
    error = np.sqrt(1 / 2000 + 1 / 2000)
    np.testing.assert_allclose(difference.high - difference.low, 2 * 1.96 * error, rtol=0.12)
    contrast = means.of(lambda means: means[..., 0] - means[..., 1], group=0)
    assert float(contrast.value) == pytest.approx(float(np.diff(means.of_group(0).value[::-1])[0]))
    assert float(contrast.high - contrast.low) == pytest.approx(2 * 1.96 * np.sqrt(2 / 2000), rel=0.12)


def test_columns_without_a_value_stay_without_one() -> None:
    values = np.ones((6, 2))
    values[:, 1] = np.nan
    found = bootstrap_mean(values)
    assert found.value[0] == found.low[0] == found.high[0] == 1.0 and np.isnan([found.value[1], found.low[1]]).all()
    empty = BootstrapMeans(2)
    empty.update(values[:, :1], np.zeros(6, np.int64))
    assert np.isnan(empty.of_group(1).value).all() and np.isnan(empty.difference(0, 1).low).all()


def test_intervals_as_text() -> None:
    interval = intervals.Interval(np.array(0.12345), np.array(0.1), np.array(0.2), 7)
    assert interval.text() == "0.12 (0.10 to 0.20)" and interval.text(1, percent=True) == "12% (10 to 20)"
    assert intervals.Interval(np.array(np.nan), np.array(np.nan), np.array(np.nan), 0).text() == "–"


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (13.121, 13.117, 13.125, "13.121 (13.117 to 13.125)"),  # the half width is 0.004
        (13.121, 13.078, 13.164, "13.12 (13.08 to 13.16)"),
        (0.24272, 0.2338, 0.2562, "0.24 (0.23 to 0.26)"),
        (152.3, 120.0, 190.0, "152 (120 to 190)"),  # no digit before the point is left out
        (0.5, 0.5, 0.5, "0.500 (0.500 to 0.500)"),
        (0.5, np.nan, np.nan, "0.500 (nan to nan)"),
    ],
)
def test_no_digit_is_printed_that_other_images_would_not_give(value: float, low: float, high: float, text: str) -> None:
    interval = intervals.Interval(*map(np.array, (value, low, high)), 7)
    assert interval.text() == text
    assert interval.times(0.01).text(percent=True).replace("%", "") == text


def test_intervals_include_both_halves_of_the_images() -> None:
    """Two sources far apart, and a column without any difference between them."""
    generator = np.random.default_rng(17)
    values = generator.standard_normal((1001, 2))
    values[500:, 0] += 1.0
    found, alone = bootstrap_mean(values), BootstrapMeans()
    alone.update(values)
    halves = np.stack([values[:500].mean(axis=0), values[500:].mean(axis=0)])
    np.testing.assert_allclose((found.low[0], found.high[0]), halves[:, 0])
    assert found.high[1] - found.low[1] < 1.2 * (alone.of_group().high - alone.of_group().low)[1]
    np.testing.assert_allclose(intervals.half_means(values), halves)
    # However the stream is cut, and for functions and differences of means too.
    groups, parts = np.arange(1001) % 2, BootstrapMeans(2, num_images=1001)
    for rows in (slice(0, 3), slice(3, 700), slice(700, 1001)):
        parts.update(values[rows], groups[rows])
    for group in range(2):
        expected = [values[rows][groups[rows] == group].mean(axis=0) for rows in (slice(500), slice(500, None))]
        np.testing.assert_allclose(parts.of_halves(group), expected)
    contrast = parts.of(lambda means: means[..., 0] - means[..., 1])
    assert (float(contrast.low), float(contrast.high)) == pytest.approx(
        tuple(sorted(parts.of_halves() @ np.array([1.0, -1.0])))
    )
    shift = BootstrapMeans(2, num_images=1001)
    shift.update(values * np.where(groups == 1, 1, -1)[:, None], groups)
    assert shift.difference(1, 0).high[0] > 1.8 and shift.difference(1, 0).low[0] < 0.2


def test_halves_of_images_in_random_order_hardly_widen_an_interval() -> None:
    samples = np.random.default_rng(18).exponential(2.0, (200, 1000))
    plain = BootstrapMeans()
    plain.update(samples)
    found, alone = bootstrap_mean(samples), plain.of_group()
    wider = (found.high - found.low) / (alone.high - alone.low)
    assert wider.min() >= 1 and 0.02 < (wider > 1).mean() < 0.1 and wider.mean() < 1.02


def test_a_half_without_images_changes_nothing() -> None:
    assert float(bootstrap_mean(np.array([3.0])).high) == 3.0
    means = BootstrapMeans(2, num_images=8)
    means.update(np.arange(8.0), np.repeat([0, 1], 4))
    assert np.isnan(means.of_halves(0)[1]) and means.of_group(0).value == 1.5 and means.of_group(0).low < 1.5


def test_permutation_p_values() -> None:
    null = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])[:, None]
    assert permutation_p_value(np.array([9.0]), null).tolist() == [1 / 6]
    assert permutation_p_value(np.array([-2.0]), null).tolist() == [3 / 6]  # the ties count, on both sides
    assert permutation_p_value(np.array([0.0]), null).tolist() == [1.0]
    assert np.isnan(permutation_p_value(np.array([np.nan]), null)).all()


def test_the_largest_of_all_keeps_the_level_for_all_together() -> None:
    """Seven statistics of very different spreads, in 400 families: any below 5% in about 5% of the families; and one
    that is planted is found, whatever its spread."""
    generator = np.random.default_rng(11)
    spreads = np.array([1e-3, 1.0, 50.0, 1.0, 1.0, 7.0, 1.0])
    rejected = 0
    for _ in range(400):
        draws = spreads * generator.standard_normal((200, 7))
        rejected += (largest_of_all_p_value(draws[0], draws[1:]) < 0.05).any()
    assert rejected / 400 == pytest.approx(0.05, abs=0.035)
    observed = spreads * 6 * (np.arange(7) == 0)
    assert np.flatnonzero(largest_of_all_p_value(observed, spreads * generator.standard_normal((999, 7))) < 0.05) == [0]


def test_p_values_of_replicates_taken_for_normal() -> None:
    replicates = np.random.default_rng(0).normal(3.0, 1.0, 100_000)
    assert intervals.normal_p_value(replicates) == pytest.approx(2 * scipy.stats.norm.sf(3), rel=0.1)
    assert intervals.normal_p_value(np.zeros(9)) == 1.0 and intervals.normal_p_value(np.ones(9)) == 0.0


@pytest.mark.parametrize("permutations", [19, 99, 999])
def test_p_values_are_uniform_where_nothing_is_planted(permutations: int) -> None:
    """At any number of permutations: with few of them, a null mean without the observed value rejects 6.4% at 5%."""
    generator = np.random.default_rng(permutations)
    cases = 20_000 if permutations < 999 else 4000
    observed, null = generator.exponential(1.0, cases), generator.exponential(1.0, (permutations, cases))
    p_values = permutation_p_value(observed, null)
    assert set(np.round(p_values * (permutations + 1), 6) % 1) == {0.0}  # (b + 1) / (B + 1)
    for level in (0.05, 0.2, 0.5):
        error = np.sqrt(level * (1 - level) / cases)
        assert (p_values <= level).mean() == pytest.approx(level, abs=4 * error)


def test_ties_reject_no_more_often() -> None:
    generator = np.random.default_rng(7)
    observed, null = generator.binomial(3, 0.5, 20_000) * 1.0, generator.binomial(3, 0.5, (99, 20_000)) * 1.0
    p_values = permutation_p_value(observed, null)
    assert len(np.unique(null)) == 4
    for level in (0.05, 0.1, 0.15, 0.25, 0.3):
        assert (p_values <= level).mean() <= level + 4 * np.sqrt(level * (1 - level) / 20_000)


def blobs(generator: np.random.Generator, n: int, patches: int = 9) -> np.ndarray:
    """Content whose neighbouring places go together, and whose places differ in how often they hold something."""
    smooth = generator.standard_normal((n, patches))
    smooth = smooth + np.roll(smooth, 1, axis=1)
    return (smooth > np.linspace(-2, 2, patches)).astype(np.float32)


def test_the_null_of_products_keeps_what_each_place_has() -> None:
    generator = np.random.default_rng(0)
    attention, content = generator.random((80, 3, 9)).astype(np.float32), blobs(generator, 80)
    observed, null = permuted_products(attention, content, 500)
    np.testing.assert_allclose(observed, (attention * content[:, None]).sum(axis=-1).mean(axis=0), rtol=1e-5)
    by_place = (attention.mean(axis=0) * content.mean(axis=0)).sum(axis=-1)
    np.testing.assert_allclose(null.mean(axis=0), by_place, rtol=0.01)


def test_a_head_without_a_choice_is_never_significant() -> None:
    """The same row on every image, or the same content: nothing to permute, and no rounding that looks like a find."""
    generator = np.random.default_rng(8)
    for trial in range(20):
        content = generator.random((300, 49)) < 0.3
        attention = np.tile(generator.dirichlet(np.ones(49), 3).astype(np.float32), (300, 1, 1))
        attention[:, 0] = 1 / 49
        observed, null = permuted_products(attention, content, 99, seed=trial)
        assert permutation_p_value(observed, null).tolist() == [1.0] * 3
        np.testing.assert_allclose(observed, (attention[0] * content.mean(axis=0)).sum(axis=-1), rtol=1e-6)
    moving = generator.dirichlet(np.ones(49), (300, 3)).astype(np.float32)
    assert permutation_p_value(*permuted_products(moving, np.tile(content[0], (300, 1)), 99)).tolist() == [1.0] * 3


def test_permutations_that_give_back_the_data_count() -> None:
    """Of three images there are six orders: p lies near a multiple of one in six, and never below."""
    generator = np.random.default_rng(9)
    for trial in range(50):
        attention, content = generator.dirichlet(np.ones(7), (3, 2)).astype(np.float32), generator.random((3, 7))
        p_values = permutation_p_value(*permuted_products(attention, content, 599, seed=trial))
        assert (p_values > 1 / 6 - 4 * np.sqrt(5 / 36 / 600)).all()


def test_a_head_that_is_not_there_has_no_p_value() -> None:
    attention = np.full((30, 2, 9), np.nan, np.float32)
    attention[:, 1] = np.random.default_rng(0).dirichlet(np.ones(9), 30)
    p_values = permutation_p_value(*permuted_products(attention, blobs(np.random.default_rng(1), 30), 19))
    assert np.isnan(p_values[0]) and p_values[1] > 0


def test_attention_to_places_alone_is_rejected_at_the_level() -> None:
    """A planted null: heads that prefer the places which usually hold something, whatever this image holds."""
    generator = np.random.default_rng(1)
    rejected = []
    for trial in range(60):
        content = blobs(generator, 50)
        attention = generator.dirichlet(np.linspace(3, 0.5, 9), (50, 5)).astype(np.float32)
        p_values = permutation_p_value(*permuted_products(attention, content, 199, seed=trial))
        rejected.append(p_values < 0.05)
    assert 0.02 <= np.mean(rejected) <= 0.085  # 300 tests of 5%: three standard errors either way


def test_attention_to_content_is_found() -> None:
    generator = np.random.default_rng(2)
    content = blobs(generator, 120)
    attention = generator.dirichlet(np.ones(9), (120, 2)).astype(np.float32)
    attention[:, 1] += 0.1 * content
    p_values = permutation_p_value(*permuted_products(attention, content, 199))
    assert p_values[1] == 1 / 200 and p_values[0] > 0.05


def test_blocks_of_permutations_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(10)
    attention, content = generator.random((20, 3, 9)).astype(np.float32), blobs(generator, 20)
    expected = permuted_products(attention, content, 70, seed=4)
    monkeypatch.setattr(intervals, "PERMUTATION_BATCH", 11)
    found = permuted_products(attention, content, 70, seed=4)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    shuffled = permuted_products(attention, content, 70, seed=5)[1]
    assert np.abs(shuffled - expected[1]).max() > 1e-3


def effects_and_influences(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The difference of two groups' means [image, ...], and each image's part in it if there were none."""
    effect = first.mean(axis=0) - second.mean(axis=0)
    weights = np.concatenate([np.full(len(first), 1 / len(first)), np.full(len(second), -1 / len(second))])
    weights = weights.reshape(-1, *[1] * effect.ndim)
    noise = np.concatenate([first - first.mean(axis=0), second - second.mean(axis=0)])
    return effect, weights * (noise + weights * effect / (weights**2).sum())


def test_the_largest_effect_holds_its_level_over_all_places() -> None:
    """Also of groups whose numbers and spreads differ, for which permutations of their images do not."""
    wrong = {(1, 25): 0, (3, 100): 0}
    for (spread, count), seed in itertools.product(wrong, range(150)):
        generator = np.random.default_rng(seed)
        first = spread * generator.standard_normal((25, 3, 7)) * np.linspace(0.1, 5, 7)
        second = generator.standard_normal((count, 3, 7)) * np.linspace(0.1, 5, 7)
        wrong[spread, count] += (
            intervals.largest_effect_test([effects_and_influences(first, second)], 99)[0] < 0.05
        ).any()
    assert all(1 <= count <= 18 for count in wrong.values()), wrong  # 150 tests of 5%, four standard errors


def test_parts_of_different_images_are_one_family() -> None:
    generator = np.random.default_rng(5)
    parts = [effects_and_influences(*generator.standard_normal((2, count, 4))) for count in (30, 40, 50)]
    together = intervals.largest_effect_test(parts, 999)
    for part, p_values in zip(parts, together, strict=True):
        (alone,) = intervals.largest_effect_test([part], 999)
        assert p_values.shape == (4,) and (p_values >= alone).all()
    (alone,) = intervals.largest_effect_test(parts[:1], 999)
    expected = 1 - (1 - alone) ** 3  # of three families that have nothing to do with each other
    np.testing.assert_allclose(together[0], expected, atol=0.05)


def test_an_effect_is_found_in_its_place_only() -> None:
    generator = np.random.default_rng(4)
    first, second = generator.standard_normal((2, 60, 4, 5))
    first[:, 2, 3] += 1.5
    (p_values,) = intervals.largest_effect_test([effects_and_influences(first, second)], 199)
    assert p_values[2, 3] == 1 / 200
    p_values[2, 3] = 1
    assert (p_values > 0.05).all()
    constant = np.ones((10, 2))
    assert intervals.largest_effect_test([effects_and_influences(constant, constant)], 19)[0].tolist() == [1.0, 1.0]


def test_the_largest_effect_of_one_place_is_scipys_t_test() -> None:
    """Welch's, which holds for groups of any spread."""
    generator = np.random.default_rng(11)
    first, second = 2 * generator.standard_normal((170, 1)), generator.standard_normal((90, 1)) + 0.25
    (p_values,) = intervals.largest_effect_test([effects_and_influences(first, second)], 4999)
    theirs = scipy.stats.ttest_ind(first[:, 0], second[:, 0], equal_var=False).pvalue
    assert 0.01 < theirs < 0.5 and p_values[0] == pytest.approx(theirs, abs=0.03)


def test_blocks_of_signed_images_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    influences = np.random.default_rng(13).standard_normal((50, 2, 3))
    monkeypatch.setattr(intervals, "IMAGES_AT_ONCE", 50)
    whole = intervals.sign_flipped_sums(influences, 4000)
    monkeypatch.setattr(intervals, "IMAGES_AT_ONCE", 7)
    cut = intervals.sign_flipped_sums(influences, 4000)
    for found in (whole, cut):  # other signs, of one distribution
        np.testing.assert_allclose(found.std(axis=0), np.sqrt((influences**2).sum(axis=0)), rtol=0.06)
        assert (np.abs(found.mean(axis=0)) < 4 * found.std(axis=0) / 4000**0.5).all()


def test_seeds_decide_what_is_drawn() -> None:
    values = np.random.default_rng(13).standard_normal((30, 2))
    first, again, other = bootstrap_mean(values, 3), bootstrap_mean(values, 3), bootstrap_mean(values, 4)
    assert (first.low == again.low).all() and (first.low != other.low).all() and (first.value == other.value).all()


@pytest.mark.parametrize("count", [1, 7, 50, 99, 100, 1000])
def test_a_stratified_choice_has_each_class_in_its_share(count: int) -> None:
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    labels = labels[np.random.default_rng(0).permutation(100)]
    chosen = intervals.stratified(labels, count)
    taken = min(count, 100)
    assert len(np.unique(chosen)) == len(chosen) == taken and (np.diff(chosen) > 0).all()
    shares = np.bincount(labels[chosen], minlength=3)
    assert np.abs(shares - taken * np.array([0.5, 0.3, 0.2])).max() <= 1
    assert (chosen == intervals.stratified(labels, count)).all()


def paired(both: int, gained: int, lost: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    before, after = (
        np.repeat([1, 0, 1, 0], [both, gained, lost, neither]),
        np.repeat([1, 1, 0, 0], [both, gained, lost, neither]),
    )
    return before.astype(bool), after.astype(bool)


def test_shares_have_wilsons_interval() -> None:
    for count, total in ((0, 7), (3, 7), (7, 7), (499, 500)):
        found = intervals.share_interval(count, total)
        expected = scipy.stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
        assert (float(found.low), float(found.high)) == pytest.approx((expected.low, expected.high), abs=1e-12)
    many = intervals.share_interval(np.array([[0, 3, 7]]), 7)
    assert many.low.shape == (1, 3) and many.low[0, 1] == intervals.share_interval(3, 7).low


@pytest.mark.parametrize(
    ("table", "value", "low", "high"),
    [
        # By hand from Newcombe's formula, phi = 0: Wilson's intervals of 1 and 1 of 500, added in squares.
        ((500, 0, 0, 0), 0.0, -0.00762, 0.00762),
        # Published: Newcombe (1998), Table II; the two studies of Fagerland et al. (2017), chapter 8.
        ((20, 12, 2, 16), 0.2, 0.0562, 0.3292),
        ((1, 1, 7, 12), -6 / 21, -0.507, -0.026),
    ],
)
def test_changes_of_shares_have_newcombes_interval(
    table: tuple[int, int, int, int], value: float, low: float, high: float
) -> None:
    before, after = paired(*table)
    found = intervals.share_change(before, after)
    assert found.n == sum(table) and float(found.value) == pytest.approx(value)
    assert (float(found.low), float(found.high)) == pytest.approx((low, high), abs=5e-4)
    # Turned round, the ends change places; columns are each for themselves.
    back = intervals.share_change(after, np.stack([before, after], axis=1))
    assert (-back.high[0], -back.low[0]) == pytest.approx((float(found.low), float(found.high)))
    assert back.value[1] == 0 and back.low[1] < 0 < back.high[1]


@pytest.mark.parametrize("shares", [(0.9, 0.02, 0.05, 0.03), (0.985, 0.0, 0.01, 0.005), (0.5, 0.2, 0.1, 0.2)])
def test_changes_of_shares_cover_their_truth(shares: tuple[float, ...]) -> None:
    generator, covered = np.random.default_rng(11), 0
    for counts in generator.multinomial(200, shares, 400):
        found = intervals.share_change(*paired(*counts))
        covered += found.low <= shares[1] - shares[2] <= found.high
    assert covered / 400 >= 0.93
    if min(shares) > 0.05:
        assert covered / 400 <= 0.98


@pytest.mark.parametrize("axis", [0, 1])
def test_spearmans_correlations_along_an_axis_are_scipys(axis: int) -> None:
    first, second = np.random.default_rng(16).standard_normal((2, 7, 11)).round(1)  # with ties
    expected = [scipy.stats.spearmanr(*pair).statistic
                for pair in zip(np.moveaxis(first, axis, 1), np.moveaxis(second, axis, 1), strict=True)]  # fmt: skip
    np.testing.assert_allclose(intervals.spearman(first, second, axis), expected, atol=1e-12)
    first[3] = 0.5
    undefined = np.isnan(intervals.spearman(first, second))
    assert undefined.tolist() == [number == 3 for number in range(7)]


def test_rank_correlations_are_scipys() -> None:
    generator = np.random.default_rng(12)
    first = generator.standard_normal(24).round(1)  # with ties
    second = first + generator.standard_normal(24)
    found, p_value = intervals.rank_correlation(first, second)
    expected = scipy.stats.spearmanr(first, second)
    assert float(found.value) == pytest.approx(expected.statistic) and found.n == 24
    assert abs(p_value - expected.pvalue) < 0.01
    assert intervals.rank_correlation(np.arange(10.0), np.arange(10.0) ** 3)[0].value == pytest.approx(1)
    assert np.isnan(intervals.rank_correlation(np.ones(5), np.arange(5.0))[1])
    assert np.isnan(intervals.rank_correlation(np.arange(3.0), np.arange(3.0))[0].value)


def test_intervals_of_rank_correlations_cover_and_their_p_is_uniform() -> None:
    """Of a normal pair, whose rank correlation is known: 6 / pi arcsin(r / 2)."""
    generator, truth = np.random.default_rng(15), 6 / np.pi * np.arcsin(0.3)
    covered, rejected = 0, 0
    for _ in range(300):
        first, noise = generator.standard_normal((2, 24))
        interval, _ = intervals.rank_correlation(first, 0.6 * first + 0.8 * noise, permutations=9)
        covered += interval.low <= truth <= interval.high
        rejected += intervals.rank_correlation(first, noise, permutations=99)[1] <= 0.1
    assert 0.89 <= covered / 300 <= 0.985 and 0.03 <= rejected / 300 <= 0.17


def test_intervals_in_other_units() -> None:
    found = intervals.Interval(np.array(0.02), np.array(-0.01), np.array(0.05), 9).times(-100)
    assert found.text(0) == "-2 (-5 to 1)" and found.n == 9
    assert intervals.Interval(np.array(-1e-9), np.array(-0.1), np.array(0.0), 9).text(1) == "0.0 (-0.1 to 0.0)"


def test_holms_adjustment_is_the_step_down_one() -> None:
    p_values = np.array([[0.01, np.nan], [0.04, 0.03], [0.005, 0.9]])
    expected = [[0.04, np.nan], [0.09, 0.09], [0.025, 0.9]]  # 5 x 0.005, 4 x 0.01, 3 x 0.03, never less than before
    np.testing.assert_allclose(intervals.holm(p_values), expected)
    assert np.isnan(intervals.holm(np.array([np.nan]))).all() and intervals.holm(np.array([0.7, 0.8])).tolist() == [
        1,
        1,
    ]


def test_halves_alternate_within_each_class() -> None:
    labels = np.array([2, 0, 2, 2, 0, 1, 2, 0])
    assert np.flatnonzero(intervals.alternate_halves(labels)).tolist() == [2, 4, 6]
