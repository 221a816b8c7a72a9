#!/usr/bin/env bash
# Sets up what is missing, then reproduces, tests, benchmarks or opens the notebooks: ./reproduce.sh --help
# This file only finds a Python; dinv/reproduce/cli.py knows the words, environment.py beside it the environment.
[ -n "${BASH_VERSION:-}" ] || { # the rest is no POSIX shell's
    echo "reproduce.sh: error: run it with bash: ./reproduce.sh or bash reproduce.sh" >&2
    exit 2
}
set -euo pipefail

self=${BASH_SOURCE[0]}
while [ -L "$self" ]; do # macOS's readlink has no -f
    link=$(readlink "$self")
    case $link in
        /*) self=$link ;;
        *) self=$(dirname "$self")/$link ;;
    esac
done
root=$(CDPATH='' cd -P "$(dirname "$self")" && pwd)

# The lock has wheels for these versions; venv needs ensurepip, which Debian packs apart.
fits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'
whole='import ensurepip, venv'

if [ -n "${DINV_PYTHON:-}" ]; then
    candidates=("$DINV_PYTHON")
else
    candidates=(${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} ${CONDA_PREFIX:+"$CONDA_PREFIX/bin/python"}
        python3 python python3.12 python3.13 python3.11 python3.14)
fi
half=
for candidate in "${candidates[@]}"; do
    python=$(command -v "$candidate") && "$python" -c "$fits" >/dev/null 2>&1 || continue
    if [ -n "${DINV_PYTHON:-}" ] || "$python" -c "$whole" >/dev/null 2>&1; then
        case $python in
            /*) ;;
            *) python=$PWD/$python ;;
        esac
        cd "$root"
        exec "$python" dinv/reproduce/environment.py "$@"
    fi
    half=$python
done

if [ -n "$half" ]; then
    echo "reproduce.sh: error: $half has no venv module. Install it (Debian, Ubuntu: apt install python3-venv)" >&2
else
    echo "reproduce.sh: error: no Python 3.11 to 3.14 among: ${candidates[*]}. Install one, or activate an environment that has it" >&2
fi
exit 1
