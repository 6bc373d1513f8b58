"""Analyse the attention of a trained Vision Transformer. `python analyze.py --help` shows what can be set."""

from pathlib import Path

from attention_visualizer.commands.main import run

if __name__ == "__main__":
    run("analyze", Path(__file__).resolve().parent / "conf")
