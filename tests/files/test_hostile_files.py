"""Files that were made to do harm: no code runs, nothing is looked up, memory and time stay within bounds."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from attention_visualizer.analysis.study.analysed_weights import find_weights, load_data
from attention_visualizer.commands import command_line
from attention_visualizer.data.image_sets import ImageFolder, InputFormat
from attention_visualizer.data.images import DatasetDescription, read_image
from attention_visualizer.data.mnist import FILES
from attention_visualizer.files import atomic
from attention_visualizer.files.tensor_files import CHECKPOINT_KEY, HASH
from attention_visualizer.runs import folders
from attention_visualizer.runs.checkpoint import load_checkpoint
from attention_visualizer.runs.export import export_safetensors
from attention_visualizer.runs.history import AttentionHistory
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.text import csv_safe, printable
from attention_visualizer.training import sweeps
from attention_visualizer.training.checkpoint_io import AtomicCheckpointIO
from attention_visualizer.training.resuming import accuracy_of_completed, read_config
from tests.helpers.runs import BARE, BRIEF, ENVIRONMENT, only_run, run_script, run_train, trained_run

SIZES = {"train": 9, "validation": 9, "test": 9}
DESCRIPTION = DatasetDescription("digits", 28, 1, tuple("0123456789"), 0.3, 0.3, SIZES)
FORMAT = InputFormat((28, 28), 1, (0.3,), (0.3,))


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return trained_run().path / "checkpoints" / "best.ckpt"


def with_pickle(checkpoint: Path, path: Path, program: bytes) -> Path:
    """The checkpoint with another program in place of its data.pkl, every checksum right."""
    with zipfile.ZipFile(checkpoint) as whole, zipfile.ZipFile(path, "w") as archive:
        for member in whole.infolist():
            is_program = member.filename.endswith("data.pkl")
            archive.writestr(member.filename, b"\x80\x02" + program + b"." if is_program else whole.read(member))
    return path


def changed(checkpoint: Path, path: Path, change: Callable[[Any], Any]) -> Path:
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def refusal(read: Callable[[Any], Any], path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < len(str(path)) + 350
    return message


def doubled(kind: type, times: int = 60) -> Any:
    """Small in a file, 2^times long when it is written out."""
    value: Any = kind(["a"])
    for _ in range(times):
        value = kind([value, value])
    return value


# --- checkpoints: memory and time


HELPER = """
import json, os, resource, signal, sys, torch
from pathlib import Path
from PIL import Image
from attention_visualizer.data import images
from attention_visualizer.runs.checkpoint import load_checkpoint
from attention_visualizer.runs.folders import RunFolder
from attention_visualizer.runs.history import AttentionHistory
from attention_visualizer.support.errors import UserError

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for line in sys.stdin:
    statement, path = json.loads(line)
    if os.fork():
        os.wait()
        print(flush=True)
        continue
    signal.alarm(60)
    before, path = peak(), Path(path)
    try:
        exec(statement)
        message = "was read"
    except UserError as error:
        message = error
    print(peak() - before, message, end="", flush=True)
    os._exit(0)
"""


@functools.cache
def helper() -> subprocess.Popen[str]:
    """A process that has imported everything and gives each statement a child; it ends with this one."""
    return subprocess.Popen([sys.executable, "-c", HELPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def limited(statement: str, path: Path, megabytes: int = 1_000) -> str:
    """The message of a process that reads `path` and may use so much memory beyond what its imports do."""
    process = helper()
    assert process.stdin is not None and process.stdout is not None
    print(json.dumps([statement, str(path)]), file=process.stdin, flush=True)
    used, _, message = process.stdout.readline().strip().partition(" ")
    assert int(used) < megabytes
    return message


def test_a_pickle_that_asks_for_gigabytes_gets_none(checkpoint: Path, tmp_path: Path) -> None:
    """torch's own list lets a file make a bytearray of any size: here 8 GB, from 40 bytes."""
    program = b"c__builtin__\nbytearray\n\x8a\x05" + (8 * 10**9).to_bytes(5, "little") + b"\x85R"
    path = with_pickle(checkpoint, tmp_path / "large.ckpt", program)
    assert "holds Python objects (__builtin__.bytearray)" in limited("load_checkpoint(path)", path)


