# Sourced by demo.sh and test.sh: makes .venv with the pinned versions, once. Leaves `python` on the PATH.
#
# A stamp in .venv holds the checksum of everything that decides what is installed; while it matches, nothing is done.
# Set MEGATRON_GSPO_PYTHON to choose the interpreter the environment is made from (3.11 or newer).

setup_environment() {
  local interpreter=${MEGATRON_GSPO_PYTHON:-python3}
  local wanted
  wanted=$(cat setup.py constraints.txt tools/setup_environment.sh | sha256sum | cut -d' ' -f1)
  if [ "$(cat .venv/installed.sha256 2>/dev/null)" != "$wanted" ]; then
    if ! "$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "setup: needs Python 3.11 or newer; $interpreter is $("$interpreter" --version 2>&1). Set MEGATRON_GSPO_PYTHON." >&2
      return 2
    fi
    local started=$SECONDS
    echo "setup: making .venv and installing pinned versions (1 GB; a few minutes, most of it PyTorch)"
    "$interpreter" -m venv .venv
    # The exact pin first: a bare `torch` or a range may resolve to a build with gigabytes of CUDA libraries.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep -E '^torch==' constraints.txt)" -c constraints.txt
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
    echo "$wanted" > .venv/installed.sha256
    echo "setup: done in $((SECONDS - started)) s"
  fi
  export PATH="$PWD/.venv/bin:$PATH"
}
setup_environment
