#!/bin/sh
# Everything that hangs on the bundled checkpoint, anew: the fixtures in tests/fixtures that come from PyTorch, diffusers
# and transformers, then the figures and pictures of the documents. Run it after the checkpoint has changed; the Rust
# tests never run Python.
#
#   tests/reference/record.sh [ARGUMENTS]       with its own virtual environment, made on the first run; the arguments
#                                               are those of record_figures.py
#   PYTHON=python3 tests/reference/record.sh    with an interpreter that has these installed
set -eu
cd "$(dirname "$0")"
if [ -z "${PYTHON:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        python3 -m venv .venv
        .venv/bin/python -m pip install --quiet -r requirements.txt
        # Its samplers alone are used: they need none of what the package asks for beyond the list.
        .venv/bin/python -m pip install --quiet --no-deps k-diffusion==0.1.1.post1
    fi
    PYTHON=.venv/bin/python
fi
for script in record_parity.py record_tokenizer.py record_crf.py; do
    echo "== $script"
    "$PYTHON" "$script"
done
"$PYTHON" record_figures.py "$@"
