"""The explorer: attention to look at by hand, as one HTML file that holds its data.

Hands out Contents, what a page shows, and `render`, which makes the page. Computes no attention. May use figures and
below.

    contents.py    what a page shows, and how it is packed
    page.py        the page: template, scripts and style in one file
    attention.js   its attention: decoded, measured, a view as an address
    drawing.js     maps over images, the comparison, the chart, the saved picture
    explorer.css   how it looks
    explorer.html  its frame
    explorer.js    what it does: follows the hand, and has all drawn
"""
