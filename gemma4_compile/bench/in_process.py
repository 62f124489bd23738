"""A workload on an Engine in this process."""

import time
from collections.abc import Sequence

from gemma4_compile.runtime.engine import Engine
from gemma4_compile.runtime.sampling_params import SamplingParams

from .timings import Timing
from .workloads import Arrivals


def run(engine: Engine, prompts: Sequence[list[int]], wanted: int, arrivals: Arrivals, seed: int = 0) -> list[Timing]:
    """Each prompt to `wanted` new tokens, greedily. A failed request is a Timing with its error."""
    params = SamplingParams(max_tokens=wanted, ignore_eos=True)
    times = arrivals.times(len(prompts), seed)
    at_a_time = arrivals.concurrency or len(prompts)
    running: dict[str, Timing] = {}
    timings: list[Timing] = []
    start = time.perf_counter()
    while len(timings) < len(prompts) or running:
        while len(timings) < len(prompts) and len(running) < at_a_time:
            now = time.perf_counter() - start
            due = times[len(timings)]
            if due > now and running:
                break
            time.sleep(max(0.0, due - now))
            request = engine.add_request(prompts[len(timings)], params)
            # One that had to wait for its turn counts from then, one that came late to us from when it was due.
            timings.append(Timing(due if arrivals.concurrency is None else max(due, time.perf_counter() - start)))
            running[request] = timings[-1]
        chunks = engine.step()
        now = time.perf_counter() - start
        for chunk in chunks:
            timing = running[chunk.request_id]
            if chunk.token_ids:
                timing.chunks.append((now, len(chunk.token_ids)))
                timing.tokens += chunk.token_ids
            if chunk.output is not None:
                timing.error = chunk.output.error
                del running[chunk.request_id]
    return timings
