"""Data: files found, checked and downloaded; splits; batches that resume anywhere; pictures of every kind."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import math
import multiprocessing
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from PIL import Image

from attention_visualizer.data import mnist
from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.data.datasets import stratified_split
from attention_visualizer.data.images import DatasetDescription, normalise, read_image
from attention_visualizer.data.mnist import MnistUnavailable, download, load_mnist, parse_idx
from attention_visualizer.support.errors import UserError


@pytest.fixture(scope="module")
def digits() -> ImageDataModule:
    data = ImageDataModule(name="digits", batch_size=211)
    data.load()
    return data


@pytest.fixture
def description(digits: ImageDataModule) -> DatasetDescription:
    return digits.description


# --- the files of MNIST ----------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A small MNIST: four IDX files whose hashes take the place of the real ones."""
    random = np.random.default_rng(0)
    shapes = {"train-images": (7, 28, 28), "train-labels": (7,), "t10k-images": (3, 28, 28), "t10k-labels": (3,)}
    files = {
        f"{name}-idx{len(shape)}-ubyte": idx(random.integers(0, 10, shape, np.uint8)) for name, shape in shapes.items()
    }
    hashes = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(mnist, "FILES", hashes)
    return files


@pytest.mark.parametrize("inside", ["MNIST/raw", "."])
def test_files_are_found_in_either_place(tmp_path: Path, small_files: dict[str, bytes], inside: str) -> None:
    folder = tmp_path / inside
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in small_files.items():
        (folder / name).write_bytes(content)
    arrays = load_mnist(tmp_path)
    assert arrays["train-images-idx3-ubyte"].shape == (7, 28, 28)
    assert arrays["t10k-labels-idx1-ubyte"].tolist() == list(small_files["t10k-labels-idx1-ubyte"][8:])


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "swapped", "images", "gzip", "folder", "pipe"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, small_files: dict[str, bytes], damage: str) -> None:
    for name, content in small_files.items():
        (tmp_path / name).write_bytes(content)
    path = tmp_path / "train-labels-idx1-ubyte"
    content = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "pipe":  # reading it would never end
        path.unlink()
        os.mkfifo(path)
    else:
        bad = {
            "truncated": content[:-1],
            "empty": b"",
            "flipped": content[:-1] + bytes([content[-1] ^ 1]),
            "swapped": small_files["t10k-labels-idx1-ubyte"],
            "images": small_files["train-images-idx3-ubyte"],
            "gzip": gzip.compress(bytes(10_000_000)),
        }
        path.write_bytes(bad[damage])
    with pytest.raises(UserError, match="train-labels-idx1-ubyte: .*delete it"):
        ImageDataModule(data_dir=str(tmp_path)).load()


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x08", b"\0\0\x09\x01\0\0\0\x01\x05", b"\0\0\x08\x01\0\0\0\x05\x01", b"\x1f\x8b\x08\x01"]
)
def test_what_is_not_idx_is_refused(content: bytes) -> None:
    with pytest.raises(UserError, match="somewhere"):
        parse_idx(content, "somewhere")


# --- downloading -----------------------------------------------------------------------------------------------


