"""Mixed load on a real server for minutes: aborts, retractions, forks, flushes; nothing may grow.

    python -m benchmarks.soak --model-path DIR --minutes 8 --csv out.csv -- --load-format dummy ...

What follows `--` are flags of the server. Clients ask for answers of random length to random
prompts, half of them forks of a common prefix, and a third go away before the end. Every quarter of
the time the load stops, both pools must be whole again, and the server compares the cluster pool
with its invariants (check_integrity) and flushes. An error, a dead server, a lost place or slot, or
a long answer without a sparse step that no full pool explains, ends the run with exit code 1; so
does a run without answers, aborts, retractions or evictions, which proved nothing. The rows are
written as they come: `kv_used` and `kv_tokens` are slots of the KV pool in use and in all, `free`
and `places` those of the cluster pool, `gpu_mib` and `host_mib` the memory of the server's
processes on the card and on the host.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from benchmarks.csv_file import write_rows
from benchmarks.versions import versions
from sglang_multipole.local_server import LocalServer

VOCABULARY = 30000
PHASES = 4
SAMPLE_SECONDS = 10.0
DRAIN_SECONDS = 60.0
CLUSTERINGS = ("segments_built", "segments_evicted", "open_builds", "early_builds")
JUDGED_TOKENS = 64  # a shorter answer can end before its clusters are built


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--max-prompt", type=int, default=7000, help="tokens")
    parser.add_argument("--max-answer", type=int, default=600, help="tokens")
    parser.add_argument(
        "--retract-interval", type=int, default=60, help="steps between retractions"
    )
    parser.add_argument("--multipole-config", default="{}")
    parser.add_argument("--name", default="default", help="of the server, in the rows")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--commit", default="", help="where there is no git repository")
    parser.add_argument("--seed", type=int, default=1)
    arguments, flags = parser.parse_known_args()
    config = {"min_context": 1024, "token_budget": 256} | json.loads(arguments.multipole_config)
    config["check_integrity"] = True
    flags = [flag for flag in flags if flag != "--"]
    flags += ["--enable-multipole", f"--multipole-config={json.dumps(config)}"]
    os.environ["SGLANG_TEST_RETRACT"] = "1"
    os.environ["SGLANG_TEST_RETRACT_INTERVAL"] = str(arguments.retract_interval)
    with tempfile.TemporaryDirectory() as folder:
        log = arguments.log or Path(folder) / "server.log"
        with LocalServer(arguments.model_path, flags, log) as server:
            soak = Soak(server, arguments, config["min_context"])
            for phase in range(PHASES):
                soak.load_until(60 * arguments.minutes * (phase + 1) / PHASES)
                soak.drain(phase)
                if soak.errors:
                    break
    seen = {**soak.counts, "segments_evicted": soak.samples[-1]["segments_evicted"]}
    soak.errors += [f"nothing of this was seen: {name}" for name in seen if not seen[name]]
    for error in soak.errors[:10]:
        sys.stderr.write(f"soak: {error}\n")
    print(json.dumps(seen))
    return 1 if soak.errors else 0


class Soak:
    """The load and what was seen of the server; errors are what must not happen."""

    def __init__(self, server: LocalServer, arguments: argparse.Namespace, min_context: int):
        self.server, self.arguments, self.min_context = server, arguments, min_context
        self.errors: list[str] = []
        names = ("finished", "aborted", "retractions", "tokens", "sparse", "flushes")
        self.counts = dict.fromkeys(names, 0)
        self.samples: list[dict[str, Any]] = []
        self._versions = versions(arguments.commit)
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._prefix = self._tokens(random.Random(arguments.seed), arguments.max_prompt // 2)
        self._kv_tokens = self._info()["max_total_num_tokens"]

    def load_until(self, seconds: float) -> None:
        """All clients ask until so many seconds after the start."""
        end = self._started + seconds
        clients = [
            threading.Thread(target=self._client, args=(index, end), daemon=True)
            for index in range(self.arguments.clients)
        ]
        for client in clients:
            client.start()
        while time.monotonic() < end and not self.errors:
            self._sample("load")
            time.sleep(min(SAMPLE_SECONDS, max(end - time.monotonic(), 0.1)))
        for client in clients:
            client.join(120)

    def drain(self, phase: int) -> None:
        """All requests are gone: places are whole, a flush (with its comparison) frees them all."""
        with contextlib.suppress(OSError, KeyError, ValueError):
            self._generate(random.Random(phase), [7, 8, 9], 4, False)  # its step frees the gone
            deadline = time.monotonic() + DRAIN_SECONDS
            while self._state()["pool"]["open"] or self._kv_used():
                if time.monotonic() > deadline:
                    self._fail(f"requests are gone and hold places or {self._kv_used()} KV slots")
                    break
                self._generate(random.Random(phase), [7, 8, 9], 4, False)
                time.sleep(0.5)
        self._sample("drained")
        try:
            request = urllib.request.Request(
                f"{self.server.base_url}/flush_cache?timeout=60", method="POST"
            )
            urllib.request.urlopen(request, timeout=120).close()
            self.counts["flushes"] += 1
        except OSError as error:
            self._fail(f"flush: {error!r}; {self.server.last_log_lines()}")
            return
        self._sample("flushed")
        pools = self.samples[-1]
        if pools["free"] != pools["places"] or pools["kv_used"]:
            self._fail(f"places or slots were lost: {pools}")

    def _client(self, index: int, end: float) -> None:
        generator = random.Random(f"{self.arguments.seed} {index} {end}")
        while time.monotonic() < end and not self.errors:
            length = generator.randrange(20, self.arguments.max_prompt)
            if generator.random() < 0.5:
                prompt = self._prefix[:length] + self._tokens(generator, 20)
            else:
                prompt = self._tokens(generator, length)
            num_tokens = generator.randrange(4, self.arguments.max_answer)
            is_aborted = generator.random() < 0.33
            try:
                self._generate(generator, prompt, num_tokens, is_aborted)
            except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
                self._fail(f"a request of {len(prompt)} tokens: {error!r}")

    def _generate(
        self, generator: random.Random, prompt: list[int], num_tokens: int, is_aborted: bool
    ) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=180)
        sampling = {"temperature": 0.8, "max_new_tokens": num_tokens, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
        connection.request(
            "POST", "/generate", json.dumps(body), {"Content-Type": "application/json"}
        )
        last_wanted = generator.randrange(num_tokens) if is_aborted else num_tokens
        answer, count = None, 0
        with contextlib.closing(connection):
            for line in connection.getresponse():
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                answer = json.loads(line.removeprefix(b"data: "))
                count += 1
                if count > last_wanted:
                    break
        if answer is None:
            raise ValueError("the stream ended before its first token")
        activity = answer["meta_info"]["multipole"]
        with self._lock:
            self.counts["aborted" if count > last_wanted else "finished"] += 1
            self.counts["retractions"] += answer["meta_info"]["num_retractions"]
            self.counts["tokens"] += count
            self.counts["sparse"] += activity["sparse_steps"]
        # mixed chunks can take all its decode steps into prefills, which count as neither
        is_dense = activity["dense_steps"] and not activity["sparse_steps"]
        is_long = num_tokens >= JUDGED_TOKENS and len(prompt) > self.min_context
        is_wrong = count <= last_wanted and is_long and is_dense
        if is_wrong and not self._state()["dense_steps"]["pool_full"]:
            self._fail(f"{len(prompt)} tokens and no sparse step: {activity}")

    def _sample(self, phase: str) -> None:
        try:
            state, kv_used = self._state(), self._kv_used()
        except (OSError, ValueError, KeyError) as error:
            self._fail(f"server_info: {error!r}; {self.server.last_log_lines()}")
            return
        pool = state["pool"]
        owned = sum(pool[name] for name in ("free", "sealed", "open", "ordered"))
        if owned != pool["places"]:
            self._fail(f"places were lost or have two owners: {pool}")
        self.samples.append(
            {
                "server": self.arguments.name,
                "seconds": round(time.monotonic() - self._started, 1),
                "phase": phase,
                "kv_tokens": self._kv_tokens,
                "kv_used": kv_used,
                **{k: pool[k] for k in ("places", "free", "sealed", "open", "ordered")},
                "gpu_mib": gpu_mib(),
                "host_mib": host_mib(),
                **{k: state["segments"][k] for k in CLUSTERINGS},
                **self.counts,
                **{k: state["totals"][k] for k in ("sparse_steps", "dense_steps")},
                "pool_full_steps": state["dense_steps"]["pool_full"],
                **self._versions,
            }
        )
        write_rows(self.arguments.csv, self.samples)

    def _info(self) -> dict[str, Any]:
        return json.loads(self.server.get("/server_info"))

    def _state(self) -> dict[str, Any]:
        return self._info()["internal_states"][0]["multipole"]

    def _kv_used(self) -> int:
        """KV slots that nothing could free at once, as the scheduler last told."""
        return json.loads(self.server.get("/v1/loads?include=core"))["loads"][0]["num_used_tokens"]

    def _fail(self, message: str) -> None:
        with self._lock:
            self.errors.append(message)

    @staticmethod
    def _tokens(generator: random.Random, count: int) -> list[int]:
        return [generator.randrange(100, VOCABULARY) for _ in range(count)]


def gpu_mib() -> int:
    """Memory of the server's processes on the GPU, MiB; 0 where the driver does not tell."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory"]
    command.append("--format=csv,noheader,nounits")
    try:
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return 0
    own = {str(process.pid) for process in psutil.Process().children(recursive=True)}
    used = dict(line.split(", ") for line in lines if line.count(", ") == 1)
    return sum(int(mib) for pid, mib in used.items() if pid in own and mib.isdigit())


def host_mib() -> int:
    """Resident memory of the server's processes, MiB; pages that they share count in each."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total >> 20


if __name__ == "__main__":
    sys.exit(main())
