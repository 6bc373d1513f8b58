"""The fields of analyze.py have types, and say the same words as what they are passed on to."""

from __future__ import annotations

import sys
from typing import Any, get_args, get_origin

import pytest
import yaml

from attention_visualizer.analysis.study.output import FileFormat
from attention_visualizer.analysis.study.study import HeadLayers
from attention_visualizer.commands.analyze_options import FIELDS, check_options
from attention_visualizer.files.films import FilmFormat
from attention_visualizer.measures.map_measures import Fusion
from attention_visualizer.support.errors import UserError
from tests.helpers.runs import PROJECT


def defaults() -> dict[str, Any]:
    content = yaml.safe_load((PROJECT / "conf" / "analyze.yaml").read_text())
    return {name: value for name, value in content.items() if name not in ("defaults", "hydra")}


def test_each_field_has_a_type_which_its_default_fits() -> None:
    assert list(FIELDS) and FIELDS.keys() == defaults().keys()
    check_options(defaults())


@pytest.mark.parametrize(
    ("field", "words"),
    [("format", FileFormat), ("format_film", FilmFormat), ("head_layers", HeadLayers), ("rollout_fusion", Fusion)],
)
def test_choices_are_those_of_the_analysis(field: str, words: Any) -> None:
    choices, remedy = get_args(FIELDS[field])
    assert get_origin(choices) is get_origin(words) and get_args(choices) == get_args(words)
    assert remedy == f"choose one of {', '.join(get_args(words))}"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", "gif", "format=gif: choose one of png, pdf, svg"),
        ("format_film", "avi", "format_film=avi: choose one of webp, mp4, gif"),
        ("format_film", None, "format_film=None: choose one of webp, mp4, gif"),
        ("num_samples", "few", "num_samples=few: give a whole number of at least 1"),
        ("wrong", "perhaps", "wrong=perhaps: give true or false"),
        ("rollout_discard", 1, "rollout_discard=1: give a share from 0 up to, but not, 1"),
        ("subset", 1, "subset=1: give a whole number of at least 2, or all"),
        ("num_heads", 0, "num_heads=0: give a whole number of at least 1"),
        ("num_heads", 8, "num_heads= is for a file of this project's weights that does not say it: name it with ckpt="),
        ("nope", 1, "nope: there is no such field; see --help for all fields"),
    ],
)
def test_a_mistake_names_the_field_the_value_and_the_remedy(field: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_options(defaults() | {field: value})
    assert str(caught.value) == message


def test_a_missing_encoder_is_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    check_options(defaults() | {"format_film": "gif"})
    with pytest.raises(UserError) as caught:
        check_options(defaults() | {"format_film": "mp4"})
    assert str(caught.value) == "format_film=mp4 needs av: python -m pip install 'attention-visualizer[film]'"
