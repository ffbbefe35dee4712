#!/usr/bin/env bash
# Tries prove.py where there is no GPU: the same programs, built for the processor, in tiny sizes.
#
#   tests/gpu/try_proof.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
work="${CARGO_TARGET_DIR:-$PWD/target}/proof"
mkdir -p "$work"
# The selection of the tests' own build, so that nothing is compiled twice.
{
    cargo build --workspace --release --locked --lib --bins --examples --test parity --message-format=json-render-diagnostics
    cargo test --workspace --release --locked --lib --no-run --message-format=json-render-diagnostics
} | python3 "$here/collect.py" "$work/programs" --link
rm -rf "$work/out"
CONCEPTLOOM_DEVICE=cpu python3 "$here/prove.py" "$work/programs" --out "$work/out" --tiny --minutes 20
python3 - "$work/out/proof.json" << 'PYTHON'
import json, sys

proof = json.load(open(sys.argv[1]))
assert proof["device"]["device"] == "cpu", proof["device"]
parity = proof["parity"]["cpu"]
assert parity["passed"] and len(parity["tensors"]) > 200, len(parity["tensors"])
assert any("gradient" in line["tensor"] for line in parity["tensors"]) and not any(line["differs"] for line in parity["tensors"])
kernels = proof["kernels"]
assert {line["operation"].split()[0] for line in kernels} == {"self-attention", "cross-attention", "observed", "group", "GEGLU"}
# Without a card both are candle's.
assert not any(line["has_own"] or line["differs"] for line in kernels)
assert all(line[side]["error"] < 1e-6 and min(line[side]["both"]) > 0 for line in kernels for side in ("own", "candle")), kernels
assert proof["wires"]["passed"] and proof["wires"]["tests"] >= 4, proof["wires"]
for work in "tokens", "e-step", "lora", "sampling", "decode":
    ours = proof["steps"]["f32"][work]["ours"]
    assert len(ours["seconds"]) >= 2 and min(ours["seconds"]) > 0 and ours["peak_bytes"] > 1 << 20, (work, ours)
assert {name: 0 <= iou["last"] <= 1 for name, iou in proof["demo"]["mask_iou"].items()} == {"<bob>": True, "<tom>": True, "<desk>": True}
assert proof["demo"]["devices"][0]["kind"] == "cpu"
# What a processor cannot show is said.
assert "memory is the system's" in proof["not_run"]["ours, out-of-memory"], proof["not_run"]
print("prove.py works")
PYTHON
