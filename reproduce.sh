#!/usr/bin/env bash
# ./reproduce.sh [WORD] [OPTIONS]: makes an environment equal to requirements.lock, then does one thing.
#   reproduce   (or no word) the notebooks in order: --profile NAME, --only 02,04, --seeds N, --set KEY=VALUE,
#               --imagenet DIR, --in-place; --list shows them, with their times and what is cached
#   test        ruff, pytest and the outputs of the notebooks; further words go to pytest: test -m slow
#   bench, lab  speed and memory; JupyterLab on notebooks/: lab -- --no-browser --port 8899
#   book        web pages in book/
#   student     the notebooks for a class, without outputs and solutions, in student/: student DIR
#   clean       remove runs/, book/, student/, figures/*/notebooks and the tools' caches
# DINV_PYTHON=/path/to/python is used as it is; else an active environment equal to the lock; else .venv.
[ -n "${BASH_VERSION:-}" ] || { echo "reproduce.sh: error: run it with bash: bash reproduce.sh" >&2; exit 2; }
set -euo pipefail
fail() { echo "reproduce.sh: error: $2" >&2; exit "$1"; }
root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")") words="reproduce test bench lab book student clean"
base='import sys, ensurepip, venv; assert (3, 11) <= sys.version_info[:2] <= (3, 14); print(sys._base_executable)'
for name in python3 python3.12 python3.13 python3.11 python3.14 python; do python=$("$name" -c "$base" 2>/dev/null) && break; done
case ${1:-reproduce} in
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$root/reproduce.sh" && exit ;;
    clean) [ $# = 1 ] || fail 2 "clean takes no option"; cd "$root" && rm -rf runs book student figures/*/notebooks .pytest_cache .ruff_cache && exit ;;
    reproduce | test | bench | lab | book | student | -*) ;;
    smoke | cpu | night | gpu | paper) fail 2 "unknown word '$1': did you mean --profile $1?" ;;
    *) near='import difflib, sys; print(*map(": did you mean {}?".format, difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1)))'
        near=$("$python" -c "$near" "$1" $words 2>/dev/null) || true; fail 2 "unknown word '$1'${near:-.} The words are ${words// /, }" ;;
esac
make_venv() ( # .venv/dinv-environment is empty from before the first file, and written when all is done
    cd "$root"; mark="$({ sha256sum || shasum -a 256; } <requirements.lock 2>/dev/null | cut -c -64) $root"
    ! command -v flock >/dev/null || flock -n 9 || { echo "reproduce.sh: waiting for another installation" && flock 9; } || true
    [ "$(cat .venv/dinv-environment 2>/dev/null)" = "$mark" ] && .venv/bin/python -c '' && exit
    [ ! -e .venv ] || [ -e .venv/dinv-environment ] || fail 1 "$root/.venv is not reproduce.sh's own: move it away"
    [ "$python" ] || fail 1 "no Python 3.11 to 3.14 with its venv module (Debian, Ubuntu: apt install python3-venv)"
    trap 'fail 1 "the reason stands above. Check the network and the free disk space, then call again"' ERR
    echo "reproduce.sh: making .venv equal to requirements.lock: minutes and 7 GB, the first time"
    mkdir -p .venv; : >.venv/dinv-environment; find .venv/ -mindepth 1 ! -name dinv-environment -delete
    "$python" -m venv .venv
    .venv/bin/python -m pip install -q --require-hashes --only-binary :all: -r <(sed -n '/^uv==/,/[^\\]$/p' requirements.lock)
    .venv/bin/uv pip sync --require-hashes --only-binary :all: --python .venv/bin/python requirements.lock ||
        { [ $? != 130 ] && .venv/bin/python -m pip install --require-hashes --only-binary :all: -r requirements.lock; }
    echo "$root" >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dinv.pth"
    echo "$mark" >.venv/dinv-environment
) 9<"$root/requirements.lock" # held by what a killed call left running, too
[ -w "${HOME:-/nowhere}" ] || { export HOME=${DINV_CACHE:-$root/runs}/.home; mkdir -p "$HOME"; } # for tools' caches
for folder in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do # an environment equal to the lock has uv
    answer=$("$folder/bin/uv" pip install --offline --dry-run --require-hashes -r "$root/requirements.lock" --python "$folder/bin/python" 2>&1) || continue
    [[ $answer != *"Would make no changes"* ]] || active=$folder/bin/python
done
[ "${chosen:=${DINV_PYTHON:-${active:-}}}" ] || { make_venv >&2; chosen=$root/.venv/bin/python; }
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$chosen" -P -m dinv.reproduce "$@"
