"""Analyse the attention of a trained Vision Transformer. `python analyze.py --help` shows what can be set."""

from pathlib import Path

from attention_visualizer.commands.quick_imports import silent_interrupt

if __name__ == "__main__":
    with silent_interrupt():
        from attention_visualizer.commands import analyze
    analyze.main(Path(__file__).resolve().parent / "conf")
