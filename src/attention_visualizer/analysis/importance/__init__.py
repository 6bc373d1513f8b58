"""What the prediction needs: heads and layers ablated.

Hands out the chapter.

    chapter.py  texts and tables
    figure.py   the figure
    measure.py  what changes without each head and layer
"""
