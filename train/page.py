"""A report as one HTML file: Markdown rendered, its pictures inside, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #8884; text-align: left; white-space: nowrap }
td + td, th + th { text-align: right }
img { max-width: 100%; background: white }
pre { background: #8881; padding: .7rem; overflow-x: auto; white-space: pre-wrap }
"""


def page(markdown: str, folder: Path) -> str:
    """The HTML of a Markdown text; `![..](file.png)` beside it in `folder` becomes part of the page.

    Raw HTML in the text is shown, not run. Raises FileNotFoundError for a picture that is missing.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)

    def inline(found: re.Match[str]) -> str:
        content = base64.b64encode((folder / found[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{content}"'

    body = re.sub(r'src="([\w.-]+\.png)"', inline, body)
    heading = re.search(r"^# (.+)$", markdown, re.MULTILINE)
    title = html.escape(heading[1] if heading else "report")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )
