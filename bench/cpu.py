"""How fast is one network step on this CPU, and in how much memory? Peers side by side, in rounds that alternate.

    python bench/cpu.py --quick                                  # small models, two rounds, minutes
    python bench/cpu.py --models sd15 sdxl                       # results in bench/results/cpu-MODEL.json
    python bench/cpu.py --models sdxl --peers openvino-fp32 openvino-int8 tfqc --latent 96 128

Every (peer, round) is a process of its own: big models do not fit into memory together, and peak memory is then that of
one peer. It loads, makes one step to warm up, times the next ones, and ends. Results are saved after each, and a rerun
goes on where the last one stopped; peers that failed are tried again. Ratios compare runs of the same round, and the
table shows their medians. Peak RSS includes what is mapped from files.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from cpu_models import ARCHITECTURES, Case
from cpu_peers import Peer, peers
from tabulate import tabulate

HERE = Path(__file__).parent
REFERENCE = "torch-fp32"  # its output is what the others' is compared with
BASES = ("openvino-fp32", REFERENCE, "openvino-int8")
QUICK_PEERS = ("torch-fp32", "torch-bf16", "openvino-fp32", "openvino-bf16", "openvino-int8", "tfqc")
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16")
LIBRARIES = ("torch", "diffusers", "openvino", "onnxruntime", "torchao")
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
SPARE_GIB = 1.0  # of a process, beside what grows with the weights


def main() -> None:
    """Run what is missing, then print a table for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--peers", nargs="+", help="first words of their names; all by default")
    parser.add_argument("--target", nargs="+", default=["cpu-int8"], help="targets of the tfqc peer")
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--latent", nargs="+", type=int, help="height and width; the model's own by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, help="timed steps of a process; by default as the model's size allows")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one process may take")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tfqc-bench-cpu")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--fresh", action="store_true", help="forget results of the chosen peers")
    parser.add_argument("--remake", action="store_true", help="prepare files of the chosen peers anew")
    parser.add_argument("--quick", action="store_true", help="small models, the peers that start fast, two rounds")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # what a process of a peer is told
    options = parser.parse_args()
    if options.job:
        print(json.dumps(work(**json.loads(options.job))))
        return
    if options.quick:
        options.models, options.rounds, options.repeats = ["fashion", "dit"], 2, 20
        options.peers = options.peers or QUICK_PEERS
    machine, versions = describe_machine(), describe_versions()
    print(f"{machine}; {options.threads} threads; {versions}", flush=True)
    for model in options.models:
        for latent in options.latent or [ARCHITECTURES[model].latent]:
            for batch in options.batch:
                case = Case(model, batch, latent, options.work)
                bench = Bench(case, options, {"machine": machine, "versions": versions})
                bench.run()
                print("\n" + bench.table() + "\n", flush=True)


