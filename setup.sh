# Read by run_all.sh and run_tests.sh. `set_up requirements.txt` finds or makes an environment with the packages of
# that file and leaves its interpreter in $python; what goes wrong ends in a sentence with its cure and status 2.

here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
venv=$here/.venv
log=$venv/setup.log

refuse() {
    printf '%s\n' "$@" >&2
    exit 2
}

# What an interpreter lacks of the pins of a requirements file; nothing where it has all.
lacking() {
    "$1" -I - "$here/requirements.txt" "$here/$2" <<'PYTHON' 2>/dev/null || echo "a working Python"
import os
import sys
from importlib.metadata import PackageNotFoundError, version

def has(name, pin):
    try:
        return version(name).partition("+")[0] == pin
    except PackageNotFoundError:
        return False

def pins_of(path):
    for line in map(str.strip, open(path)):
        if line.startswith("-r "):
            yield from pins_of(os.path.join(os.path.dirname(path), line[3:]))
        elif "==" in line:
            yield tuple(line.split("=="))

pins = sorted({pin for path in sys.argv[1:] for pin in pins_of(path)})
missing = ["Python 3.11"] if sys.version_info < (3, 11) else []
missing += [name + " " + pin for name, pin in pins if not has(name, pin)]
print(", ".join(missing[:3]) + (" and %d more" % len(missing[3:]) if missing[3:] else ""))
PYTHON
}

# The interpreter of the active virtual or conda environment, where that is not .venv.
active() {
    local prefix=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    [[ -n $prefix && ! $prefix -ef $venv ]] && echo "$prefix/bin/python"
}

# Whether .venv was filled from these very files, to the end, and still works.
is_ready() {
    cmp -s "$here/requirements.txt" "$venv/requirements.txt" && cmp -s "$here/$1" "$venv/$1" &&
        [[ -z $(lacking "$venv/bin/python" "$1") ]]
}

find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11; do
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$name" && return
    done
    refuse "Python 3.11 or newer is needed; here is $(python3 --version 2>/dev/null || echo none)." \
        "Install it, on Debian: sudo apt install python3 python3-pip"
}

# Debian keeps ensurepip in python3-venv; without that, the system's pip fills the environment.
make_environment() {
    local bare=()
    rm -rf "$venv" && mkdir "$venv" 2>/dev/null || refuse "$venv cannot be written." "Make the folder writable, or copy it."
    if ! "$base" -c 'import ensurepip' 2>/dev/null; then
        "$base" -m pip --version >>"$log" 2>&1 || refuse "$base has no pip." "Install it, on Debian: sudo apt install python3-pip"
        bare=(--without-pip)
    fi
    "$base" -m venv "${bare[@]}" "$venv" >>"$log" 2>&1 ||
        refuse "No environment could be made in $venv." "$log says why; on Debian, sudo apt install python3-venv may help."
}

# pip's words go to the log; a terminal shows which package it is at.
show() {
    local line
    while IFS= read -r line; do
        [[ -t 2 && $line =~ ^(Collecting|Downloading|Installing) ]] && printf '\r\033[K  %.70s' "$line" >&2
    done
    [[ ! -t 2 ]] || printf '\r\033[K' >&2
}

install() {
    local pip=("$venv/bin/python" -m pip)
    "${pip[@]}" --version >>"$log" 2>&1 || pip=("$base" -m pip --python "$venv/bin/python")
    PIP_USER=0 "${pip[@]}" install --no-input --disable-pip-version-check -r "$here/$1" 2>&1 | tee -a "$log" | show
    [[ ${PIPESTATUS[0]} == 0 ]] || refuse "The packages of $1 could not be installed." \
        "See the end of $log, mend the network or the disk, and start again."
}

# The copies of the requirements are the sign of a whole environment: gone while it is filled, back at the end.
build() {
    local base
    base=$(find_python) || exit 2
    echo "Setting up once, in .venv: some 2 GB, more with CUDA, and several minutes." >&2
    trap 'echo "Set-up was interrupted; start again and it mends itself." >&2; exit 130' INT TERM
    [[ -e $venv/requirements.txt && $(lacking "$venv/bin/python" "$1") != *Python* ]] || make_environment
    rm -f "$venv"/requirements*.txt
    install "$1"
    cp "$here/$1" "$here/requirements.txt" "$venv/" 2>/dev/null
    trap - INT TERM
}

set_up() {
    local other missing
    if other=$(active); then
        missing=$(lacking "$other" "$1")
        [[ -z $missing ]] && python=$other && return
        echo "The active environment lacks $missing; .venv is used." >&2
    fi
    python=$venv/bin/python
    is_ready "$1" && return
    [[ -w $here ]] || refuse "$here cannot be written." "Copy the repository to a folder of your own."
    exec 9<"$here/setup.sh"
    flock -n 9 || { echo "Another start is setting up; waiting for it." >&2 && flock 9; }
    is_ready "$1" || build "$1"
    exec 9<&-
}
