"""Whatever goes wrong in watching, training goes on: one warning for each kind of thing that is missing."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from attention_visualizer.attention import hand_written, proof, recording
from attention_visualizer.attention.capture import CaptureError
from attention_visualizer.figures import attention_figures
from attention_visualizer.measures.streaming import AttentionStatistics
from attention_visualizer.runs.history import AttentionHistory
from attention_visualizer.support.errors import UserError, summary
from attention_visualizer.watching import attention_logger, loggers, validation
from attention_visualizer.watching.attention_logger import AttentionLogger
from attention_visualizer.watching.validation import ValidationWatch
from tests.helpers.trainers import Recorder, Steps, attention_warnings, fit, kept_in, vit

CPU_MEMORY = "[enforce fail] DefaultCPUAllocator: can't allocate memory: planted"  # as PyTorch has it, a RuntimeError
ERRORS = {
    "AttributeError": AttributeError("planted\nand more"),
    "KeyError": KeyError("planted"),
    "OSError": OSError("planted\nand more"),
    "MemoryError": MemoryError("planted"),
    "OutOfMemoryError": torch.OutOfMemoryError("planted"),
    "memory of the CPU": RuntimeError(CPU_MEMORY),
}
MEMORY = list(ERRORS)[3:]


class Random(Steps):
    """Draws random numbers in each step, also in validation and inside its attention: a step run twice would show."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        super().__init__(vit(dropout=0.2, attention_dropout=0.2), head=nn.Dropout(0.2))
        self.outputs: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        if not self.trainer.training:
            self.model.train()
        output = self.head(self.model(batch[0] + 0.01 * torch.rand_like(batch[0])))
        self.outputs.append(output.detach())
        return F.cross_entropy(output, batch[1])


class MultiHead(Random):
    """Attention of torch.nn, which a capture runs in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.MultiheadAttention(6, 3, dropout=0.3, batch_first=True)
        for block in self.model.blocks:
            block.attn = Mixer()


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 3, dropout=0.3, batch_first=True)

    def forward(self, tokens: Tensor, *_: Any) -> Tensor:
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


class HandWritten(Random):
    """Softmax, dropout and products of its own, one of them in place."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.model.blocks:
            block.attn = Products()


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, tokens: Tensor, *_: Any) -> Tensor:
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)
        weights = (query @ key.transpose(1, 2)).mul_(0.4).softmax(dim=-1)
        return F.dropout(weights, 0.3, self.training) @ value


def trained(folder: Path, module: Random, *callbacks: Any, **options: Any) -> tuple[Any, ...]:
    """Everything that a training leaves: outputs of all steps, weights and random numbers; steps and modes."""
    trainer = fit(folder, module, *callbacks, **options)
    tensors = [*module.outputs, *module.state_dict().values(), torch.rand(3)]
    return tensors, trainer.global_step, [part.training for part in module.modules()]


@functools.cache
def trained_unwatched(make: Callable[[], Random]) -> tuple[Any, ...]:
    with tempfile.TemporaryDirectory() as folder:
        return trained(Path(folder), make())


def warnings_of(folder: Path, make: Callable[[], Random] = Random, **options: Any) -> list[str]:
    """Train with AttentionLogger; all must be as without it. Return what was warned of."""
    plain = trained_unwatched(make)
    with attention_warnings() as lines:
        watched = trained(folder, make(), AttentionLogger(head_grids=1), **options)
    assert plain[1:] == watched[1:]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(plain[0], watched[0], strict=True))
    return lines


class Plant:
    """Lets a function raise `error` from its `after`-th call on; calls: how many were made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(self, owner: Any, name: str, error: BaseException, after: int = 1) -> Plant:
        plain, self.calls = getattr(owner, name), 0

        def spoilt(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls >= after:
                raise error.with_traceback(None)
            return plain(*args, **kwargs)

        self.monkeypatch.setattr(owner, name, spoilt)
        return self


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    return Plant(monkeypatch)


class Service(Recorder):
    """A logger of which only what AttentionLogger writes can be spoilt."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any("vit_" in name for name in metrics):
            self.log_attention()

    def log_attention(self) -> None:
        pass


PLACES = {  # where, from which call on, what is missing
    "the probes": (attention_logger, "images_of_validation", 1, "no attention"),
    "the search": (attention_logger, "find_model", 1, "no attention"),
    "the first frame": (attention_logger, "observe", 1, "no frame"),
    "a later frame": (attention_logger, "observe", 3, "no frame"),
    "the start of a capture": (validation, "capture", 1, "no statistics"),
    "measures": (AttentionStatistics, "update", 4, "no statistics"),
    "summaries": (AttentionStatistics, "compute", 1, "no statistics"),
    "pictures": (attention_figures, "layer_card", 2, "no figures"),
    "the heat map": (attention_figures, "entropy_heat_map", 1, "no figures"),
    "the history": (AttentionHistory, "save", 1, "no history"),
    "scalars": (Service, "log_attention", 1, "Service gets no more numbers"),
    "images": (Service, "log_image", 3, "Service gets no more images"),
    "encoding": (loggers, "encode_png", 3, "TensorBoardLogger"),
}


