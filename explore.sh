#!/usr/bin/env bash
# Sets up once, then serves the detection app to this machine alone, to whoever has the address that is printed.
# The kernel of a page that was closed ends after EXPLORE_IDLE seconds, 60 unless it is set; arguments go to Voilà
# (--port=8866 …).
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup.sh"
set_up requirements.txt
export JUPYTER_PREFER_ENV_PATH=1
idle=${EXPLORE_IDLE:-60}
PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} JUPYTER_PATH=$here/lib/templates${JUPYTER_PATH:+:$JUPYTER_PATH} \
    exec "$python" -P -m voila "$here/notebooks/explore.ipynb" --template=explore \
    --no-browser --Voila.ip=127.0.0.1 --Voila.auto_token=True \
    --MappingKernelManager.cull_idle_timeout="$idle" --MappingKernelManager.cull_interval="$((idle / 4 + 1))" "$@"
