#!/bin/sh
# Build .venv with the interpreter $1 from requirements.txt. An interrupted build has no stamp and starts afresh;
# of two builds at once, the second waits and finds it done. With uv if it is on the PATH; otherwise the pinned uv
# comes into the new environment first, and does in a fraction of pip's time what pip would do.
set -eu
python=$1
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed, $python is not: make PYTHON=/path/to/python3.11" >&2
    exit 2
}
mkdir -p .build
exec 9> .build/environment.lock
"$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' # held until this script ends
if [ "$(cat .venv/.complete 2> /dev/null)" = "$python" ] && [ .venv/.complete -nt requirements.txt ]; then
    exit 0
fi
echo "building .venv from requirements.txt"
trap '[ -e .venv/.complete ] || echo "the environment is incomplete (see above); make env starts again" >&2' EXIT
rm -rf .venv
if command -v uv > /dev/null; then
    uv venv --quiet --python "$python" .venv
    uv=uv
else
    "$python" -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check "$(grep '^uv==' requirements.txt)"
    uv=.venv/bin/uv
fi
# Compiled once here, not in every kernel and worker where the system forbids writing bytecode.
"$uv" pip install --compile-bytecode --python .venv/bin/python -r requirements.txt -e .
echo "$python" > .venv/.complete
