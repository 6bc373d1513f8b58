"""Train a Vision Transformer on MNIST and watch its attention. `python train.py --help` shows what can be set."""

from pathlib import Path

from attention_visualizer.commands.main import run

if __name__ == "__main__":
    run("train", Path(__file__).resolve().parent / "conf")
