"""Whether a long run stays as it began: memory, seconds an epoch, number and size of its files.

    python benchmarks/long_run.py
    python benchmarks/long_run.py --epochs 400 --markdown
    python benchmarks/long_run.py --quick

`train.py` with its default loggers on scikit-learn's digits: a model of two layers and 24 channels, two batches an
epoch, a validation with attention statistics, overlays, head grids and history after each. The process writes down its
memory (what is resident, in Linux's words VmRSS) and looks at its run folder after each validation; the table has it at
a quarter, a half and the end. Seconds an epoch are the mean since the row before. The last column is what the history
alone took to be written, once an epoch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from tables import machine, table, versions

PROJECT = Path(__file__).resolve().parent.parent
SMALL = (
    *("data=digits", "data.batch_size=103", "model.embed_dim=24", "model.num_heads=3", "model.num_layers=2"),
    *("model.mlp_dim=29", "trainer.limit_train_batches=2", "trainer.enable_progress_bar=false", "test=false"),
)
# Trains as train.py does, and keeps a record at the end of each validation.
WATCHED = """
import json, os, runpy, sys, time
from pathlib import Path
from lightning import LightningModule
from attention_visualizer.runs.history import AttentionHistory
record, sys.argv = open(sys.argv[1], "w"), sys.argv[2:]
seconds = [0.0]
def save(self, path, save=AttentionHistory.save):
    began = time.perf_counter()
    save(self, path)
    seconds[0] = time.perf_counter() - began
def note(module):
    folder = Path(module.trainer.default_root_dir)
    files = {str(path): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    row = dict(epoch=module.current_epoch + 1, moment=time.perf_counter(), resident=resident, files=len(files),
        events=sum(size for name, size in files.items() if "tfevents" in name),
        history=sum(size for name, size in files.items() if name.endswith("history.npz")), history_seconds=seconds[0])
    print(json.dumps(row), file=record, flush=True)
AttentionHistory.save = save
LightningModule.on_validation_end = note
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="12 epochs")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("overrides", nargs="*", help="of train.py, after --")
    options = parser.parse_args()
    epochs = 12 if options.quick else options.epochs
    rows = measure(epochs, options.overrides)
    shown = [rows[epochs * quarter // 4 - 1] for quarter in (1, 2, 4)]
    header = ("epoch", "memory MB", "seconds an epoch", "files", "events kB", "history kB", "history ms")
    print(
        table(
            header,
            [line(row, earlier) for row, earlier in zip(shown, [rows[0], *shown], strict=False)],
            options.markdown,
        )
    )
    print(f"\nbytes of events an epoch: {events_an_epoch(rows):,.0f}")
    print(f"memory from epoch {shown[0]['epoch']} to {shown[-1]['epoch']}: {growth(shown) / 1e6:+.1f} MB")
    print(f"{machine()}, {versions('torch', 'lightning', 'tensorboard')}")
    return 0


def measure(epochs: int, overrides: list[str]) -> list[dict[str, Any]]:
    """What the process wrote down after each validation."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        command = [sys.executable, "-c", WATCHED, str(record), str(PROJECT / "train.py"), *SMALL]
        subprocess.run(
            [*command, f"trainer.max_epochs={epochs}", *overrides], cwd=folder, check=True, stdout=sys.stderr
        )
        return [json.loads(text) for text in record.read_text().splitlines()]


def line(row: dict[str, Any], earlier: dict[str, Any]) -> tuple[str, ...]:
    seconds = (row["moment"] - earlier["moment"]) / max(1, row["epoch"] - earlier["epoch"])
    return (
        str(row["epoch"]),
        f"{row['resident'] / 1e6:.1f}",
        f"{seconds:.3f}",
        str(row["files"]),
        f"{row['events'] / 1e3:,.0f}",
        f"{row['history'] / 1e3:,.0f}",
        f"{row['history_seconds'] * 1e3:.1f}",
    )


def events_an_epoch(rows: list[dict[str, Any]]) -> float:
    """Over the second half, where what is written once is behind."""
    middle, end = rows[len(rows) // 2 - 1], rows[-1]
    return (end["events"] - middle["events"]) / (end["epoch"] - middle["epoch"])


def growth(rows: list[dict[str, Any]]) -> int:
    """Of the memory from the first of the rows to the last, in bytes."""
    return rows[-1]["resident"] - rows[0]["resident"]


if __name__ == "__main__":
    raise SystemExit(main())
