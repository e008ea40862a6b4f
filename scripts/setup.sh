# Sourced by the other scripts, with a requirements file: creates .venv in the checkout and installs what is missing.
requirements=$1
python=${PYTHON:-}
for candidate in python3.12 python3.11 python3.13 python3; do
  [ -n "$python" ] && break
  if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
  fi
done
if [ -z "$python" ]; then
  echo "no Python 3.11 or newer was found: install one, or name it with PYTHON=/path/to/python" >&2
  exit 2
fi
stamp=.venv/.installed-$(basename "$requirements")
wanted=$(cat requirements*.txt)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  echo "installing $requirements into .venv"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
  echo "$wanted" > "$stamp"
fi
