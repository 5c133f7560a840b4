"""Many clients for long: does a server lose a request, keep a block, or grow?

Starts ``moeforge serve`` over a model folder and lets clients ask for texts of mixed lengths, streamed or not; one in
ten hangs up midway. ``python benchmarks/soak.py FOLDER --minutes 10 --clients 64`` writes ``soak.json``.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx


def resident(pid: int) -> int:
    """Bytes of a process's memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="ascii"))
    assert found
    return int(found[1]) * 1024


async def client(url: str, number: int, until: float, counts: Counter[str]) -> None:
    """Asks until the time is up; counts how each request ended."""
    draw = random.Random(number)
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        while time.monotonic() < until:
            tokens = int(2 ** draw.uniform(0, 7.5))
            prompt = "".join(draw.choice("def (x): return\n") for _ in range(int(2 ** draw.uniform(0, 8))))
            asked: dict[str, object] = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
            asked["stream"] = draw.random() < 0.7
            if asked["stream"]:
                asked["stream_options"] = {"include_usage": True}
            leaves = draw.random() < 0.1
            try:
                counts[await (leave if leaves else finish)(http, asked, draw)] += 1
            except httpx.HTTPError as error:
                counts[f"lost: {type(error).__name__}"] += 1


async def finish(http: httpx.AsyncClient, asked: dict[str, object], draw: random.Random) -> str:
    """Reads all of it; it must have as many tokens as were asked for."""
    answer = await http.post("/v1/completions", json=asked)
    if answer.status_code == 429:
        await asyncio.sleep(draw.uniform(0.5, 1.5))
        return "told to come back"
    if answer.status_code != 200:
        return f"lost: status {answer.status_code}"
    told = re.findall(r'"completion_tokens": ?(\d+)', answer.text)
    if asked["stream"] and not answer.text.endswith("data: [DONE]\n\n"):
        return "lost: cut short"
    return "answered" if told == [str(asked["max_tokens"])] else "lost: other tokens than asked for"


async def leave(http: httpx.AsyncClient, asked: dict[str, object], draw: random.Random) -> str:
    """Hangs up after a while, unless it is all there before."""
    try:
        async with asyncio.timeout(draw.uniform(0.01, 1.0)):
            return await finish(http, asked, draw)
    except TimeoutError:
        return "hung up"


def gauge(url: str, name: str) -> float:
    """One of /metrics."""
    found = re.search(rf"^moeforge_{name} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


async def run(url: str, pid: int, minutes: float, clients: int) -> dict[str, object]:
    """The soak, with the server's memory every five seconds."""
    counts, memory, until = Counter[str](), [resident(pid)], time.monotonic() + 60 * minutes
    asking = [asyncio.create_task(client(url, number, until, counts)) for number in range(clients)]
    while time.monotonic() < until:
        await asyncio.sleep(5)
        memory.append(resident(pid))
        print(f"{until - time.monotonic():6.0f} s left, {memory[-1] / 2**20:.0f} MiB, {dict(counts)}", flush=True)
    await asyncio.gather(*asking)
    for _ in range(100):
        if gauge(url, "running_requests") == 0:
            break
        await asyncio.sleep(0.1)
    left = {name: gauge(url, name) for name in ("running_requests", "waiting_requests", "kv_blocks_used")}
    middle = len(memory) // 2
    return {
        "clients": clients,
        "minutes": minutes,
        "requests": dict(counts),
        "lost": sum(count for kind, count in counts.items() if kind.startswith("lost")),
        "left_behind": left,
        "tokens_written": gauge(url, "tokens_written_total"),
        "preemptions": gauge(url, "preemptions_total"),
        "memory_mib": {
            "after 5 s": memory[1] // 2**20,
            "middle": memory[middle] // 2**20,
            "end": memory[-1] // 2**20,
            "most": max(memory) // 2**20,
        },
    }


def main() -> None:
    """Runs it and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    options = ["--max-waiting", "24", "--kv-memory", "0.01"]  # so few that requests are refused and pushed out
    command = [sys.executable, "-m", "moeforge", "serve", str(asked.folder), "--port", "0"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        url = ""
        while not url:
            found = re.search(r"http://\S+", server.stderr.readline())
            url = found[0] if found else ""
        log = asked.out.with_suffix(".log").open("w")
        drain = subprocess.Popen(["cat"], stdin=server.stderr, stdout=log)
        result = asyncio.run(run(url, server.pid, asked.minutes, asked.clients))
        server.terminate()
        result |= {"model": asked.folder.name, "options": options}
        result["exit_code"] = server.wait(timeout=60)
        drain.wait(timeout=10)
        log.close()
        asked.out.with_suffix(".log").unlink()
    asked.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