class Mirror:
    """A web server on this machine; counts what it served, by path."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.requests: list[str] = []
        self.behaviour = "good"
        self.release = threading.Event()
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.requests.append(self.path)
                if mirror.behaviour == "redirects":
                    self.send_response(302)
                    self.send_header("Location", self.path)
                    self.end_headers()
                    return
                if mirror.behaviour == "headers by the byte":
                    self.wfile.write(b"HTTP/1.0 200 OK\r\n")
                    with suppress(OSError):
                        while not mirror.release.wait(0.05):
                            self.wfile.write(b"X")
                    return
                content = files[self.path[1:]]
                self.send_response(200)
                if mirror.behaviour != "endless":
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if mirror.behaviour == "truncated":
                    content = content[: len(content) // 2]
                elif mirror.behaviour == "altered":
                    content = content[:-1] + b"?"
                elif mirror.behaviour == "stalled":
                    self.wfile.write(content[:5])
                    mirror.release.wait(10)
                    return
                elif mirror.behaviour == "trickle":
                    for byte in content[:40]:
                        self.wfile.write(bytes([byte]))
                        if mirror.release.wait(0.05):
                            return
                elif mirror.behaviour == "slow":
                    time.sleep(0.3)
                elif mirror.behaviour == "endless":
                    with suppress(OSError):
                        while not mirror.release.is_set():
                            self.wfile.write(content)
                    return
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


CONTENT = np.random.default_rng(1).integers(0, 256, 5003, np.uint8).tobytes()
ARCHIVE = gzip.compress(CONTENT)
ARCHIVES = [("numbers.gz", hashlib.md5(ARCHIVE).hexdigest())]


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    mirror = Mirror({"numbers.gz": ARCHIVE})
    yield mirror
    mirror.close()


def test_a_download_is_extracted_and_leaves_nothing_else(tmp_path: Path, mirror: Mirror) -> None:
    folder = tmp_path / "MNIST" / "raw"
    download(folder, ARCHIVES, ["http://127.0.0.1:9/", mirror.url])  # the first mirror refuses, the second serves
    assert (folder / "numbers").read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == ["numbers"]
    download(folder, ARCHIVES, [])  # there already: no mirror is asked


@pytest.mark.parametrize(
    "behaviour",
    ["truncated", "altered", "stalled", "trickle", "redirects", "headers by the byte", "endless"],
)
def test_a_bad_download_gives_a_reason_soon_and_leaves_nothing(tmp_path: Path, mirror: Mirror, behaviour: str) -> None:
    mirror.behaviour = behaviour
    began = time.monotonic()
    with pytest.raises(MnistUnavailable, match=r"numbers\.gz"):
        download(tmp_path / "data" / "MNIST" / "raw", ARCHIVES, [mirror.url], timeout=0.3, deadline=0.5)
    assert time.monotonic() - began < 2
    assert list(tmp_path.iterdir()) == []


def test_who_waited_for_a_download_that_failed_tries_it_again(tmp_path: Path, mirror: Mirror) -> None:
    folder = tmp_path / "data" / "MNIST" / "raw"
    outcomes: list[str] = []

    def attempt() -> None:
        try:
            download(folder, ARCHIVES, [mirror.url], timeout=2.0, deadline=0.5)
            outcomes.append("done")
        except MnistUnavailable as error:
            outcomes.append(str(error))

    mirror.behaviour = "stalled"
    threads = [threading.Thread(target=attempt) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
    mirror.behaviour = "good"  # from the second request on
    for thread in threads:
        thread.join(10)
    assert "not complete" in outcomes[0] and outcomes[1] == "done"
    assert [path.name for path in folder.iterdir()] == ["numbers"]


def test_two_processes_download_once(tmp_path: Path, mirror: Mirror) -> None:
    mirror.behaviour = "slow"
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=download, args=(tmp_path, ARCHIVES, [mirror.url])) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(10)
    assert [process.exitcode for process in processes] == [0, 0]
    assert mirror.requests == ["/numbers.gz"]
    assert (tmp_path / "numbers").read_bytes() == CONTENT


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mirrors on a port of this machine that refuses."""
    from torchvision.datasets import MNIST

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])


