"""`python -m attention_visualizer`: the same as `attention-visualizer`."""

from attention_visualizer.commands.main import main

if __name__ == "__main__":
    main()