def test_a_long_pickle_is_not_read(checkpoint: Path, tmp_path: Path) -> None:
    """A byte of it makes an object of 64."""
    path = with_pickle(checkpoint, tmp_path / "long.ckpt", b"(" + b"}" * 30_000_000 + b"t")
    assert "far more besides its tensors" in limited("load_checkpoint(path)", path, 300)


def test_a_dictionary_key_that_takes_for_ever_to_hash(checkpoint: Path, tmp_path: Path) -> None:
    nested = b")q\x00" + b"h\x00h\x00\x86q\x00" * 60
    path = with_pickle(checkpoint, tmp_path / "key.ckpt", b"}" + nested + b"K\x01s")
    assert "refers to parts of itself" in refusal(load_checkpoint, path)


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("field", ["format", "data", "model", "validation_accuracy", "split_seed"])
def test_values_that_are_endless_when_written_out(checkpoint: Path, tmp_path: Path, field: str, kind: type) -> None:
    path = changed(
        checkpoint, tmp_path / "endless.ckpt", lambda content: content[CHECKPOINT_KEY].update({field: doubled(kind)})
    )
    assert "refers to parts of itself" in refusal(load_checkpoint, path)
    assert "refers to parts of itself" in refusal(AtomicCheckpointIO().load_checkpoint, path)


def test_values_that_hold_themselves_or_are_nested_deeply(checkpoint: Path, tmp_path: Path) -> None:
    circle: list[Any] = []
    circle.append(circle)
    deep: list[Any] = []
    for _ in range(300):
        deep = [deep]
    for value in (circle, deep):
        path = changed(checkpoint, tmp_path / "deep.ckpt", lambda content, value=value: content.update(loops=value))
        assert "refers to parts of itself" in refusal(AtomicCheckpointIO().load_checkpoint, path)


