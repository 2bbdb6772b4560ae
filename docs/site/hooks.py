"""Adapt pages to the site: options of code blocks that only the tests read, links out of docs/, and notebooks."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = "https://github.com/distclip/distclip/blob/main/"
FENCE = re.compile(r"^```(\w+) (?:ranks=\d+|file=(\S+))$", flags=re.MULTILINE)
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the Markdown of a page before it is converted."""
    folder = posixpath.dirname(page.file.src_uri)

    def title(match: re.Match[str]) -> str:
        return f'```{match[1]} title="{match[2]}"' if match[2] else f"```{match[1]}"

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, match[1]))
        return match[0] if target.startswith("docs/") else f"]({REPOSITORY}{target}{match[2] or ''})"

    return LINK.sub(link, FENCE.sub(title, markdown))


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each notebook."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        text = notebook_to_markdown(json.loads(Path(file.abs_src_path or "").read_text(encoding="utf-8")))
        link = f"\n\n[Download the notebook]({posixpath.basename(file.src_uri)}){{: download }}\n"
        files.append(File.generated(config, file.src_uri.replace(".ipynb", ".md"), content=text + link))
    return files


def notebook_to_markdown(notebook: dict[str, Any]) -> str:
    """Return the cells of a notebook and the outputs that it contains."""
    parts: list[str] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                parts.append(
                    f'<img alt="Output of the cell above" src="data:image/png;base64,{data["image/png"].strip()}">'
                )
            else:
                parts.append("```text\n" + "".join(data["text/plain"]).strip("\n") + "\n```")
    return "\n\n".join(parts)
