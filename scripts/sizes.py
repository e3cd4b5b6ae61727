"""Print how large each part is: `make sizes`."""

import ast
import json
import re
import subprocess
from pathlib import Path

from scripts.dependencies import code

CORE = ("data", "training", "runs", "probing", "averaging", "theory")


def lines(folder: Path) -> int:
    """Lines of Python in a folder, or a file, docstrings and blanks included."""
    files = folder.rglob("*.py") if folder.is_dir() else [folder]
    return sum(len(file.read_text().splitlines()) for file in files)


def modules(notebook: Path) -> set[str]:
    """The modules of paper_lib that a notebook imports by name."""
    cells = json.loads(notebook.read_text())["cells"]
    found = set()
    for node in ast.walk(ast.parse("\n".join(map(code, cells)))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("paper_lib"):
            for alias in node.names:
                place = Path(*f"{node.module}.{alias.name}".split("."))
                is_module = place.is_dir() or place.with_suffix(".py").exists()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("paper_lib")}
    return found


def main() -> None:
    """Print the table, asked values beside those found."""
    library = Path("paper_lib")
    parts = sorted(
        p for p in library.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    )
    for part in parts:
        print(f"{lines(part):8,}  {part}")
    fan_out = {path.stem: modules(path) for path in sorted(Path("notebooks").glob("*.ipynb"))}
    widest = max(fan_out, key=lambda name: len(fan_out[name]), default="none")
    listed = subprocess.run(["git", "ls-files", "results"], capture_output=True, text=True)
    committed = sum(Path(file).stat().st_size for file in listed.stdout.splitlines())
    words = len(re.findall(r"\S+", Path("README.md").read_text()))
    print()
    for found, asked, what in (
        (f"{lines(library):,}", "7,000", "lines of paper_lib"),
        (f"{sum(lines(library / name) for name in CORE):,}", "3,600", f"of them {', '.join(CORE)}"),
        (len(parts), "16", "parts of paper_lib at the top level"),
        (f"{lines(Path('tests')):,}", "6,500", "lines of tests"),
        (
            f"{lines(Path('benchmarks')) + lines(Path('scripts')):,}",
            "",
            "of benchmarks and scripts",
        ),
        (f"{words:,}", "", "words of README.md"),
        (f"{committed / 1e6:.1f}", "25", "MB of committed results"),
        (len(fan_out.get(widest, ())), "6", f"modules named by a notebook, {widest} the most"),
    ):
        print(f"{found:>8}  {f'(at most {asked})' if asked else '':<17} {what}")


if __name__ == "__main__":
    main()
