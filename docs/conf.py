"""The documentation as a site: `sphinx-build -W docs site`. Needs no network."""

project = "attention-visualizer"
html_title = "attention-visualizer"
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "alabaster"
html_theme_options = {
    "page_width": "72rem",
    "sidebar_width": "15rem",
    "description": "What a Vision Transformer attends to",
}
html_sidebars = {"**": ["about.html", "navigation.html", "searchbox.html"]}
exclude_patterns = ["pictures"]
highlight_language = "none"
