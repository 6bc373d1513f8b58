"""What places are measured with: passes of hand-made models, whose tokens answer as they are told to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attention_visualizer.attention import places
from attention_visualizer.attention.capture import capture
from attention_visualizer.attention.function_call import FunctionCall
from attention_visualizer.attention.placement import Lines, PlacedKeys
from attention_visualizer.attention.places import confirmed, edges_of, is_confirmed, is_same_in_all
from attention_visualizer.attention.policies import OneCallOff, SwitchedOff
from attention_visualizer.attention.probe import Probe, UnmeasurableError, moves_of_queries
from attention_visualizer.attention.receptive_fields import ReceptiveFields, changed, other_pixels

SIDE, PATCH, GRID = 16, 4, 4
Values = Callable[[Tensor, SwitchedOff], dict[str, Tensor]]


def patches_of(pictures: Tensor) -> Tensor:
    """The mean of each patch, as values [picture, head, key, column]."""
    return nn.functional.avg_pool2d(pictures, PATCH).flatten(2).mT[:, None]


def probe_of(values: Values) -> Probe:
    """A probe of a model of which only the values of its attention calls are known."""
    image = torch.rand(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(3))

    def record(call: FunctionCall, policy: SwitchedOff) -> dict[str, Tensor]:
        return values(next(call.tensors()), policy)

    return Probe(FunctionCall(lambda pictures: None, (image,), {}), image, record)


def placed() -> PlacedKeys:
    lines = Lines(GRID, 0.0, float(PATCH))
    return PlacedKeys(lines, lines, np.arange(GRID * GRID))


def fields_of_patches() -> ReceptiveFields:
    """Of keys that answer to their own patch and to no other pixel."""
    number = np.arange(GRID * GRID)
    pixels = np.arange(SIDE)[:, None] // PATCH
    edges = tuple(range(SIDE + 1))
    return ReceptiveFields((pixels == number // GRID) * 1.0, (pixels == number % GRID) * 1.0, edges, edges)


def one_pixel_each() -> NDArray[Any]:
    """A picture for each patch, in which one pixel of it is another: bool [picture, row, column]."""
    pixels = np.zeros((GRID * GRID, SIDE, SIDE), bool)
    for number in range(GRID * GRID):
        pixels[number, number // GRID * PATCH + 1, number % GRID * PATCH + 2] = True
    return pixels


# --- the second look ---


def test_patches_that_answer_to_their_own_pixels_alone_are_confirmed() -> None:
    assert is_confirmed(placed(), fields_of_patches(), one_pixel_each(), np.eye(GRID * GRID))


@pytest.mark.parametrize(("key", "picture", "move"), [(5, 5, 0.0), (5, 9, 0.9)])
def test_a_key_that_stays_or_one_that_moves_for_pixels_of_others_is_not(key: int, picture: int, move: float) -> None:
    moves = np.eye(GRID * GRID)
    moves[picture, key] = move
    assert not is_confirmed(placed(), fields_of_patches(), one_pixel_each(), moves)


def test_a_little_that_all_tokens_move_by_is_background() -> None:
    assert is_confirmed(placed(), fields_of_patches(), one_pixel_each(), np.eye(GRID * GRID) + 0.1)


def confirming_pictures() -> tuple[Tensor, Tensor]:
    """The picture, and those that `confirmed` looks at."""
    looked_at: list[Tensor] = []

    def values(pictures: Tensor, policy: SwitchedOff) -> dict[str, Tensor]:
        looked_at.append(pictures)
        return {"layer": patches_of(pictures)}

    probe = probe_of(values)
    looked_at.clear()
    result = confirmed(probe, {"layer": fields_of_patches()}, {"layer": placed()})
    assert isinstance(result["layer"], PlacedKeys)
    return probe.image, torch.cat([pictures[1:] for pictures in looked_at])


def test_the_second_look_has_other_pixels_than_the_first() -> None:
    """What was found with one picture may hold of it alone."""
    image, pictures = confirming_pictures()
    assert (pictures != image).any(dim=0).float().mean() > 0.9
    assert not torch.equal(torch.where(pictures != image, other_pixels(image), image), pictures)


def test_the_second_look_tells_any_two_rows_and_columns_of_patches_apart() -> None:
    image, pictures = confirming_pictures()
    whole = nn.functional.avg_pool2d((pictures != image).float(), PATCH)[:, 0] == 1.0  # [picture, row, column]
    none = nn.functional.max_pool2d((pictures != image).float(), PATCH)[:, 0] == 0.0
    for axis in (2, 1):
        lines, left = whole.all(dim=axis), none.all(dim=axis)
        for one in range(GRID):
            for other in range(GRID):
                if one != other:
                    assert (lines[:, one] & left[:, other]).any() or (lines[:, other] & left[:, one]).any()


def test_edges_lie_within_the_image_also_of_patches_that_do_not() -> None:
    assert edges_of(Lines(3, -2.0, 4.0), 8) == [0, 2, 6, 8]


@pytest.mark.parametrize("shuffled", [False, True])
def test_few_passes_suffice_where_all_calls_have_the_same_patches_in_whatever_order(shuffled: bool) -> None:
    order = torch.arange(GRID * GRID)
    if shuffled:
        order = torch.randperm(len(order), generator=torch.Generator().manual_seed(0))

    def values(pictures: Tensor, policy: SwitchedOff) -> dict[str, Tensor]:
        keys = patches_of(pictures)[:, :, order]
        return {"first": keys, "second": 2 * keys}

    probe, lines = probe_of(values), Lines(GRID, 0.0, float(PATCH))
    moves = probe.moves(changed(probe.image, np.ones((1, SIDE), bool), 0))
    assert is_same_in_all(probe, moves, PlacedKeys(lines, lines, order.argsort().numpy()))
    others = np.roll(order.argsort().numpy(), 1)
    assert not is_same_in_all(probe, moves, PlacedKeys(lines, lines, others))


def test_calls_with_other_numbers_of_keys_or_windows_are_not_the_same() -> None:
    def values(pictures: Tensor, policy: SwitchedOff) -> dict[str, Tensor]:
        keys = patches_of(pictures)
        return {"first": keys, "second": keys[:, :, ::2]}

    probe = probe_of(values)
    moves = probe.moves(changed(probe.image, np.ones((1, SIDE), bool), 0))
    assert not is_same_in_all(probe, moves, placed())


# --- a probe's passes ---


def test_pictures_go_in_parts_where_memory_ends() -> None:
    most = 3

    def values(pictures: Tensor, policy: SwitchedOff) -> dict[str, Tensor]:
        if len(pictures) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"layer": patches_of(pictures)}

    pictures = torch.rand(7, 1, SIDE, SIDE)
    expected = (patches_of(pictures) - patches_of(probe_of(values).image)).abs()[:, 0, :, 0].numpy()
    np.testing.assert_allclose(probe_of(values).moves(pictures)["layer"], expected, atol=1e-6)
    most = 1  # not even the picture beside the unchanged one
    with pytest.raises(torch.OutOfMemoryError):
        probe_of(values).moves(pictures)


@pytest.mark.parametrize(
    ("calls", "words"),
    [(3, "the number of its attention calls depends on the picture"), (4, "images are computed one by one")],
)
def test_calls_whose_number_differs_tell_no_places(calls: int, words: str) -> None:
    def values(pictures: Tensor, policy: SwitchedOff) -> dict[str, Tensor]:
        number = 2 if len(pictures) == 1 else calls
        return {f"layer{index}": patches_of(pictures) for index in range(number)}

    with pytest.raises(UnmeasurableError, match=words):
        probe_of(values).moves(torch.rand(2, 1, SIDE, SIDE))


def test_keys_whose_number_differs_move_by_nothing_that_is_known() -> None:
    def values(pictures: Tensor, policy: SwitchedOff) -> dict[str, Tensor]:
        keys = patches_of(pictures)
        return {"whole": keys, "some": keys if len(pictures) == 1 else keys[:, :, :-1]}

    moves = probe_of(values).moves(torch.rand(2, 1, SIDE, SIDE))
    assert np.isnan(moves["some"]).all() and not np.isnan(moves["whole"]).any()


@pytest.mark.parametrize(("scale", "noise", "expected"), [(1e-9, 0.0, True), (0.0, 0.0, False), (1e-6, 1e-3, False)])
def test_a_call_depends_on_another_if_switching_that_off_changes_more_than_nothing_does(
    scale: float, noise: float, expected: bool
) -> None:
    """However little: layers may be scaled to almost nothing."""

    def values(pictures: Tensor, policy: SwitchedOff) -> dict[str, Tensor]:
        first = patches_of(pictures).double()
        off = torch.zeros(len(pictures), 1, 1, 1, dtype=torch.float64)
        if isinstance(policy, OneCallOff):
            off[1 - policy.first if policy.first < 1 else 0 :][: policy.number] = 1.0
        last = torch.zeros_like(off)
        last[-1] = noise
        return {"first": first, "second": first * (1 + scale * off) + last}

    assert bool(probe_of(values).dependence()[1, 0]) == expected


# --- moves of queries, read from weights ---


def weights_of(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1)[:, None]


def test_queries_move_by_what_their_weights_for_keys_that_stay_do() -> None:
    """Not by what a key moves, nor by the sum of their softmax, which depends on that."""
    logits = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1)
    logits[1, :, 0] += 2.0  # key 0 moves in the second picture, no query does
    logits[2, 1, 1] += 1.0  # query 1 moves in the third
    keys = np.zeros((2, 5))
    keys[0, 0] = 1.0
    moves = moves_of_queries(weights_of(logits), keys)
    assert moves.shape == (2, 3) and moves[1, 1] > 0.1
    moves[1, 1] = 0.0
    np.testing.assert_allclose(moves, 0, atol=1e-6)


def test_what_a_query_moves_by_is_not_known_of_one_key_that_stays() -> None:
    """Its weight there tells the sum of the softmax alone."""
    logits = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    keys = np.array([[1.0, 1.0, 0.0]])
    assert np.isnan(moves_of_queries(weights_of(logits), keys)).all()
    keys[0, 1] = 0.0
    assert not np.isnan(moves_of_queries(weights_of(logits), keys)).any()


# --- what a model draws ---


class Drawing(nn.Module):
    """Attention over patches that stand in another order in each pass."""

    def __init__(self, shuffles: bool) -> None:
        super().__init__()
        self.shuffles = shuffles
        self.drawn: list[float] = []
        self.cut = nn.Conv2d(1, 8, PATCH, PATCH)
        self.qkv = nn.Linear(8, 24)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.cut(images).flatten(2).mT
        self.drawn.append(float(torch.rand(())))
        if self.shuffles:
            tokens = tokens[:, torch.randperm(tokens.shape[1])]
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0].mean(1)


def placed_in(model: nn.Module) -> Any:
    with torch.no_grad(), capture(model.eval()) as attention:
        model(torch.rand(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)))
    return attention[0]


def test_tokens_in_another_order_in_each_pass_have_no_place() -> None:
    torch.manual_seed(0)
    assert placed_in(Drawing(shuffles=False)).geometry is not None
    shuffled = placed_in(Drawing(shuffles=True))
    assert shuffled.geometry is None and shuffled.unplaced


def test_what_is_drawn_while_measuring_is_the_same_whatever_was_drawn_before(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, measured = [], places.measured_places
    for seed in (1, 2):
        model = Drawing(shuffles=False)

        def noted(*arguments: Any, model: Drawing = model) -> places.MeasuredPlaces:
            start = len(model.drawn)
            result = measured(*arguments)
            drawn.append(model.drawn[start:])
            return result

        with monkeypatch.context() as patch:
            patch.setattr(places, "measured_places", noted)
            torch.manual_seed(seed)
            placed_in(model)
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 3
