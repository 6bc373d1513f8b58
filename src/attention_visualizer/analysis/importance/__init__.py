"""What the prediction needs: heads and layers ablated.

Hands out the chapter.

    chapter.py  figures, tables and text
"""
