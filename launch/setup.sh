# Source this file with the name of an extra (train or dev). It installs the extra and sets PYTHON to the interpreter that
# has it. An active virtual environment is used as it is. Otherwise .venv at the root of the repository is used, which is
# created with $DISTCLIP_PYTHON or python3.
# shellcheck shell=bash
setup_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
setup_venv=${VIRTUAL_ENV:-$setup_root/.venv}
PYTHON=$setup_venv/bin/python
export PYTHON

# Nothing is installed if these files have not changed since the last call.
setup_key="$setup_root $(cat "$setup_root/pyproject.toml" "$setup_root"/distclip/norms/kernels/native* | cksum)"
setup_stamp=$setup_venv/.distclip-$1
if [ ! -x "$PYTHON" ] || [ "$(cat "$setup_stamp" 2>/dev/null)" != "$setup_key" ]; then
    setup_base=${DISTCLIP_PYTHON:-python3}
    [ -z "${VIRTUAL_ENV:-}" ] || setup_base=$PYTHON
    if ! "$setup_base" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "setup: $setup_base is not Python 3.10 or later. Set DISTCLIP_PYTHON to one" >&2
        exit 1
    fi
    echo "setup: installing distclip[$1] and its dependencies into $setup_venv (once, takes a few minutes)" >&2
    if [ "$setup_venv" != "$setup_root/.venv" ]; then
        echo "setup: that is your active environment. To use $setup_root/.venv instead, interrupt this and run deactivate" >&2
    fi
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$setup_base" -m venv "$setup_venv"
    setup_packages=(-e "${setup_root}[$1]")
    # A torch that is installed stays as it is. The newest one comes with gigabytes of CUDA libraries, which are of no use
    # without a GPU.
    if setup_torch=$("$PYTHON" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null); then
        setup_packages+=("torch==$setup_torch")
    elif ! nvidia-smi -L >/dev/null 2>&1; then
        setup_packages+=(torch==2.13.0)
    fi
    # One line for each package, so that slow downloads are not mistaken for a hang.
    PYTHONUNBUFFERED=1 "$PYTHON" -m pip install --disable-pip-version-check --progress-bar off "${setup_packages[@]}" |
        sed -u -n -e 's/^ *Downloading \([^ /]*\/\)*/setup: downloading /p' -e 's/^Collecting \([^ ]*\).*/setup: \1/p' \
            -e 's/^Installing collected packages.*/setup: installing the packages/p' >&2
    echo "$setup_key" >"$setup_stamp"
fi
