"""The explorer: attention to look at by hand, as one HTML file that holds its data.

Hands out Contents, what a page shows, and `render`, which makes the page. Computes no attention. May use figures and
below.

    contents.py    what a page shows, and how it is packed
    page.py        the page: template, scripts and style in one file
    address.js     a view as an address, and back
    attention.js   its attention: decoded, which tokens it is of, measured
    drawing.js     maps over images, the comparison, the chart over training
    explorer.css   how it looks
    explorer.html  its frame
    explorer.js    what it does: follows the hand, and has all drawn
    live.js        the toolbar above the page in a notebook with a kernel
    saved.js       what is taken along: pictures and numbers
    start.js       unpacks the data, and shows the page
    words.js       what it says of tokens, maps and the view
"""
