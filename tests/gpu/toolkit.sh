# The parts of CUDA's toolkit that compile kernels, from PyPI: sourced. Sets `toolkit`, the folder that has bin/nvcc.
#
# Takes `here`, the folder of this file, and `prefix`, where the toolkit is or goes (0.3 GB).
mkdir -p "$prefix"
prefix=$(realpath "$prefix")
# nvcc finds its parts relative to itself.
toolkit=$prefix/nvidia/cu13
if [ ! -e "$prefix/toolkit.done" ]; then
    [ -x "$prefix/venv/bin/pip" ] || python3 -m venv "$prefix/venv"
    "$prefix/venv/bin/pip" download -q --no-deps --only-binary=:all: --require-hashes -d "$prefix/wheels" -r "$here/toolkit.txt"
    for wheel in "$prefix"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$prefix/wheels/unpacked"; done
    cp -r "$prefix/wheels/unpacked/nvidia" "$prefix/"
    chmod -R u+x "$toolkit/bin" "$toolkit/nvvm/bin"
    rm -rf "$prefix/wheels"
    touch "$prefix/toolkit.done"
fi
