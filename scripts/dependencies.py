"""Write for make what each notebook's result depends on: itself, the pins, all it imports.

Run in the repository's root, as the Makefile does, by any Python: `python scripts/dependencies.py`.
"""

import ast
import functools
import json
import re
import sys
from pathlib import Path

PACKAGE = Path("paper_lib")


def sources(folder: Path) -> list[Path]:
    """Return the notebooks in reading order; copies under other names, "05_a (copy)", are none."""
    files = sorted(folder.glob("*.ipynb"))
    return [file for file in files if re.fullmatch(r"[0-9]{2}_[A-Za-z0-9_-]*", file.stem)]


def code(cell: dict) -> str:
    """Return a code cell as plain Python, without IPython's magics; "" for any other cell."""
    if cell["cell_type"] != "code":
        return ""
    lines = "".join(cell["source"]).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


@functools.cache
def imported(source: str, home: Path) -> frozenset[Path]:
    """Return the files of paper_lib that a piece of Python, from the file `home`, imports itself.

    Packages on the way count. What calls import_module depends on its whole folder.
    """
    names = set()
    for node in ast.walk(ast.parse(source, str(home))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    parts = [name.split(".") for name in names if name.split(".")[0] == PACKAGE.name]
    places = {Path(*words[:n]) for words in parts for n in range(1, len(words) + 1)}
    files = {file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")}
    modules = (file for file in home.parent.glob("*.py") if file.stem.isidentifier())
    by_name = modules if "import_module" in source else []
    return frozenset({*by_name, *(file for file in files if file.exists())})


def prerequisites(notebook: Path) -> list[Path]:
    """Return what a notebook's result depends on, imports followed to their end."""
    cells = json.loads(notebook.read_text())["cells"]
    pending = set(imported("\n".join(map(code, cells)), notebook))
    found: set[Path] = set()
    while pending:
        module = pending.pop()
        found.add(module)
        pending |= imported(module.read_text(), module) - found - {PACKAGE / "__main__.py"}
    return sorted(found | {notebook, Path("requirements.txt")})


def main() -> None:
    """Print a rule for each notebook, whose target is its stamp."""
    for notebook in sources(Path("notebooks")):
        try:
            needed = " ".join(map(str, prerequisites(notebook)))
        except (OSError, ValueError, SyntaxError, KeyError, TypeError) as error:
            sys.exit(f"error: {notebook}, or what it imports, cannot be read: {error}")
        print(f"$(STAMPS)/{notebook.stem}: {needed}")


if __name__ == "__main__":
    main()
