"""The report: from chapters to Markdown, one HTML page, CSV and JSON.

Hands out Chapter and the functions that write reports; computes nothing. May use figures and below.

    chapter.py   what a chapter hands to the report
    html.py      the report as one HTML file
    markdown.py  the report as Markdown, CSV and JSON
"""
