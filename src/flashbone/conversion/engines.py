"""The serving engines: which LoRAs each takes, which files it needs, and the command that starts it with an adapter.

Taken from their sources and documentation in November 2026; tests/engines runs vLLM, llama.cpp and mlx-lm.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flashbone.conversion import factors
from flashbone.errors import ConfigError, FormatError
from flashbone.files import gguf, mlx
from flashbone.files.beside import GENERATION, TEMPLATE, TOKENIZER_CONFIG, Beside
from flashbone.files.lora import Lora
from flashbone.files.sources import read_json

GGUF = "adapter.gguf"  # in a folder
_MODELFILE = """\
# FROM: {known}, {hint}
FROM {base}
ADAPTER ./{gguf}
"""
_PAGE = """\
# How to serve it with {title}

In this folder:

    {command}

Ask for it as {asked}.{hint}
"""


@dataclass(frozen=True)
class ServingEngine:
    """A serving engine.

    Attributes:
        name: as users write it.
        title: its name in text.
        formats: that it takes, the preferred first.
        start: the command, with {base}, {name}, {path} and {rank}.
        asked: how a request names the adapter.
        hint: what else users need to know.
        until: the versions that take adapters, where new ones do not.
        ranks: that it takes, in ascending order; empty: all.
        more: whether it takes ranks above the last, as they are.
        layers: pattern of the names of the layers that it adapts; empty: it refuses others itself.
        brings: files that an adapter may bring, and the option by which the engine takes each, with {folder}.
        one_file: whether it reads the chat template in the tokenizer's configuration alone.
        all_alike: whether a kind of layer must be adapted in every layer of the base or in none.
    """

    name: str
    title: str
    formats: tuple[str, ...]
    start: str
    asked: str
    hint: str = ""
    until: str = ""
    ranks: tuple[int, ...] = ()
    more: bool = False
    layers: str = ""
    brings: tuple[tuple[str, str], ...] = ()
    one_file: bool = False
    all_alike: bool = False

    def rank(self, rank: int) -> int | None:
        """The smallest rank that it takes and that is not below this rank; None: the rank is too large."""
        return next((r for r in self.ranks if r >= rank), rank if self.more or not self.ranks else None)

    def not_adapted(self, names: Iterable[str]) -> list[str]:
        """The layers among these that it cannot adapt, by their names."""
        return [name for name in names if self.layers and not re.fullmatch(self.layers, name)]

    def prepare(self, lora: Lora, where: Path) -> Lora:
        """The LoRA as the engine takes it, padded to an allowed rank; what it cannot take is refused.

        Raises:
            FormatError: it holds what the engine cannot serve; all is named.
        """
        own_format = {"gguf": gguf.tensor_names, "mlx": mlx.check}.get(self.formats[0])
        if own_format is not None:
            own_format(lora)  # refuses
            return lora
        problems = {
            "tensors that replace the base's": list(lora.replacements),
            "embedding tables": sorted(lora.embeddings),
            "layers that keep their weight as (in, out)": sorted(lora.conv1d),
            "layers that it does not adapt": self.not_adapted(set(lora.factors) - lora.embeddings - lora.conv1d),
            "layers that it would leave out, as others of their kind are not adapted": self._in_part(lora, where),
        }
        named = [f"{what}: {', '.join(sorted(names))}" for what, names in problems.items() if names]
        if named:
            raise FormatError(f"{where}: {self.title} cannot serve {'; '.join(named)}; merge it into the base instead")
        rank = self.rank(lora.rank)
        if rank is None:
            largest = f"rank {lora.rank} is more than the {self.ranks[-1]} of {self.title}"
            raise FormatError(f"{where}: {largest}; ask for a smaller rank, or merge it into the base instead")
        return factors.resized(lora, rank, None, where)

    def write_extras(self, lora: Lora, folder: Path, out: Path) -> str:
        """Write what else the engine needs into the folder that becomes `out`; returns the file's name."""
        command = self._start(lora, '"$PWD"' + f"/{GGUF}" * ("gguf" in self.formats), _name(out))
        command += self._options(folder, '"$PWD"')
        asked = self.asked.format(name=_name(out))
        text = _PAGE.format(title=self.title, command=command, asked=asked, hint=f" {self.hint}" if self.hint else "")
        (folder / "SERVE.md").write_text(text, encoding="utf-8")
        template, tokenizer = folder / TEMPLATE, folder / TOKENIZER_CONFIG
        if self.one_file and template.is_file() and tokenizer.is_file():
            both = read_json(tokenizer) | {"chat_template": template.read_text(encoding="utf-8")}
            tokenizer.write_text(json.dumps(both, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return "SERVE.md"

    def unread(self, brought: Beside) -> str:
        """What the engine does not read of the files that an adapter brings, and the remedy, for one line."""
        if GENERATION not in brought.files or any(name == GENERATION for name, _ in self.brings):
            return ""
        ends = read_json(brought.files[GENERATION]).get("eos_token_id")
        return (
            f"; {self.title} does not read the settings: send the stop tokens {ends} with each request" if ends else ""
        )

    def needs(self, lora: Lora) -> str:
        """What the base needs before the engine runs it as transformers does, for one line."""
        return ""

    def command(self, lora: Lora, out: Path) -> str:
        """The shell command that starts it with the adapter."""
        path = out.absolute()
        if "gguf" in self.formats and out.suffix != ".gguf":
            path = path / GGUF
        return self._start(lora, shlex.quote(str(path)), _name(out)) + self._options(
            out, shlex.quote(str(out.absolute()))
        )

    def _options(self, folder: Path, shown: str) -> str:
        """The options for what the adapter brought into a folder."""
        options = [option.format(folder=shown) for file, option in self.brings if (folder / file).is_file()]
        return "".join(f" {option}" for option in options)

    def _start(self, lora: Lora, path: str, name: str) -> str:
        base = shlex.quote(_folder(lora) or lora.base_model or "BASE")
        return self.start.format(base=base, name=name, path=path, rank=lora.rank)

    def _in_part(self, lora: Lora, where: Path) -> list[str]:
        """Layers of a kind that is not adapted in every layer of the base."""
        if not self.all_alike:
            return []
        layers = lora.base_config.get("num_hidden_layers")
        if not isinstance(layers, int):
            raise FormatError(f"{where}: how many layers the base has is not known; give the base model's folder")
        kinds: dict[str, list[str]] = defaultdict(list)
        for name in lora.factors:
            kinds[re.sub(r"\.\d+\.", ".*.", name)].append(name)
        return [name for kind, names in kinds.items() if "*" in kind and len(names) < layers for name in names]


class Mlx(ServingEngine):
    """Reads the base's rotary embedding where transformers wrote it up to version 4."""

    def needs(self, lora: Lora) -> str:
        rope = lora.base_config.get("rope_parameters")
        theta = rope.get("rope_theta") if isinstance(rope, dict) else None
        if theta is None or "rope_theta" in lora.base_config:
            return ""
        place = f"{_folder(lora) or lora.base_model}/config.json"
        return f'; mlx-lm needs a line "rope_theta": {theta}, in {place}, else it silently takes another value'


class Ollama(ServingEngine):
    """Starts from a Modelfile, which names base and adapter."""

    def write_extras(self, lora: Lora, folder: Path, out: Path) -> str:
        (folder / "Modelfile").write_text(self._modelfile(lora, GGUF), encoding="utf-8")
        return "Modelfile"

    def command(self, lora: Lora, out: Path) -> str:
        path, name = out.absolute(), _name(out)
        if out.suffix != ".gguf":
            return self._start(lora, shlex.quote(str(path / "Modelfile")), name)
        text, file = self._modelfile(lora, path.name), shlex.quote(str(path.with_name("Modelfile")))
        return f"printf %s {shlex.quote(text)} > {file} && ollama create {name} -f {file}"

    def _modelfile(self, lora: Lora, file: str) -> str:
        known = " ".join(lora.base_model.split()) if lora.base_model else "the model that it was trained on"
        return _MODELFILE.format(known=known, hint=self.hint, base=_folder(lora) or "./base.gguf", gguf=file)


ENGINES = {
    engine.name: engine
    for engine in (
        ServingEngine(
            "vllm",
            "vLLM",
            ("lora",),
            "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={path}",
            '`"model": "{name}"`',
            ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),  # what its max_lora_rank may be
            brings=(
                (TOKENIZER_CONFIG, "--tokenizer {folder}"),
                (TEMPLATE, f"--chat-template {{folder}}/{TEMPLATE}"),
                (GENERATION, "--generation-config {folder}"),
            ),
        ),
        ServingEngine(
            "llama.cpp",
            "llama.cpp",
            ("gguf",),
            "llama-server -m BASE.gguf --lora {path}",
            "usual, it is always on",
            "BASE.gguf is the base as convert_hf_to_gguf.py makes it, without --fuse-qkv, of any quantisation.",
            brings=((TEMPLATE, f"--jinja --chat-template-file {{folder}}/{TEMPLATE}"),),
        ),
        Ollama(
            "ollama",
            "Ollama",
            ("gguf",),
            "ollama create {name} -f {path}",
            "{name}",
            "as a GGUF file, as a folder of safetensors that Ollama converts, or as a model that it has."
            " Ollama from 0.34.1 on is reported to take no ADAPTER: merge instead.",
            until=" and up to version 0.34.0",
        ),
        ServingEngine(
            "sglang",
            "SGLang",
            ("lora",),
            "python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths {name}={path}",
            '`"lora_path": "{name}"` of /generate, or `"model": "BASE:{name}"`',
            brings=(
                (TOKENIZER_CONFIG, "--tokenizer-path {folder}"),
                (TEMPLATE, f"--chat-template {{folder}}/{TEMPLATE}"),
            ),
            layers=r".*\blayers\.\d+\.(.*\.)?([qkvo]|gate|up|down|qkv|gate_up)_proj|(.*\.)?lm_head",
        ),
        Mlx(
            "mlx",
            "mlx-lm",
            ("mlx",),
            "mlx_lm.server --model {base} --adapter-path {path}",
            "usual, it is always on",
        ),
        # It pads to multiples of 16 itself, but its kernels know only these sizes; larger ranks do without them.
        ServingEngine(
            "tgi",
            "TGI",
            ("lora",),
            "text-generation-launcher --model-id {base} --lora-adapters {name}={path}",
            '`"parameters": {{"adapter_id": "{name}"}}`',
            ranks=(8, 16, 32, 64, 128),
            brings=((TOKENIZER_CONFIG, f"--tokenizer-config-path {{folder}}/{TOKENIZER_CONFIG}"),),
            one_file=True,
            more=True,
            layers=r"model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj|lm_head",
            all_alike=True,
        ),
    )
}


def get(name: str) -> ServingEngine:
    """The engine of that name.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in ENGINES:
        raise ConfigError(f"engine: got {name!r}, wanted one of {', '.join(ENGINES)}")
    return ENGINES[name]


def _folder(lora: Lora) -> str | None:
    """The absolute path of the base, if it is a local folder."""
    is_here = lora.base_model and Path(lora.base_model).is_dir()
    return str(Path(str(lora.base_model)).absolute()) if is_here else None


def _name(out: Path) -> str:
    """What the adapter is called in requests: no engine's command line takes = , or a space in it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", out.absolute().name.removesuffix(".gguf")).strip("-.") or "adapter"
