"""What TensorBoard shows of a run of train.py: described curves, and the settings that matter."""

from __future__ import annotations

import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from attention_visualizer.training.tensorboard import DESCRIPTIONS, SHOWN, shown_parameters, wait_for_a_later_second
from tests.helpers.runs import compose_train, trained_run


def board_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def test_loss_and_accuracy_come_first_and_say_what_they_are() -> None:
    board = board_of(trained_run().path)
    groups = sorted({tag.partition("/")[0] for tag in board.Tags()["scalars"]})
    assert groups[:3] == ["test", "train", "validation"]  # of which TensorBoard opens the first, and no other before
    assert all(group.startswith(("vit_", "watching")) for group in groups[3:])
    for tag in board.Tags()["scalars"]:
        described = board.SummaryMetadata(tag).summary_description
        assert described and described == DESCRIPTIONS.get(tag, described), tag


def test_the_hparams_tab_shows_what_differs_and_how_good_it_is() -> None:
    run = trained_run()
    content = board_of(run.path).PluginTagToContent("hparams")
    session = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    shown = set(session.hparams)
    assert {*SHOWN, "parameters", "model.attention_dropout", "model.mlp_dim"} <= shown
    assert not any("_target_" in name or "data_dir" in name for name in shown) and len(shown) < 20
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["test/accuracy", "validation/best_accuracy"]
    (best,) = board_of(run.path).Scalars("validation/best_accuracy")
    assert abs(best.value - run.manifest["metrics"]["validation_accuracy"]) < 1e-6


def test_defaults_are_not_shown_twice() -> None:
    plain, other = (shown_parameters(compose_train(*words)) for words in ((), ("data.rotation=3", "logger=csv")))
    assert list(other)[: len(SHOWN)] == list(SHOWN)
    assert set(other) - set(plain) == {"data.rotation"}


def test_a_new_file_of_events_sorts_behind_those_of_a_process_with_a_larger_number(tmp_path: Path) -> None:
    while time.time() % 1 > 0.8:  # so that the next second is not there by chance
        time.sleep(0.01)
    killed = tmp_path / f"events.out.tfevents.{int(time.time())}.host.99999.1"
    killed.touch()
    wait_for_a_later_second(tmp_path)
    assert f"events.out.tfevents.{int(time.time())}.host.10000.0" > killed.name
    (tmp_path / f"events.out.tfevents.{int(time.time()) + 900}.host.1.0").touch()
    began = time.monotonic()
    wait_for_a_later_second(tmp_path)  # of a clock that was set back: it ends
    assert time.monotonic() - began < 10
    wait_for_a_later_second(tmp_path / "not there")