class Bench:
    """The rows of one case, kept in a JSON file as they come."""

    def __init__(self, case: Case, options: argparse.Namespace, host: dict[str, str]) -> None:
        self.case = case
        self.options = options
        self.title = f"{case.model}, batch {case.batch}, {case.latent}×{case.latent} latent"
        self.out: Path = options.results / f"cpu-{case.model}.json"
        self.settings = {
            **host,
            "threads": options.threads,
            "repeats": options.repeats or case.architecture.repeats,
        }
        everyone = peers(options.target)
        self.peers = {n: p for n, p in everyone.items() if not options.peers or n.split()[0] in options.peers}
        self.order = list(everyone)
        self.rows = self._stored()
        for name, peer in self.peers.items():
            row = self.rows.setdefault(name, {"note": peer.note, "runs": []})
            row.pop("failed", None)
            if options.fresh:
                row["runs"] = []

    def run(self) -> None:
        """Prepare every peer, then time them in turn."""
        self._process(action="make")
        if self.options.remake:
            for peer in self.peers.values():
                remove(peer.prepared(self.case))
        for name, peer in self.peers.items():
            path = peer.prepared(self.case)
            if path is not None and not path.exists():
                self._record(name, "preparation", self._process(peer, name, action="prepare"))
        for round_ in range(self.options.rounds):
            for name, peer in self.peers.items():
                row = self.rows[name]
                if "failed" not in row and len(row["runs"]) <= round_:
                    self._record(name, f"round {round_ + 1}", self._process(peer, name, action="time"))

    def _process(self, peer: Peer | None = None, name: str = "", *, action: str) -> dict[str, Any]:
        """Run `work` in a process of its own; what it returns, or {"failed": why}."""
        if peer is not None:
            weights = peer.preparing if action == "prepare" else peer.memory
            needed, free = weights * self.case.weight_gib + SPARE_GIB, available_gib()
            if needed > free:
                return {"failed": f"{action}: needs about {needed:.0f} GiB of memory, {free:.0f} are free"}
        threads = self.options.threads
        job = {
            "action": action,
            "peer": name,
            "targets": self.options.target,
            "threads": threads,
            "repeats": self.settings["repeats"],
            "case": {**vars(self.case), "work": str(self.case.work)},
        }
        log = self.case.home / "log" / f"{action}-{name or 'model'}.txt".replace(" ", "-")
        log.parent.mkdir(parents=True, exist_ok=True)
        path = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("w") as stderr:
            try:
                done = subprocess.run(
                    [sys.executable, __file__, "--job", json.dumps(job)],
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                    timeout=self.options.timeout,
                    env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(path)},
                )
            except subprocess.TimeoutExpired:
                return {"failed": f"{action}: took more than {self.options.timeout:.0f} s"}
        if done.returncode:
            why = "killed, out of memory?" if done.returncode == -9 else f"exit code {done.returncode}"
            return {"failed": f"{action}: {why} ({log})"}
        return json.loads(done.stdout.splitlines()[-1])

    def _record(self, name: str, what: str, found: dict[str, Any]) -> None:
        row = self.rows[name]
        if "failed" in found:
            row["failed"] = found["failed"]
        elif "times_ms" in found:
            row["runs"].append(found)
        else:
            row["preparation"] = found
        if "failed" in found:
            told = f"failed: {found['failed']}"
        else:
            told = ", ".join(f"{key} {value:.3g}" for key, value in found.items() if isinstance(value, float))
        print(f"{self.title}: {name}, {what}: {told}", flush=True)
        self._save()

    def _key(self) -> str:
        return f"batch {self.case.batch}, latent {self.case.latent}"

    def _stored(self) -> dict[str, dict[str, Any]]:
        """Rows of the file, if they were measured with these settings."""
        cases = json.loads(self.out.read_text()) if self.out.exists() else {}
        found = cases.get(self._key())
        return found["peers"] if found and found["settings"] == self.settings else {}

    def _save(self) -> None:
        cases = json.loads(self.out.read_text()) if self.out.exists() else {}
        cases[self._key()] = {"settings": self.settings, "peers": self.rows}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        beside = self.out.with_suffix(".part")
        beside.write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n")
        os.replace(beside, self.out)

    def table(self) -> str:
        """The rows as GitHub markdown, with what it takes to read them."""
        head = ["peer", "median ms", "min", *(f"× {base}" for base in BASES), "peak RSS, GiB", "cosine", "load s"]
        names = sorted(self.rows, key=lambda n: self.order.index(n) if n in self.order else len(self.order))
        lines = [self._line(name) for name in names]
        text = f"{self.title}: speed-ups over each base, {self.settings['threads']} threads\n\n"
        text += tabulate(lines, head, tablefmt="github", disable_numparse=True)
        for name in names:
            row = self.rows[name]
            if row["note"]:
                text += f"\n- {name}: {row['note']}"
        shares = [run["cpu_share"] for row in self.rows.values() for run in row["runs"]]
        if shares and min(shares) < 0.9:
            text += f"\n- other processes ran: a peer had as little as {100 * min(shares):.0f}% of its threads' time"
        return text

    def _line(self, name: str) -> list[str]:
        row = self.rows[name]
        if not row["runs"]:
            return [name, row.get("failed", "not run"), *[""] * 7]
        times = [t for run in row["runs"] for t in run["times_ms"]]
        cosines = [run["cosine"] for run in row["runs"] if run["cosine"] is not None]
        return [
            name,
            f"{statistics.median(times):.4g}" + (f" (then failed: {row['failed']})" if "failed" in row else ""),
            f"{min(times):.4g}",
            *(self._speedup(name, base) for base in BASES),
            f"{max(run['peak_gib'] for run in row['runs']):.2f}",
            f"{min(cosines):.4f}" if cosines else "-",
            f"{statistics.median(run['load_seconds'] for run in row['runs']):.1f}",
        ]

    def _speedup(self, name: str, base: str) -> str:
        """Median over rounds of how many times faster than the base a peer was in the same round."""
        mine, others = self.rows[name]["runs"], self.rows.get(base, {"runs": []})["runs"]
        pairs = zip(mine, others, strict=False)
        ratios = [statistics.median(b["times_ms"]) / statistics.median(m["times_ms"]) for m, b in pairs]
        return f"{statistics.median(ratios):.2f}" if ratios else "-"


