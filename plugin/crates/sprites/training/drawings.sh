#!/bin/sh
# The drawings: WORK/drawings.pkl, from the packages of four emoji styles. Skipped where it is already there.
#
#   sh drawings.sh WORK [PYTHON]
#
# Needs node's npm, and a python with numpy, pillow and resvg_py.
set -eu
work=$(mkdir -p "$1" && cd "$1" && pwd)
python=${2:-python3}
here=$(cd "$(dirname "$0")" && pwd)
[ -f "$work/drawings.pkl" ] && exit

# name, version
while read -r name version; do
    [ -f "$work/icons/$name/icons.json" ] && continue
    mkdir -p "$work/icons/$name"
    (cd "$work/icons" && npm pack --silent "@iconify-json/$name@$version" > /dev/null)
    tar xzf "$work/icons/iconify-json-$name-$version.tgz" -C "$work/icons/$name" --strip-components=1 package/icons.json
done <<LIST
noto 1.2.9
twemoji 1.2.5
fluent-emoji 1.2.7
fluent-emoji-flat 1.2.6
LIST
"$python" "$here/drawings.py" --icons "$work/icons" --out "$work/drawings.pkl"