@pytest.mark.parametrize("place", ["absent", "under a file"])
def test_without_disk_and_network_the_digits_step_in_and_say_so(
    tmp_path: Path, no_network: None, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / ("file/data" if place == "under a file" else "data")
    data = ImageDataModule(data_dir=str(folder))
    data.load()
    assert data.description.name == "digits"
    assert data.batch_size == 32 and data.default_epochs == 60
    banner = capsys.readouterr().err
    assert "NOT MNIST" in banner and "MNIST_DIR" in banner


@pytest.mark.parametrize("fallback", [None, "null"])
def test_without_fallback_that_is_an_error(tmp_path: Path, no_network: None, fallback: str | None) -> None:
    with pytest.raises(UserError, match="data.data_dir=.*MNIST is not there.*refused"):
        ImageDataModule(data_dir=str(tmp_path), fallback=fallback).load()


@pytest.mark.skipif(not os.environ.get("MNIST_DIR"), reason="needs MNIST_DIR")
def test_the_real_mnist() -> None:
    data = ImageDataModule()
    data.load()
    assert data.description.sizes == {"train": 55_000, "validation": 5_000, "test": 10_000}
    assert (data.description.mean, data.description.std) == pytest.approx((0.1307, 0.3081), abs=2e-3)
    assert data.batch_size == 128 and data.default_epochs == 10
    assert data.splits["test"][1][:5].tolist() == [7, 2, 1, 0, 4]  # known to begin so


# --- splits and description ------------------------------------------------------------------------------------


def test_split_is_stratified_disjoint_and_repeatable() -> None:
    labels = np.random.default_rng(3).choice(5, 1009, p=[0.4, 0.3, 0.2, 0.07, 0.03])
    sizes = {"train": 701, "validation": 101, "test": 207}
    parts = stratified_split(labels, sizes, seed=11)
    assert {name: len(rows) for name, rows in parts.items()} == sizes
    assert sorted(np.concatenate(list(parts.values()))) == list(range(1009))
    for rows in parts.values():
        expected = np.bincount(labels) * len(rows) / 1009
        assert np.abs(np.bincount(labels[rows]) - expected).max() <= 2
    again, other = stratified_split(labels, sizes, seed=11), stratified_split(labels, sizes, seed=12)
    assert np.array_equal(parts["test"], again["test"]) and not np.array_equal(parts["test"], other["test"])


def test_seed_moves_the_order_and_split_seed_the_split() -> None:
    first, seeded, resplit = (
        ImageDataModule(name="digits", seed=seed, split_seed=split_seed, augment=False)
        for seed, split_seed in ((0, 0), (1, 0), (0, 1))
    )
    for data in (first, seeded, resplit):
        data.load()
    assert torch.equal(first.splits["test"][0], seeded.splits["test"][0])
    assert not torch.equal(first.splits["test"][0], resplit.splits["test"][0])
    assert not torch.equal(next(first.training_batches(0))[1], next(seeded.training_batches(0))[1])


def test_digits_are_the_scans(digits: ImageDataModule) -> None:
    images, labels = digits.splits["train"]
    assert images.shape == (1297, 1, 28, 28) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert (int(images.min()), int(images.max())) == (0, 255)
    assert digits.description.sizes == {"train": 1297, "validation": 200, "test": 300}


def test_normalised_training_pixels_have_mean_zero_and_deviation_one(digits: ImageDataModule) -> None:
    pixels = normalise(digits.splits["train"][0], digits.description)
    assert pixels.dtype == torch.float32
    assert float(pixels.double().mean()) == pytest.approx(0, abs=1e-5)
    assert float(pixels.double().std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_description_survives_a_checkpoint(description: DatasetDescription) -> None:
    file = io.BytesIO()
    torch.save(description.to_dict(), file)
    file.seek(0)
    assert DatasetDescription.from_dict(torch.load(file, weights_only=True)) == description


@pytest.mark.parametrize(
    "change",
    [
        {"name": "cats"},
        {"name": ["mnist"]},
        {"image_size": 0},
        {"image_size": True},
        {"channels": 1.0},
        {"class_names": "0123456789"},
        {"class_names": []},
        {"class_names": [0, 1]},
        {"mean": math.nan},
        {"mean": "0.1"},
        {"std": 0.0},
        {"std": math.inf},
        {"sizes": {"train": 1}},
        {"sizes": {"train": 1, "validation": -1, "test": 1}},
        {"another": 1},
    ],
)
def test_a_description_that_is_not_one_is_refused(description: DatasetDescription, change: dict) -> None:
    with pytest.raises(UserError, match=next(iter(change)) if change.keys() != {"another"} else "exactly"):
        DatasetDescription.from_dict({**description.to_dict(), **change})


def test_a_description_with_a_field_missing_is_refused(description: DatasetDescription) -> None:
    values = description.to_dict()
    del values["std"]
    with pytest.raises(UserError, match="exactly"):
        DatasetDescription.from_dict(values)


# --- arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "cifar"),
        ("data_dir", 3),
        ("fallback", "cifar"),
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("eval_batch_size", -1),
        ("split_seed", -1),
        ("seed", 0.5),
        ("augment", "yes"),
        ("rotation", math.nan),
        ("rotation", -1),
        ("translation", math.inf),
        ("scaling", 1.0),
        ("shear", "much"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^data\.{field}="):
        ImageDataModule(**{field: value})  # type: ignore[arg-type]


def test_a_batch_larger_than_the_training_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.batch_size=1298.*1297"):
        ImageDataModule(name="digits", batch_size=1298).load()


# --- batches ---------------------------------------------------------------------------------------------------


def test_training_batches_cover_the_split_once_in_a_new_order_each_epoch() -> None:
    data = ImageDataModule(name="digits", batch_size=211, augment=False)
    data.load()
    epochs = [list(data.training_batches(epoch * 6)) for epoch in (0, 1)]
    assert [len(epoch) for epoch in epochs] == [6, 6]  # 1297 = 6 * 211 + 31
    known = {pixels.numpy().tobytes() for pixels in normalise(data.splits["train"][0], data.description)}
    for epoch in epochs:
        images = torch.cat([images for images, _ in epoch])
        seen = {pixels.numpy().tobytes() for pixels in images}
        assert images.shape == (1266, 1, 28, 28) and len(seen) == 1266 and seen <= known
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])


def test_training_batches_begin_anywhere(digits: ImageDataModule) -> None:
    whole = list(digits.training_batches(6))
    rest = list(digits.training_batches(8))
    assert len(rest) == 4
    for (images, labels), (images_again, labels_again) in zip(whole[2:], rest, strict=True):
        assert torch.equal(images, images_again) and torch.equal(labels, labels_again)


def test_evaluation_keeps_every_image_in_order() -> None:
    data = ImageDataModule(name="digits", eval_batch_size=97)
    data.load()
    loader = data.test_dataloader()
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [97, 97, 97, 9] and len(loader) == 4
    images, labels = data.splits["test"]
    assert torch.equal(torch.cat([labels for _, labels in batches]), labels)
    assert torch.equal(torch.cat([pixels for pixels, _ in batches]), normalise(images, data.description))


def test_augmentation_fades_out_at_the_end_of_training() -> None:
    data = ImageDataModule(name="digits", batch_size=211, fade=0.25)
    data.load()
    assert data.strength(10**6) == 1.0  # without a trainer, nobody knows where the end is
    limits = {"world_size": 1, "global_rank": 0, "limit_train_batches": 1.0, "accumulate_grad_batches": 2}
    data.trainer = SimpleNamespace(max_epochs=4, max_steps=-1, **limits)  # type: ignore[assignment]
    assert [data.strength(done) for done in (0, 18, 21, 24, 30)] == [1.0, 1.0, 0.5, 0.0, 0.0]  # of 4 x 6 batches
    data.trainer = SimpleNamespace(max_epochs=4, max_steps=4, **limits)  # type: ignore[assignment]
    assert [data.strength(done) for done in (6, 7, 8)] == [1.0, 0.5, 0.0]
    data.trainer = SimpleNamespace(max_epochs=-1, max_steps=-1, **limits)  # type: ignore[assignment]
    assert data.strength(10**6) == 1.0


def test_processes_share_the_images_without_overlap() -> None:
    shares = []
    for rank in (0, 1):
        data = ImageDataModule(name="digits", batch_size=211, eval_batch_size=97, augment=False)
        data.load()
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank, limit_train_batches=1.0)  # type: ignore[assignment]
        training, evaluation = list(data.training_batches(3)), list(data.test_dataloader())
        assert len(training) == 3 and len(evaluation) == len(data.test_dataloader())  # 1297 = 3 * 2 * 211 + 31
        shares.append((training, torch.cat([labels for _, labels in evaluation])))
    seen = {pixels.numpy().tobytes() for training, _ in shares for images, _ in training for pixels in images}
    assert len(seen) == 1266
    labels = data.splits["test"][1]
    assert torch.equal(shares[0][1], labels[0::2]) and torch.equal(shares[1][1], labels[1::2])


