#!/usr/bin/env bash
# Sets up once, then runs the course; ./run_all.sh --help shows the options.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup.sh"
set_up requirements.txt
PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} exec "$python" -P -m lib.course "$@"
