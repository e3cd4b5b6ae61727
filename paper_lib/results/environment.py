"""The pinned environment: builds .venv from environment.yml, renews its pins, and says what a result was made with.

Runs as a script on any Python 3.11 or newer, before anything is installed: standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PINS = ROOT / "environment.yml"
TRANSITIVE = "      # What those need in turn; `make lock` writes everything below this line.\n"


def pins(text: str) -> list[str]:
    """Return the requirements under `pip:` in an environment.yml, in order."""
    return re.findall(r"^      - (\S.*?)\s*$", text, flags=re.MULTILINE)


def direct_pins() -> list[str]:
    """Return the pins that this project asks for itself, without the package itself."""
    return [pin for pin in pins(PINS.read_text().split(TRANSITIVE)[0]) if not pin.startswith("-")]


def build(venv: Path) -> None:
    """Make `venv` hold exactly environment.yml; do nothing if it does. An interrupted build starts afresh.

    Uses uv if it is on the PATH, and otherwise installs the pinned uv into the new environment first: it then does
    in a fraction of pip's time what pip would do.
    """
    key = hashlib.sha256(PINS.read_bytes() + sys.version.encode()).hexdigest()
    stamp = venv / ".complete"
    with _locked(ROOT / ".build" / "environment.lock"):
        if stamp.exists() and stamp.read_text() == key:
            return
        print(f"building {venv.name} from environment.yml", flush=True)
        shutil.rmtree(venv, ignore_errors=True)
        uv = shutil.which("uv")
        if uv:
            _run(uv, "venv", "--quiet", "--python", sys.executable, venv)
        else:
            uv = _bootstrap(venv)
        # Compiled once here, not in every kernel and worker where the system forbids writing bytecode.
        install = (uv, "pip", "install", "--compile-bytecode", "--python", venv / "bin" / "python", "-r", "-")
        _run(*install, text="\n".join(pins(PINS.read_text())))
        stamp.write_text(key)


def _bootstrap(venv: Path) -> Path:
    """Create `venv` with the standard library, and uv inside it with pip."""
    _run(sys.executable, "-m", "venv", venv)
    pinned = next(pin for pin in direct_pins() if pin.startswith("uv=="))
    _run(venv / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", pinned)
    return venv / "bin" / "uv"


def lock(uv: Path) -> None:
    """Resolve the direct pins again, for every platform and Python at once, and rewrite the transitive ones.

    Pins that still fit stay as they are.
    """
    text = PINS.read_text()
    head = text.split(TRANSITIVE)[0]
    direct = direct_pins()
    compiled = ROOT / ".build" / "pins.txt"
    compiled.parent.mkdir(exist_ok=True)
    compiled.write_text("\n".join(pin for pin in pins(text) if not pin.startswith("-")))  # uv keeps what it can
    options = ("--universal", "--python-version", "3.11", "--no-header", "--no-annotate", "--quiet")
    _run(uv, "pip", "compile", *options, "-o", compiled, "-", text="\n".join(direct))
    found = [line for line in compiled.read_text().splitlines() if line not in direct]
    PINS.write_text(head + TRANSITIVE + "".join(f"      - {line}\n" for line in found))


def describe() -> dict:
    """Return what a result was made with: commit, Python, packages, platform, processor, device."""
    import torch

    names = [re.split(r"[=<>; ]", pin)[0] for pin in direct_pins()]
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": {name: metadata.version(name) for name in names},
    }


def commit() -> str:
    """Return the commit of the source, with "+" where it was changed outside results/; "unknown" without git."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
        status = ["git", "status", "--porcelain", "--", ".", ":!results"]
        changed = subprocess.run(status, cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip()[:12] + ("+" if changed.stdout.strip() else "")


def _processor() -> str:
    """The processor's name, from the kernel where it says so."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), flags=re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that the system releases when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(*command: object, text: str | None = None) -> None:
    """Run a command in the repository; on failure exit with its status and a line saying what failed."""
    done = subprocess.run([str(word) for word in command], cwd=ROOT, input=text, text=True)
    if done.returncode:
        words = " ".join(str(word) for word in command[:4])
        sys.exit(f"the environment is incomplete: `{words} ...` failed (its message is above); `make env` starts again")


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036 -- run by whatever python3 there is
        sys.exit(
            f"Python 3.11 or newer is needed, this is {platform.python_version()}: make PYTHON=/path/to/python3.11"
        )
    action, where = sys.argv[1:]
    {"build": build, "lock": lock}[action](ROOT / where)
