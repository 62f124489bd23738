"""AsyncEngine: many coroutines, one engine; what ends one of them leaves the others as they are."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from gemma4_compile import AsyncEngine, Chunk, Engine, EngineConfig, RequestOutput, SamplingParams
from tests.runtime.demo_models import demo

PATIENCE = 300  # seconds until a test that waits for nothing fails
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def engine() -> Engine:
    models = demo("e")
    return Engine(models.served, EngineConfig(max_requests=8, max_batched_tokens=64, page_size=16), models.tokenizer)


@pytest.fixture
def served(engine: Engine) -> Iterator[AsyncEngine]:
    """One that a test has for itself; the next finds the engine idle."""
    found = AsyncEngine(engine)
    yield found
    found.close()
    while engine.has_work:
        engine.step()
    for pool in engine.runner.pages.pools.values():
        assert pool.free == pool.pages, f"{pool.in_use} pages of {pool.kind} have leaked"


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE))


def prompts(count: int) -> list[list[int]]:
    return demo("e").prompts(count, 60)


async def chunks_of(served: AsyncEngine, prompt: Any, params: SamplingParams = PARAMS) -> list[Chunk]:
    return [chunk async for chunk in served.stream(prompt, params)]


async def first_chunk(served: AsyncEngine, prompt: Any, got: "asyncio.Event", **given: Any) -> None:
    """Reads on and on; `got` is set once something came."""
    async for _ in served.stream(prompt, LONG, **given):
        got.set()


def test_streams_give_what_the_engine_gives(engine: Engine, served: AsyncEngine) -> None:
    async def all_at_once() -> list[list[Chunk]]:
        return await asyncio.gather(*(chunks_of(served, prompt) for prompt in prompts(8)))

    streams = run(all_at_once())
    served.close()
    for output, chunks in zip(engine.generate(prompts(8), PARAMS), streams, strict=True):
        last = chunks[-1].output
        assert last is not None and [chunk.output for chunk in chunks[:-1]] == [None] * 11
        assert (last.token_ids, last.text) == (output.token_ids, output.text)
        assert [token for chunk in chunks for token in chunk.token_ids] == output.token_ids
        assert "".join(chunk.text for chunk in chunks) == output.text


def test_a_reader_who_falls_behind_gets_fewer_chunks_of_the_same_tokens(engine: Engine, served: AsyncEngine) -> None:
    params = replace(PARAMS, n=2, seed=3, temperature=1.0, logprobs=1)

    async def late() -> list[Chunk]:
        found = []
        async for chunk in served.stream(prompts(1)[0], params):
            found.append(chunk)
            if len(found) == 1:
                while engine.has_work:
                    await asyncio.sleep(0.01)
        return found

    chunks = run(late())
    served.close()
    assert len(chunks) <= 4 and chunks[-1].output is not None
    for index, sample in enumerate(chunks[-1].output.samples):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert [token for chunk in mine for token in chunk.token_ids] == sample.token_ids
        assert "".join(chunk.text for chunk in mine) == sample.text
        assert [found for chunk in mine for found in chunk.logprobs or []] == sample.logprobs
        assert [chunk.finish_reason for chunk in mine][-1] == sample.finish_reason


def test_generate_and_metrics(engine: Engine, served: AsyncEngine) -> None:
    async def both() -> tuple[RequestOutput, int]:
        output = await served.generate("def f(x):", SamplingParams(max_tokens=4))
        return output, (await served.metrics()).requests

    before = engine.metrics.requests
    output, requests = run(both())
    assert len(output.token_ids) == 4 and output.text and requests == before + 1


def test_a_cancelled_task_gives_its_pages_back(engine: Engine, served: AsyncEngine) -> None:
    async def cancel_one() -> list[list[Chunk]]:
        got = asyncio.Event()
        task = asyncio.create_task(first_chunk(served, prompts(8)[3], got))
        await got.wait()
        others = [asyncio.create_task(chunks_of(served, prompt)) for prompt in prompts(8)[:3]]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await asyncio.gather(*others)

    streams = run(cancel_one())
    assert not engine.has_work, "the cancelled request is gone before it has its 400 tokens"
    assert all(pool.free == pool.pages for pool in engine.runner.pages.pools.values())
    served.close()
    wanted = engine.generate(prompts(8)[:3], PARAMS)
    assert [chunks[-1].output.token_ids for chunks in streams] == [output.token_ids for output in wanted]  # type: ignore


def test_a_loop_that_is_left_ends_its_request(engine: Engine, served: AsyncEngine) -> None:
    async def leave() -> None:
        async for _ in served.stream(prompts(2)[1], LONG):
            break
        while engine.has_work:
            await asyncio.sleep(0.01)

    before = engine.metrics.output_tokens
    run(leave())
    assert engine.metrics.output_tokens - before < LONG.max_tokens  # type: ignore[operator]


def test_a_bad_prompt_is_its_coroutines_own(served: AsyncEngine) -> None:
    async def all_at_once() -> list[Any]:
        asked = [served.generate(prompt, PARAMS) for prompt in ([5, 6], [], [2048], [5, 7], "text", [{"role": "user"}])]
        return await asyncio.gather(*asked, return_exceptions=True)

    good, none, outside, other, text, messages = run(all_at_once())
    for output in (good, other, text):
        assert len(output.token_ids) == 12
    for error in (none, outside, messages):
        assert isinstance(error, ValueError)
    assert "at least one token" in str(none) and "got 2048" in str(outside) and "chat template" in str(messages)


def test_an_id_in_use_leaves_its_owner_alone(served: AsyncEngine) -> None:
    async def twice() -> list[Chunk]:
        chunks: list[Chunk] = []
        async for chunk in served.stream([5, 6], PARAMS, request_id="mine"):
            chunks.append(chunk)
            if len(chunks) == 1:
                with pytest.raises(ValueError, match="a request_id must be new, got 'mine'"):
                    await served.stream([5, 7], PARAMS, request_id="mine").__anext__()
        return chunks

    assert len(run(twice())) == 12


def test_close_ends_streams(engine: Engine, served: AsyncEngine) -> None:
    async def close_amid() -> None:
        events = [asyncio.Event() for _ in range(3)]
        tasks = [asyncio.create_task(first_chunk(served, prompts(3)[i], event)) for i, event in enumerate(events)]
        for event in events:
            await event.wait()
        async with served:
            pass
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, RuntimeError) and "closed" in str(result)
        with pytest.raises(RuntimeError, match="the engine must run, got one that was closed"):
            await served.generate([5, 6])

    run(close_amid())
    assert not any(thread.name == "gemma4_compile engine" for thread in threading.enumerate())
    assert not engine.metrics.running and not engine.metrics.waiting
    served.close()


def test_a_fault_of_the_engine_reaches_all(engine: Engine, served: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    real, broken = engine.step, threading.Event()

    def step() -> list[Chunk]:
        if broken.is_set():
            raise KeyError("a fault")
        return real()

    async def break_amid() -> None:
        events = [asyncio.Event() for _ in range(3)]
        tasks = [asyncio.create_task(first_chunk(served, prompts(3)[i], event)) for i, event in enumerate(events)]
        for event in events:
            await event.wait()
        broken.set()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, KeyError) and "a fault" in str(result)
        with pytest.raises(RuntimeError, match="closed or has failed"):
            await served.generate([5, 6])

    monkeypatch.setattr(engine, "step", step)
    run(break_amid())
    served.close()
    monkeypatch.undo()


def test_a_fault_is_told_even_if_aborts_fail(
    engine: Engine, served: AsyncEngine, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError("a fault")

    async def wait() -> None:
        with pytest.raises(KeyError, match="a fault"):
            await served.generate([5, 6])

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", fail)
        patch.setattr(engine, "abort", fail)
        patch.setattr(threading, "excepthook", lambda _: None)
        run(wait())
        served.close()
    for request_id in list(engine.outputs.requests):
        engine.abort(request_id)


def test_two_event_loops(engine: Engine, served: AsyncEngine) -> None:
    outputs: dict[int, list[RequestOutput]] = {}

    async def several(number: int) -> None:
        mine = prompts(6)[number::2]
        outputs[number] = list(await asyncio.gather(*(served.generate(prompt, PARAMS) for prompt in mine)))

    threads = [threading.Thread(target=run, args=(several(number),)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    served.close()
    wanted = [output.token_ids for output in engine.generate(prompts(6), PARAMS)]
    assert [[output.token_ids for output in outputs[n]] for n in range(2)] == [wanted[0::2], wanted[1::2]]


def test_a_loop_that_was_closed_harms_nobody(served: AsyncEngine) -> None:
    loop = asyncio.new_event_loop()
    first = served.stream([5, 6], LONG)
    loop.run_until_complete(anext(first))
    loop.close()  # with a request that runs
    assert len(run(served.generate([5, 7], PARAMS)).token_ids) == 12
