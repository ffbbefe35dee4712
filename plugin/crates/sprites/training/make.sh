#!/bin/sh
# The whole recipe: drawings, scenes, hard evaluation scenes, tokenizer, autoencoder, U-Net and text encoder, evaluation.
#
#   sh make.sh WORK [released|tiny]
#
# Needs python 3.11 or later, a C++ compiler, node's npm, two cores and some 5 GB below WORK. The result is WORK/model
# and WORK/contact-sheet.png; the hard scenes are in WORK/hard. Every step is skipped where its result is already there.
set -eu
work=$(mkdir -p "$1" && cd "$1" && pwd)
settings=${2:-released}
here=$(cd "$(dirname "$0")" && pwd)
cd "$here"
export OMP_NUM_THREADS=1

if [ ! -f "$work/venv/complete" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install -r requirements.txt
    touch "$work/venv/complete"
fi
python="$work/venv/bin/python3"
PATH="$work/venv/bin:$PATH"

sh drawings.sh "$work" "$python"

for set in first larger familiar; do
    [ -d "$work/$set" ] && continue
    "$python" compose.py --settings "$settings" --set $set --drawings "$work/drawings.pkl" --out "$work/$set.new"
    mv "$work/$set.new" "$work/$set"
done

if [ ! -d "$work/hard" ]; then
    "$python" hard_scenes.py --drawings "$work/drawings.pkl" --out "$work/hard.new"
    mv "$work/hard.new" "$work/hard"
fi

base="$work/base"
[ -d "$base/tokenizer" ] || "$python" tokenizer.py --out "$base/tokenizer"
[ -d "$base/vae" ] || "$python" autoencoder.py train --settings "$settings" --data "$work/first" --out "$base/vae"
for set in first larger familiar; do
    "$python" autoencoder.py encode --data "$work/$set" --model "$base"
done

# name of the stage, its scenes; each starts from the one before
from="$base"
for stage in pictures:first words:first larger:larger polish:larger objects:larger familiar:familiar; do
    name=${stage%:*}
    out="$work/stage-$name"
    if [ ! -f "$out.done" ]; then
        "$python" denoiser.py --settings "$settings" --stage "$name" --data "$work/${stage#*:}" --base "$from" --out "$out"
        touch "$out.done"
    fi
    from="$out"
done
rm -rf "$work/model"
cp -r "$from" "$work/model"

"$python" evaluate.py --model "$work/model" --scenes "$here/../scenes" --sheet "$work/contact-sheet.png"
