.PHONY: lint format test bench

lint:
	ruff check .
	ruff format --check .
	mypy

format:
	ruff check --fix .
	ruff format .

test:
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q

# On a GPU.
bench:
	python scripts/bench_ops.py --out benchmarks/ops.json
	python scripts/bench_model.py --out benchmarks/model.json