def test_a_resumed_optimiser_has_no_more_elements_than_were_stored(checkpoint: Path, tmp_path: Path) -> None:
    def widen(content: Any) -> None:
        content["optimizer_states"][0]["state"][0]["exp_avg"] = torch.zeros(1).expand(10**12)

    path = changed(checkpoint, tmp_path / "wide.ckpt", widen)
    assert "declares 4,000,000,000,000 bytes" in refusal(AtomicCheckpointIO().load_checkpoint, path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse", "quantised", "meta"])
def test_special_tensors_are_refused_before_they_are_made(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    tensor = {
        "sparse": lambda: torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (10**12,)),
        "quantised": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
        "meta": lambda: torch.empty(10**9, 10**9, device="meta"),
    }[kind]()
    path = changed(checkpoint, tmp_path / "special.ckpt", lambda content: content.update(other=tensor))
    for read in (load_checkpoint, AtomicCheckpointIO().load_checkpoint):
        assert "special tensor (torch._utils." in refusal(read, path)


def test_an_archive_within_an_archive(checkpoint: Path, tmp_path: Path) -> None:
    """Whose end states another directory than the one before it: zipfile reads the second one, torch the first."""
    content = checkpoint.read_bytes()
    hidden, end = content[:-22], bytearray(content[-22:])
    with zipfile.ZipFile(checkpoint) as archive:
        start = archive.start_dir
    twice = tmp_path / "twice.ckpt"
    twice.write_bytes(hidden + content[:start] + content[start:-22] + bytes(end))
    with pytest.raises(UserError, match=r"two archives in one|truncated or corrupt|two members"):
        load_checkpoint(twice)
    twice.write_bytes(content + b"something")
    with pytest.raises(UserError, match="comes after its end"):
        load_checkpoint(twice)


def test_what_is_no_file_is_not_waited_for(checkpoint: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "zero.ckpt").symlink_to("/dev/zero")
    for name in ("pipe.ckpt", "zero.ckpt"):
        assert "is not a regular file" in refusal(load_checkpoint, tmp_path / name)
        assert "not a readable file" in refusal(AttentionHistory.load, tmp_path / name)
    (tmp_path / "loop.ckpt").symlink_to("loop.ckpt")
    refusal(load_checkpoint, tmp_path / "loop.ckpt")


@pytest.mark.parametrize("header", [struct.pack("<Q", 2**60) + b'{"a":1}', None])
def test_what_a_safetensors_header_declares(tmp_path: Path, header: bytes | None) -> None:
    declared = json.dumps({"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "declared.safetensors"
    path.write_bytes(header or struct.pack("<Q", len(declared)) + declared + bytes(4))
    assert "no safetensors file" in refusal(load_checkpoint, path)


# --- run folders


class Exploit:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.touched}",)


def test_no_pickle_in_a_history_runs(tmp_path: Path) -> None:
    exploit = Exploit(tmp_path / "touched")
    np.savez(tmp_path / "a.npz", **{"probe/images": np.array([exploit], dtype=object)})
    np.save(tmp_path / "b.npy", np.array([exploit], dtype=object), allow_pickle=True)
    (tmp_path / "c.npz").write_bytes(pickle.dumps(exploit))
    for name in ("a.npz", "b.npy", "c.npz"):
        assert "not a readable attention history" in refusal(AttentionHistory.load, tmp_path / name)
    assert not exploit.touched.exists()


def test_a_history_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    header = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (1, 10**9, 1, 1)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("probe/images.npy", "w") as file:
        file.write(header.getvalue())
        for _ in range(100):
            file.write(bytes(10**7))
    assert "unpacks to more than" in limited("AttentionHistory.load(path)", path, 100)


@pytest.mark.parametrize(
    "arrays",
    [
        {"frames/step": np.zeros((10**9, 0))},  # a billion entries of nothing
        {"frames/step": np.zeros(200_000)},
        {"frames/maps": np.zeros((3, 4))},
        {"probe/images": np.zeros((3, 4))},
        {"probe/labels": np.zeros(0)},
        {"save/step": np.zeros(3)},
        {"__class__/step": np.zeros(3)},
        {"frames/step": np.zeros(3), "frames/epoch": np.zeros(4)},
        {"probe/labels": np.zeros(3, "datetime64[s]")},
        {"step": np.zeros(3)},
    ],
    ids=str,
)
def test_arrays_that_no_history_has(tmp_path: Path, arrays: dict[str, Any]) -> None:
    np.savez_compressed(tmp_path / "history.npz", **arrays)
    refusal(AttentionHistory.load, tmp_path / "history.npz")


def test_the_history_of_a_run_is_accepted() -> None:
    assert AttentionHistory.load(trained_run().path / "attention_history.npz").frames


def test_a_manifest_that_is_a_pipe_huge_or_nested(tmp_path: Path) -> None:
    folder = folders.RunFolder(tmp_path)
    os.mkfifo(folder.manifest_path)
    assert "not a readable file" in refusal(lambda path: folder.read_manifest(), folder.manifest_path)
    folder.manifest_path.unlink()
    folder.manifest_path.write_text("[" * 10**6)
    for read in (atomic.read_json, lambda path: folder.read_manifest()):
        assert "cannot be read as JSON" in refusal(read, folder.manifest_path)
    folder.manifest_path.write_text('{"a": [' + "{}," * 20_000_000 + "1]}")
    assert "bytes are too many" in limited("RunFolder(path.parent).read_manifest()", folder.manifest_path, 100)


@pytest.mark.parametrize(
    "text",
    [
        '!!python/object/apply:os.system ["touch touched"]',
        "a: !!python/object/apply:os.system ['touch touched']",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        "a: ${oc.env:HOME}",
        "a: [{b: '${oc.env:HOME}'}]",
        "'${oc.env:HOME}': 1",
        "a: {_target_: os.system, _args_: [touch touched]}",
        "a: [{_partial_: true}]",
        "a: {_instantiator: os.system}",
        "a: {_zen_target: os.system}",
        "[" * 90_000,
        "a: " + "x" * 200_000,
        "- a",
        "\x00",
    ],
    ids=lambda text: text[:30],
)
def test_configurations_that_are_more_than_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    refusal(read_config, tmp_path / "config.yaml")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("metrics", [None, 3, {}, {"validation_accuracy": "high"}])
def test_a_manifest_that_only_says_that_it_is_done(tmp_path: Path, metrics: Any) -> None:
    atomic.write_json(tmp_path / "run.json", {"status": "completed", "metrics": metrics})
    assert accuracy_of_completed(folders.RunFolder(tmp_path), OmegaConf.create({})) is None


def test_links_out_of_a_run_s_folder_are_not_followed(tmp_path: Path) -> None:
    assert run_train(*BRIEF, *BARE, "test=false", folder=tmp_path).exit_code == 0
    run = only_run(tmp_path)
    (victim := tmp_path / "victim").mkdir()
    (victim / "attention_analysis_report.md").write_text("precious")
    (run / "attention_analysis").symlink_to(victim)
    outcome = run_script("analyze.py", "chapters=[patterns]", folder=tmp_path, environment=ENVIRONMENT)
    assert outcome.exit_code == 2 and "leads out of the run's folder" in outcome.err
    outcome = run_train(f"ckpt_path={run}/checkpoints/last.ckpt", "trainer.max_epochs=2", folder=tmp_path)
    assert outcome.exit_code == 2 and "attention_analysis leads out of the run's folder" in outcome.err
    assert (victim / "attention_analysis_report.md").read_text() == "precious" and len(list(victim.iterdir())) == 1


def test_a_checkpoint_of_another_run_in_a_run_s_folder(tmp_path: Path, checkpoint: Path) -> None:
    """Equal shapes: the number of heads shows in no weight."""
    assert run_train(*BRIEF, *BARE, "model.num_heads=4", folder=tmp_path).exit_code == 0
    run = only_run(tmp_path)
    for name in ("best.ckpt", "last.ckpt"):
        (run / "checkpoints" / name).write_bytes(checkpoint.read_bytes())
    with pytest.raises(UserError, match=r"best.ckpt was trained with model.num_heads=3 and .*config.yaml says 4"):
        find_weights("best", str(run), "runs")
    resumed = run_train(f"ckpt_path={run}/checkpoints/last.ckpt", "trainer.max_epochs=2", folder=tmp_path)
    assert (resumed.exit_code, resumed.out) == (2, "")
    assert "model.num_heads=4 cannot resume" in resumed.err and "trained with 3" in resumed.err


def test_a_checkpoint_of_other_data_in_a_run_s_folder(tmp_path: Path, checkpoint: Path) -> None:
    folder = folders.RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    change = lambda content: content[CHECKPOINT_KEY]["data"].update(mean=0.5)  # noqa: E731
    changed(checkpoint, folder.best, change)
    (folder.path / "run.json").write_text((checkpoint.parents[1] / "run.json").read_text())
    with pytest.raises(UserError, match="the data set's mean=0.5 and .*run.json says 0.3"):
        find_weights("best", str(folder.path), "runs")


def test_a_checkpoint_does_not_say_where_data_is_downloaded_to(tmp_path: Path, checkpoint: Path) -> None:
    def point(content: Any) -> None:
        content[CHECKPOINT_KEY]["data_dir"] = str(tmp_path / "home")
        content[CHECKPOINT_KEY]["data"]["name"] = "mnist"

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / next(iter(FILES))).touch()
    (tmp_path / "empty").mkdir()
    loaded = load_checkpoint(changed(checkpoint, tmp_path / "a.ckpt", point))
    os.mkfifo(tmp_path / "empty" / next(iter(FILES)))
    with pytest.raises(UserError, match="empty/train-images-idx3-ubyte: not a readable file"):
        load_data(loaded, str(tmp_path / "empty"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MNIST_DIR", str(tmp_path / "empty"))
        with pytest.raises(UserError, match="empty/train-images-idx3-ubyte: not a readable file"):
            load_data(loaded)


# --- names and text


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[31m", "a\x00", "\ud800", "x" * 101, 3])
def test_class_names_that_cannot_be_shown(name: Any) -> None:
    with pytest.raises(UserError, match="class_names=.*printable characters"):
        DatasetDescription.from_dict(DESCRIPTION.to_dict() | {"class_names": [name]})


def test_names_of_a_sweep_s_folders() -> None:
    for value in ("../../x", "/etc/passwd", "a" * 1000, "ж" * 1000, "漢" * 1000, "a\x00b", "\udcff", "~", "x\n"):
        name = sweeps.job_folder(3, f"a-{value}")
        assert name.startswith("3_a") and len(name.encode()) <= 240 and not set(name) & set("/\\\x00\n ~")


def test_text_is_inert_on_terminals_and_in_spreadsheets(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("\x1b[31mred\x9b2J\n\u202e\udcff") == "�[31mred�2J���"
    for text in ("=1+1", "+1", "-1", "@x", "\t=1", "＝1", " =1", "\x1b=1"):
        assert not str(csv_safe(text)).lstrip().startswith(("=", "+", "-", "@", "\t", "＝", "\x1b"))
    assert csv_safe(-1.5) == -1.5
    with pytest.raises(SystemExit):
        command_line.fail(UserError("no run called \x1b]0;title\x07"))
    assert capsys.readouterr().err == "error: no run called �]0;title�\n"


def test_a_sweep_s_table_shows_what_it_finds_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from omegaconf import OmegaConf

    jobs = {
        "0_[red]": {"status": "=cmd()", "error": "@SUM(A1)\x1b[2J", "metrics": {"validation_accuracy": "high"}},
        "1_a": {"status": "completed", "metrics": [1], "parameters": "=1"},
        "²_b": {"status": "completed"},
        "9ab": "no manifest",
    }
    for name, manifest in jobs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit):
        sweeps.SweepTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "sweep.csv").read_text())))
    assert [row["run"] for row in rows] == ["0_[red]", "1_a", "9ab", "²_b"]
    assert (rows[0]["status"], rows[0]["error"], rows[1]["parameters"]) == ("'=cmd()", "'@SUM(A1)�[2J", "'=1")
    assert rows[2]["status"] == "unreadable"
    shown = capsys.readouterr().out
    assert "0_[red]" in shown and "\x1b[2J" not in shown


