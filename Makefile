# Every target makes and fills .venv by itself; `make demo` and `make check test` are the two commands of the README.
PYTHON ?= python3
export HF_HUB_OFFLINE ?= 1
include environments.mk

.PHONY: help check docs test test-all test-floors test-newest test-anywhere test-hostile coverage mutants test-peft test-triton test-fla \
	test-deepspeed test-ray test-llamacpp test-engines demo demo-classification demo-orthogonal notebooks compare-classification compare-topics compare-sft golden \
	golden-llamacpp benchmarks benchmarks-quick gpu-report clean
.DEFAULT_GOAL := help

help:
	@echo "make check   lint, formatting, types        make demo                 fine-tune a small language model"
	@echo "make test    the tests, in minutes          make demo-classification  classify news with a small BERT"
	@echo "make test-all  every test that needs no other compiler or server: what CI runs"
	@echo "make docs    the documentation, a site in site/   make demo-orthogonal    the same with rotations"
	@echo "make test-floors    the tests with the lowest versions that pyproject.toml allows; make test-newest with the newest"
	@echo "make test-anywhere  the tests as other machines run them: instruction sets, threads, orders, two at once; 40 minutes"
	@echo "make test-hostile   thousands of damaged files of every kind, through every command"
	@echo "make test-peft   PEFT's own tests, for BONE"
	@echo "make test-triton the Triton kernels, interpreted on the CPU and compiled for GPUs"
	@echo "make test-fla    flash-linear-attention's RWKV-7 and RWKV-6, interpreted on the CPU"
	@echo "make test-deepspeed  ZeRO-2 and ZeRO-3, in two CPU processes"
	@echo "make test-ray    runs of a comparison as tasks of Ray"
	@echo "make test-llamacpp  LoRAs in GGUF, run by llama.cpp; make test-engines  adapters in vLLM, llama.cpp and mlx-lm"
	@echo "make notebooks   the three notebooks as scripts; figures in .cache/notebooks"
	@echo "make compare-classification   methods side by side on the news, 13 minutes; compare-topics on pairs of texts; compare-sft on a chat corpus, an hour"
	@echo "make coverage the lines of src that the tests run; half an hour"
	@echo "make mutants  lines of shards, variants, ops and files, changed one by one: which does no test notice? hours"
	@echo "make golden  rewrite the golden files with peft 0.18.1"
	@echo "make gpu-report   all that wants a GPU, in 8 minutes: a folder to send to us"
	@echo "make benchmarks   measure all methods, hours; make benchmarks-quick tries every benchmark at tiny sizes"

check: .venv/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright

# Strict: a link that leads nowhere, or a page that no menu names, fails. One page can be read from the disk: site/index.html.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "the documentation is in site/; read it by: $(BIN)/python -m http.server -d site (from the disk it has no search)"

# Two tiers, told apart by the marker `slow`: `make test` is the first, `make test-all` both. A test of the first may work for
# five seconds. What is marked `beside` needs packages that lie beside the environment.
test test-all test-floors test-newest coverage: export OMP_NUM_THREADS ?= 1
TESTS = -m pytest -n 2 --dist loadfile --durations=25 --most-seconds=5
BESIDE_PATH := $(CURDIR)/.venv/quant:$(CURDIR)/.venv/eval:$(CURDIR)/.venv/trackers:$(CURDIR)/.venv/build

test: .venv/.dev
	$(BIN)/python $(TESTS) -m "not slow"

test-all: .venv/.dev .venv/.quant .venv/.eval .venv/.trackers .venv/.build
	$(BIN)/python $(TESTS) -m "not beside"
	PYTHONPATH="$(BESIDE_PATH)" $(BIN)/python $(TESTS) -m beside

# The first tier with other versions of the hosts, each in an environment of its own.
test-floors: .venv/.floors
	.venv/floors/bin/python $(TESTS) -m "not slow"

test-newest: .venv/.newest
	.venv/newest/bin/python $(TESTS) -m "not slow"

# The first tier as other machines would run it.
test-anywhere: .venv/.randomly
	$(BIN)/python tests/anywhere.py

# Thousands of damaged files through every command; a fifth of them is part of the second tier.
test-hostile: .venv/.dev
	FLASHBONE_HOSTILE=$(or $(FLASHBONE_HOSTILE),0) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/hostile

# Which lines of src the tests run, in every process that they start. Beside the environment. The limits of starting
# times do not hold where lines are counted; the Triton kernels have tests of their own, test-triton.
coverage: export COVERAGE_PROCESS_START = $(CURDIR)/pyproject.toml
coverage: export COVERAGE_DATA = $(CURDIR)/.cache/coverage/data
coverage: .venv/.coverage .venv/.quant .venv/.eval .venv/.trackers .venv/.build
	rm -rf .cache/coverage && mkdir -p .cache/coverage
	PYTHONPATH="$(CURDIR)/.venv/coverage:$(CURDIR)/tests/coverage" $(BIN)/python -m pytest -n 2 --dist loadfile --timeout=900 -m "not beside" --ignore tests/packaging/test_startup.py
	PYTHONPATH="$(CURDIR)/.venv/coverage:$(CURDIR)/tests/coverage:$(BESIDE_PATH)" $(BIN)/python -m pytest -n 2 --dist loadfile --timeout=900 -m beside
	PYTHONPATH=.venv/coverage $(BIN)/python -m coverage combine --quiet
	PYTHONPATH=.venv/coverage $(BIN)/python -m coverage report

