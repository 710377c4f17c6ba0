"""The documentation site: the Markdown pages of this folder. ``make docs`` builds it into out/docs."""

from pathlib import Path

version_file = Path(__file__).resolve().parent.parent / "tensorcast" / "version.py"

project = "tensorcast"
author = "tensorcast authors"
copyright = "tensorcast authors, Apache-2.0"
release = version_file.read_text(encoding="utf-8").split('"')[-2]
extensions = ["myst_parser"]
myst_heading_anchors = 3  # [a link](page.md#a-heading) is checked, too
html_theme = "furo"
html_title = f"tensorcast {release}"
html_copy_source = False
