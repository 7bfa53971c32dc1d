# Sourced by the scripts here and by .ci/run: finds or makes the Python environment, sets $python. Not run by itself.

# use_environment DEFAULT_FOLDER REQUIREMENT...
#   Installs the requirements, held to constraints.txt, into $FUYOU_VENV (default: DEFAULT_FOLDER), a venv made if
#   missing. Nothing is installed twice: a stamp in the venv says what it was installed from.
use_environment() {
    local folder="${FUYOU_VENV:-$1}" wanted
    shift
    wanted="$PWD $* $(cat pyproject.toml constraints.txt | cksum)"
    if [ ! -x "$folder/bin/python" ]; then
        echo "making the environment $folder" >&2
        "${PYTHON:-python3}" -m venv "$folder" || {
            echo "error: python3 cannot make a venv (on Debian and Ubuntu: apt install python3-venv)" >&2
            exit 1
        }
    fi
    python="$(cd "$folder/bin" && pwd)/python"
    if [ "$(cat "$folder/.fuyou-installed" 2>/dev/null)" != "$wanted" ]; then
        "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || {
            echo "error: $("$python" --version) in $folder: Python 3.10 to 3.13 is needed; set PYTHON=python3.12" >&2
            exit 1
        }
        echo "installing into $folder" >&2
        # First and alone: held to its version, torch comes as the small CPU build wherever the index offers that.
        pip_install torch
        pip_install "$@"
        printf '%s' "$wanted" >"$folder/.fuyou-installed"
    fi
}

pip_install() {
    "$python" -m pip install -qq --disable-pip-version-check -c constraints.txt "$@"
}

# use_active_environment: true, with $python set, if the active environment has this checkout's fuyou already.
use_active_environment() {
    [ -z "${FUYOU_VENV:-}" ] && [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || return 1
    python="$(command -v python)" || return 1
    # From /, so that only an installed package is found.
    (cd / && "$python" -c 'import sys, importlib.util as u
origin = getattr(u.find_spec("fuyou"), "origin", None) or ""
sys.exit(not origin.startswith(sys.argv[1] + "/") or not u.find_spec("pytest"))' "$OLDPWD")
}