# --- pictures


def png(width: int, height: int, depth: int = 8) -> bytes:
    """A whole picture of zeros: megabytes of them are a few kilobytes here."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = zlib.compress(bytes((1 + width * depth // 8) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def floats(*values: float) -> Image.Image:
    return Image.fromarray(np.resize(np.array(values, np.float32), (5, 7)))


BROKEN: dict[str, Callable[[Path], Any]] = {
    "zero.png": lambda path: path.touch(),
    "text.png": lambda path: path.write_text("hello"),
    "program.png": lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
    "large.png": lambda path: path.write_bytes(png(9000, 9000)),
    "bomb.ppm": lambda path: path.write_bytes(b"P6 60000 60000 255\n"),
    "nan.tif": lambda path: floats(0.5, float("nan")).save(path),
    "infinite.tif": lambda path: floats(0.5, float("inf")).save(path),
    "negative.tif": lambda path: floats(-1, 0.5).save(path),
    "beyond.tif": lambda path: floats(0, 1e30).save(path),
    "cut.png": lambda path: path.write_bytes(png(9, 9)[:45]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_pictures_that_are_refused(tmp_path: Path, name: str) -> None:
    BROKEN[name](tmp_path / name)
    refusal(lambda path: read_image(path, DESCRIPTION), tmp_path / name)


def test_the_rest_of_a_folder_is_read_and_the_broken_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, make in BROKEN.items():
        make(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "self").symlink_to(".")
    (tmp_path / "a\x1b[31m.png").write_text("hello")
    (tmp_path / "good.png").write_bytes(png(9, 9))
    with caplog.at_level("WARNING"):
        pictures = ImageFolder.find(tmp_path, FORMAT)
    assert [pictures.name(number) for number in range(len(pictures))] == ["good.png"]
    assert set(pictures.broken) == {*BROKEN, "a�[31m.png"}
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == len(pictures.broken) and all(message.isprintable() for message in named)


def test_the_largest_picture_fits_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(png(7999, 8000, depth=16))
    assert limited("images.grey_pixels(Image.open(path))", path, 600) == "was read"


def test_floats_from_nought_to_one_are_shades_of_grey(tmp_path: Path) -> None:
    floats(0.0, 0.5, 1.0).resize((28, 28), Image.Resampling.NEAREST).save(tmp_path / "a.tif")
    assert set(read_image(tmp_path / "a.tif", DESCRIPTION).unique().tolist()) == {0, 127, 255}
    os.mkfifo(tmp_path / "pipe.png")
    refusal(lambda path: read_image(path, DESCRIPTION), tmp_path / "pipe.png")


# --- export


def test_an_export_comes_back_whole(checkpoint: Path, tmp_path: Path) -> None:
    path = export_safetensors(checkpoint, tmp_path / "out" / "best.safetensors")
    loaded, exported = load_checkpoint(checkpoint), load_checkpoint(path)
    for field in ("model_config", "data", "split_seed", "seed", "epoch", "step", "validation_accuracy"):
        assert getattr(exported, field) == getattr(loaded, field)
    weights = load_file(path)
    assert weights.keys() == loaded.state_dict.keys()
    for name, tensor in loaded.state_dict.items():
        assert torch.equal(weights[name], tensor) and torch.equal(exported.state_dict[name], tensor)


def test_every_flipped_bit_of_an_export_is_caught_or_harmless(checkpoint: Path, tmp_path: Path) -> None:
    path = export_safetensors(checkpoint, tmp_path / "best.safetensors")
    whole, loaded = path.read_bytes(), load_checkpoint(path)
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    chosen = random.Random(5)
    places = [*range(8), *range(8, end, 5), *chosen.sample(range(end, len(whole)), 200)]
    caught = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chosen.randrange(8)
        path.write_bytes(damaged)
        try:
            read = load_checkpoint(path)
        except UserError:
            caught += 1
            continue
        assert place < end and read.model_config == loaded.model_config and read.data == loaded.data
        assert all(torch.equal(read.state_dict[name], tensor) for name, tensor in loaded.state_dict.items())
    assert caught > 0.95 * len(places)


def test_an_export_with_other_settings_or_without_its_hash(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    path = export_safetensors(checkpoint, tmp_path / "best.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    other_heads = metadata | {CHECKPOINT_KEY: metadata[CHECKPOINT_KEY].replace('"num_heads": 3', '"num_heads": 4')}
    assert other_heads != metadata
    for change in (other_heads, {CHECKPOINT_KEY: metadata[CHECKPOINT_KEY]}, {HASH: metadata[HASH]}):
        save_file(weights, path, change)
        assert "is corrupt" in refusal(load_checkpoint, path)


def test_export_by_command(tmp_path: Path) -> None:
    done = run_train(*BRIEF, *BARE, "export=true", folder=tmp_path)
    assert done.exit_code == 0, done.err
    run = only_run(tmp_path)
    path = run / "checkpoints" / "best.safetensors"
    assert f"Exported:     {path.relative_to(tmp_path)}" in done.out
    assert load_checkpoint(path).data == load_checkpoint(run / "checkpoints" / "best.ckpt").data