class Recorder(LightningModule):
    """The least that trains; keeps a fingerprint of every training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(784, 10)
        self.seen: list[tuple[int, float]] = []
        self.validations: list[int] = []
        self.interrupt_at: int | None = None

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        if self.interrupt_at == len(self.seen):
            raise KeyboardInterrupt
        self.seen.append((batch_idx, float(images.double().sum())))
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        self.validations.append(self.trainer.current_epoch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SaveAlways(Callback):
    """Saves wherever Lightning's own callback may: after each batch, validation and epoch, and on an exception."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, module: Recorder, *_: object) -> None:  # type: ignore[override]
        trainer.save_checkpoint(self.folder / f"batch{len(module.seen)}.ckpt")

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"validation{trainer.current_epoch + 1}.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"epoch{trainer.current_epoch + 1}.ckpt")

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        trainer.save_checkpoint(self.folder / "exception.ckpt")


def fit(
    save_to: Path | None = None, resume: Path | None = None, interrupt_at: int | None = None, limit: int | None = None
) -> Recorder:
    """Three epochs of six batches, or of `limit`."""
    torch.manual_seed(0)
    module, data = Recorder(), ImageDataModule(name="digits", batch_size=211)
    module.interrupt_at = interrupt_at
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_train_batches=limit,
        callbacks=[] if save_to is None else [SaveAlways(save_to)],
    )
    try:
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        assert interrupt_at is not None
    return module


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorder, Path]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return fit(save_to=folder), folder


