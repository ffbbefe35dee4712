#!/bin/sh
# Records every fixture in tests/fixtures that comes from PyTorch, diffusers and transformers.
# Run it after the bundled checkpoint has changed; the Rust tests never run Python.
#
#   tests/reference/record.sh            with its own virtual environment, made on the first run
#   PYTHON=python3 tests/reference/record.sh    with an interpreter that has requirements.txt installed
set -eu
cd "$(dirname "$0")"
if [ -z "${PYTHON:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        python3 -m venv .venv
        .venv/bin/python -m pip install --quiet -r requirements.txt
    fi
    PYTHON=.venv/bin/python
fi
for script in record_parity.py record_tokenizer.py record_crf.py; do
    if [ -f "$script" ]; then
        echo "== $script"
        "$PYTHON" "$script"
    fi
done
