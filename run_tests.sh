#!/usr/bin/env bash
# Sets up once, then checks style and stored notebooks and runs the tests; arguments go to pytest.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup.sh"
set_up requirements-dev.txt
set -e
shopt -s nullglob
cd "$here"
"$python" -m ruff check
"$python" -m nbstripout --verify notebooks/*.ipynb tests/notebooks/*.ipynb ||
    refuse "These notebooks are stored with outputs." "Strip them: .venv/bin/nbstripout notebooks/*.ipynb tests/notebooks/*.ipynb"
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