@pytest.mark.filterwarnings("error:.*not resumable")
@pytest.mark.parametrize(
    ("name", "done"), [("batch1", 1), ("batch6", 6), ("batch9", 9), ("validation1", 6), ("epoch2", 12)]
)
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(
    uninterrupted: tuple[Recorder, Path], name: str, done: int
) -> None:
    whole, folder = uninterrupted
    assert [number for number, _ in whole.seen] == 3 * list(range(6))
    path = folder / f"{name}.ckpt"
    assert torch.load(path, weights_only=True)["ImageDataModule"]["batches_done"] == done
    resumed = fit(resume=path)
    assert resumed.seen == whole.seen[done:]
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    assert resumed.validations[-1] == 2


def test_a_batch_that_was_interrupted_is_repeated(tmp_path: Path, uninterrupted: tuple[Recorder, Path]) -> None:
    fit(save_to=tmp_path, interrupt_at=8)
    assert fit(resume=tmp_path / "exception.ckpt").seen == uninterrupted[0].seen[8:]


def test_limited_epochs_begin_each_order_anew_and_resume(tmp_path: Path, uninterrupted: tuple[Recorder, Path]) -> None:
    limited = fit(save_to=tmp_path, limit=4)
    beginnings = [seen for seen in uninterrupted[0].seen if seen[0] < 4]
    assert limited.seen[:8] == beginnings[:8]  # in the third epoch, the augmentation fades out in both at its own pace
    assert len(limited.seen) == 12
    assert fit(resume=tmp_path / "batch6.ckpt", limit=4).seen == limited.seen[6:]