@pytest.mark.parametrize("error", ["AttributeError", "OutOfMemoryError"])
@pytest.mark.parametrize("place", PLACES)
def test_one_warning_and_the_same_training(tmp_path: Path, plant: Plant, place: str, error: str) -> None:
    owner, name, after, missing = PLACES[place]
    plant(owner, name, ERRORS[error], after)
    log = TensorBoardLogger(tmp_path) if place == "encoding" else Service()
    (line,) = warnings_of(tmp_path, logger=log)
    assert missing in line and "planted" in line and "\n" not in line
    if error in MEMORY:  # never tried again
        assert plant.calls == after
    if missing not in ("no attention", "no frame", "no history"):  # the others come all the same
        assert kept_in(tmp_path).column("frames", "step").tolist() == [0, 1, 2, 4, 5, 10]


@pytest.mark.parametrize("error", ERRORS)
def test_errors_of_every_kind(tmp_path: Path, plant: Plant, error: str) -> None:
    plant(attention_logger, "observe", ERRORS[error], after=2)
    again = "any more" if error in MEMORY else "this time"
    cause = "KeyError: 'planted'" if error == "KeyError" else summary(ERRORS[error])
    assert warnings_of(tmp_path) == [f"AttentionLogger: no frame {again}: {cause}"]
    assert plant.calls == (2 if error in MEMORY else 6)


CAPTURE_PLACES = {  # of a capture's own work around the model's calls
    "before a call": (hand_written.HandWrittenAttention, "before"),
    "after a call": (hand_written.HandWrittenAttention, "after"),
    "who calls": (recording, "calling_stack"),
    "the proof": (proof.Proof, "of"),
    "the end": (recording.Recorder, "finish"),
    "after dropout": (hand_written, "_state_after_dropout"),
    "torch.nn": (recording, "multi_head_body"),
}


@pytest.mark.parametrize(
    ("place", "make"),
    [
        *itertools.product(["who calls", "the proof", "the end"], [Random, MultiHead, HandWritten]),
        *itertools.product(["before a call", "after a call", "after dropout"], [HandWritten]),  # reached by it alone
        ("torch.nn", MultiHead),
    ],
)
def test_a_capture_that_fails_hands_on_the_model_s_own_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, make: Callable[[], Random]
) -> None:
    """Also where the step draws random numbers or changes a tensor in place: nothing is done twice."""
    owner, name = CAPTURE_PLACES[place]
    plain, begin, log_frame = getattr(owner, name), ValidationWatch._begin_capture, AttentionLogger._log_frame
    plant = Plant(monkeypatch)

    def begin_and_spoil(watch: ValidationWatch) -> Any:
        plant(owner, name, ERRORS["AttributeError"])
        return begin(watch)

    def log_whole_frame(*args: Any, **options: Any) -> None:
        monkeypatch.setattr(owner, name, plain)
        log_frame(*args, **options)

    monkeypatch.setattr(ValidationWatch, "_begin_capture", begin_and_spoil)
    monkeypatch.setattr(AttentionLogger, "_log_frame", log_whole_frame)
    (line,) = warnings_of(tmp_path, make)
    assert plant.calls and "no statistics of this validation: " in line and "planted" in line
    assert kept_in(tmp_path).column("frames", "step").tolist() == [0, 1, 2, 4, 5, 10]


def test_memory_that_ends_in_the_model_may_have_been_what_watching_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own call is made again when watching has ended, once."""
    plain, refused = F.gelu, []

    def scarce(watch: ValidationWatch) -> bool:
        return bool(watch._capture._exit_callbacks) and not refused  # type: ignore[attr-defined]

    watches: list[ValidationWatch] = []
    begin = ValidationWatch._begin_capture
    monkeypatch.setattr(ValidationWatch, "_begin_capture", lambda watch: watches.append(watch) or begin(watch))

    def gelu(*args: Any, **options: Any) -> Tensor:
        if torch.overrides.has_torch_function(args):
            return torch.overrides.handle_torch_function(gelu, args, *args, **options)
        if watches and scarce(watches[-1]):
            refused.append(watches[-1])
            raise ERRORS["memory of the CPU"]
        return plain(*args, **options)

    monkeypatch.setattr(F, "gelu", gelu)
    (line,) = warnings_of(tmp_path)
    assert refused and line.startswith("AttentionLogger: no statistics any more: [enforce fail]")
    assert len(kept_in(tmp_path).validations) == 0 and len(watches) == 1


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(143)], ids=repr)
@pytest.mark.parametrize("place", ["a later frame", "measures", "pictures", "the history", "images"])
def test_an_interrupt_ends_training_also_in_the_midst_of_watching(
    tmp_path: Path, plant: Plant, place: str, end: BaseException
) -> None:
    owner, name, after, _ = PLACES[place]
    plant(owner, name, end, after)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(tmp_path, Random(), AttentionLogger(), logger=Service())


class Broken(Random):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 1:
            raise self.error


@pytest.mark.parametrize("error", [*ERRORS.values(), CaptureError("somebody's own"), UserError("own")], ids=repr)
def test_errors_of_the_step_itself_end_training_as_they_are(tmp_path: Path, error: Exception) -> None:
    with attention_warnings() as lines, pytest.raises(type(error)) as caught:
        fit(tmp_path, Broken(error), AttentionLogger())
    assert caught.value is error and error.__cause__ is None and lines == []


class TwoProcesses(SingleDeviceStrategy):
    """Fails where it adds up what two processes have."""

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if tensor.dtype == torch.float64:
            raise torch.OutOfMemoryError("planted")
        return tensor


def test_a_reduction_over_processes_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "world_size", 2)
    with attention_warnings() as lines:
        trainer = fit(tmp_path, Random(), AttentionLogger(), strategy=TwoProcesses(torch.device("cpu")))
    assert trainer.global_step == 10 and kept_in(tmp_path).validations == []
    assert lines == ["AttentionLogger: no statistics any more: planted"]