# Changes of shards, variants, ops and files that no test notices: tests/mutation/README.md. Hours; what has run is kept.
mutants: .venv/.mutants
	PYTHONPATH=.venv/mutants OMP_NUM_THREADS=1 $(BIN)/python tests/mutation/mutate.py shards variants ops
	PYTHONPATH=.venv/mutants OMP_NUM_THREADS=1 $(BIN)/python tests/mutation/mutate.py files --sample 0 --inside

# Threads that sleep while they wait: beside one busy program on two cores, spinning made a step 1.7 times as long.
demo demo-classification demo-orthogonal notebooks compare-classification compare-topics compare-sft: export OMP_WAIT_POLICY = PASSIVE

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

compare-topics: .venv/.demo .venv/.demo-classification
	$(BIN)/python -m examples.demo.prepare
	$(BIN)/python -m examples.classification.prepare
	$(BIN)/flashbone compare examples/compare/topics.yaml

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
test-peft: .venv/.peft-suite
	$(BIN)/python tests/peft_suite/prepare.py .cache/peft-suite
	cd .cache/peft-suite && PYTHONPATH="$(CURDIR)/.venv/peft-suite" OMP_NUM_THREADS=1 \
		"$(CURDIR)/$(BIN)/python" -m pytest -c /dev/null --rootdir . -n 2 -q -W ignore -k "(Bone or bone) and not (MHA and deterministic_in_train_mode)" suite \
		--deselect suite/test_config.py::TestPeftConfig::test_from_pretrained \
		--deselect suite/test_config.py::TestPeftConfig::test_save_pretrained_with_runtime_config

# The kernels are interpreted, then compiled for GPUs; neither needs a GPU.
WITH_TRITON := PYTHONPATH=.venv/triton TRITON_CACHE_DIR=.cache/triton OMP_NUM_THREADS=1

test-triton: .venv/.triton
	$(WITH_TRITON) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/triton_kernels/test_triton_results.py
	$(WITH_TRITON) $(BIN)/python -m pytest -n 2 tests/triton_kernels/test_triton_compiled.py

test-fla: .venv/.fla
	PYTHONPATH=.venv/fla:.venv/triton TRITON_CACHE_DIR=.cache/triton TRITON_INTERPRET=1 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n 2 tests/hosts/test_fla.py

# DeepSpeed compiles a library of its own once (80 s), for processes on one machine.
test-deepspeed: .venv/.deepspeed
	PYTHONPATH=.venv/deepspeed TORCH_EXTENSIONS_DIR="$(CURDIR)/.cache/torch_extensions" OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/distributed/test_distributed.py -k zero

test-ray: .venv/.ray
	PYTHONPATH=.venv/ray OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/compare/test_compare_runs.py -k "goes_on or ray"

test-llamacpp: .venv/.llamacpp
	$(BIN)/python -m examples.demo.prepare
	PYTHONPATH=.venv/llamacpp OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/llamacpp

# Each engine in an environment of its own, 4 GB in all; greedy answers on SmolLM2, those of transformers with the adapter.
test-engines: .venv/.llamacpp .venv/.mlx .venv/.vllm
	$(BIN)/python -m examples.demo.prepare
	ENGINES="$(CURDIR)/.venv" $(BIN)/python -m pytest tests/engines

golden-llamacpp: .venv/.llamacpp
	rm -rf .cache/golden-llamacpp
	$(BIN)/python tests/llamacpp/convert.py $(LLAMA_CPP) .cache/golden-llamacpp
	$(BIN)/python tests/llamacpp/write_golden.py .cache/golden-llamacpp

golden: .venv/.dev
	PYTHONPATH=.venv/peft-0.18.1 $(BIN)/python tests/golden/write_golden.py
	$(BIN)/python tests/rwkv/write_golden.py

# Not in parallel, whatever -j says: one measurement at a time.
BENCHMARKS := layer step memory decode forward mixed load merge train wkv

benchmarks: .venv/.dev .venv/.demo
	$(BIN)/python -m examples.demo.prepare
	set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks $$name; done
	$(BIN)/python -m benchmarks tables

benchmarks-quick: .venv/.dev
	set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks $$name --quick; done

# torch of .venv has no CUDA: GPU_PYTHON is that of an environment whose torch sees the card, with flashbone in it.
GPU_PYTHON ?= $(BIN)/python
gpu-report:
	PYTHONPATH=src $(GPU_PYTHON) -m benchmarks report --device cuda --out runs/gpu-report

clean:
	rm -rf .venv .cache dist site