def work(
    action: str, peer: str, targets: list[str], threads: int, repeats: int, case: dict[str, Any]
) -> dict[str, Any]:
    """What a process of its own does; an error is what it returns, in one line."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory ends, it is this process that ends
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nor does it outlive the one that started it
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    what = Case(**{**case, "work": Path(case["work"])})
    try:
        began = time.perf_counter()
        if action == "make":
            what.make()
        elif action == "prepare":
            peers(targets)[peer].prepare(what)
        else:
            return measure(peers(targets)[peer], what, threads, repeats, reference=peer == REFERENCE)
        return {"seconds": time.perf_counter() - began, "peak_gib": memory_gib("VmHWM")}
    except Exception as error:
        import traceback

        traceback.print_exc()
        reason = str(error).strip().splitlines()
        return {"failed": f"{action}: {type(error).__name__}: {reason[0][:160] if reason else ''}"}


def measure(peer: Peer, case: Case, threads: int, repeats: int, reference: bool) -> dict[str, Any]:
    """Load, warm up, time. The cosine is between this output and that of torch in fp32, where that has run."""
    inputs = case.inputs()
    began = time.perf_counter()
    step = peer.load(case, threads)
    loaded = time.perf_counter()
    output = step(inputs).float().flatten()
    warm = time.perf_counter()
    if not output.isfinite().all():
        raise ArithmeticError("the output is not finite")
    if reference and not case.reference.exists():
        torch.save(output, case.reference)
    times: list[float] = []
    used, start = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        before = time.perf_counter()
        step(inputs)
        times.append(1e3 * (time.perf_counter() - before))
    share = (time.process_time() - used) / (time.perf_counter() - start) / threads
    cosine = None
    if case.reference.exists():
        cosine = float(torch.cosine_similarity(output.double(), torch.load(case.reference).double(), dim=0))
    return {
        "times_ms": [round(t, 3) for t in times],
        "median_ms": statistics.median(times),
        "load_seconds": loaded - began,
        "warmup_seconds": warm - loaded,
        "peak_gib": memory_gib("VmHWM"),
        "resident_gib": memory_gib("VmRSS"),
        "cpu_share": share,
        "cosine": cosine,
    }


def memory_gib(field: str) -> float:
    """A field of this process's memory. (ru_maxrss would begin with the size of the process that started this one.)"""
    return _field(Path("/proc/self/status"), field)


def available_gib() -> float:
    """Memory that could be had without swapping."""
    return _field(Path("/proc/meminfo"), "MemAvailable")


def _field(file: Path, name: str) -> float:
    line = next(line for line in file.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 2**20


def describe_machine() -> str:
    """Processor, the flags that decide which kernels run, cores and memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in fields.items()}
    flags = [flag for flag in FLAGS if flag in facts["flags"].split()]
    model = f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"
    total = _field(Path("/proc/meminfo"), "MemTotal")
    return f"{model}, {' '.join(flags)}, {os.cpu_count()} cores, {total:.0f} GiB"


def describe_versions() -> str:
    """Versions of the libraries that are installed."""
    found: list[str] = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def remove(path: Path | None) -> None:
    """Remove a file or a folder, if it is there."""
    if path is not None and path.is_dir():
        shutil.rmtree(path)
    elif path is not None:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
