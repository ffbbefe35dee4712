"""Packs the nodes with library and program as a wheel.

    cargo build --release --locked && python3 plugin/comfyui/build_wheel.py

Takes them from target/release, or from --built FOLDER, and writes dist/conceptloom-….whl, or into --out FOLDER. The
wheel is for this platform and every Python from 3.10 on.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile
import tomllib

HERE = pathlib.Path(__file__).parent
REPOSITORY = HERE.parent.parent

BINARIES = {
    "win32": ["conceptloom.dll", "host-demo.exe"],
    "darwin": ["libconceptloom.dylib", "host-demo"],
}.get(sys.platform, ["libconceptloom.so", "host-demo"])

PROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "conceptloom"
version = "{version}"
description = "Learns a token for every thing in a picture, and its mask: ComfyUI nodes, and a host of its own"
license = "{license}"
license-files = ["LICENSE-*"]
requires-python = ">=3.10"
readme = "README.md"

[project.scripts]
conceptloom = "conceptloom.command:main"

[tool.setuptools]
packages = ["conceptloom"]

[tool.setuptools.package-data]
conceptloom = ["bin/*", "example_workflows/*"]
"""

# What is in it is no Python, so it is for one platform and every Python.
SETUP = """\
from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel


class Binaries(Distribution):
    def has_ext_modules(self):
        return True


class Wheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(distclass=Binaries, cmdclass={"bdist_wheel": Wheel})
"""


def build(built, out):
    """Returns the wheel's path."""
    missing = [name for name in BINARIES if not (built / name).is_file()]
    if missing:
        sys.exit(f"error: {built} has no {' and no '.join(missing)}; run `cargo build --release --locked`")
    package = tomllib.loads((REPOSITORY / "Cargo.toml").read_text())["workspace"]["package"]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        source, wheels = folder / "source", folder / "wheels"
        shutil.copytree(
            HERE / "conceptloom", source / "conceptloom", ignore=shutil.ignore_patterns("__pycache__", "bin")
        )
        (source / "conceptloom" / "bin").mkdir()
        for name in BINARIES:
            shutil.copy(built / name, source / "conceptloom" / "bin" / name)
        for name in ["LICENSE-MIT", "LICENSE-APACHE"]:
            shutil.copy(REPOSITORY / name, source / name)
        shutil.copy(HERE / "README.md", source / "README.md")
        (source / "pyproject.toml").write_text(PROJECT.format(**package))
        (source / "setup.py").write_text(SETUP)
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--wheel-dir", wheels, source], check=True)
        [wheel] = wheels.iterdir()
        out.mkdir(parents=True, exist_ok=True)
        return pathlib.Path(shutil.copy(wheel, out / wheel.name))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--built", type=pathlib.Path, default=REPOSITORY / "target" / "release", metavar="FOLDER")
    parser.add_argument("--out", type=pathlib.Path, default=REPOSITORY / "dist", metavar="FOLDER")
    arguments = parser.parse_args()
    print(build(arguments.built, arguments.out))


main()
