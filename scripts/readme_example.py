"""Print the block of Python under a heading of a page: `readme_example.py PAGE.md HEADING`."""

import re
import sys
from pathlib import Path


def example(text: str, heading: str) -> str:
    """Return the one fenced block of Python under a heading; ValueError unless there is one."""
    section = re.split(r"^#+ (.+)$", text, flags=re.M)
    blocks = re.findall(
        r"^```python\n(.*?)^```", section[section.index(heading) + 1], flags=re.M | re.S
    )
    if len(blocks) != 1:
        raise ValueError(f"{len(blocks)} Python blocks under {heading!r}")
    return blocks[0]


if __name__ == "__main__":
    print(example(Path(sys.argv[1]).read_text(), sys.argv[2]))
