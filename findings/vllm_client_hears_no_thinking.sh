#!/usr/bin/env bash
# vLLM's benchmark client, and an SGLang server whose model thinks before it answers.
#
# Packages: vllm 0.24.0 and 0.33.0 (Apache-2.0), benchmarks/lib/endpoint_request_func.py; sglang 0.5.23 (Apache-2.0),
# srt/entrypoints/openai/sse_utils.py, which writes each chunk that its server streams.
# Guess: a client of OpenAI's chat interface times the first token and the time per token of either server alike.
# Seen: the client of 0.33.0 takes a chunk for a token where it has `content` or `reasoning`, as vLLM's own server says
# it; SGLang's says `reasoning_content`. 100 thoughts, then 50 words, one each 10 ms: it prints 1 s to the first token,
# which is the first word, and a third of the time per token, as the end's usage counts the thoughts, too. 0.24.0 took
# every chunk and was right. SGLang's own client takes both names.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for wheel in vllm==0.24.0 vllm==0.33.0 sglang==0.5.23; do
  python3 -m pip download -q --no-deps --only-binary :all: "$wheel" --python-version 3.12 -d "$folder" 2>/dev/null
done
python3 -m pip install -q --target "$folder/lib" aiohttp==3.14.1 msgspec==0.21.1 regex==2026.1.15 tqdm==4.67.1 2>/dev/null
PYTHONPATH="$folder/lib" python3 - "$folder" <<'PY'
import asyncio
import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import aiohttp
from aiohttp import web

FOLDER, THOUGHTS, WORDS, APART_S = Path(sys.argv[1]), 100, 50, 0.01


def released(wheel: str, name: str):
    """A module of a wheel by itself."""
    files = zipfile.ZipFile(next(FOLDER.glob(f"{wheel}*.whl")))
    path = FOLDER / f"{wheel.replace('-', '_').replace('.', '_')}.py"
    path.write_bytes(files.read(name))
    found = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


clients = {r: released(f"vllm-{r}", "vllm/benchmarks/lib/endpoint_request_func.py") for r in ("0.24.0", "0.33.0")}
sglang = released("sglang-0.5.23", "sglang/srt/entrypoints/openai/sse_utils.py")


def sglang_says(**delta: str) -> bytes:
    return sglang.build_sse_content("one", 0, "m", 0, **delta).encode()


def vllm_says(**delta: str) -> bytes:
    """As vLLM's server: the same, but for its name of thoughts (entrypoints/openai/chat_completion/protocol.py)."""
    if "reasoning_content" in delta:
        delta["reasoning"] = delta.pop("reasoning_content")
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n".encode()


def server(says) -> web.Application:
    async def answer(request: web.Request) -> web.StreamResponse:
        found = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await found.prepare(request)
        await asyncio.sleep(APART_S)
        await found.write(says(role="assistant", content=""))
        for kind, count in (("reasoning_content", THOUGHTS), ("content", WORDS)):
            for _ in range(count):
                await found.write(says(**{kind: "word "}))
                await asyncio.sleep(APART_S)
        usage = {"prompt_tokens": 10, "completion_tokens": THOUGHTS + WORDS}
        await found.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())
        return found

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    return app


async def times(says, client) -> tuple[float, float]:
    """To the first token, and per token as the client works it out (benchmarks/serve.py, calculate_metrics)."""
    runner = web.AppRunner(server(says))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    asked = client.RequestFuncInput(
        prompt="hello", api_url=f"http://127.0.0.1:{port}/v1/chat/completions", prompt_len=10,
        output_len=THOUGHTS + WORDS, model="m",
    )
    async with aiohttp.ClientSession() as session:
        found = await client.async_request_openai_chat_completions(asked, session)
    await runner.cleanup()
    assert found.success and found.output_tokens == THOUGHTS + WORDS, found.error
    return found.ttft, (found.latency - found.ttft) / (found.output_tokens - 1)


seen = {}
for server_name, says in (("vLLM's", vllm_says), ("SGLang 0.5.23's", sglang_says)):
    for release, client in clients.items():
        ttft, tpot = seen[server_name, release] = asyncio.run(times(says, client))
        print(f"client of vllm {release}, {server_name} stream: first token after {1e3 * ttft:.0f} ms, "
              f"{1e3 * tpot:.1f} ms per token")
(true_s, each), (deaf_s, less) = (seen["SGLang 0.5.23's", release] for release in ("0.24.0", "0.33.0"))
assert max(true_s, *(seen["vLLM's", release][0] for release in clients)) < 0.3, "another first token is late"
assert deaf_s > 0.9 * THOUGHTS * APART_S and less < 0.5 * each, "the client hears SGLang's thoughts"
PY
