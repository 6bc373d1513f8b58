"""Train a Vision Transformer on MNIST and watch its attention. `python train.py --help` shows what can be set."""

from pathlib import Path

from attention_visualizer.commands.quick_imports import quick_imports, silent_interrupt

if __name__ == "__main__":
    with silent_interrupt(), quick_imports():
        from attention_visualizer.commands import train
    train.main(Path(__file__).resolve().parent / "conf")