def test_a_resume_with_other_data_is_refused() -> None:
    saved = ImageDataModule(name="digits", split_seed=3)
    saved.load()
    other = ImageDataModule(name="digits", split_seed=4)
    other.load()
    with pytest.raises(UserError, match=r"data\.split_seed=4: the run to resume has 3"):
        other.load_state_dict(saved.state_dict())
    saved.load_state_dict(saved.state_dict())


# --- pictures --------------------------------------------------------------------------------------------------


def test_a_test_image_comes_back_as_it_was(tmp_path: Path, digits: ImageDataModule) -> None:
    image = digits.splits["test"][0][0]
    Image.fromarray(image[0].numpy()).save(tmp_path / "digit.png")
    assert torch.equal(read_image(tmp_path / "digit.png", digits.description), image)


def ink(mode: str) -> Image.Image:
    """Dark ink on light paper, 56 x 56, a vertical stroke right of the middle."""
    grey = np.full((56, 56), 255, np.uint8)
    grey[10:46, 32:40] = 0
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257)
    if mode == "RGBA":  # black ink, and paper that is see-through black
        pixels = np.zeros((56, 56, 4), np.uint8)
        pixels[..., 3] = 255 - grey
        return Image.fromarray(pixels)
    return Image.fromarray(grey).convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA", "I;16", "I", "F", "CMYK"])
def test_every_kind_of_picture_becomes_light_ink_on_dark(
    tmp_path: Path, description: DatasetDescription, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / ("ink.tif" if mode in ("I", "F", "CMYK") else "ink.png")
    ink(mode).save(path)
    with caplog.at_level("INFO"):
        image = read_image(path, description)
    expected = torch.zeros(1, 28, 28, dtype=torch.uint8)
    expected[0, 5:23, 16:20] = 255
    assert image.dtype == torch.uint8 and torch.equal(image, expected)
    assert "inverted" in caplog.text


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 997), (997, 1), (53, 17), (5, 7), (601, 401)])
def test_any_size_fits_centred(tmp_path: Path, description: DatasetDescription, width: int, height: int) -> None:
    grey = np.zeros((height, width), np.uint8)
    grey[height // 3 : height - height // 3, width // 3 : width - width // 3] = 200
    Image.fromarray(grey).save(tmp_path / "any.png")
    image = read_image(tmp_path / "any.png", description)[0]
    assert image.shape == (28, 28)
    if min(width, height) > 1:
        ys, xs = torch.nonzero(image > 100, as_tuple=True)
        assert abs(ys.float().mean() - 13.5) <= 0.6 and abs(xs.float().mean() - 13.5) <= 0.6
        shown, real = (xs.max() - xs.min() + 1) / (ys.max() - ys.min() + 1), width / height
        assert 0.6 < shown / real < 1.6


def test_orientation_of_a_photo_is_followed(tmp_path: Path, description: DatasetDescription) -> None:
    grey = np.zeros((28, 28), np.uint8)
    grey[3, 8] = 250
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    Image.fromarray(grey).save(tmp_path / "turned.png", exif=exif)
    image = read_image(tmp_path / "turned.png", description)[0]
    assert image[8, 24] == 250 and int(image.sum()) == 250


def test_a_picture_with_pixels_that_are_no_numbers_is_refused(tmp_path: Path, description: DatasetDescription) -> None:
    for number, value in enumerate((math.nan, math.inf)):
        pixels = np.zeros((31, 29), np.float32)
        pixels[3, 5] = value
        Image.fromarray(pixels).save(tmp_path / f"{number}.tif")
        with pytest.raises(UserError, match=rf"{number}\.tif.*NaN or infinite"):
            read_image(tmp_path / f"{number}.tif", description)


def test_what_is_not_a_picture_is_refused(tmp_path: Path, description: DatasetDescription) -> None:
    (tmp_path / "text.png").write_text("no picture")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (97, 97), np.uint8))
    noise.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:997])
    messages = {
        "none.png": "no such file",
        ".": "folder",
        "text.png": "not a readable image",
        "cut.png": "cannot be read",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            read_image(tmp_path / name, description)
